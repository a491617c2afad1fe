"""The model computes what transformers' GPTNeoXForCausalLM computes: logits and every gradient, in float32.

And what all families share: sizes, paths, precisions, rematerialisation, the cache. (The others: test_families.py.)
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from allpairspy import AllPairs
from models import family_model, model_config, off_by, random_params, random_tensors, to_ours, to_theirs
from parity import (
    FAST,
    TOLERANCE,
    assert_same,
    check_parity,
    our_results,
    some_tokens,
    their_results,
    transformers_model,
)
from transformers import GPTNeoXConfig

from polyglot_jax import names, steps
from polyglot_jax.checkpoint import flatten, unflatten
from polyglot_jax.config import PRESETS
from polyglot_jax.hf_folder import HfFolder
from polyglot_jax.model import REMAT, Transformer, abstract_params, init_cache, split_layers
from polyglot_jax.names import FAMILIES
from polyglot_jax.steps import Batch
from polyglot_jax.weights import load_params

RESIDUALS = ("parallel", "sequential")
ROTARY = (0.25, 0.5, 1.0)
ACTIVATIONS = ("gelu", "gelu_new", "gelu_fast", "gelu_pytorch_tanh", "relu")
TIED = (False, True)
HEAD_DIMS = (16, 64, 128, 256)
FORMS = ("stacked", "split")

# head_dim -> (vocabulary, heads, MLP): no two sizes of a model are the same, nor the MLP four times the width.
SIZES = {16: (96, 5, 112), 64: (131, 3, 320), 128: (257, 2, 200), 256: (67, 1, 300)}

MODELS = list(itertools.product(RESIDUALS, ROTARY, ACTIVATIONS, TIED, HEAD_DIMS))
PAIRS = [tuple(case) for case in AllPairs([RESIDUALS, ROTARY, ACTIVATIONS, TIED, HEAD_DIMS, FORMS])]


def theirs(residual, rotary_pct, activation, tied, head_dim, **more):
    vocab, heads, mlp = SIZES[head_dim]
    return GPTNeoXConfig(
        vocab_size=vocab,
        num_hidden_layers=2,
        hidden_size=heads * head_dim,
        num_attention_heads=heads,
        intermediate_size=mlp,
        max_position_embeddings=32,
        rotary_pct=rotary_pct,
        use_parallel_residual=residual == "parallel",
        hidden_act=activation,
        tie_word_embeddings=tied,
        eos_token_id=1,
        **more,
    )


def seed_of(case):
    return len(PAIRS) + MODELS.index(case)


@pytest.mark.parametrize("case", PAIRS, ids=lambda case: "-".join(map(str, case)))
def test_logits_and_gradients_pairwise(case):
    check_parity(theirs(*case[:-1]), seed_of(case[:-1]), {case[-1]: True})


@pytest.mark.slow
@pytest.mark.parametrize("case", MODELS, ids=lambda case: "-".join(map(str, case)))
def test_logits_and_gradients(case):
    check_parity(theirs(*case), seed_of(case), {"stacked": True, "split": False})


@pytest.mark.parametrize("form", FORMS)
def test_without_biases_in_the_attention(form):
    config = theirs("parallel", 0.5, "gelu", False, 16, attention_bias=False)
    check_parity(config, seed=4, forms={form: True})


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("tied", TIED)
def test_through_a_folder(tmp_path, tied, split):
    model, config, _ = transformers_model(theirs("parallel", 0.5, "gelu", tied, 16), seed=1)
    model.save_pretrained(tmp_path)
    folder = HfFolder(tmp_path)
    assert folder.config == config
    tokens = some_tokens(config.model.vocab)
    params = load_params(folder, None, split=split)
    logits = jax.jit(Transformer(config.model).apply)({"params": params}, tokens[:, :-1])
    assert off_by(logits, their_results(model, tokens)[0]) <= TOLERANCE


def swap_q_and_k(config, tensors):
    params = to_ours(config, tensors)
    attention = params["layers"]["attention"]
    attention["q"], attention["k"] = attention["k"], attention["q"]
    return config, to_theirs(config, params)


def perturb(key):
    def perturbed(config, tensors):
        return config, tensors | {key: tensors[key] * np.float32(1.01)}

    return perturbed


def change(**fields):
    def changed(config, tensors):
        return model_config(**{name: getattr(config, name) for name in config.__dataclass_fields__} | fields), tensors

    return changed


FAULTS = {
    "q and k swapped": swap_q_and_k,
    "a bias off by a hundredth": perturb("gpt_neox.layers.1.attention.dense.bias"),
    "a norm off by a hundredth": perturb("gpt_neox.layers.0.post_attention_layernorm.weight"),
    "rotary_pct": change(rotary_pct=0.25),
    "rotary_base": change(rotary_base=5000.0),
    "residual": change(residual="sequential"),
    "activation": change(activation="gelu_new"),
    "norm_eps": change(norm_eps=1e-3),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_comparison_notices(fault):
    model, config, tensors = transformers_model(theirs("parallel", 0.5, "gelu", False, 64), seed=2)
    tokens = some_tokens(config.model.vocab)
    reference = their_results(model, tokens)
    faulty, tensors = FAULTS[fault](config.model, tensors)
    with pytest.raises(AssertionError):
        assert_same(our_results(faulty, tensors, tokens, "split"), reference)


@pytest.fixture(scope="module")
def small():
    """A model's config, its weights and a batch of 3 sequences of 12 predicted tokens, some with no weight."""
    config = model_config(vocab=128)
    tokens = some_tokens(config.vocab, batch=3).astype(np.int32)
    weights = np.ones((3, 12), np.float32)
    weights[0, 7:] = 0
    return config, random_params(config, seed=3), Batch(tokens, weights)


