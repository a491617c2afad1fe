"""A model of 10M parameters on the reviews of NSMC, with the released tokenizer, in 20 CPU minutes.

Command:   python -m experiments.nsmc --reviews nsmc_raw_reviews.tsv.gz --tokenizer tokenizer.json
Time:      about 13 minutes on 2 cores, 10 of them training
Expected:  held-out bits per token more than 1 below the unigram; what came out is in records/nsmc.json
Leaves:    runs/nsmc/{data,run} (checkpoint, log, curves.png) and experiments/records/nsmc.json, nsmc.png

Reviews: https://github.com/e9t/nsmc (CC0). One document is one review. The last 0.5 % of the tokens, those of the
newest reviews, are held out.
"""

from __future__ import annotations

import json
import math
import os
import platform
import shutil
import statistics
import subprocess
import time
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path

import numpy as np
import tyro

import polyglot_jax
from experiments.baselines import trigram_bits, unigram_bits
from polyglot_jax.config import Config, DataConfig, ModelConfig, OptimizerConfig, TrainConfig
from polyglot_jax.data import Batches
from polyglot_jax.log import read_log
from polyglot_jax.prepare.command import PrepareConfig, prepare
from polyglot_jax.tokenizer import Tokenizer
from polyglot_jax.train import train

RECORDS = Path(__file__).parent / "records"
PROMPTS = (
    "이 영화는", "정말 재미있게", "배우들의 연기가", "스토리가 너무", "시간 가는 줄", "기대했는데", "내 인생 최고의",
    "돈이 아깝다", "어릴 때 봤던", "평점이",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Nsmc:
    """Train on NSMC for a given time and record what came out."""

    reviews: str
    """nsmc_raw_reviews.tsv.gz, or any .tsv(.gz) with the column document."""
    tokenizer: str
    """The released tokenizer.json."""
    minutes: float = 10
    """Time to train for, by the speed of a short run; 10 minutes on 2 cores are 20 CPU minutes."""
    out: str = "runs/nsmc"
    """Folder of the token files and of the run."""


def base_config(data: Path) -> Config:
    """10,070,272 parameters, nearly 8 million of them the tied embedding."""
    return Config(
        model=ModelConfig(layers=3, embed=256, heads=4, mlp=1024, context=128, tied=True),
        optimizer=OptimizerConfig(learning_rate=2e-3, final_learning_rate=1e-4, warmup=0.05, b2=0.98, weight_decay=0.1),
        data=DataConfig(paths=(str(data),), heldout=0.005),
        train=TrainConfig(steps=30, batch_size=16, sequence_length=128, dtype="float32", remat="none",
                          eval_every=100, eval_sequences=64, checkpoint_every=200),
    )  # fmt: skip


def fitted(config: Config, minutes: float, out: Path) -> Config:
    """`config` with as many steps as fit into the time, by the speed of a short run, judged on all held-out text."""
    shutil.rmtree(out, ignore_errors=True)
    train(config, out)
    speed = [row["tokens_per_second"] for row in read_log(out) if "tokens_per_second" in row][-1]
    tokens_per_step = config.train.batch_size * config.train.sequence_length
    steps = max(100, round(minutes * 60 * speed / tokens_per_step / 100) * 100)
    return replace(config, train=replace(config.train, steps=steps, eval_sequences=0, eval_every=max(1, steps // 4)))


def bits_per_token(config: Config, heldout: list[dict[str, float]]) -> dict[str, float]:
    """Of the held-out text: before and after training, and under the baselines on the same split."""
    [corpus] = Batches(config).corpora
    tokens, split = np.asarray(corpus.tokens), len(corpus.tokens) - corpus.heldout_tokens
    valid = Tokenizer.load(config.data.paths[0]).valid_ids
    return {
        "before": heldout[0]["heldout_loss"] / math.log(2),
        "model": heldout[-1]["heldout_loss"] / math.log(2),
        "unigram": unigram_bits(tokens[:split], tokens[split:], valid),
        "trigram": trigram_bits(tokens[:split], tokens[split:], valid),
    }


def main(experiment: Nsmc) -> None:
    out = Path(experiment.out)
    described = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=True)
    commit = described.stdout.strip()
    manifest = prepare(
        PrepareConfig(text=(experiment.reviews,), column="document", quoting="none", tokenizer=experiment.tokenizer,
                      out=str(out / "data"), overwrite=True)
    )  # fmt: skip
    config = fitted(base_config(out / "data"), experiment.minutes, out / "trial")
    shutil.rmtree(out / "run", ignore_errors=True)
    start, cpu = time.perf_counter(), time.process_time()
    train(config, out / "run")
    minutes, cpu_minutes = (time.perf_counter() - start) / 60, (time.process_time() - cpu) / 60

    rows = read_log(out / "run")
    heldout = [row for row in rows if "heldout_loss" in row]
    bits = bits_per_token(config, heldout)
    tokens_per_byte = heldout[-1]["heldout_bits_per_byte"] / bits["model"]
    texts = polyglot_jax.load(out / "run").generate(PROMPTS, max_new_tokens=30, temperature=0.8, top_p=0.95)
    packages = {name: version(name) for name in ("jax", "flax", "optax", "numpy")}
    record = {
        "what": "NSMC reviews, 10M parameters, trained on CPU",
        "command": "python -m experiments.nsmc --reviews nsmc_raw_reviews.tsv.gz --tokenizer tokenizer.json "
        f"--minutes {experiment.minutes:g}",
        "commit": commit,
        "device": f"{platform.machine()} CPU, {os.cpu_count()} cores",
        "versions": packages | {"python": platform.python_version()},
        "config": json.loads(config.to_json()),
        "parameters": config.model.parameters(),
        "documents": manifest["documents"],
        "corpus_tokens": manifest["tokens"],
        "minutes": round(minutes, 2),
        "cpu_minutes": round(cpu_minutes, 2),
        "trained_tokens": config.train.steps * config.train.batch_size * config.train.sequence_length,
        "tokens_per_second": round(statistics.median(r["tokens_per_second"] for r in rows if "tokens_per_second" in r)),
        "bits_per_token": {name: round(value, 4) for name, value in bits.items()},
        "bits_per_byte": {name: round(value * tokens_per_byte, 4) for name, value in bits.items()},
        "below_unigram_bits_per_token": round(bits["unigram"] - bits["model"], 4),
        "continuations": dict(zip(PROMPTS, texts, strict=True)),
    }
    RECORDS.mkdir(exist_ok=True)
    (RECORDS / "nsmc.json").write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    shutil.copy(out / "run" / "curves.png", RECORDS / "nsmc.png")
    for name, value in bits.items():
        print(f"{name:<8} {value:7.4f} bits per token {value * tokens_per_byte:7.4f} bits per byte")
    for prompt, text in zip(PROMPTS, texts, strict=True):
        print(f"{prompt}|{text}")
    print(f"wrote {RECORDS / 'nsmc.json'}")
    if record["below_unigram_bits_per_token"] < 1:
        raise SystemExit("the model is less than 1 bit per token below the unigram: it has not learned enough")


if __name__ == "__main__":
    main(tyro.cli(Nsmc, prog="python -m experiments.nsmc"))
