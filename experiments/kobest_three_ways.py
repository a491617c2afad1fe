"""KoBEST's five tasks three ways: our evaluation, lm-evaluation-harness with our model, the harness with torch.

Command:   python -m experiments.kobest_three_ways --checkpoint runs/nsmc/run --data KoBEST_datarepo/v1.0
Needs:     pip install -r requirements-harness.txt; the 10M model that experiments/nsmc.py leaves, or any other
Time:      about 35 minutes of CPU time; stopped at any moment, the same command goes on
Expected:  at 0 and 5 shots the same choice for each of 4,561 documents, and equal metrics in every cell. Documents with
           two choices within 1e-4, or within what follows from it per character, are listed, and alone may be chosen
           otherwise. What came out is in records/kobest_three_ways.json, and as a table in kobest_three_ways.md

Torch reads an export of the checkpoint, which is verified to hold the same bits. Our evaluation, with --protocol
harness, reads KoBEST's own files; the harness makes its prompts from the same documents laid out as the hub's dataset.
"""

from __future__ import annotations

import dataclasses
import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from experiments import harness, record
from polyglot_jax import weights
from polyglot_jax.config import InputError
from polyglot_jax.evaluate.tasks import TASKS
from polyglot_jax.files import new_folder

WAYS = {"native": "evaluate", "polyglot_jax": "harness, ours", "hf": "harness, torch"}


