"""`evaluate` against lm-evaluation-harness with torch: KoBEST's COPA and HellaSwag at 5 shots, one model, one machine.

Command:   python -m experiments.benchmarks.evaluate --data KoBEST_datarepo/v1.0 --tokenizer tokenizer.json
Needs:     pip install -r requirements-harness.txt
Goal:      at least twice as quick, and the same choice for every document; records/benchmark_evaluate.json

A model of random weights (56M parameters, context 2,048, float32) is scored by both commands in turn, Python's start,
loading and compilation included. Ours runs with --protocol harness, so that both score the same tokens. Documents whose
two best choices lie within 1e-4 of each other are counted apart: rounding may turn them.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from experiments import record
from experiments.random_model import write_random_model
from polyglot_jax.config import Config, DataConfig, ModelConfig
from polyglot_jax.evaluate.data import read
from polyglot_jax.evaluate.metrics import choose, is_near_tie
from polyglot_jax.evaluate.tasks import TASKS

MODEL = ModelConfig(layers=8, embed=512, heads=8, mlp=2048)
NAMES = ("kobest_copa", "kobest_hellaswag")


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """Time `evaluate` against lm-evaluation-harness with torch."""

    data: str
    """KoBEST's folder."""
    tokenizer: str
    """The released tokenizer.json."""
    documents: int | None = None
    """Test documents of each task; none: all."""
    turns: int = 3
    """How often each is timed."""
    batch_size: int = 16
    """Of the harness (ours chooses its own)."""
    out: str = "runs/benchmark_evaluate"
    """Folder for the model and the results; emptied at the end."""


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


def timed(command: list[str], folder: Path) -> tuple[float, float]:
    """Seconds a command takes, by the clock and of all cores; the second also where others use the machine."""
    root = str(Path(__file__).resolve().parents[2])
    offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "cache"), "TOKENIZERS_PARALLELISM": "false"}
    environment = os.environ | offline | {"PYTHONPATH": root, "JAX_PLATFORMS": os.environ.get("JAX_PLATFORMS", "cpu")}
    start, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, check=True, cwd=folder, env=environment, stdout=subprocess.DEVNULL,
                   stderr=subprocess.DEVNULL)  # fmt: skip
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cores = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return time.perf_counter() - start, cores


def harness_scores(folder: Path, names: Sequence[str]) -> dict[str, list[list[float]]]:
    """Task -> the choices' log-probabilities of each document, from the samples that the harness logged."""
    scores = {}
    for name in names:
        [file] = folder.rglob(f"samples_{name}_*.jsonl")
        samples = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        samples.sort(key=lambda sample: sample["doc_id"])
        scores[name] = [[float(answer[0]) for answer in sample["filtered_resps"]] for sample in samples]
    return scores


def compared(ours: dict[str, Any], theirs: dict[str, list[list[float]]]) -> dict[str, Any]:
    """How far the two are apart, task by task."""
    found = {}
    for name in NAMES:
        pairs = [(document["scores"], scores) for document, scores in
                 zip(ours["documents"][name]["5"], theirs[name], strict=True)]  # fmt: skip
        found[name] = {
            "documents": len(pairs),
            "other_choices": sum(choose(a) != choose(b) for a, b in pairs),
            "of_them_near_ties": sum(choose(a) != choose(b) and is_near_tie(a) for a, b in pairs),
            "largest_difference": max(abs(x - y) for a, b in pairs for x, y in zip(a, b, strict=True)),
        }
    return found


def main(benchmark: Benchmark) -> None:
    out = Path(benchmark.out).resolve()
    if out.exists():
        raise SystemExit(f"error: {out}: exists; remove it, or choose another place with --out")
    model = str(out / "model")
    tokenizer = Path(benchmark.tokenizer).read_text(encoding="utf-8")
    write_random_model(Path(model), Config(model=MODEL, data=DataConfig(valid_ids=30_003)), tokenizer=tokenizer)
    (out / "model" / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"})
    )
    write_hub_folder(benchmark.data, NAMES, benchmark.documents, out)
    ours, theirs = out / "ours.json", out / "theirs"
    commands = {
        "evaluate": [sys.executable, "-m", "polyglot_jax", "evaluate", "--checkpoint", model, "--data", "skt/kobest_v1",
                     "--tasks", ",".join(NAMES), "--shots", "5", "--protocol", "harness", "--out", str(ours),
                     "--overwrite"],
        "harness with torch": [sys.executable, "-m", "lm_eval", "run", "--model", "hf", "--model_args",
                               f"pretrained={model},dtype=float32", "--device", "cpu", "--tasks", *NAMES,
                               "--num_fewshot", "5", "--batch_size", str(benchmark.batch_size), "--log_samples",
                               "--output_path", str(theirs)],
    }  # fmt: skip
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in commands}
    try:
        for turn in range(benchmark.turns):
            for name in list(commands)[:: 1 if turn % 2 else -1]:
                if name != "evaluate":  # the harness would add to what it left
                    shutil.rmtree(theirs, ignore_errors=True)
                seconds[name].append(timed(commands[name], out))
            print(f"turn {turn + 1}: " + ", ".join(f"{name} {times[-1][0]:.1f} s" for name, times in seconds.items()))
        agreement = compared(json.loads(ours.read_text(encoding="utf-8")), harness_scores(theirs, NAMES))
    finally:
        shutil.rmtree(out)
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
    command += f" --turns {benchmark.turns}" + (f" --documents {benchmark.documents}" if benchmark.documents else "")
    packages = ("jax", "torch", "transformers", "lm_eval", "tokenizers", "numpy")
    path = record.write("benchmark_evaluate", "evaluate against lm-evaluation-harness with torch", command, packages,
                        numbers)  # fmt: skip
    print(f"{clock:.2f} times as fast ({cores:.2f} by seconds of all cores)")
    print(f"{json.dumps(agreement, indent=1)}\nwrote {path}")


if __name__ == "__main__":
    main(tyro.cli(Benchmark, prog="python -m experiments.benchmarks.evaluate"))
