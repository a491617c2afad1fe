"""Generation against `transformers` with torch: the same weights, prompts and tokens, on one machine, in turns.

Command:   python -m experiments.benchmarks.generate --tokenizer tokenizer.json
Needs:     pip install -r requirements-test.txt
Goal:      at least 1.5 times the tokens a second at batch 1 and 8; at batch 1 at least 70 % of the memory bandwidth
           measured in the same run; streaming at most 10 % dearer; records/benchmark_generate.json

A model of random weights (56M parameters, float32) continues prompts of 32 and 512 tokens by 128, greedily. Bandwidth
is what summing an array of 256 MB reaches; a token is counted as the weights it reads (all but the embedding) and the
slots of the cache that hold something. The time to a first piece of text is that of a new process, from the import on,
without compiled programs and with those that JAX kept in a folder, and of a process that made one before.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from experiments import record
from experiments.random_model import MODEL, benchmark_folder

BATCHES, PROMPTS, NEW = (1, 8), (32, 512), 128
COLD = """
import sys, time
start = time.perf_counter()
import polyglot_jax
lm = polyglot_jax.load(sys.argv[1])
loaded = time.perf_counter()
next(lm.stream("봄이 오면 마을 사람들은", stop=[]))
print(loaded - start, time.perf_counter() - loaded)
"""


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """Time generation against transformers with torch."""

    tokenizer: str
    """The released tokenizer.json."""
    turns: int = 5
    """How often each is timed."""
    out: str = "runs/benchmark_generate"
    """Folder for the model and compiled programs; emptied at the end."""


def seconds(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def bandwidth() -> float:
    """Bytes a second that a sum over 256 MB reads; the best of five."""
    import jax
    import jax.numpy as jnp

    array = jnp.ones(2**26, jnp.float32)
    total = jax.jit(jnp.sum)
    total(array).block_until_ready()
    return array.nbytes / min(seconds(lambda: total(array).block_until_ready()) for _ in range(5))


def speeds(model: str, turns: int) -> dict[str, Any]:
    """Tokens a second of both for each batch and prompt; medians, and every turn."""
    import numpy as np
    import torch
    from transformers import AutoModelForCausalLM

    import polyglot_jax

    ours = polyglot_jax.load(model)
    theirs = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    rng, found = np.random.default_rng(0), {}
    weights = 4 * (MODEL.parameters() - MODEL.vocab * MODEL.embed)
    for batch in BATCHES:
        for length in PROMPTS:
            prompts = rng.integers(4, 30_000, (batch, length))
            ids, rows = torch.from_numpy(prompts), prompts.tolist()

            def we(rows: list[list[int]] = rows, new: int = NEW) -> Any:
                return ours.complete(rows, stop=[], max_new_tokens=new, temperature=0)

            def they(ids: Any = ids) -> Any:
                with torch.inference_mode():
                    return theirs.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW,
                                           min_new_tokens=NEW, do_sample=False, pad_token_id=2,
                                           suppress_tokens=list(range(30_003, MODEL.vocab)))  # fmt: skip

            made = np.array([row[0].ids for row in we()])
            same = int((they().numpy()[:, length:] == made).all(1).sum())
            we(new=1)
            times: dict[str, list[float]] = {"ours": [], "theirs": [], "ours, first token": [], "bandwidth": []}
            for _ in range(turns):
                times["ours"].append(seconds(we))
                times["theirs"].append(seconds(they))
                times["ours, first token"].append(seconds(lambda: we(new=1)))
                times["bandwidth"].append(bandwidth())
            median = {name: statistics.median(values) for name, values in times.items()}
            step = (median["ours"] - median["ours, first token"]) / (NEW - 1)
            cache = 2 * 4 * MODEL.layers * MODEL.embed * (length + NEW / 2) * batch
            found[f"batch {batch}, prompt {length}"] = {
                "tokens_per_second": {name: round(batch * NEW / median[name], 1) for name in ("ours", "theirs")},
                "times_as_fast": round(median["theirs"] / median["ours"], 2),
                "share_of_bandwidth_while_decoding": round((weights + cache) / step / median["bandwidth"], 3),
                "rows_with_the_same_tokens": same,
                "seconds": {name: [round(value, 3) for value in times[name]] for name in ("ours", "theirs")},
                "gigabytes_per_second": round(median["bandwidth"] / 1e9, 1),
            }
            print(f"batch {batch}, prompt {length}: {json.dumps(found[f'batch {batch}, prompt {length}'])}", flush=True)
    return found


def streaming(model: str, turns: int) -> dict[str, Any]:
    """What streaming costs over generating the same, and the time to the first piece where that was made before."""
    import polyglot_jax

    lm, prompt = polyglot_jax.load(model), "봄이 오면 마을 사람들은 강가에 모여"
    sample = {"stop": [], "max_new_tokens": NEW, "temperature": 0}
    whole, pieces, first = [], [], []
    for _ in range(turns + 1):
        whole.append(seconds(lambda: lm.generate(prompt, **sample)))
        pieces.append(seconds(lambda: list(lm.stream(prompt, **sample))))
        first.append(seconds(lambda: next(lm.stream(prompt, **sample))))
    cost = statistics.median(pieces[1:]) / statistics.median(whole[1:]) - 1
    return {"stream_over_generate": round(cost, 3), "first_piece_warm_s": round(statistics.median(first[1:]), 3)}


def first_piece(model: str, out: Path, turns: int) -> dict[str, Any]:
    """Medians of new processes: seconds to load, and from there to the first piece."""
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    kept = {"JAX_COMPILATION_CACHE_DIR": str(out / "compiled"), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    found: dict[str, Any] = {}
    for name, more, times in (("cold", {}, turns), ("compiled before", kept, turns + 1)):
        runs = []
        for _ in range(times):
            done = subprocess.run([sys.executable, "-c", COLD, model], env=environment | more, check=True, text=True,
                                  stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)  # fmt: skip
            runs.append([float(value) for value in done.stdout.split()])
        found[name] = [round(statistics.median(kind), 2) for kind in zip(*runs[-turns:], strict=True)]
    return {"seconds_to_load_and_to_the_first_piece": found}


def main(benchmark: Benchmark) -> None:
    with benchmark_folder(benchmark.out, benchmark.tokenizer) as out:
        model = str(out / "model")
        numbers = {
            "parameters": MODEL.parameters(),
            "load_average": os.getloadavg(),
            "speeds": speeds(model, benchmark.turns),
            **streaming(model, benchmark.turns),
            **first_piece(model, out, min(3, benchmark.turns)),
        }
    command = f"python -m experiments.benchmarks.generate --tokenizer tokenizer.json --turns {benchmark.turns}"
    packages = ("jax", "torch", "transformers", "tokenizers", "numpy")
    path = record.write("benchmark_generate", "generation against transformers with torch", command, packages, numbers)
    print(f"{json.dumps({name: value for name, value in numbers.items() if name != 'speeds'}, indent=1)}\nwrote {path}")


if __name__ == "__main__":
    main(tyro.cli(Benchmark, prog="python -m experiments.benchmarks.generate"))
