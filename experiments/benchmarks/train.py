"""A training step against one of transformers and torch: the same model, batch and arithmetic, in turn, on one machine.

Command:   python -m experiments.benchmarks.train
Needs:     pip install torch transformers (the tests' requirements have them)
Goal:      at least as quick; waiting for data under 1 %; no longer to compile for more layers;
           records/benchmark_train.json

GPT-NeoX of 56M parameters, float32, AdamW, gradients clipped to a norm of 1. Ours is the step that `train` compiles.
The reference is transformers' model with torch's attention kernels, cross-entropy, clip_grad_norm_ and fused AdamW.
Both get the same weights and batches, and their losses are compared after every step. Ours keeps for the backward
pass what remat "value" says, the quickest of the policies here.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tyro

from experiments import record
from experiments.random_model import write_random_model
from polyglot_jax.config import Config, DataConfig, MeshConfig, ModelConfig, OptimizerConfig, TrainConfig
from polyglot_jax.log import read_log
from polyglot_jax.program import Program
from polyglot_jax.sharding import make_mesh
from polyglot_jax.steps import Batch
from polyglot_jax.token_files import TokenFileWriter
from polyglot_jax.train import train
from polyglot_jax.weights import load_params, open_source

MODEL = ModelConfig(layers=8, embed=512, heads=8, mlp=2048, context=256)


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """Time a training step against transformers and torch."""

    turns: int = 5
    """How often each is timed."""
    steps: int = 4
    """Steps in a turn."""
    batches: tuple[int, ...] = (4, 8)
    """Sequences of 256 tokens in a step."""
    depths: tuple[int, ...] = (2, 8, 32)
    """Numbers of layers for which compilation is timed."""


def config_of(batch_size: int, layers: int = MODEL.layers, **more: Any) -> Config:
    return Config(
        model=dataclasses.replace(MODEL, layers=layers),
        mesh=MeshConfig(data=1),
        optimizer=OptimizerConfig(learning_rate=1e-4, warmup=0.0, final_learning_rate=1e-4, weight_decay=0.0),
        train=TrainConfig(steps=1_000, batch_size=batch_size, sequence_length=256, dtype="float32",
                          remat="value", **more),
    )  # fmt: skip


class Ours:
    """The step of `train`."""

    def __init__(self, folder: Path, config: Config):
        mesh = make_mesh(config.mesh)
        self.program = Program.make(config, mesh)
        self.step = self.program.compile()
        self.state = self.program.first_state(load_params(open_source(folder), mesh, "float32", split=False))

    def __call__(self, tokens: np.ndarray) -> float:
        weights = np.ones((tokens.shape[0], tokens.shape[1] - 1), np.float32)
        batch = jax.device_put(Batch(tokens, weights), self.program.batch.tokens.sharding)
        self.state, metrics = self.step(self.state, batch)
        return float(metrics["loss"])


class Theirs:
    """transformers' GPT-NeoX with the same weights, read from a folder, and torch's optimizer."""

    def __init__(self, folder: Path, config: Config):
        import torch
        from transformers import GPTNeoXForCausalLM

        self.torch = torch
        self.model = GPTNeoXForCausalLM.from_pretrained(folder, dtype=torch.float32).train()
        chosen = config.optimizer
        betas = (chosen.b1, chosen.b2)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=chosen.learning_rate, betas=betas,
                                           eps=chosen.eps, weight_decay=0.0, fused=True)  # fmt: skip

    def __call__(self, tokens: np.ndarray) -> float:
        torch, ids = self.torch, self.torch.from_numpy(tokens.astype(np.int64))
        logits = self.model(ids[:, :-1], use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        return loss.item()


def in_turn(config: Config, folder: Path, benchmark: Benchmark) -> dict[str, Any]:
    """Seconds a step of both, turn by turn, and how far their losses are apart."""
    rng = np.random.default_rng(0)
    steppers: dict[str, Callable[[np.ndarray], float]] = {"ours": Ours(folder, config), "torch": Theirs(folder, config)}
    seconds: dict[str, list[float]] = {name: [] for name in steppers}
    apart = []
    for turn in range(-1, benchmark.turns):  # the first warms up and is not counted
        batches = [
            rng.integers(0, MODEL.vocab, (config.train.batch_size, 257), np.int32) for _ in range(benchmark.steps)
        ]
        losses = {}
        for name in list(steppers)[:: 1 if turn % 2 else -1]:
            start = time.perf_counter()
            losses[name] = [steppers[name](batch) for batch in batches]
            if turn >= 0:
                seconds[name].append((time.perf_counter() - start) / benchmark.steps)
        apart += [abs(a - b) for a, b in zip(*losses.values(), strict=True)]
        if turn >= 0:
            print(f"turn {turn + 1}: " + ", ".join(f"{name} {times[-1]:.2f} s" for name, times in seconds.items()))
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    tokens = config.train.batch_size * 256
    return {
        "seconds_a_step": {name: [round(value, 3) for value in times] for name, times in seconds.items()},
        "tokens_per_second": {name: round(tokens / value) for name, value in medians.items()},
        "times_as_fast": round(medians["torch"] / medians["ours"], 2),
        "largest_difference_of_losses": max(apart),
    }


def compile_seconds(benchmark: Benchmark) -> dict[int, float]:
    """Layers -> seconds to trace, lower and compile the step."""
    found = {}
    for layers in benchmark.depths:
        config = config_of(benchmark.batches[0], layers)
        start = time.perf_counter()
        Program.make(config, make_mesh(config.mesh)).compile()
        found[layers] = round(time.perf_counter() - start, 2)
    return found


def data_wait(folder: Path, benchmark: Benchmark) -> float:
    """Share of the time in which a run of `train`, on a corpus of random ids, waits for its batches."""
    rng = np.random.default_rng(0)
    with TokenFileWriter(folder / "text_document", vocab=MODEL.vocab) as writer:
        for _ in range(2_000):
            writer.add_document(rng.integers(0, MODEL.vocab, 500).tolist())
    config = config_of(benchmark.batches[0], log_every=5, eval_sequences=4)
    config = dataclasses.replace(
        config, data=DataConfig(paths=(str(folder),)), train=dataclasses.replace(config.train, steps=20)
    )
    with contextlib.redirect_stdout(io.StringIO()):
        train(config, folder / "run")
    return statistics.median(row["data_wait"] for row in read_log(folder / "run") if "data_wait" in row)


def main(benchmark: Benchmark) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_random_model(folder / "model", config_of(1))
        numbers: dict[str, Any] = {"parameters": MODEL.parameters()}
        for size in benchmark.batches:
            print(f"{size} x 256 tokens a step")
            numbers[f"{size} x 256 tokens"] = in_turn(config_of(size), folder / "model", benchmark)
        (folder / "data").mkdir()
        numbers["data_wait"] = round(data_wait(folder / "data", benchmark), 5)
    numbers["seconds_to_compile_by_layers"] = compile_seconds(benchmark)
    path = record.write("benchmark_train", "a training step against transformers and torch",
                        "python -m experiments.benchmarks.train", ("jax", "flax", "optax", "torch", "transformers"),
                        numbers)  # fmt: skip
    print(json.dumps(numbers, indent=1))
    print(f"wrote {path}")


if __name__ == "__main__":
    main(tyro.cli(Benchmark, prog="python -m experiments.benchmarks.train"))
