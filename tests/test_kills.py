"""A conversion killed at any change it makes to the disk leaves nothing that looks complete, and loses nothing."""

import random
import shutil
from functools import partial
from pathlib import Path

import pytest
from kills import changes_of, convert, killed_at
from models import model_config, random_params, small_tokenizer

from polyglot_jax import checkpoint, store
from polyglot_jax.checkpoint import Checkpoint
from polyglot_jax.config import Config, InputError, TrainConfig
from polyglot_jax.weights import open_source

MODEL = model_config(embed=48, heads=3, mlp=80, context=64)


# Orbax writes times into these, and the manifest has their checksums.
TIMED = ("_CHECKPOINT_METADATA", "commit_success.txt", "manifest.json")


def contents(folder: Path) -> dict[str, bytes]:
    return {
        file.relative_to(folder).as_posix(): b"" if file.name in TIMED else file.read_bytes()
        for file in folder.rglob("*")
        if file.is_file() and file.name != ".unfinished"
    }


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """The sources of both directions, an earlier result of each, and what a whole conversion makes and does."""
    folder = tmp_path_factory.mktemp("models")
    config = Config(model=MODEL, train=TrainConfig(sequence_length=64))
    tokenizer = small_tokenizer().to_json()
    found = {}
    for seed in (0, 1):
        checkpoint.save(folder / f"saved{seed}", config, random_params(MODEL, seed), tokenizer=tokenizer)
        convert(folder / f"saved{seed}", folder / f"hf{seed}", overwrite=False)
        convert(folder / f"hf{seed}", folder / f"orbax{seed}", overwrite=False)
    for direction, source, result in (("to orbax", "hf", "orbax"), ("to hf", "orbax", "hf")):
        expected = contents(folder / f"{result}0")
        counts = {}
        for overwrite in (False, True):
            counted = folder / "counted"
            if overwrite:
                shutil.copytree(folder / f"{result}1", counted)
            counts[overwrite] = len(changes_of(partial(convert, folder / f"{source}0", counted, overwrite=overwrite)))
            assert contents(counted) == expected
            shutil.rmtree(counted)
        found[direction] = (folder / f"{source}0", folder / f"{result}1", expected, counts)
    return found


def loads(path: Path) -> bool:
    """Whether every weight there can be read."""
    try:
        source = open_source(path)
        for name, layer in store.pieces(source.params):
            source.read(name, layer)
    except InputError:
        return False
    return True


def check(models, tmp_path, direction, overwrite, moments):
    source, earlier, expected, _ = models[direction]
    before, killed = contents(source), 0
    for moment in moments:
        place = tmp_path / f"{moment}"
        place.mkdir()
        if overwrite:
            shutil.copytree(earlier, place / "result")
        killed += killed_at(moment, partial(convert, source, place / "result", overwrite=overwrite))
        assert contents(source) == before
        found = {path.name: contents(path) for path in place.iterdir() if path.is_dir()}
        if "result" in found:
            assert found["result"] in ([contents(earlier), expected] if overwrite else [expected]), moment
            assert loads(place / "result")
        elif overwrite:
            assert found["result.replaced"] == contents(earlier), moment
        # What is named so may be whole just before it is renamed, and just before an earlier result is deleted.
        if found.get("result.incomplete") not in (None, expected, contents(earlier)):
            assert not loads(place / "result.incomplete"), moment
        again = overwrite or "result" not in found
        if again:
            convert(source, place / "result", overwrite=overwrite)
        assert contents(place / "result") == expected
        # The lock file of the killed process stays where nothing was left to do; it locks nothing.
        assert {path.name for path in place.iterdir()} - {".result.lock"} == {"result"}, moment
    assert killed >= len(moments) - 1  # Orbax's threads do not always take the same number of changes


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("direction", ["to orbax", "to hf"])
def test_killed_at_some_moments(models, tmp_path, direction, overwrite):
    """At random, and just before the last change."""
    count = models[direction][3][overwrite]
    check(models, tmp_path, direction, overwrite, {*random.Random(7).sample(range(count), 3), count - 1})


@pytest.mark.slow
@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("direction", ["to orbax", "to hf"])
def test_killed_at_many_moments(models, tmp_path, direction, overwrite):
    count = models[direction][3][overwrite]
    check(models, tmp_path, direction, overwrite, {*random.Random(8).sample(range(count), min(count, 25)), count - 1})


def test_a_whole_conversion_is_read(models):
    """What the other tests take for loading does load."""
    source, earlier, _, _ = models["to orbax"]
    assert loads(source) and loads(earlier) and Checkpoint(earlier).tokenizer
