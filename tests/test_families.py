"""GPT-2, GPT-J and XGLM compute what transformers' models do, and the tables read what its configs and files say."""

import dataclasses
import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from models import family_model, off_by, random_params
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
from safetensors.numpy import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config, GPTJConfig, GPTNeoXConfig, XGLMConfig

import polyglot_jax.model
from convert.hf import hf_to_orbax, orbax_to_hf
from polyglot_jax import names, steps
from polyglot_jax.checkpoint import flatten
from polyglot_jax.config import Config, InputError, MeshConfig, SampleConfig, TrainConfig
from polyglot_jax.generate import Generator
from polyglot_jax.hf_folder import HfFolder
from polyglot_jax.model import Transformer, sinusoids, split_layers
from polyglot_jax.names import FAMILIES, config_from_theirs, config_to_theirs
from polyglot_jax.optimizer import decay_mask
from polyglot_jax.sharding import make_mesh, shardings
from polyglot_jax.steps import Batch
from polyglot_jax.weights import load_params

NEW = ("gpt2", "gptj", "xglm")
FORMS = ("stacked", "split")
ACTIVATIONS = ("gelu", "gelu_new", "gelu_fast", "gelu_pytorch_tanh", "relu")
TIED = (False, True)

CLASSES = {"gpt_neox": GPTNeoXConfig, "gpt2": GPT2Config, "gptj": GPTJConfig, "xglm": XGLMConfig}


def gpt2(activation="gelu_new", tied=True, head_dim=24, mlp=100):
    return GPT2Config(vocab_size=96, n_layer=2, n_embd=3 * head_dim, n_head=3, n_inner=mlp, n_positions=40,
                      activation_function=activation, tie_word_embeddings=tied, eos_token_id=2)  # fmt: skip


def gptj(activation="gelu_new", tied=False, rotary_dim=8, mlp=100, head_dim=24):
    return GPTJConfig(vocab_size=96, n_layer=2, n_embd=3 * head_dim, n_head=3, n_inner=mlp, n_positions=40,
                      rotary_dim=rotary_dim, activation_function=activation, tie_word_embeddings=tied,
                      eos_token_id=2)  # fmt: skip


def xglm(activation="gelu", tied=True, scaled=True, head_dim=18, pad=None):
    """With a padding id, transformers gives its embedding no gradient."""
    return XGLMConfig(vocab_size=96, num_layers=2, d_model=4 * head_dim, attention_heads=4, ffn_dim=100,
                      max_position_embeddings=40, activation_function=activation, tie_word_embeddings=tied,
                      scale_embedding=scaled, pad_token_id=pad)  # fmt: skip


def gpt_neox():
    return GPTNeoXConfig(vocab_size=96, num_hidden_layers=2, hidden_size=72, num_attention_heads=3,
                         intermediate_size=100, max_position_embeddings=40)  # fmt: skip


MAKE = {"gpt_neox": gpt_neox, "gpt2": gpt2, "gptj": gptj, "xglm": xglm}

MODELS = [
    *itertools.product(["gpt2"], ACTIVATIONS, TIED, (16, 24, 120), (None, 100)),
    *itertools.product(["gptj"], ACTIVATIONS, TIED, (2, 8, 24), (None, 100)),
    *itertools.product(["xglm"], ACTIVATIONS, TIED, TIED, (15, 18)),
]
# Of these, some with everything in them; in a head of 44 dimensions, int(44 * (30 / 44)) is 29.
SOME = [
    ("gpt2", "gelu_new", True, 120, None, "stacked"),
    ("gpt2", "relu", False, 24, 100, "split"),
    ("gptj", "gelu_new", False, 8, None, "split"),
    ("gptj", "gelu", True, 30, 100, 44, "stacked"),
    ("xglm", "gelu", True, True, 18, "stacked"),
    ("xglm", "gelu_fast", False, False, 15, "split"),
]


def name_of(case):
    return "-".join(map(str, case))


# The maths


@pytest.mark.parametrize("case", SOME, ids=name_of)
def test_logits_and_gradients_of_some(case):
    family, *arguments, form = case
    check_parity(MAKE[family](*arguments), SOME.index(case), {form: True})


@pytest.mark.slow
@pytest.mark.parametrize("case", MODELS, ids=name_of)
def test_logits_and_gradients(case):
    family, *arguments = case
    check_parity(MAKE[family](*arguments), MODELS.index(case), {"stacked": True, "split": False})


