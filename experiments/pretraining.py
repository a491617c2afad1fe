"""The published runs as recipes: what to type, what it should come to, and where it would fit.

A recipe prints its plan. With --estimate it first compiles the step for each of its meshes (pip install -r
requirements-tpu.txt; no TPU needed; about two minutes a mesh) and writes records/pretrain_SIZE.json. Memory, time and
utilisation are estimates from the compiled program, as `python -m polyglot_jax compile` makes them; no pod was there.
"""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from experiments import record
from polyglot_jax.config import PRESETS


@dataclass(frozen=True)
class Recipe:
    """A released size. tokens: those its card says it saw. meshes: topology -> flags of `train` and `compile`."""

    name: str
    preset: str
    tokens: float
    meshes: dict[str, str]


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Print the plan of a published run."""

    estimate: bool = False
    """Compile the step for each mesh first, and write the record."""


def compiled(recipe: Recipe, topology: str) -> dict[str, Any]:
    """What the compiler says of a step on `topology`."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "estimate.json"
        command = ["polyglot_jax", "compile", "--preset", recipe.preset, "--topology", topology]
        flags = [*shlex.split(recipe.meshes[topology]), "--json", str(file)]
        subprocess.run([sys.executable, "-m", *command, *flags], check=True, stdout=subprocess.DEVNULL)
        found = json.loads(file.read_text(encoding="utf-8"))
    seconds, steps = found["seconds"]["step"], PRESETS[recipe.preset].train.steps
    return {
        "flags": recipe.meshes[topology],
        "chips": found["chips"],
        "gib_of_a_chip": round(found["memory"]["total"] / 2**30, 2),
        "gib_free_on_a_chip": round(found["memory"]["free_on_chip"] / 2**30, 2),
        "seconds_a_step": round(seconds, 3),
        "mfu_6n": round(found["mfu_6n"], 3),
        "mfu_6n_and_attention": round(found["mfu_6n_and_attention"], 3),
        "days": round(seconds * steps / 86_400, 1),
    }


def plan(recipe: Recipe, estimates: dict[str, dict[str, Any]]) -> str:
    """The recipe for a reader."""
    config = PRESETS[recipe.preset]
    train = config.train
    tokens = train.steps * train.batch_size * train.sequence_length
    lines = [
        f"{recipe.preset}: {config.model.parameters():,} parameters",
        f"  {train.steps:,} steps x {train.batch_size:,} sequences x {train.sequence_length:,} tokens = "
        f"{tokens / 1e9:.1f}B tokens (the card says {recipe.tokens / 1e9:.0f}B)",
        f"  learning rate {config.optimizer.learning_rate:g}, {config.optimizer.warmup:.0%} warm-up, cosine to "
        f"{config.optimizer.final_learning_rate:g}; clipping at {config.optimizer.clip:g} (not published: see README)",
    ]
    for topology, flags in recipe.meshes.items():
        lines.append(f"on {topology}:")
        lines.append(f"  python -m polyglot_jax train --preset {recipe.preset} {flags} --data DATA --out RUN")
        if found := estimates.get(topology):
            lines.append(
                f"  estimated: {found['gib_of_a_chip']} of {found['gib_free_on_a_chip']} GiB a chip, "
                f"{found['seconds_a_step']} s a step, {found['days']} days on {found['chips']} chips, "
                f"MFU {found['mfu_6n_and_attention']:.1%} (6N + causal attention)"
            )
        else:
            lines.append("  not estimated yet: --estimate")
    return "\n".join(lines)


def main(recipe: Recipe) -> None:
    """The command line of a recipe."""
    arguments = tyro.cli(Arguments, prog=f"python -m experiments.{recipe.name}")
    if arguments.estimate:
        numbers = {topology: compiled(recipe, topology) for topology in recipe.meshes}
        path = record.write(recipe.name, "estimates from the compiled step, not measurements",
                            f"python -m experiments.{recipe.name} --estimate", ("jax", "flax", "libtpu"),
                            {"preset": recipe.preset, "estimates": numbers})  # fmt: skip
        print(f"wrote {path}")
    file = record.FOLDER / f"{recipe.name}.json"
    estimates = json.loads(file.read_text(encoding="utf-8"))["estimates"] if file.is_file() else {}
    print(plan(recipe, estimates))
