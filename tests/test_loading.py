"""Loading: what it says it needs, what it takes, what is then there; and the command that generates from it."""

import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import speakers
from conftest import ROOT
from models import model_config, off_by, random_params
from speakers import config_of

import polyglot_jax
from convert.hf import hf_to_orbax
from convert.meter import anonymous_bytes
from experiments.random_model import write_random_model
from polyglot_jax import checkpoint, language_model
from polyglot_jax import weights as weights_module
from polyglot_jax.__main__ import VERBS
from polyglot_jax.cli import run
from polyglot_jax.config import Config, InputError, MeshConfig, SampleConfig, TrainConfig
from polyglot_jax.hardware import free_memory
from polyglot_jax.model import Transformer
from polyglot_jax.sharding import make_mesh


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("speakers") / "pair"


@pytest.fixture(scope="module")
def pair(folder):
    return speakers.pair(folder)


def test_what_loading_needs_is_said_first(tmp_path, capsys, monkeypatch):
    model, path = model_config(), tmp_path / "checkpoint"
    checkpoint.save(path, config_of(model), random_params(model, seed=14))
    lm = polyglot_jax.load(path)
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(lm.params))
    cache = 2 * 2 * 128 * 64 * 4  # k and v of 2 layers, 128 positions of width 64 in float32
    said = capsys.readouterr().err.splitlines()[0]
    assert said.startswith(
        f"note: checkpoint: {weights / 1e6:.1f} MB of float32 weights and {cache / 1e6:.1f} MB for the cache"
    )
    assert said.endswith("are free")

    def fail(*_, **__):
        raise AssertionError("read before the room was looked at")

    monkeypatch.setattr(language_model, "load_params", fail)
    monkeypatch.setattr(weights_module, "free_memory", lambda devices: weights + cache - 1)
    with pytest.raises(
        InputError, match=r"but only 0\.6 MB are free; dtype='bfloat16' halves it; quantize='int8' takes .*; a mesh"
    ):
        polyglot_jax.load(path)
    monkeypatch.undo()
    monkeypatch.setattr(weights_module, "free_memory", lambda devices: weights + cache)
    polyglot_jax.load(path)
    monkeypatch.setattr(weights_module, "free_memory", lambda devices: (weights + cache) // 2)
    polyglot_jax.load(path, dtype="bfloat16")
    polyglot_jax.load(path, mesh=make_mesh(MeshConfig(data=1, fsdp=4, tensor=2)))


@pytest.mark.parametrize("path", [None, 5, b"x", "", "x" * 5000], ids=lambda path: repr(path)[:9])
def test_what_names_no_model(path):
    with pytest.raises(InputError, match=r"^path=.*: must name a run|^x{80}: File name too long"):
        polyglot_jax.load(path)


def test_a_mesh_that_does_not_divide(tmp_path, capsys):
    """The tensor axis has to; the axes that share out what they can say what they cannot."""
    model = model_config()
    checkpoint.save(tmp_path / "model", config_of(model), random_params(model, seed=14))
    devices = jax.devices()[:3]
    with pytest.raises(InputError, match=rf"^mesh\.tensor=3: does not divide model\.\w+={model.vocab}; 1, 2 or "):
        polyglot_jax.load(tmp_path / "model", mesh=make_mesh(MeshConfig(data=1, tensor=3), devices))
    lm = polyglot_jax.load(tmp_path / "model", mesh=make_mesh(MeshConfig(data=1, fsdp=3), devices))
    assert "(mesh.fsdp and mesh.sequence do not divide model.heads, model.vocab: " in capsys.readouterr().err
    assert lm.logits([[5, 6]]).shape == (1, 2, model.vocab)
    with pytest.raises(InputError, match=r"^mesh: its axes are \('x',\); they must be \('slices', 'data', "):
        polyglot_jax.load(tmp_path / "model", mesh=jax.make_mesh((8,), ("x",)))


def test_free_memory_is_what_the_system_says():
    one, all_ = free_memory(jax.devices()[:1]), free_memory(jax.devices())
    assert 10**8 < one < 2**50
    assert all_ == pytest.approx(one / 8, rel=0.2)


def test_the_object_says_what_it_is(pair):
    _, lm = pair
    for said in (repr(lm), lm._repr_html_()):
        for part in ("124,352", "2 x 64, 4 heads", "403 ids, in 512 rows", "float32", "one cpu", "0.5 MB"):
            assert part in said
    assert lm._repr_html_().count("<tr>") == 7


def test_a_model_without_a_tokenizer(tmp_path):
    model = model_config()
    checkpoint.save(tmp_path / "checkpoint", config_of(model), random_params(model, seed=12))
    for bad in ("int8", "int32", "float64", "bf16", "banana"):
        with pytest.raises(InputError, match=f"^dtype={bad}: must be float32, bfloat16 or float16; "):
            polyglot_jax.load(tmp_path / "checkpoint", dtype=bad)
    with pytest.raises(InputError, match=r"^mesh=.*sharding\.make_mesh"):
        polyglot_jax.load(tmp_path / "checkpoint", MeshConfig())
    lm = polyglot_jax.load(tmp_path / "checkpoint")
    assert lm.tokenizer is None
    assert "tokenizer: none" in repr(lm)
    assert np.isfinite(lm.logits([[1, 2, 3]])).all()
    for ask in (
        lambda: lm.generate("마을"),
        lambda: lm.generate([[5, 6]]),
        lambda: list(lm.stream("마을")),
        lambda: lm.score(["마을"], [" 사람"]),
    ):
        with pytest.raises(InputError, match=r"without a tokenizer\.json"):
            ask()


def test_bfloat16_and_the_split_tree(tmp_path):
    model = model_config()
    params = random_params(model, seed=15)
    checkpoint.save(tmp_path / "checkpoint", config_of(model), params)
    lm = polyglot_jax.load(tmp_path / "checkpoint", dtype="bfloat16")
    assert {leaf.dtype for leaf in jax.tree.leaves(lm.params)} == {jnp.dtype(jnp.bfloat16)}
    assert set(lm.params) == {"embed", "layer_0", "layer_1", "final_norm", "head"}
    tokens = np.arange(20)[None]
    full = Transformer(model).apply({"params": params}, tokens)
    assert 0 < off_by(lm.logits(tokens), full) < 0.05
    made = list(lm._generator.run(lm.params, [[5, 6, 7]], SampleConfig(max_new_tokens=8), []))[-1][0]
    assert len(made.ids) == 8


LOAD = """
import json, sys
import jax, polyglot_jax
from convert.meter import Meter, anonymous_bytes

polyglot_jax.load(sys.argv[1] + "/small")
before = anonymous_bytes()
with Meter() as meter:
    lm = polyglot_jax.load(sys.argv[1] + "/" + sys.argv[2])
print(json.dumps([sum(leaf.nbytes for leaf in jax.tree.leaves(lm.params)), meter.peak - before]))
"""


@pytest.mark.slow
@pytest.mark.skipif(anonymous_bytes() is None, reason="only Linux tells how much memory is no file's")
@pytest.mark.parametrize("kind", ["huggingface", "orbax"])
def test_loading_holds_the_weights_once(tmp_path, kind):
    """And a few pieces besides; 305 MB of float16 become 610 of float32, a layer of which is 13 MB."""
    for name, layers in (("small", 1), ("huggingface", 48)):
        model = model_config(vocab=8192, embed=512, heads=8, mlp=2048, context=64, layers=layers)
        write_random_model(tmp_path / name, Config(model=model, train=TrainConfig(sequence_length=64)))
    if kind == "orbax":
        hf_to_orbax(str(tmp_path / "huggingface"), str(tmp_path / "orbax"))
    done = subprocess.run([sys.executable, "-c", LOAD, tmp_path, kind], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    weights, taken = json.loads(done.stdout)
    assert weights > 600e6
    assert taken < weights + 150e6


def test_the_command_prints_samples_and_log_probabilities(pair, folder, capsys):
    _, lm = pair
    sample = {"max_new_tokens": 12, "temperature": 0.9, "min_p": 0.01, "seed": 5}
    flags = [part for name, value in sample.items() for part in (f"--sample.{name.replace('_', '-')}", str(value))]
    common = ["generate", "--checkpoint", str(folder), "--prompt", "마을", "봄이 오면"]
    prompts = ["마을", "봄이 오면"]
    assert run(VERBS, "prog", [*common, *flags]) == 0
    assert capsys.readouterr().out == "".join(
        prompt + text + "\n" for prompt, text in zip(prompts, lm.generate(prompts, **sample), strict=True)
    )
    assert run(VERBS, "prog", [*common, *flags, "--samples", "2", "--log-probabilities"]) == 0
    out = capsys.readouterr().out
    for prompt, row in zip(prompts, lm.complete(prompts, 2, **sample), strict=True):
        for number, completion in enumerate(row):
            total = sum(completion.log_probabilities)
            assert f"# sample {number}, seed 5, ended by length, log-probability {total:.3f} of 12 tokens" in out
            assert prompt + completion.text in out
            assert f"{completion.log_probabilities[-1]:9.3f}  {completion.ids[-1]:>6}  " in out