def test_sinusoids_are_those_of_transformers_far_out():
    table = AutoModelForCausalLM.from_config(XGLMConfig(vocab_size=8, num_layers=1, d_model=128, ffn_dim=8)).model
    positions = np.arange(2048)[None]
    theirs = table.embed_positions(torch.from_numpy(positions)).numpy()
    assert theirs.shape == (1, 2048, 128)
    # Neighbouring float32 are 1.2e-4 apart where the largest angles are, and exp may err in the last bit.
    assert np.abs(np.asarray(sinusoids(jnp.asarray(positions), 128)) - theirs).max() < 2e-4


def change(**fields):
    return lambda config, params: (dataclasses.replace(config, **fields), params)


def norms_of_their_own(config, params):
    """Two LayerNorms instead of one; with two alike, nothing would change."""
    norm = params["layers"]["attention_norm"]
    other = {"scale": np.ones_like(norm["scale"]), "bias": np.zeros_like(norm["bias"])}
    return dataclasses.replace(config, residual="parallel"), params | {"layers": params["layers"] | {"mlp_norm": other}}


def replace(path, values):
    def replaced(config, params):
        (part, leaf) = path.split("/")
        return config, params | {part: params[part] | {leaf: values(params[part][leaf])}}

    return replaced


FAULTS = {
    ("gpt2", "positions are off by one"): replace("positions/kernel", lambda table: np.roll(table, 1, axis=0)),
    ("gpt2", "no positions"): replace("positions/kernel", np.zeros_like),
    ("gpt2", "one norm for both"): change(residual="parallel_shared"),
    ("gpt2", "parallel"): change(residual="parallel"),
    ("gptj", "halves rather than pairs"): change(positions="rotary"),
    ("gptj", "two dimensions fewer turn"): change(rotary_pct=0.25),
    ("gptj", "a norm for each"): norms_of_their_own,
    ("gptj", "no bias in the head"): replace("head/bias", np.zeros_like),
    ("xglm", "no scale"): change(embedding_scale="one"),
    ("xglm", "parallel"): change(residual="parallel"),
}


@pytest.mark.parametrize("fault", FAULTS, ids=name_of)
def test_comparison_notices(fault):
    model, config, tensors = transformers_model(MAKE[fault[0]](), seed=2)
    tokens = some_tokens(config.model.vocab)
    with pytest.raises(AssertionError):
        assert_same(our_results(config.model, tensors, tokens, "split", jitted=False, fault=FAULTS[fault]),
                    their_results(model, tokens))  # fmt: skip


@pytest.mark.parametrize("rows", [-2, 1])
def test_comparison_notices_other_rows_of_sinusoids(rows, monkeypatch):
    model, config, tensors = transformers_model(xglm(), seed=2)
    tokens = some_tokens(config.model.vocab)
    monkeypatch.setattr(polyglot_jax.model, "sinusoids", lambda at, width: sinusoids(at + rows, width))
    with pytest.raises(AssertionError):
        assert_same(our_results(config.model, tensors, tokens, "split", jitted=False), their_results(model, tokens))


@pytest.mark.parametrize("param_dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("family", NEW)
def test_bfloat16_is_strict(family, param_dtype):
    config = family_model(family)
    model = Transformer(config, jnp.bfloat16, param_dtype)
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf, param_dtype), random_params(config, seed=7))
    batch = Batch(np.zeros((2, 9), np.int32), np.ones((2, 8), np.float32))
    with jax.numpy_dtype_promotion("strict"):
        logits = jax.eval_shape(model.apply, {"params": params}, batch.tokens)
        loss, grads = jax.eval_shape(lambda *a: steps.gradients(model, *a, 1), params, batch)
        hidden, _ = jax.eval_shape(lambda p, t: model.apply({"params": p}, t, method="features"), params, batch.tokens)
    assert (logits.dtype, loss.dtype, hidden.dtype) == (jnp.float32, jnp.float32, jnp.bfloat16)
    assert {leaf.dtype for leaf in jax.tree.leaves(grads)} == {jnp.dtype(param_dtype)}


@pytest.mark.parametrize("family", NEW)
def test_weight_decay_leaves_positions_alone(family):
    decayed = flatten(decay_mask(Transformer(family_model(family)).axes()))
    matrices = {"attention/q", "attention/k", "attention/v", "attention/out", "mlp/up", "mlp/down"}
    assert {name for name, is_decayed in decayed.items() if is_decayed} == {f"layers/{m}/kernel" for m in matrices}


