"""What a user can mend, the converters say in one line of stderr, and end with status 1; no traceback, nothing made."""

import os
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT
from disks import state
from formats import FORMATS
from verbs import convert


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    folder = tmp_path_factory.mktemp("originals")
    for name, format in {"hf": "safetensors", "bin": "bin", "ours": "converted", "neox": "neox"}.items():
        FORMATS[format].make(folder / name)
    return folder


@pytest.fixture
def place(originals, tmp_path, monkeypatch):
    """A folder to work in, with a model in each format."""
    shutil.copytree(originals, tmp_path / "place")
    monkeypatch.chdir(tmp_path / "place")
    return tmp_path / "place"


def cut(file):
    """Leave half of a file."""
    return lambda place: (place / file).write_bytes((place / file).read_bytes()[: (place / file).stat().st_size // 2])


def text(file, content):
    return lambda place: (place / file).write_text(content)


def folder(name):
    return lambda place: (place / name).mkdir()


def nothing(place):
    pass


def change_bit(file):
    def change(place):
        content = bytearray((place / file).read_bytes())
        content[len(content) // 2] ^= 4
        (place / file).write_bytes(content)

    return change


CHUNK = "ours/params/layers.mlp.up.kernel/c/1/0/0"
LAYER = "neox/global_step7/layer_03-model_01-model_states.pt"
CASES = [
    # what is damaged | the command | what the error begins with
    (nothing, "hf-to-orbax absent new", "absent: no such folder (and not a name like "),
    (nothing, "hf-to-orbax hf/model.safetensors new", "hf/model.safetensors: neither a checkpoint, nor a run "),
    (folder("empty"), "hf-to-orbax empty new", "empty: neither a checkpoint, nor a run with one, nor a Hugging Face "),
    (folder("empty"), "neox-to-orbax empty new", "empty: no checkpoint of GPT-NeoX: neither a folder global_stepN "),
    (nothing, "hf-to-orbax ours new", "ours: is a checkpoint already"),
    (nothing, "orbax-to-hf hf new", "hf: is a Hugging Face folder already"),
    (nothing, "orbax-to-neox hf new --tensor-parallel 1", "hf: is a Hugging Face folder, not a checkpoint"),
    (nothing, "orbax-to-neox ours new --tensor-parallel 3", "model.vocab=404: does not divide over "),
    (nothing, "orbax-to-neox ours new --tensor-parallel 0", "tensor_parallel=0: must be above 0"),
    (nothing, "neox-to-orbax neox new --config absent.yml", "absent.yml: missing"),
    (nothing, "orbax-to-hf ours new --shard-bytes 0", "shard_bytes=0: must be above 0"),
    (nothing, "hf-to-orbax hf ours", "{place}/ours: exists; choose another place, or replace it with --overwrite"),
    (nothing, "hf-to-orbax hf bin --overwrite", "{place}/bin: was not made by this command; remove it yourself"),
    (nothing, "orbax-to-hf ours hf/config.json", "{place}/hf/config.json: is a file; name a folder"),
    (nothing, "orbax-to-hf ours bin/config.json/new", "{place}/bin/config.json/new: lies in a file; "),
    (nothing, "hf-to-orbax hf hf/new", "hf/new: is, holds or lies in the source, hf; choose another place"),
    (nothing, "hf-to-orbax hf " + "y" * 300, "[Errno 36] File name too long: "),
    (nothing, "hf-to-orbax " + "y" * 300 + " new", "y" * 80 + ": File name too long"),
    (nothing, "hf-to-orbax hf\udcff new", r"'hf\udcff': is not UTF-8; rename it"),
    (nothing, "hf-to-orbax hf new --dtype float16 --dtype float32", "--dtype: given 2 times; "),
    (lambda place: (place / "loop").symlink_to("loop"), "hf-to-orbax loop new", "loop: no such folder"),
    (text("hf/config.json", '{"model_type":\n\n"x"'), "hf-to-orbax hf new", "hf/config.json: not JSON: "),
    (text("hf/config.json", '{"model_type": "x\\ny"}'), "hf-to-orbax hf new", "hf/config.json: model_type='x\\ny': "),
    (text("hf/tokenizer.json", "{\n}"), "hf-to-orbax hf new", "hf/tokenizer.json: "),
    (cut("hf/model.safetensors"), "hf-to-orbax hf new", "hf/model.safetensors: damaged or not safetensors: "),
    (cut("bin/pytorch_model.bin"), "hf-to-orbax bin new", "bin/pytorch_model.bin: refused: it is damaged, or "),
    (cut(LAYER), "neox-to-orbax neox new", f"{LAYER}: refused: it is damaged, or holds more than "),
    (text("neox/global_step7/configs/run.yml", "a: [\n\n}"), "neox-to-orbax neox new",
     "neox/global_step7/configs/run.yml: not a config of GPT-NeoX: while parsing"),
    (text("neox/latest", "a\nb"), "neox-to-orbax neox new", "neox/latest: names 'a\\nb', which is not there"),
    (text("ours/config.json", "{\n"), "orbax-to-hf ours new", "{place}/ours/config.json: has 2 bytes instead of "),
    (cut("ours/manifest.json"), "orbax-to-hf ours new", "{place}/ours/manifest.json: "),
    (change_bit(CHUNK), "orbax-to-hf ours new", "{place}/" + CHUNK + ": its bytes are not those that were written"),
    (change_bit(CHUNK), "orbax-to-neox ours new --tensor-parallel 2", "{place}/" + CHUNK + ": its bytes are not"),
    (change_bit(CHUNK), "verify hf ours", "{place}/" + CHUNK + ": its bytes are not those that were written"),
    (nothing, "verify hf absent", "absent: no such folder (and not a name like "),
    (nothing, "verify absent neox", "absent: no such folder (and not a name like "),
    (nothing, "verify hf neox", "hf and neox differ in "),
]  # fmt: skip


def everything_in(place):
    """Without the times of the folder itself: something may have been begun there."""
    return {name: item for name, item in state(place).items() if name != "."}


@pytest.mark.parametrize("damage, command, message", CASES, ids=[f"{number}" for number in range(len(CASES))])
def test_errors_are_of_one_line(place, damage, command, message):
    damage(place)
    before = everything_in(place)
    assert convert(*command.split(" ")).error.startswith(f"error: {message.replace('{place}', str(place))}")
    assert everything_in(place) == before


@pytest.mark.parametrize("command, message", [
    ("hf-to-orbax absent new", "error: absent: no such folder (and not a name like EleutherAI/polyglot-ko-1.3b)\n"),
    ("verify hf neox", "error: hf and neox differ in 20 places\n"),
])  # fmt: skip
def test_the_program_itself(place, command, message):
    done = subprocess.run(
        [sys.executable, "-m", "convert", *command.split()],
        env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (1, message)
