"""The converters' command lines: where they read and write, what they leave alone, and how they say what is wrong."""

import os
import shutil
import threading
import unicodedata
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from disks import remount, small_disk, state
from formats import FORMATS
from verbs import CONVERSIONS, convert

from convert.hf import hf_to_orbax, orbax_to_hf
from convert.verify import differences
from polyglot_jax import checkpoint, hf_folder
from polyglot_jax.config import InputError
from polyglot_jax.weights import open_source


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    """A folder of each format."""
    folder = tmp_path_factory.mktemp("originals")
    for name, format in FORMATS.items():
        format.make(folder / name)
    return folder


@pytest.fixture
def source_of(originals, tmp_path):
    """(verb, place, if not tmp_path/source) -> a source for it there."""

    def copy(verb: str, place: Path = tmp_path / "source") -> Path:
        return shutil.copytree(originals / CONVERSIONS[verb].source, place)

    return copy


# --- Names ---

NAMES = ("봄 여름", unicodedata.normalize("NFD", "가을 모델"), "a%41b#1?x=[y]*{z}", "-o 'k' \"q\"", "~", "x\ny")


@pytest.mark.parametrize("verb", CONVERSIONS)
def test_any_name_will_do(verb, source_of, tmp_path):
    plain = source_of(verb)
    assert convert(verb, plain, tmp_path / "expected").status == 0
    for name in NAMES:
        (tmp_path / name).mkdir()
        source, result = source_of(verb, tmp_path / name / "모델 하나"), tmp_path / name / "결과 둘"
        assert convert(verb, source, result).status == 0
        assert convert("verify", source, result).status == 0
        assert convert("verify", result, tmp_path / "expected").status == 0
        assert sorted(item.name for item in (tmp_path / name).iterdir()) == ["결과 둘", "모델 하나"]


@pytest.mark.parametrize("verb", CONVERSIONS)
def test_relative_paths(verb, source_of, tmp_path, monkeypatch):
    source_of(verb)
    monkeypatch.chdir(tmp_path)
    assert convert(verb, "source", "new/result").status == 0
    assert convert("verify", "./source", "new/../new/result").status == 0


# --- Sources stay as they are ---


@pytest.mark.parametrize("place", [
    "source", "source/", "source/inside", "source/inside/further", ".", "other/../source", "link", "link/inside",
    "above",
])  # fmt: skip
@pytest.mark.parametrize("verb", CONVERSIONS)
def test_a_place_in_or_above_the_source_is_refused(verb, place, source_of, tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "source")
    (tmp_path / "above").symlink_to(tmp_path)
    source_of(verb)
    before = state(tmp_path)
    for source in (tmp_path / "source", tmp_path / "link", tmp_path / "above" / "source"):
        for overwrite in ([], ["--overwrite"]):
            error = convert(verb, source, f"{tmp_path}/{place}", *overwrite).error
            assert "is, holds or lies in the source" in error
            assert state(tmp_path) == before


@pytest.mark.parametrize("place", ["", "checkpoints", "checkpoints/3", "checkpoints/3/params"])
@pytest.mark.parametrize("verb", ["orbax-to-hf", "orbax-to-neox"])
def test_a_place_in_or_above_a_runs_checkpoint_is_refused(verb, place, source_of, tmp_path):
    run = tmp_path / "run"
    source_of(verb, run / "checkpoints" / "3")
    before = state(tmp_path)
    assert "is, holds or lies in the source" in convert(verb, run, run / place, "--overwrite").error
    assert state(tmp_path) == before


@pytest.mark.parametrize("suffix", ["incomplete", "replaced"])
@pytest.mark.parametrize("verb", CONVERSIONS)
def test_a_source_in_the_place_of_a_half_written_result_is_spared(verb, suffix, source_of, tmp_path):
    """A conversion writes to RESULT.incomplete, and clears away what an earlier one left there."""
    source = source_of(verb, tmp_path / f"result.{suffix}")
    before = state(tmp_path)
    error = convert(verb, source, tmp_path / "result").error
    assert f"{source}: is in the way of writing {tmp_path / 'result'}; rename it" in error
    assert state(tmp_path) == before


@pytest.mark.parametrize("verb", CONVERSIONS)
def test_a_read_only_source_will_do(verb, source_of, tmp_path):
    source = source_of(verb)
    for item in [source, *source.rglob("*")]:
        item.chmod(item.stat().st_mode & ~0o222)
    before = state(source)
    assert convert(verb, source, tmp_path / "result").status == 0
    assert convert("verify", source, tmp_path / "result").status == 0
    assert state(source) == before


@pytest.mark.parametrize("verb", CONVERSIONS)
def test_a_source_on_a_read_only_disk_will_do(verb, source_of, tmp_path):
    """There not even root writes."""
    with small_disk(tmp_path / "disk", 4 * 2**20) as disk:
        source = source_of(verb, disk / "source")
        remount(disk, "ro")
        assert convert(verb, source, tmp_path / "result").status == 0
        assert convert("verify", source, tmp_path / "result").status == 0
        assert "Read-only file system" in convert(verb, source, disk / "result").error


# --- Links ---