@pytest.mark.parametrize("family", NEW)
def test_generation_is_that_of_transformers(family):
    """Prompts of different lengths, read together here, one by one there; each with its own cache."""
    theirs = xglm(pad=1) if family == "xglm" else MAKE[family]()
    model, config, _ = transformers_model(theirs, seed=3)
    params = split_layers(random_params(config.model, seed=3))
    prompts = [some_tokens(96, 1, length)[0].tolist() for length in (3, 11, 1, 8)]
    sample = SampleConfig(max_new_tokens=20)
    (made,) = Generator(Transformer(config.model), config).run(params, prompts, sample, [config.data.eos_id])
    for prompt, ours in zip(prompts, made, strict=True):
        ids = torch.tensor([prompt])
        continued = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=20, do_sample=False)
        assert ours == continued[0, len(prompt) :].tolist()


def test_loss_and_gradients_on_a_mesh_are_those_of_one_device():
    config = family_model("gpt2")
    model, params = Transformer(config), random_params(config, seed=4)
    batch = Batch(some_tokens(config.vocab, batch=4, length=17).astype(np.int32), np.ones((4, 16), np.float32))

    def results(params, batch):
        return steps.gradients(model, params, batch, 1)

    loss, grads = jax.jit(results, compiler_options=FAST)(params, batch)
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    with jax.set_mesh(mesh):
        spread = jax.device_put(params, shardings(mesh, model.axes(), model.config.sizes))
        spread_loss, spread_grads = jax.jit(results, compiler_options=FAST)(spread, batch)
    np.testing.assert_allclose(spread_loss, loss, rtol=1e-6)
    assert max(jax.tree.leaves(jax.tree.map(lambda a, b: off_by(a, b, 1.0), spread_grads, grads))) < 1e-5


# Folders


@pytest.mark.parametrize("tied", TIED)
@pytest.mark.parametrize("family", NEW)
def test_there_and_back(tmp_path, family, tied):
    """Old buffers in the file are dropped, and so is a tied head; what is written opens in transformers."""
    model, config, tensors = transformers_model(MAKE[family](tied=tied), seed=5)
    model.save_pretrained(tmp_path / "a")
    file = tmp_path / "a" / "model.safetensors"
    original = load_file(file)
    assert original.keys() == tensors.keys()
    buffers = {key.format(1): np.ones(3, np.float32) for key in names.family(family).DROPPED}
    if tied:
        buffers["lm_head.weight"] = original[names.family(family).WEIGHTS[0][1]].copy()
    save_file(original | buffers, file)
    assert HfFolder(tmp_path / "a").config == config
    params = load_params(HfFolder(tmp_path / "a"), None, split=True)
    tokens = some_tokens(96)
    logits = jax.jit(Transformer(config.model).apply)({"params": params}, tokens[:, :-1])
    assert off_by(logits, their_results(model, tokens)[0]) <= TOLERANCE
    hf_to_orbax(str(tmp_path / "a"), tmp_path / "b")
    orbax_to_hf(str(tmp_path / "b"), tmp_path / "c")
    back = load_file(tmp_path / "c" / "model.safetensors")
    assert {key: array.tobytes() for key, array in back.items()} == {
        key: array.tobytes() for key, array in original.items()
    }
    reopened, info = AutoModelForCausalLM.from_pretrained(tmp_path / "c", output_loading_info=True)
    assert not any(info.values()), info
    assert type(reopened) is type(model)


def test_tensors_come_one_by_one():
    """A config may claim any number of layers; the first missing tensor is found before the last is thought of."""
    for family in FAMILIES:
        keys = [tensor.key for tensor in itertools.islice(names.tensors(family_model(family, layers=10**9)), 40)]
        assert len(set(keys)) == 40


# What configs say


@pytest.mark.parametrize("family", FAMILIES)
def test_absent_settings_are_transformers_defaults(family):
    defaults = json.loads(json.dumps(CLASSES[family]().to_dict()))
    assert config_from_theirs(defaults) == config_from_theirs({"model_type": family})


WRITTEN = [
    *(MAKE[family](tied=tied) for family in NEW for tied in TIED),
    xglm(scaled=False, activation="relu"),
    gpt2(mlp=None),
    gptj(mlp=None, rotary_dim=24),
    GPTNeoXConfig(vocab_size=96, hidden_size=72, num_attention_heads=3, attention_bias=False, eos_token_id=5,
                  use_parallel_residual=False, initializer_range=0.01, layer_norm_eps=1e-6),
    GPT2Config(initializer_range=0.01, layer_norm_epsilon=1e-6, eos_token_id=[7]),
    XGLMConfig(init_std=0.01),
]  # fmt: skip


