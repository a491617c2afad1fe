"""int8 weights: what they compute, how much room they take, and what they cost in perplexity."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import KOREAN, family_model, model_config, off_by, random_params
from runs import SENTENCES, make_config, text_corpus

import polyglot_jax
from polyglot_jax import checkpoint
from polyglot_jax.checkpoint import flatten
from polyglot_jax.config import Config, InputError, MeshConfig, TrainConfig
from polyglot_jax.model import Transformer
from polyglot_jax.quantise import SCALE, quantised
from polyglot_jax.sharding import make_mesh
from polyglot_jax.train import train


@pytest.mark.parametrize("inputs", [(0,), (1,), (0, 1)])
def test_weights_are_off_by_at_most_half_a_step(inputs):
    values = np.random.default_rng(0).standard_normal((24, 6, 10), np.float32)
    values[:, 2, 3] = values[2, :, 3] = 0
    whole, scale = quantised(values.copy(), inputs)
    assert whole.dtype == np.int8
    assert np.abs(whole).max() == 127
    scale = np.expand_dims(scale, inputs)
    np.testing.assert_allclose(scale, np.abs(values).max(inputs, keepdims=True) / 127, rtol=1e-6)
    assert (np.abs(whole * scale - values) <= scale * 0.5001).all()


def saved(path, model, seed=3):
    config = Config(model=model, train=TrainConfig(sequence_length=model.context))
    checkpoint.save(path, config, random_params(model, seed))
    return path


@pytest.mark.parametrize(
    "family",
    ["gpt_neox", *(pytest.param(name, marks=pytest.mark.slow) for name in ("gpt2", "gptj", "xglm"))],
)
def test_logits_are_those_of_the_rounded_weights(tmp_path, family):
    """Of every family: tied or not, with every kind of position; read by scaling the weights instead of the outputs."""
    model = family_model(family)
    lm = polyglot_jax.load(saved(tmp_path / "checkpoint", model), quantize="int8")
    leaves = flatten(lm.params)
    whole = {
        name: leaf * _wide(leaves[name + SCALE], name) if name + SCALE in leaves else leaf
        for name, leaf in leaves.items()
        if not name.endswith(SCALE)
    }
    assert sum(name.endswith(SCALE) for name in leaves) == 6 * 2 + 1 + (not model.tied)
    tokens = np.random.default_rng(1).integers(0, 512, (2, 30))
    expected = Transformer(model).apply({"params": checkpoint.unflatten(whole)}, tokens)
    assert off_by(lm.logits(tokens), expected) < 1e-5
    plain = polyglot_jax.load(tmp_path / "checkpoint").logits(tokens)
    assert 1e-4 < off_by(lm.logits(tokens), plain) < 0.05
    assert "weights in int8" in repr(lm)


def _wide(scale, name):
    """The scales as they are multiplied with the weights."""
    return scale[:, None] if name in ("embed/kernel", "head/kernel") else scale


def test_a_mesh_holds_the_same(tmp_path):
    path = saved(tmp_path / "checkpoint", model_config())
    one = polyglot_jax.load(path, quantize="int8")
    eight = polyglot_jax.load(path, quantize="int8", mesh=make_mesh(MeshConfig(data=2, fsdp=2, tensor=2)))
    up = eight.params["layer_0"]["mlp"]["up"]
    assert up["kernel"].sharding.shard_shape((64, 96)) == (32, 48)
    for name, leaf in flatten(one.params).items():
        np.testing.assert_array_equal(flatten(eight.params)[name], leaf)
    tokens = np.arange(20)[None]
    assert off_by(eight.logits(tokens), one.logits(tokens)) < 1e-5


def test_what_is_said_to_be_needed_is_what_it_takes(tmp_path, capsys):
    path = saved(tmp_path / "checkpoint", model_config(embed=128, mlp=512))
    for mesh in (None, make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))):
        lm = polyglot_jax.load(path, mesh=mesh, dtype="bfloat16", quantize="int8")
        first = jax.devices()[0]
        taken = sum(shard.data.nbytes for leaf in jax.tree.leaves(lm.params) for shard in leaf.addressable_shards
                    if shard.device == first)  # fmt: skip
        assert f"checkpoint: {taken / 1e6:.1f} MB of int8 weights" in capsys.readouterr().err


def test_other_kinds_are_refused(tmp_path):
    with pytest.raises(InputError, match="quantize='int4': there is int8, or None"):
        polyglot_jax.load(tmp_path, quantize="int4")


@pytest.mark.slow
def test_a_trained_model_keeps_its_perplexity_in_half_the_room(tmp_path):
    """The demo's size: 4 layers of 128; against bfloat16, on sentences made as those it was trained on."""
    corpus, _ = text_corpus(tmp_path / "corpus")
    shape = {"layers": 4, "embed": 128, "mlp": 512, "context": 64, "tied": True}
    changes = {f"model__{name}": value for name, value in shape.items()}
    run = tmp_path / "run"
    train(make_config(corpus, train__steps=80, train__sequence_length=32, **changes), run)
    half, byte = (polyglot_jax.load(run, dtype="bfloat16", quantize=kind) for kind in (None, "int8"))
    sizes = [sum(leaf.nbytes for leaf in jax.tree.leaves(lm.params)) for lm in (half, byte)]
    assert sizes[1] <= 0.55 * sizes[0]
    assert byte.params["layer_0"]["attention"]["q"]["kernel"].dtype == jnp.int8
    texts = [" ".join(SENTENCES[i::7][:2]) for i in range(7)]
    count = sum(len(half.tokenizer.encode(text)) for text in texts)
    before, after = (-lm.score([""] * 7, texts).log_probabilities.sum() / count for lm in (half, byte))
    assert before < 2.5  # it has learnt: a uniform guess is 5.9
    assert abs(np.expm1(after - before)) < 0.01
    assert byte.generate(KOREAN[:1], max_new_tokens=8)[0]
