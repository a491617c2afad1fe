"""Conversion in flat memory: a model of eight times as many layers takes no more of it, in any direction."""

import json
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT
from models import model_config

from convert.meter import anonymous_bytes
from experiments.random_model import write_random_model
from polyglot_jax.config import Config, TrainConfig

pytestmark = pytest.mark.skipif(anonymous_bytes() is None, reason="only Linux tells how much memory is no file's")

MARGIN = 32
"""MiB by which measurements of the same differ at most: threads are ahead by more or less, freed memory stays."""

CONVERT = """
import json, sys
from convert.hf import hf_to_orbax, orbax_to_hf
from convert.meter import Meter
from convert.neox import neox_to_orbax
from convert.neox_export import orbax_to_neox

peaks = {}
for convert, theirs, ours in ((hf_to_orbax, "hf", "a"), (orbax_to_hf, "a", "b"), (orbax_to_neox, "a", "neox"),
                              (neox_to_orbax, "neox", "c")):
    with Meter() as meter:
        convert(f"{sys.argv[1]}/{theirs}", f"{sys.argv[1]}/{ours}")
    peaks[convert.__name__] = meter.peak / 2**20
print(json.dumps(peaks))
"""

HOARD = """
from polyglot_jax.source import Renamed
read, kept = Renamed.read, []

def hoard(*where):
    kept.append(read(*where).copy())
    return kept[-1]

Renamed.read = hoard
"""


def peaks(folder, layers, before=""):
    """(MiB of a random model, {conversion: the most MiB of memory it took}), one after the other in one process."""
    model = model_config(vocab=8192, embed=512, heads=8, mlp=2048, context=64, layers=layers)
    config = Config(model=model, train=TrainConfig(sequence_length=64))
    write_random_model(folder / "hf", config, shard_bytes=50 * 10**6)
    size = sum(file.stat().st_size for file in (folder / "hf").iterdir()) / 2**20
    done = subprocess.run([sys.executable, "-c", before + CONVERT, folder], cwd=ROOT, capture_output=True, text=True)
    shutil.rmtree(folder)
    assert done.returncode == 0, done.stderr
    return size, json.loads(done.stdout)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return peaks(tmp_path_factory.mktemp("models") / "small", 5)


def test_memory_does_not_grow_with_the_model(small, tmp_path):
    """The largest tensor is the same in both, 8 MiB."""
    (small_size, before), (size, after) = small, peaks(tmp_path / "large", 61)
    assert small_size < 50 and size > 380
    growth = {name: after[name] - before[name] for name in before}
    assert len(growth) == 4 and max(growth.values()) <= MARGIN, growth


def test_the_comparison_notices_what_is_kept(small, tmp_path):
    """A conversion that keeps what it has read, of a model of 16 layers."""
    (small_size, before), (size, after) = small, peaks(tmp_path / "hoarded", 16, HOARD)
    assert after["hf_to_orbax"] - before["hf_to_orbax"] > max(MARGIN, 0.8 * (size - small_size))
