"""Conversion against `cp -r` of the same files, taking turns.

Command:   python -m experiments.benchmarks.convert
Time:      about 6 minutes and 10 GB of disk for the 1.3B model
Goal:      half the speed of cp in both directions; what came out is in records/benchmark_convert.json

Each turn times cp -r, hf-to-orbax and orbax-to-hf on a float16 model of random weights, as commands, Python's start
included, and until the data is on the disk (sync), since all three otherwise only fill the system's memory. Medians.
What one has written is deleted before the next starts, and then the machine rests: a virtual one gives freed memory
back to its host within seconds, and whoever writes first into what is not back yet looks several times quicker than
the others, cp for one, which needs no second to start. The order turns with every turn.
"""

from __future__ import annotations

import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

from experiments import record
from experiments.random_model import write_random_model
from polyglot_jax.config import PRESETS


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """Time conversion against cp -r."""

    preset: str = "polyglot-ko-1.3b"
    """Size of the model."""
    turns: int = 5
    """How often each is timed."""
    out: str = "runs/benchmark_convert"
    """Folder for the copies; emptied at the end."""


REST = 10


def timed(command: Sequence[str]) -> float:
    """Seconds a command takes, on a machine at rest, until what it wrote is on the disk."""
    os.sync()
    time.sleep(REST)
    start = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    os.sync()
    return time.perf_counter() - start


def main(benchmark: Benchmark) -> None:
    out = Path(benchmark.out)
    if out.exists():
        raise SystemExit(f"error: {out}: exists; remove it, or choose another place with --out")
    source, orbax, made = (str(out / name) for name in ("huggingface", "orbax", "made"))
    write_random_model(Path(source), PRESETS[benchmark.preset])
    convert = (sys.executable, "-m", "convert")
    commands = {
        "cp": ("cp", "-r", source, made),
        "hf-to-orbax": (*convert, "hf-to-orbax", source, made),
        "orbax-to-hf": (*convert, "orbax-to-hf", orbax, made),
    }
    seconds: dict[str, list[float]] = {name: [] for name in commands}
    try:
        timed((*convert, "hf-to-orbax", source, orbax))
        shutil.copytree(source, made)
        for turn in range(benchmark.turns):
            names = list(commands)
            for name in names[turn % 3 :] + names[: turn % 3]:
                shutil.rmtree(made)
                seconds[name].append(timed(commands[name]))
            print(f"turn {turn + 1}: " + ", ".join(f"{name} {times[-1]:.1f} s" for name, times in seconds.items()))
    finally:
        shutil.rmtree(out)
    size = 2 * PRESETS[benchmark.preset].model.parameters()
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    ratios = {name: medians["cp"] / median for name, median in medians.items() if name != "cp"}
    numbers = {
        "preset": benchmark.preset,
        "bytes": size,
        "seconds": {name: [round(value, 2) for value in times] for name, times in seconds.items()},
        "megabytes_per_second": {name: round(size / median / 1e6) for name, median in medians.items()},
        "speed_as_share_of_cp": {name: round(ratio, 2) for name, ratio in ratios.items()},
    }
    command = f"python -m experiments.benchmarks.convert --preset {benchmark.preset} --turns {benchmark.turns}"
    packages = ("jax", "orbax-checkpoint", "tensorstore", "safetensors", "numpy")
    path = record.write("benchmark_convert", "conversion against cp -r, until on disk", command, packages, numbers)
    for name, ratio in ratios.items():
        print(f"{name}: {size / medians[name] / 1e6:.0f} MB/s, {ratio:.2f} of cp's speed")
    print(f"wrote {path}")


if __name__ == "__main__":
    main(tyro.cli(Benchmark, prog="python -m experiments.benchmarks.convert"))