@dataclass(frozen=True, kw_only=True)
class ThreeWays:
    """Evaluate a checkpoint on KoBEST in three ways, and compare every document."""

    data: str
    """KoBEST's folder."""
    checkpoint: str = "runs/nsmc/run"
    """A run or checkpoint of ours, with its tokenizer."""
    shots: tuple[int, ...] = (0, 5)
    """Numbers of examples before each question."""
    documents: int | None = None
    """Test documents of each task, from the front; none: all."""
    batch_size: int = 16
    """Of the harness (our evaluation chooses its own)."""
    out: str = "runs/kobest_three_ways"
    """Folder of the export and of what each way made; an interrupted comparison goes on from there."""

    def __post_init__(self) -> None:
        if not self.shots or min(self.shots) < 0:
            raise InputError(f"shots={self.shots}: must be numbers from 0")
        for name in ("documents", "batch_size"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise InputError(f"{name}={value}: must be at least 1")


def prepared(experiment: ThreeWays) -> Path:
    """The folder to work in, with the exported model, verified, and the harness's dataset."""
    out = Path(experiment.out)
    settings, exported = out / "settings.json", out / "huggingface"
    wanted = json.dumps(dataclasses.asdict(experiment))
    if settings.is_file() and settings.read_text(encoding="utf-8") != wanted:
        raise InputError(f"{out}: holds what other settings made; remove it, or choose another --out")
    if not settings.is_file():
        weights.open_source(experiment.checkpoint)  # says what is wrong with it
        with new_folder(out, lambda folder: (folder / settings.name).is_file(), overwrite=True) as folder:
            harness.write_hub_folder(experiment.data, list(TASKS), experiment.documents, folder)
            into = str(folder / exported.name)
            harness.timed([sys.executable, "-m", "convert", "orbax-to-hf", experiment.checkpoint, into], folder)
            (folder / settings.name).write_text(wanted, encoding="utf-8")
    harness.timed([sys.executable, "-m", "convert", "verify", experiment.checkpoint, str(exported)], out)
    return out


def scored(experiment: ThreeWays, way: str, shots: int, out: Path) -> dict[str, Any]:
    """The documents' scores and the metrics of all tasks, one way; what was done before is read from its file."""
    file, made = out / f"{way}-{shots}.json", out / f"made-{way}-{shots}"
    if file.is_file():
        return json.loads(file.read_text(encoding="utf-8"))
    if way == "native":
        limit = ["--limit", str(experiment.documents)] if experiment.documents else []
        command = [
            sys.executable, "-m", "polyglot_jax", "evaluate", "--checkpoint", experiment.checkpoint,
            "--data", experiment.data, "--tasks", "kobest", "--shots", str(shots), "--protocol", "harness", *limit,
            "--out", str(made), "--overwrite",
        ]  # fmt: skip
        seconds = harness.timed(command, out)
        said = json.loads(made.read_text(encoding="utf-8"))
        documents = {task: cells[str(shots)] for task, cells in said["documents"].items()}
        found = {
            "metrics": {task: cells[str(shots)] for task, cells in said["results"].items()},
            "scores": {task: [document["scores"] for document in rows] for task, rows in documents.items()},
            "model": {name: said[name] for name in ("weights_sha256", "tokenizer_sha256", "dtype", "model")},
        }
    else:
        arguments = {
            "polyglot_jax": f"path={experiment.checkpoint}",
            "hf": f"pretrained={out / 'huggingface'},dtype=float32",
        }
        seconds = harness.run(way, arguments[way], TASKS, shots, made, experiment.batch_size)
        found = {"metrics": harness.metrics(made), "scores": harness.scores(made, TASKS)}
    found["seconds"] = [round(value, 1) for value in seconds]
    incomplete = file.with_suffix(".incomplete")
    incomplete.write_text(json.dumps(found), encoding="utf-8")
    incomplete.replace(file)
    print(f"{WAYS[way]}, {shots} shots: {seconds[0]:.0f} s, {seconds[1]:.0f} s of all cores", flush=True)
    return found


def cell(task: str, found: Mapping[str, Mapping[str, Any]], lengths: Sequence[Sequence[int]]) -> dict[str, Any]:
    """A task at a number of shots; found: way -> what `scored` gave; lengths: of the choices of each document.

    Metrics are those that the harness knows too.
    """
    native = found["native"]["metrics"][task]
    metrics = {
        name: {way: made["metrics"][task][name] for way, made in found.items()}
        for name in ("macro_f1", "acc", "acc_norm")
        if name in found["hf"]["metrics"][task]
    }
    return {
        "macro_f1_interval": [native["macro_f1_low"], native["macro_f1_high"]],
        "truncated": native["truncated"],
        "equal_metrics": all(max(v.values()) - min(v.values()) < 1e-9 for v in metrics.values()),
        **harness.compared([made["scores"][task] for made in found.values()], lengths),
        "metrics": metrics,
    }


def problems(cells: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> list[str]:
    """The cells in which the three ways differ by more than choices between near-ties."""
    lines = []
    for task, by_shots in cells.items():
        for shots, one in by_shots.items():
            if others := sorted(set(one["other_choices"]) - set(one["near_ties"])):
                lines.append(f"{task}, {shots} shots: documents {others} are chosen otherwise, and are no near-ties")
            elif not one["equal_metrics"] and not one["other_choices"]:
                lines.append(f"{task}, {shots} shots: the same choices, but other metrics")
    return lines


def table(cells: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> str:
    """The record in Markdown."""
    head = ["task", "shots", "documents, cut", "metric", *WAYS.values(), "chosen otherwise", "near-ties", "apart by"]
    rows = [head, ["---"] * len(head)]
    for task, by_shots in cells.items():
        for shots, one in by_shots.items():
            for name, values in one["metrics"].items():
                rows.append([task, shots, f"{one['documents']:,}, {one['truncated']:,}", name])
                rows[-1] += [f"{values[way]:.4f}" for way in WAYS]
                rows[-1] += [f"{len(one['other_choices'])}", f"{len(one['near_ties'])}"]
                rows[-1].append(f"{one['largest_difference']:.0e}")
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def resolved(experiment: ThreeWays) -> ThreeWays:
    """With whole paths, since the commands run in another folder."""
    paths = {name: str(Path(getattr(experiment, name)).resolve()) for name in ("data", "checkpoint", "out")}
    return dataclasses.replace(experiment, **paths)


def command_of(experiment: ThreeWays) -> str:
    """The command that makes the same numbers: all but --out, as it was given."""
    words = ["--checkpoint", experiment.checkpoint, "--data", experiment.data, "--shots", *map(str, experiment.shots)]
    words += ["--batch-size", str(experiment.batch_size)]
    words += ["--documents", str(experiment.documents)] if experiment.documents else []
    return shlex.join(["python", "-m", "experiments.kobest_three_ways", *words])


def main(experiment: ThreeWays) -> None:
    given, experiment = experiment, resolved(experiment)
    out = prepared(experiment)
    cells: dict[str, dict[str, Any]] = {task: {} for task in TASKS}
    seconds: dict[str, dict[str, Sequence[float]]] = {way: {} for way in WAYS}
    for shots in experiment.shots:
        found = {way: scored(experiment, way, shots, out) for way in WAYS}
        for way in WAYS:
            seconds[way][str(shots)] = found[way]["seconds"]
        for task in TASKS:
            lengths = harness.lengths(experiment.data, task, experiment.documents)
            cells[task][str(shots)] = cell(task, found, lengths)
    different = problems(cells)
    numbers = {
        "batch_size_of_the_harness": experiment.batch_size,
        "model": found["native"]["model"],
        "seconds_by_the_clock_and_of_all_cores": seconds,
        "different": different,
        "cells": cells,
    }
    packages = ("jax", "torch", "transformers", "lm_eval", "tokenizers", "numpy")
    what = "KoBEST by evaluate, by the harness with ours and with torch"
    path = record.write("kobest_three_ways", what, command_of(given), packages, numbers)
    text = table(cells)
    note = "Cut: contexts that lost their beginning. Apart by: the largest difference of a log-probability."
    path.with_suffix(".md").write_text(f"{text}\n\n{note}\n", encoding="utf-8")
    print(f"{text}\n{note}\nwrote {path}")
    if different:
        raise SystemExit("error: " + "\n".join(different))


if __name__ == "__main__":
    try:
        main(tyro.cli(ThreeWays, prog="python -m experiments.kobest_three_ways"))
    except (InputError, OSError) as error:
        raise SystemExit(f"error: {' '.join(str(error).splitlines())}") from None
