"""Whole models from Hugging Face to Orbax and back, on an ordinary machine: time, memory, every byte.

Command:   python -m experiments.full_size --presets polyglot-ko-1.3b polyglot-ko-3.8b --tokenizer tokenizer.json
Time:      about 5 minutes for the 3.8B model on 2 cores and a disk of 300 MB/s; disk for twice the model
Expected:  the shards that come back are the shards that went in, by SHA-256; under 1 GiB of memory at any size; what
           came out is in records/full_size.json, the memory in full_size.png

The weights are random, float16, made shard by shard. The source is deleted once its checksums are known and it is
converted, so that the disk holds two copies, never three. Then the model is loaded from the checkpoint and generates.
"""

from __future__ import annotations

import gc
import hashlib
import re
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import tyro

from convert.meter import Meter
from experiments import record
from experiments.random_model import write_random_model
from polyglot_jax.config import PRESETS

matplotlib.use("Agg")
PROMPT = "한국어 언어 모델은"


@dataclass(frozen=True, kw_only=True)
class FullSize:
    """Convert models of full size there and back, and record what it took."""

    presets: tuple[str, ...] = ("polyglot-ko-1.3b", "polyglot-ko-3.8b")
    """Sizes, each made, converted and deleted before the next."""
    tokenizer: str | None = None
    """A tokenizer.json, for the generation at the end; none: no generation."""
    generate: tuple[str, ...] = ("polyglot-ko-3.8b",)
    """Sizes that are also loaded, in float32, which takes twice the memory of the files."""
    out: str = "runs/full_size"
    """Folder for the models; emptied at the end."""


def run_convert(*arguments: str) -> dict[str, float]:
    """Run a command of `convert`; what it says of its time and memory."""
    done = subprocess.run([sys.executable, "-m", "convert", *arguments], check=True, capture_output=True, text=True)
    seconds, peak = re.search(r"in ([\d.]+) s, at most (\d+) MiB", done.stdout).groups()
    print(done.stdout.splitlines()[0])
    return {"seconds": float(seconds), "peak_mib": int(peak)}


def checksums(folder: Path) -> dict[str, str]:
    """SHA-256 of every shard."""
    sums = {}
    for file in sorted(folder.glob("*.safetensors")):
        with open(file, "rb") as opened:
            sums[file.name] = hashlib.file_digest(opened, "sha256").hexdigest()
    return sums


def one_size(preset: str, out: Path, tokenizer: str | None, generate: bool) -> dict[str, Any]:
    source, orbax, back = (out / name for name in ("huggingface", "orbax", "back"))
    config = PRESETS[preset]
    write_random_model(source, config, tokenizer)
    before = checksums(source)
    found = {
        "parameters": config.model.parameters(),
        "bytes": sum(file.stat().st_size for file in source.glob("*.safetensors")),
        "hf-to-orbax": run_convert("hf-to-orbax", str(source), str(orbax)),
    }
    shutil.rmtree(source)
    found["orbax-to-hf"] = run_convert("orbax-to-hf", str(orbax), str(back))
    start = time.perf_counter()
    subprocess.run([sys.executable, "-m", "convert", "verify", str(orbax), str(back)], check=True, capture_output=True)
    found["verify"] = {"seconds": round(time.perf_counter() - start, 1)}
    found["sha256"] = checksums(back)
    found["same_bytes"] = found["sha256"] == before
    shutil.rmtree(back)
    if generate:
        found["generate"] = load_and_generate(orbax)
    shutil.rmtree(orbax)
    return found


def load_and_generate(path: Path) -> dict[str, Any]:
    """Load a checkpoint and continue a prompt greedily."""
    import polyglot_jax

    with Meter() as loading:
        lm = polyglot_jax.load(path)
    with Meter() as generating:
        text = lm.generate([PROMPT], max_new_tokens=16, stop=[])[0]
    found = {
        "dtype": str(lm.model.dtype),
        "load_seconds": round(loading.seconds, 1),
        "load_peak_mib": round(loading.peak / 2**20),
        "generate_seconds": round(generating.seconds, 1),
        "prompt": PROMPT,
        "text": text,
    }
    del lm
    gc.collect()
    return found


def plot(results: dict[str, Any], path: Path) -> None:
    """Memory of conversion against the size of the model."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 4))
    sizes = [result["bytes"] / 1e9 for result in results.values()]
    for direction, marker in (("hf-to-orbax", "o"), ("orbax-to-hf", "s")):
        axes.plot(sizes, [result[direction]["peak_mib"] for result in results.values()], marker=marker, label=direction)
    axes.plot(sizes, [size * 1e9 / 2**20 for size in sizes], ":", color="gray", label="the model itself")
    axes.set(xlabel="model, GB in float16", ylabel="peak anonymous memory, MiB", yscale="log")
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main(experiment: FullSize) -> None:
    out = Path(experiment.out)
    if out.exists():
        raise SystemExit(f"error: {out}: exists; remove it, or choose another place with --out")
    tokenizer = Path(experiment.tokenizer).read_text(encoding="utf-8") if experiment.tokenizer else None
    results = {}
    try:
        for preset in experiment.presets:
            print(f"{preset}:")
            results[preset] = one_size(preset, out, tokenizer, bool(tokenizer) and preset in experiment.generate)
    finally:
        shutil.rmtree(out, ignore_errors=True)
    command = f"python -m experiments.full_size --presets {' '.join(experiment.presets)}"
    command += " --tokenizer tokenizer.json" if tokenizer else ""
    packages = ("jax", "orbax-checkpoint", "tensorstore", "safetensors", "numpy")
    path = record.write("full_size", "conversion there and back at full size", command, packages, {"models": results})
    plot(results, path.with_suffix(".png"))
    print(f"wrote {path}")
    if not all(result["same_bytes"] for result in results.values()):
        raise SystemExit("error: bytes differ after the round trip")


if __name__ == "__main__":
    main(tyro.cli(FullSize, prog="python -m experiments.full_size"))