def as_cache(folder: Path, cache: Path) -> Path:
    """A model laid out as huggingface_hub keeps it: a snapshot of links to blobs. Returns the snapshot."""
    snapshot = cache / "models--a--b" / "snapshots" / ("c" * 40)
    blobs = cache / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, file in enumerate(sorted(folder.iterdir())):
        shutil.copyfile(file, blobs / f"{number:064x}")
        (snapshot / file.name).symlink_to(f"../../blobs/{number:064x}")
    return snapshot


HF_FORMATS = ("safetensors", "safetensors in shards", "bin", "bin in shards")


@pytest.mark.parametrize("name", HF_FORMATS)
def test_a_snapshot_of_links_to_blobs(name, originals, tmp_path):
    snapshot = as_cache(originals / name, tmp_path / "cache")
    before = state(tmp_path / "cache")
    assert convert("hf-to-orbax", snapshot, tmp_path / "result").status == 0
    assert convert("verify", originals / name, tmp_path / "result").status == 0
    assert state(tmp_path / "cache") == before


@pytest.mark.parametrize("name", HF_FORMATS)
def test_a_link_to_nothing_is_named(name, originals, tmp_path):
    snapshot = as_cache(originals / name, tmp_path / "cache")
    for link in snapshot.iterdir():
        blob = link.resolve()
        blob.rename(tmp_path / "away")
        before = state(tmp_path)
        error = convert("hf-to-orbax", snapshot, tmp_path / "result").error
        assert str(link if "-of-" in link.name else snapshot) in error
        assert state(tmp_path) == before
        (tmp_path / "away").rename(blob)
    assert convert("hf-to-orbax", snapshot, tmp_path / "result").status == 0


def test_a_link_to_no_tokenizer_is_named(source_of, tmp_path):
    source = source_of("neox-to-orbax")
    (source / "tokenizer.json").unlink()
    (source / "tokenizer.json").symlink_to("absent")
    error = convert("neox-to-orbax", source, tmp_path / "b").error
    assert f"No such file or directory: '{source / 'tokenizer.json'}'" in error
    assert [item.name for item in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize("verb", CONVERSIONS)
def test_sources_whose_every_file_is_a_link(verb, source_of, tmp_path):
    """As data managers leave them."""
    source = source_of(verb)
    (tmp_path / "store").mkdir()
    for number, file in enumerate([item for item in source.rglob("*") if item.is_file()]):
        file.rename(tmp_path / "store" / str(number))
        file.symlink_to(tmp_path / "store" / str(number))
    before = state(source), state(tmp_path / "store")
    assert convert(verb, source, tmp_path / "result").status == 0
    assert convert("verify", source, tmp_path / "result").status == 0
    assert (state(source), state(tmp_path / "store")) == before


# --- What others do meanwhile, or have put there ---


class _Slow:
    """A source that waits for a sign before it gives its first values."""

    def __init__(self, source):
        for name in ("path", "config", "tokenizer", "params", "chunk"):
            setattr(self, name, getattr(source, name))
        self._read, self.begun, self.go_on = source.read, threading.Event(), threading.Event()

    def read(self, *arguments):
        self.begun.set()
        assert self.go_on.wait(60)
        return self._read(*arguments)


@pytest.mark.parametrize("write", [checkpoint.copy, hf_folder.write])
def test_two_at_once_into_one_place(write, source_of, tmp_path):
    """The second is refused, the first is not disturbed."""
    first = _Slow(open_source(source_of("hf-to-orbax")))
    with ThreadPoolExecutor() as pool:
        done = pool.submit(write, tmp_path / "result", first)
        assert first.begun.wait(60)
        with pytest.raises(InputError, match=rf"process {os.getpid()} on .* is writing there; wait for it, or stop it"):
            write(tmp_path / "result", first)
        first.go_on.set()
        done.result()
    assert list(differences(str(tmp_path / "result"), str(first.path))) == []
    assert [item.name for item in tmp_path.iterdir() if "result" in item.name] == ["result"]


@pytest.mark.parametrize("make", ["folder", "file", "link"])
def test_what_others_put_beside_the_result_is_left_alone(make, source_of, tmp_path):
    source, place = source_of("hf-to-orbax"), tmp_path / "new.incomplete"
    if make == "folder":
        place.mkdir()
        (place / "thesis.txt").touch()
    elif make == "file":
        place.touch()
    else:
        place.symlink_to(source)
    with pytest.raises(InputError, match=rf"^{place}: is in the way and was not made by this command; move it away"):
        hf_to_orbax(str(source), tmp_path / "new")
    assert place.exists() and not (tmp_path / "new").exists()


def test_what_others_put_into_a_folder_is_not_overwritten(source_of, tmp_path):
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    source = source_of("hf-to-orbax")
    hf_to_orbax(str(source), ours)
    orbax_to_hf(str(ours), theirs)
    orbax_to_hf(str(ours), theirs, overwrite=True)
    (theirs / "optimizer.pt").touch()
    home = tmp_path / "home"
    (home / "params").mkdir(parents=True)
    for write, what, place in ((orbax_to_hf, ours, theirs), (hf_to_orbax, source, home)):
        with pytest.raises(InputError, match=rf"^{place}: was not made by this command; remove it yourself"):
            write(str(what), place, overwrite=True)
    assert (theirs / "optimizer.pt").exists() and (home / "params").exists()
