"""`evaluate` against lm-evaluation-harness with torch: KoBEST's COPA and HellaSwag at 5 shots, one model, one machine.

Command:   python -m experiments.benchmarks.evaluate --data KoBEST_datarepo/v1.0 --tokenizer tokenizer.json
Needs:     pip install -r requirements-harness.txt
Time:      about 6 minutes on 2 idle cores; all 1,500 documents (--documents None) take about 40 minutes a turn
Goal:      at least twice as quick, and the same choice for every document; records/benchmark_evaluate.json

A model of random weights (56M parameters, context 2,048, float32) is scored by both commands in turn, Python's start,
loading and compilation included. Ours runs with --protocol harness, so that both score the same tokens. Documents whose
two best choices lie within 1e-4 of each other are listed: rounding may turn them.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import tyro

from experiments import harness, record
from experiments.harness import Seconds
from experiments.random_model import MODEL, benchmark_folder
from polyglot_jax.config import InputError

NAMES = ("kobest_copa", "kobest_hellaswag")


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """Time `evaluate` against lm-evaluation-harness with torch."""

    data: str
    """KoBEST's folder."""
    tokenizer: str
    """The released tokenizer.json."""
    documents: int | None = 24
    """Test documents of each task, from the front; none: all."""
    turns: int = 3
    """How often each is timed."""
    batch_size: int = 16
    """Of the harness (ours chooses its own)."""
    out: str = "runs/benchmark_evaluate"
    """Folder for the model and the results; emptied at the end."""

    def __post_init__(self) -> None:
        for name in ("documents", "turns", "batch_size"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise InputError(f"{name}={value}: must be at least 1")


def by_evaluate(folder: Path) -> Seconds:
    arguments = ["--checkpoint", "model", "--data", "skt/kobest_v1", "--tasks", ",".join(NAMES), "--shots", "5"]
    arguments += ["--protocol", "harness", "--out", "ours.json", "--overwrite"]
    return harness.timed([sys.executable, "-m", "polyglot_jax", "evaluate", *arguments], folder)


def main(benchmark: Benchmark) -> None:
    with benchmark_folder(benchmark.out, benchmark.tokenizer) as folder:
        (folder / "model" / "tokenizer_config.json").write_text(
            json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"})
        )
        harness.write_hub_folder(benchmark.data, NAMES, benchmark.documents, folder)
        theirs = folder / "theirs"
        ways: dict[str, Callable[[], Seconds]] = {
            "evaluate": lambda: by_evaluate(folder),
            "harness with torch": lambda: harness.run(
                "hf", "pretrained=model,dtype=float32", NAMES, 5, theirs, benchmark.batch_size
            ),
        }
        seconds: dict[str, list[Seconds]] = {name: [] for name in ways}
        for turn in range(benchmark.turns):
            for name in list(ways)[:: 1 if turn % 2 else -1]:
                seconds[name].append(ways[name]())
            print(f"turn {turn + 1}: " + ", ".join(f"{name} {times[-1][0]:.1f} s" for name, times in seconds.items()))
        documents = json.loads((folder / "ours.json").read_text(encoding="utf-8"))["documents"]
        scores = harness.scores(theirs, NAMES)
        agreement = {
            name: harness.compared(
                [[document["scores"] for document in documents[name]["5"]], scores[name]],
                harness.lengths(benchmark.data, name, benchmark.documents),
            )
            for name in NAMES
        }
    medians = {name: [statistics.median(kind) for kind in zip(*times, strict=True)] for name, times in seconds.items()}
    clock, cores = (a / b for a, b in zip(medians["harness with torch"], medians["evaluate"], strict=True))
    numbers = {
        "parameters": MODEL.parameters(),
        "seconds_by_the_clock_and_of_all_cores": {
            name: [[round(value, 1) for value in both] for both in times] for name, times in seconds.items()
        },
        "times_as_fast": round(clock, 2),
        "times_as_fast_by_seconds_of_all_cores": round(cores, 2),
        "agreement": agreement,
    }
    command = "python -m experiments.benchmarks.evaluate --data KoBEST_datarepo/v1.0 --tokenizer tokenizer.json"
    command += f" --turns {benchmark.turns} --documents {benchmark.documents}"
    packages = ("jax", "torch", "transformers", "lm_eval", "tokenizers", "numpy")
    path = record.write("benchmark_evaluate", "evaluate against lm-evaluation-harness with torch", command, packages,
                        numbers)  # fmt: skip
    print(f"{clock:.2f} times as fast ({cores:.2f} by seconds of all cores)")
    print(f"{json.dumps(agreement, indent=1)}\nwrote {path}")


if __name__ == "__main__":
    main(tyro.cli(Benchmark, prog="python -m experiments.benchmarks.evaluate"))