@pytest.fixture(scope="module")
def full_results(small):
    """Logits, loss and gradients of the small model in float32, under strict dtype promotion."""
    return results_of(small, Transformer(small[0]))


def results_of(small, model):
    _, params, batch = small

    def results(params, batch):
        logits = model.apply({"params": params}, batch.tokens[:, :-1])
        return logits, *steps.gradients(model, params, batch, 1)

    # Strict while our code runs, not while XLA's is made of it: there JAX itself promotes, in its products' precision.
    with jax.numpy_dtype_promotion("strict"):
        traced = jax.jit(results).trace(params, batch)
    return traced.lower().compile(FAST)(params, batch)


def test_float32_is_strict(full_results):
    logits, loss, grads = full_results
    assert logits.dtype == loss.dtype == jnp.float32
    assert {leaf.dtype for leaf in jax.tree.leaves(grads)} == {jnp.dtype(jnp.float32)}


@pytest.mark.parametrize(("param_dtype", "form"), [(jnp.float32, "stacked"), (jnp.bfloat16, "split")])
def test_bfloat16_is_strict_and_near_float32(small, full_results, param_dtype, form):
    config, params, batch = small
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf, param_dtype), params)
    params = split_layers(params) if form == "split" else params
    logits, loss, grads = results_of((config, params, batch), Transformer(config, jnp.bfloat16, param_dtype))
    assert logits.dtype == loss.dtype == jnp.float32
    assert {leaf.dtype for leaf in jax.tree.leaves(grads)} == {jnp.dtype(param_dtype)}
    # bfloat16 has 8 bits: rounding errs by at most 0.4 % at each of the dozen operations a value passes.
    assert 0 < off_by(logits, full_results[0]) < 0.05
    np.testing.assert_allclose(loss, full_results[1], rtol=0.01)


@pytest.mark.parametrize("remat", [*REMAT])
def test_remat_changes_no_gradient(small, full_results, remat):
    _, loss, grads = results_of(small, Transformer(small[0], remat=remat))
    np.testing.assert_allclose(loss, full_results[1], rtol=1e-6)
    errors = jax.tree.map(off_by, grads, full_results[2])
    # A bias of k moves all scores of a query alike, but for the rotary part, so its gradient is small and less exact.
    assert {name: error for name, error in flatten(errors).items() if error > 1e-5} == {}


