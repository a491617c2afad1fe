"""`convert verify`: the same weights in any two formats, what differs by name, and what the logits say."""

import itertools
import json
import shutil

import numpy as np
import pytest
from models import model_config, random_params
from safetensors.numpy import load_file, save_file
from verbs import convert, without

from convert.hf import hf_to_orbax, orbax_to_hf
from convert.neox_export import orbax_to_neox
from polyglot_jax import checkpoint
from polyglot_jax.config import Config, TrainConfig

MODEL = model_config(embed=32, heads=2, mlp=48, context=64)
KINDS = ("checkpoint", "run", "hf", "neox")


def make(folder, params, model=MODEL):
    """The weights in each of KINDS."""
    config = Config(model=model, train=TrainConfig(sequence_length=64))
    checkpoint.save(folder / "run" / "checkpoints" / "3", config, params, step=3)
    orbax_to_hf(str(folder / "run"), folder / "hf")
    hf_to_orbax(str(folder / "hf"), folder / "checkpoint")
    orbax_to_neox(str(folder / "run"), folder / "neox", 2)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """ "same"; "other", in which one value is another; "half", rounded; "larger", with one layer more."""
    folder = tmp_path_factory.mktemp("models")
    params = random_params(MODEL, seed=0)
    make(folder / "same", params)
    params["layers"]["attention"]["out"]["bias"][1, 7] += 3
    make(folder / "other", params)
    half = {name: leaf.astype(np.float16) for name, leaf in checkpoint.flatten(random_params(MODEL, seed=0)).items()}
    make(folder / "half", checkpoint.unflatten(half))
    larger = model_config(embed=32, heads=2, mlp=48, context=64, layers=3)
    make(folder / "larger", random_params(larger, seed=0), larger)
    return folder


PAIRS = list(itertools.product(KINDS, KINDS))


@pytest.mark.parametrize("a, b", PAIRS)
def test_the_same_weights_in_any_two_formats(models, a, b):
    first, second = models / "same" / a, models / "same" / b
    done = convert("verify", first, second)
    assert (done.status, done.out, done.err) == (0, [f"{first} and {second} hold the same weights, bit for bit"], [])


@pytest.mark.parametrize("a, b", PAIRS)
def test_one_other_value_is_named(models, a, b):
    first, second = models / "same" / a, models / "other" / b
    done = convert("verify", first, second)
    (line,) = done.out
    assert line.startswith("layers/attention/out/bias, layer 1: 1 of 32 values differ, first [7]: ")
    ours, theirs = map(float, line.rsplit(": ", 1)[1].split(" and "))
    assert theirs == pytest.approx(ours + 3, abs=1e-5)
    assert done.error == f"error: {first} and {second} differ in 1 places"


@pytest.mark.parametrize("a, b", PAIRS)
def test_another_dtype_is_named(models, a, b):
    first, second = models / "same" / a, models / "half" / b
    done = convert("verify", first, second)
    (line,) = done.out
    assert line.endswith(f": float32 in {first}, float16 in {second}") and done.status == 1


@pytest.mark.parametrize("a, b", PAIRS)
def test_another_model_is_named(models, a, b):
    first, second = models / "same" / a, models / "larger" / b
    done = convert("verify", first, second)
    assert f"layers/mlp/up/kernel: (2, 32, 48) in {first}, (3, 32, 48) in {second}" in done.out
    assert len(done.out) == 16 and done.error.endswith("differ in 16 places")


@pytest.mark.parametrize("bit", [0, 15, 31])
@pytest.mark.parametrize("key, where", [
    ("gpt_neox.embed_in.weight", "embed/kernel"),
    ("gpt_neox.layers.1.attention.query_key_value.weight", "layers/attention/v/kernel, layer 1"),
])  # fmt: skip
def test_a_single_flipped_bit_is_named(models, tmp_path, key, where, bit):
    """Of the last value; in the fused tensor that is the last of v."""
    first, second = models / "same" / "checkpoint", shutil.copytree(models / "same" / "hf", tmp_path / "hf")
    tensors = load_file(second / "model.safetensors")
    tensors[key].view(np.uint32).reshape(-1)[-1] ^= np.uint32(1 << bit)
    save_file(tensors, second / "model.safetensors")
    for a, b in ((first, second), (second, first)):
        (line,) = convert("verify", a, b).out
        assert line.startswith(f"{where}: 1 of ")


def test_settings_are_no_weights(models, tmp_path):
    first, second = models / "same" / "checkpoint", shutil.copytree(models / "same" / "hf", tmp_path / "hf")
    config = json.loads((second / "config.json").read_text())
    (second / "config.json").write_text(json.dumps(config | {"initializer_range": 0.5}))
    assert convert("verify", first, second).status == 0


def logits(done):
    """The differences that --logits prints, position by position."""
    start = next(number for number, line in enumerate(done.out) if line.startswith("position"))
    rows = [line.split() for line in done.out[start + 1 :] if line.startswith(" ")]
    assert [int(position) for position, _ in rows] == list(range(len(rows)))
    return np.array([float(difference) for _, difference in rows])


@pytest.mark.parametrize("a, b", [pair.split() for pair in
    ("checkpoint run", "hf run", "run hf", "hf hf", "neox hf", "run neox", "neox neox")])  # fmt: skip
def test_logits(models, a, b):
    for_nine = ("--logits", "--tokens", "9")
    same = convert("verify", models / "same" / a, models / "same" / b, *for_nine)
    assert same.status == 0
    assert len(logits(same)) == 9 and logits(same).max() < 2e-5
    other = convert("verify", models / "same" / a, models / "other" / b, *for_nine)
    assert other.status == 1
    assert len(logits(other)) == 9 and logits(other).min() > 0.01


def test_logits_of_a_larger_model(models):
    done = convert("verify", models / "same" / "hf", models / "larger" / "run", "--logits")
    assert len(logits(done)) == 32 and logits(done).min() > 0.01 and done.status == 1


def test_logits_over_another_vocabulary(models, tmp_path):
    model = model_config(vocab=400, embed=32, heads=2, mlp=48, context=64)
    make(tmp_path, random_params(model, seed=0), model)
    first, second = tmp_path / "neox", models / "same" / "run"
    done = convert("verify", first, second, "--logits")
    assert done.error == f"error: {first} has 400 ids and {second} 512: their logits cannot be compared"


@pytest.mark.parametrize("count", ["0", "-1"])
def test_logits_of_no_tokens(models, count):
    done = convert("verify", models / "same" / "hf", models / "same" / "run", "--logits", "--tokens", count)
    assert done.error == f"error: --tokens {count}: must be above 0"


def test_logits_beyond_the_context(models):
    done = convert("verify", models / "same" / "hf", models / "same" / "run", "--logits", "--tokens", "100000")
    assert len(logits(done)) == MODEL.context and done.status == 0


def test_logits_without_transformers(models):
    done = without("transformers", "verify", models / "same" / "hf", models / "same" / "run", "--logits")
    assert done.error == "error: --logits runs transformers beside this: pip install torch transformers"
