"""The whole line on the Korean sample in experiments/sample: `make demo`, or python -m experiments.quickstart.

Text -> tokenizer -> token files -> a trained model -> Hugging Face and back, bit for bit -> continuations.
Time: about 2 minutes on 2 CPU cores. Expected: held-out bits per byte from 2.63 to about 1.81, unigram 2.35.
Every command it runs is printed first, so that it can be run again by hand.
"""

from __future__ import annotations

import json
import math
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import tyro

from experiments.baselines import unigram_bits

SAMPLE = Path(__file__).parent / "sample"
PROMPTS = ("봄이 오면", "옛날 어느 마을에", "할머니는", "도서관에서")


@dataclass(frozen=True)
class Quickstart:
    """Train, convert and generate on the Korean sample that comes with the project."""

    out: str = "demo"
    """Folder for everything it makes."""
    steps: int = 240
    """Training steps; many more only learn the sample by heart."""
    overwrite: bool = False
    """Remove what an earlier demo left in --out and start anew."""


def run(*command: str) -> None:
    """Print a command and run it with this Python."""
    print(f"\n$ python {shlex.join(command)}", flush=True)
    subprocess.run([sys.executable, *command], check=True)


def main(demo: Quickstart) -> None:
    out = Path(demo.out)
    if demo.overwrite:
        for product in ("tokenizer", "data", "run", "huggingface", "checkpoint"):
            shutil.rmtree(out / product, ignore_errors=True)
    elif out.exists():
        raise SystemExit(f"error: {out}: exists; remove it, or pass --overwrite to start anew")
    tokenizer, data, trained = str(out / "tokenizer"), str(out / "data"), str(out / "run")
    text = ("--text", str(SAMPLE), "--txt-documents", "file")
    verb = ("-m", "polyglot_jax")
    run(*verb, "tokenizer", *text, "--vocab-size", "1533", "--out", tokenizer)
    run(*verb, "prepare", *text, "--tokenizer", tokenizer, "--out", data)
    run(
        *verb, "train", "--preset", "tiny", "--data", data, "--out", trained, "--model.vocab", "1536",
        "--train.steps", str(demo.steps), "--train.eval-every", "60", "--train.checkpoint-every", "120",
    )  # fmt: skip
    hf, back = str(out / "huggingface"), str(out / "checkpoint")
    run("-m", "convert", "orbax-to-hf", trained, hf)
    run("-m", "convert", "hf-to-orbax", hf, back)
    run("-m", "convert", "verify", trained, back)
    run(*verb, "generate", "--checkpoint", hf, "--prompt", *PROMPTS, "--sample.temperature", "0.7",
        "--sample.top-p", "0.9", "--sample.max-new-tokens", "48")  # fmt: skip
    summary(out)


def summary(out: Path) -> None:
    """What was learned, and where everything is."""
    from polyglot_jax.config import Config
    from polyglot_jax.data import Batches
    from polyglot_jax.log import read_log

    config = Config.from_json((out / "run" / "config.json").read_text(encoding="utf-8"))
    heldout = [row for row in read_log(out / "run") if "heldout_loss" in row]
    [corpus] = Batches(config).corpora
    cut = len(corpus.tokens) - corpus.heldout_tokens
    unigram = unigram_bits(corpus.tokens[:cut], corpus.tokens[cut:], config.data.valid_ids)
    per_token = heldout[0]["heldout_bits_per_byte"] / heldout[0]["heldout_loss"]  # bits per byte of a nat per token
    documents = json.loads((out / "data" / "manifest.json").read_text(encoding="utf-8"))["documents"]
    best = min(heldout, key=lambda row: row["heldout_loss"])
    print(
        f"\nheld-out bits per byte, on the end of {documents} documents that training never saw:\n"
        f"  before training      {heldout[0]['heldout_bits_per_byte']:.3f}\n"
        f"  unigram frequencies  {unigram * math.log(2) * per_token:.3f}\n"
        f"  after step {heldout[-1]['step']:<5}     {heldout[-1]['heldout_bits_per_byte']:.3f}\n"
        f"  (best at step {best['step']}: {best['heldout_bits_per_byte']:.3f})\n\n"
        f"tokenizer      {out / 'tokenizer'}\n"
        f"token files    {out / 'data'}\n"
        f"run, log       {out / 'run'}\n"
        f"curves         {out / 'run' / 'curves.png'}\n"
        f"Hugging Face   {out / 'huggingface'}\n"
        f"checkpoint     {out / 'checkpoint'}\n\n"
        f'next: python -m polyglot_jax generate --checkpoint {out / "run"} --prompt "바다는" --sample.temperature 0.7\n'
        f"or train longer: python -m polyglot_jax train --preset tiny --data {out / 'data'} --out runs/mine "
        "--model.vocab 1536 --train.steps 1000"
    )


if __name__ == "__main__":
    main(tyro.cli(Quickstart, prog="python -m experiments.quickstart"))