def test_remat_recomputes(small):
    """The policies do what they say: the fewer values are kept, the more products the gradient computes."""
    config, params, batch = small

    def products(remat):
        model = Transformer(config, remat=remat)
        return str(jax.make_jaxpr(lambda p: steps.gradients(model, p, batch, 1))(params)).count("dot_general")

    assert products("none") < products("dots") < products("full")
    assert products("none") < products("products") < products("value") < products("mlp") < products("full")
    assert products("products") < products("attention") < products("full")


def test_accumulated_gradients_are_those_of_the_batch(small, full_results):
    config, params, batch = small
    model = Transformer(config)
    loss, grads = jax.jit(lambda p, b: steps.gradients(model, p, b, 3))(params, batch)
    np.testing.assert_allclose(loss, full_results[1], rtol=1e-6)
    errors = flatten(jax.tree.map(off_by, grads, full_results[2]))
    assert {name: error for name, error in errors.items() if error > 1e-5} == {}


CACHED = [
    *(model_config(vocab=128, residual=residual, tied=True) for residual in RESIDUALS),
    *(family_model(family, vocab=128) for family in ("gpt2", "gptj", "xglm")),
]


@pytest.mark.parametrize("config", CACHED, ids=lambda config: f"{config.positions}-{config.residual}")
def test_cached_decoding_equals_the_full_forward_pass(config):
    """Three prompts of different lengths, read together and continued token by token."""
    params = random_params(config, seed=4)
    model, split = Transformer(config), split_layers(params)
    tokens = some_tokens(config.vocab, batch=3, length=16)
    full = np.asarray(jax.jit(model.apply)({"params": params}, tokens))
    lengths, width, slots, rows = np.array([3, 7, 1]), 8, 20, np.arange(3)
    padded = np.where(np.arange(width) < lengths[:, None], tokens[:, :width], 99)

    cache = init_cache(config, 3, slots, jnp.float32)
    logits, cache = jax.jit(lambda *a: steps.prefill(model, *a))(split, padded, lengths, cache)
    assert off_by(logits, full[rows, lengths - 1]) <= 1e-5
    step = jax.jit(lambda *a: steps.decode_step(model, *a))
    for _ in range(16 - lengths.max()):
        logits, cache = step(split, tokens[rows, lengths], lengths, cache)
        assert off_by(logits, full[rows, lengths]) <= 1e-5
        lengths = lengths + 1


def test_a_cache_asks_for_split_layers(small):
    config, params, _ = small
    cache = init_cache(config, 1, 8, jnp.float32)
    zeros = jnp.zeros((1, 1), jnp.int32)
    with pytest.raises(ValueError, match="split_layers"):
        Transformer(config).apply({"params": params}, zeros, zeros, cache, method="features")


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("polyglot-ko-1.3b", 1_331_810_304),
        ("polyglot-ko-3.8b", 3_809_974_272),
        ("polyglot-ko-5.8b", 5_885_059_072),
        # The card says 12,898,631,680, which no vocabulary of this architecture gives.
        ("polyglot-ko-12.8b", 12_898_631_680 - 5_027_840),
        ("ko-gpt-trinity-1.2b", 1_162_556_160),
        ("kogpt-6b", 6_166_502_400),
        ("xglm-7.5b", 7_492_771_840),
    ],
)
def test_sizes_of_the_published_models(name, parameters):
    config = PRESETS[name].model
    assert sum(leaf.size for leaf in jax.tree.leaves(abstract_params(config))) == parameters
    assert config.parameters() == parameters


VARIANTS = [
    *itertools.product(FAMILIES, TIED, [{}]),
    *itertools.product(["gpt_neox"], TIED, [{"attention_bias": False}]),
]


def variant(family, tied, changes):
    return family_model(family, vocab=131, embed=48, heads=3, mlp=80, context=40, tied=tied, **changes)


@pytest.mark.parametrize("case", VARIANTS)
def test_formula_of_the_size(case):
    config = variant(*case)
    assert sum(leaf.size for leaf in jax.tree.leaves(abstract_params(config))) == config.parameters()