@pytest.mark.parametrize("theirs", WRITTEN, ids=lambda theirs: theirs.model_type)
def test_configs_survive_both_directions(theirs):
    config = config_from_theirs(json.loads(json.dumps(theirs.to_dict())))
    written = json.loads(json.dumps(config_to_theirs(config, "float32")))
    assert config_from_theirs(written) == config
    back, original = AutoConfig.for_model(**written).to_dict(), theirs.to_dict()
    not_ours = ("architectures", "dtype", "pad_token_id")
    if original.get("n_inner", 0) is None:
        original["n_inner"] = 4 * original["n_embd"]
    if isinstance(original["eos_token_id"], list):
        (original["eos_token_id"],) = original["eos_token_id"]
    assert {key: value for key, value in back.items() if key not in not_ours} == {
        key: value for key, value in original.items() if key not in not_ours
    }


def test_every_even_number_of_rotary_dimensions_survives():
    for head_dim in range(2, 97):
        for dims in range(2, head_dim + 1, 2):
            config = config_from_theirs({"model_type": "gptj", "n_embd": head_dim, "n_head": 1, "rotary_dim": dims})
            assert config.model.rotary_dims == dims
            assert config_to_theirs(config, "float32")["rotary_dim"] == dims


# What files on the hub say besides, mostly of older versions.
OLDER = {
    "_name_or_path": "x", "_num_labels": 1, "author": "x", "created_date": "2021-05-06", "license": "x",
    "gradient_checkpointing": False, "id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}, "num_labels": 1,
    "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}}, "torch_dtype": "float16",
    "transformers_version": "4.5.1", "tokenizer_class": "x", "use_cache": True, "output_past": True,
    "pruned_heads": {}, "is_decoder": True, "is_encoder_decoder": False, "decoder_start_token_id": 2,
    "architectures": ["x"], "bos_token_id": 0, "do_sample": False, "temperature": 1.0, "num_beams": 1,
}  # fmt: skip
OLDER_DROPOUTS = {
    "gpt_neox": {"attention_dropout": 0.1, "hidden_dropout": 0.1, "num_steps": "global_step320000"},
    "gpt2": {"n_ctx": 1024, "attn_pdrop": 0.1, "embd_pdrop": 0.1, "resid_pdrop": 0.1, "summary_activation": None,
             "summary_first_dropout": 0.1, "summary_type": "cls_index", "scale_attn_weights": True, "pad_token_id": 8},
    "gptj": {"n_ctx": 2048, "attn_pdrop": 0.0, "rotary": True, "scale_attn_weights": True, "pad_token_id": 3},
    "xglm": {"activation_dropout": 0, "attention_dropout": 0.1, "dropout": 0.1, "layerdrop": 0.0, "pad_token_id": 1},
}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_what_older_files_say_besides_is_known(family):
    plain = {"model_type": family}
    assert config_from_theirs(plain | OLDER | OLDER_DROPOUTS[family]) == config_from_theirs(plain)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_end_of_text_in_a_list(family):
    assert config_from_theirs({"model_type": family, "eos_token_id": [3]}).data.eos_id == 3
    for several in ([3, 4], [], None):
        with pytest.raises(InputError, match=r"^config\.json: eos_token_id=.*: generation stops at one id"):
            config_from_theirs({"model_type": family, "eos_token_id": several})


