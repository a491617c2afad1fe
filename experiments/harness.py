"""lm-evaluation-harness as a peer: KoBEST as it looks for it, its command, what it logged."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from polyglot_jax.evaluate.data import read
from polyglot_jax.evaluate.metrics import choose, is_near_tie
from polyglot_jax.evaluate.tasks import TASKS

ROOT = Path(__file__).resolve().parents[1]
Scores = Mapping[str, Sequence[Sequence[float]]]
"""Task -> the choices' log-probabilities of each document."""


class Seconds(NamedTuple):
    """What a command took."""

    by_the_clock: float
    of_all_cores: float


def write_hub_folder(data: str, names: Sequence[str], documents: int | None, folder: Path) -> None:
    """Tasks as a dataset in `folder`/skt/kobest_v1: the name under which the harness's own task files ask for it.

    documents: how many of each test file, from the front; None: all.
    """
    place, configs = folder / "skt" / "kobest_v1", []
    for name in names:
        hub = TASKS[name].hub
        (place / hub).mkdir(parents=True)
        files = [{"split": split, "path": f"{hub}/{split}.jsonl"} for split in ("train", "test")]
        configs.append({"config_name": hub, "data_files": files})
        for file in files:
            rows = read(data, name, file["split"])[: documents if file["split"] == "test" else None]
            lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            (place / file["path"]).write_text("".join(lines), encoding="utf-8")
    (place / "README.md").write_text(f"---\n{json.dumps({'configs': configs})}\n---\n", encoding="utf-8")


def timed(command: list[str], folder: Path) -> Seconds:
    """Run a command in `folder`, without a network; raises with the end of what it said if it fails.

    Seconds of all cores mean something where others use the machine, too.
    """
    offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "cache"), "TOKENIZERS_PARALLELISM": "false"}
    environment = os.environ | offline | {"PYTHONPATH": str(ROOT)}
    environment.setdefault("JAX_PLATFORMS", "cpu")
    start, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr[-3000:]}")
    cores = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Seconds(time.perf_counter() - start, cores)


def run(
    model: str,
    arguments: str,
    tasks: Iterable[str],
    shots: int,
    out: Path,
    batch_size: int = 16,
    more: Sequence[str] = (),
) -> Seconds:
    """Run the harness in the folder above `out`, where `write_hub_folder` wrote; `out` gets what it logs, and no more.

    model: the harness's own "hf", torch on the CPU, or "polyglot_jax", which our launcher adds; arguments: its own.
    """
    shutil.rmtree(out, ignore_errors=True)
    module = "lm_eval" if model == "hf" else "polyglot_jax.evaluate.harness"
    command = [
        sys.executable, "-m", module, "run", "--model", model, "--model_args", arguments, "--tasks", *tasks,
        "--num_fewshot", str(shots), "--batch_size", str(batch_size), "--device", "cpu", "--log_samples",
        "--output_path", str(out), *more,
    ]  # fmt: skip
    return timed(command, out.parent)


def samples(out: Path, task: str) -> list[dict[str, Any]]:
    """What the harness logged of each document, in the order of the file."""
    [file] = out.rglob(f"samples_{task}_*.jsonl")
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    return sorted(rows, key=lambda row: row["doc_id"])


def scores(out: Path, tasks: Iterable[str]) -> Scores:
    """The scores that the harness logged."""
    return {task: [[float(answer[0]) for answer in row["filtered_resps"]] for row in samples(out, task)]
            for task in tasks}  # fmt: skip


def metrics(out: Path) -> dict[str, dict[str, float]]:
    """Task -> metric -> value as the harness computed them, under our names."""
    [file] = out.rglob("results_*.json")
    results = json.loads(file.read_text(encoding="utf-8"))["results"]
    ours = {"acc,none": "acc", "acc_norm,none": "acc_norm", "f1,none": "macro_f1"}
    return {task: {ours[name]: value for name, value in found.items() if name in ours}
            for task, found in results.items() if task in TASKS}  # fmt: skip


def lengths(data: str, name: str, documents: int | None) -> list[list[int]]:
    """Characters of each choice of a task's test documents."""
    return [[len(choice) for choice in TASKS[name].choices(row)] for row in read(data, name, "test")[:documents]]


def compared(ways: Sequence[Sequence[Sequence[float]]], lengths: Sequence[Sequence[int]]) -> dict[str, Any]:
    """How far scores of the same documents, computed in several ways, are apart; lengths: characters of the choices.

    other_choices: numbers of the documents for which not all choose alike; near_ties: of those whose best choices lie
    so close in one of the ways that rounding may turn them. Both by sums of log-probabilities and per character.
    """
    found: dict[str, Any] = {"documents": len(ways[0]), "other_choices": [], "near_ties": [], "largest_difference": 0.0}
    for number, (rows, sizes) in enumerate(zip(zip(*ways, strict=True), lengths, strict=True)):
        if any(len({choose(row, by) for row in rows}) > 1 for by in (None, sizes)):
            found["other_choices"].append(number)
        if any(is_near_tie(row, by) for row in rows for by in (None, sizes)):
            found["near_ties"].append(number)
        apart = max(max(values) - min(values) for values in zip(*rows, strict=True))
        found["largest_difference"] = max(found["largest_difference"], apart)
    return found