AXES = {
    "embed/kernel": ("vocab", "embed"),
    "layers/attention_norm/scale": ("layers", "embed"),
    "layers/attention_norm/bias": ("layers", "embed"),
    "layers/attention/q/kernel": ("layers", "embed", "heads", "head_dim"),
    "layers/attention/q/bias": ("layers", "heads", "head_dim"),
    "layers/attention/k/kernel": ("layers", "embed", "heads", "head_dim"),
    "layers/attention/k/bias": ("layers", "heads", "head_dim"),
    "layers/attention/v/kernel": ("layers", "embed", "heads", "head_dim"),
    "layers/attention/v/bias": ("layers", "heads", "head_dim"),
    "layers/attention/out/kernel": ("layers", "heads", "head_dim", "embed"),
    "layers/attention/out/bias": ("layers", "embed"),
    "layers/mlp_norm/scale": ("layers", "embed"),
    "layers/mlp_norm/bias": ("layers", "embed"),
    "layers/mlp/up/kernel": ("layers", "embed", "mlp"),
    "layers/mlp/up/bias": ("layers", "mlp"),
    "layers/mlp/down/kernel": ("layers", "mlp", "embed"),
    "layers/mlp/down/bias": ("layers", "embed"),
    "final_norm/scale": ("embed",),
    "final_norm/bias": ("embed",),
    "head/kernel": ("vocab", "embed"),
}
"""The public tree of parameters: its paths are in every checkpoint, so changing one breaks them all."""


BIASES = [f"layers/attention/{name}/bias" for name in ("q", "k", "v", "out")]
# family -> (what it lacks of AXES, what it has besides)
UNLIKE_NEOX = {
    "gpt_neox": ([], {}),
    "gpt2": ([], {"positions/kernel": ("context", "embed")}),
    "gptj": (["layers/mlp_norm/scale", "layers/mlp_norm/bias", *BIASES], {"head/bias": ("vocab",)}),
    "xglm": ([], {}),
}


@pytest.mark.parametrize("case", VARIANTS)
def test_paths_and_axes(case):
    family, tied, changes = case
    lacks, has = UNLIKE_NEOX[family]
    lacks = {*lacks, *(["head/kernel"] if tied else []), *(BIASES if changes else [])}
    expected = {name: axes for name, axes in AXES.items() if name not in lacks} | has
    config = variant(*case)
    assert flatten(Transformer(config).axes()) == expected
    shapes = {name: leaf.shape for name, leaf in flatten(abstract_params(config)).items()}
    assert shapes == {name: tuple(config.sizes[axis] for axis in axes) for name, axes in expected.items()}


@pytest.mark.parametrize("case", VARIANTS)
def test_tables_name_each_leaf_once(case):
    config = variant(*case)
    paths = [(path, tensor.layer) for tensor in names.tensors(config) for path in tensor.paths]
    assert len(set(paths)) == len(paths)
    params = random_params(config, seed=5)
    shapes = jax.tree.map(np.shape, params, is_leaf=lambda x: isinstance(x, np.ndarray))
    assert flatten(shapes) == {name: leaf.shape for name, leaf in flatten(abstract_params(config)).items()}
    back, tensors = to_theirs(config, params), random_tensors(config, seed=5)
    assert back.keys() == tensors.keys()
    for key, tensor in tensors.items():
        np.testing.assert_array_equal(back[key], tensor, err_msg=key)


@pytest.mark.parametrize("family", ["gpt_neox", "gpt2", "gptj"])
def test_init_fills_the_tree_as_the_config_says(family):
    config = family_model(family, init_std=0.1)
    params = flatten(jax.jit(Transformer(config).init)(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"])
    learned = ["positions"] if family == "gpt2" else []
    assert unflatten(params).keys() == {"embed", "layers", "final_norm", "head", *learned}
    for name, leaf in params.items():
        if name.endswith("bias"):
            assert not leaf.any(), name
        elif name.endswith("scale"):
            assert (leaf == 1).all(), name
        else:
            # Back into the residual: 0.1 / sqrt(2 layers).
            std = 0.05 if name in ("layers/attention/out/kernel", "layers/mlp/down/kernel") else 0.1
            assert abs(float(leaf.std()) / std - 1) < 0.05, name
    layers = params["layers/mlp/up/kernel"]
    assert not (layers[0] == layers[1]).any()