@pytest.mark.parametrize(
    ("family", "key", "value", "message"),
    [
        *((family, "is_causal", False, "is_causal=False: unknown setting") for family in FAMILIES),
        *((family, "quantization_config", {"bits": 8}, "quantization_config={'bits': 8}: unk") for family in FAMILIES),
        *((family, "add_cross_attention", True, "add_cross_attention=True: this model is") for family in FAMILIES),
        *((family, "is_encoder_decoder", True, "is_encoder_decoder=True: this model is") for family in FAMILIES),
        *((family, "pruned_heads", {"0": [1]}, "pruned_heads={'0': [1]}: this model is") for family in FAMILIES),
        *((family, "tie_word_embeddings", None, "model.tied=None: must be of type bool") for family in FAMILIES),
        ("gpt2", "scale_attn_weights", False, "scale_attn_weights=False: this model is implemented for True only"),
        ("gpt2", "scale_attn_by_inverse_layer_idx", True, "scale_attn_by_inverse_layer_idx=True: this model is"),
        ("gpt2", "reorder_and_upcast_attn", True, "reorder_and_upcast_attn=True: this model is"),
        ("gpt2", "activation_function", "silu", "model.activation='silu': must be one of "),
        ("gpt2", "n_inner", "3072", "model.mlp='3072': must be of type int"),
        ("gpt2", "n_embd", "768", "n_inner=None: depends on model.embed='768', which must be a whole number"),
        ("gpt2", "n_embd", 770, "model.heads=12: does not divide model.embed=770"),
        ("gptj", "rotary_dim", None, "rotary_dim=None: must be an even number, from 2 to the 256 dimensions of a head"),
        ("gptj", "rotary_dim", 63, "rotary_dim=63: must be an even number"),
        ("gptj", "rotary_dim", 0, "rotary_dim=0: must be an even number"),
        ("gptj", "rotary_dim", 258, "rotary_dim=258: must be an even number"),
        ("gptj", "rotary_dim", 64.0, "rotary_dim=64.0: must be an even number"),
        ("gptj", "rotary", False, "rotary=False: this model is implemented for True only"),
        ("gptj", "n_head", 0, "rotary_dim=64: depends on model.heads=0, which must be a whole number above 0"),
        ("xglm", "scale_embedding", "yes", "scale_embedding='yes': must be one of True, False"),
        ("xglm", "pad_token_id", 5, "pad_token_id=5: this model is implemented for 1, 0, None only"),
        ("xglm", "d_model", 15, "model.heads=16: does not divide model.embed=15"),
        ("xglm", "layer_norm_eps", 1e-6, "layer_norm_eps=1e-06: unknown setting"),
    ],
)
def test_settings_refused(family, key, value, message):
    with pytest.raises(InputError) as error:
        config_from_theirs({"model_type": family, key: value}, source="x/config.json")
    assert str(error.value).startswith(f"x/config.json: {message}")


@pytest.mark.parametrize("model_type", ["llama", None, ["gpt2"], 3])
def test_other_architectures_are_refused(model_type):
    with pytest.raises(InputError, match=r"not an architecture this project has; it has gpt_neox, gpt2, gptj, xglm$"):
        config_from_theirs({"model_type": model_type})


def test_a_padding_id_beyond_the_first_two_takes_a_position_from_transformers():
    """Why it is refused: the row of that number is zeros in their table of sinusoids."""
    tokens = torch.from_numpy(some_tokens(96))
    model, _, _ = transformers_model(xglm(pad=1), seed=6)
    other = AutoModelForCausalLM.from_config(xglm(pad=6), attn_implementation="eager").eval()
    other.load_state_dict(model.state_dict())
    with torch.no_grad():
        same = (model(tokens).logits - other(tokens).logits).abs().amax((0, 2)) < 1e-6
    assert same.tolist() == [True] * 4 + [False] * 9


# Which family a model is of


@pytest.mark.parametrize("family", FAMILIES)
def test_the_family_is_inferred(family):
    tables = names.family_of(family_model(family))
    assert tables is names.family(family)


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("gptj", {"residual": "sequential"},
         "model.residual='sequential': Hugging Face's gptj, the nearest to this model, needs "
         "model.residual='parallel_shared'"),
        ("gptj", {"attention_bias": True, "head_bias": False},
         "model.attention_bias=True, model.head_bias=False: Hugging Face's gptj, the nearest to this model, needs "
         "model.attention_bias=False, model.head_bias=True"),
        ("gptj", {"rotary_base": 5000.0}, "model.rotary_base=5000.0: Hugging Face's gptj, the nearest"),
        ("gpt_neox", {"residual": "parallel_shared"},
         "model.residual='parallel_shared': Hugging Face's gpt_neox, the nearest to this model, needs "
         "model.residual='parallel' or 'sequential'"),
        ("gpt2", {"embedding_scale": "sqrt_embed"}, "model.embedding_scale='sqrt_embed': Hugging Face's gpt2,"),
        ("gpt2", {"residual": "parallel"}, "model.residual='parallel': Hugging Face's gpt2,"),
        ("xglm", {"norm_eps": 1e-6}, "model.norm_eps=1e-06: Hugging Face's xglm,"),
    ],
)  # fmt: skip
def test_a_model_that_is_none_of_theirs_is_refused(family, changes, message):
    model = family_model(family, **changes)
    config = Config(model=model, train=TrainConfig(sequence_length=model.context))
    for ask in (lambda: config_to_theirs(config, "float32"), lambda: next(names.tensors(model)),
                lambda: names.is_dropped("lm_head.weight", model)):  # fmt: skip
        with pytest.raises(InputError) as error:
            ask()
        assert str(error.value).startswith(message)
