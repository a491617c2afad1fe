"""Values that no number is, or that a narrower dtype cannot hold: converted, and counted by name, by every verb."""

import numpy as np
import pytest
from models import model_config, random_params
from verbs import convert

from polyglot_jax import checkpoint
from polyglot_jax.config import Config, TrainConfig

MODEL = model_config(embed=16, heads=2, mlp=24, context=64)
NAN = np.uint32(0x7FC1_2345).view(np.float32)  # with a payload
ODD = [np.inf, -np.inf, NAN, -NAN, -0.0, 1e-45, -1e-40, np.finfo(np.float32).tiny, 65504, -65504]
# To float16, 65519 is rounded down to the largest value, 65520 up to infinity.
LARGE = [65519, -65519, 65520, -65520, 1e5, 3e38]

NAMES = {
    "to orbax": ("layers/mlp/up/kernel, layer 1", "layers/mlp_norm/bias, layer 0", "layers/attention/q/bias, layer 0"),
    "orbax-to-hf": (
        "gpt_neox.layers.1.mlp.dense_h_to_4h.weight", "gpt_neox.layers.0.post_attention_layernorm.bias",
        "gpt_neox.layers.0.attention.query_key_value.bias",
    ),
    "orbax-to-neox": (
        "sequential.3.mlp.linear1.weight", "sequential.2.post_attention_layernorm.bias",
        "sequential.2.attention.query_key_value.bias",
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """The source of each verb; the weights are those of all."""
    folder = tmp_path_factory.mktemp("sources")
    params = random_params(MODEL, seed=0)
    params["layers"]["mlp"]["up"]["kernel"][1].flat[5 : 5 + len(ODD)] = ODD
    params["layers"]["mlp_norm"]["bias"][0, : len(LARGE)] = LARGE
    params["layers"]["attention"]["q"]["bias"][0, 1, 2] = np.finfo(np.float32).max  # rounded up in bfloat16 as well
    checkpoint.save(folder / "ours", Config(model=MODEL, train=TrainConfig(sequence_length=64)), params)
    assert convert("orbax-to-hf", folder / "ours", folder / "hf").status == 0
    assert convert("orbax-to-neox", folder / "ours", folder / "neox").status == 0
    return {
        "hf-to-orbax": folder / "hf", "neox-to-orbax": folder / "neox",
        "orbax-to-hf": folder / "ours", "orbax-to-neox": folder / "ours",
    }  # fmt: skip


@pytest.mark.parametrize("dtype, expected", [(None, (4, 0, 0)), ("bfloat16", (4, 0, 1)), ("float16", (4, 4, 1))])
@pytest.mark.parametrize("verb", ["hf-to-orbax", "neox-to-orbax", "orbax-to-hf", "orbax-to-neox"])
def test_they_are_counted_by_name(sources, tmp_path, verb, dtype, expected):
    options = [] if dtype is None else ["--dtype", dtype]
    done = convert(verb, sources[verb], tmp_path / "result", *options)
    names = NAMES.get(verb, NAMES["to orbax"])
    notes = {
        f"note: {name} has {count} infinite or NaN values" for name, count in zip(names, expected, strict=True) if count
    }
    assert {line for line in done.err if "config.json says" not in line} == notes
    assert done.status == 0
    assert convert("verify", sources[verb], tmp_path / "result").status == (dtype is not None)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_every_verb_narrows_alike(sources, tmp_path, dtype):
    """To the same bits, those of NaNs too."""
    for verb, source in sources.items():
        convert(verb, source, tmp_path / verb, "--dtype", dtype)
        assert convert("verify", tmp_path / verb, tmp_path / "hf-to-orbax").status == 0


@pytest.mark.parametrize("shard_bytes", [10**9, 10_000])
@pytest.mark.parametrize("where", ["head/kernel", "embed/kernel", "final_norm/bias"])
def test_the_last_value_of_a_tensor_counts(tmp_path, where, shard_bytes):
    """It may be the last of a file."""
    params = random_params(MODEL, seed=1)
    checkpoint.flatten(params)[where].flat[-1] = np.nan
    checkpoint.save(tmp_path / "a", Config(model=MODEL, train=TrainConfig(sequence_length=64)), params)
    (line,) = convert("orbax-to-hf", tmp_path / "a", tmp_path / "b", "--shard-bytes", str(shard_bytes)).err
    assert line.startswith("note: ") and line.endswith(" has 1 infinite or NaN values")
