"""What weights in int8 cost: perplexity of held-out text, and bytes, beside bfloat16 and float32.

Command:   python -m experiments.int8 --checkpoint runs/nsmc/run --data runs/nsmc/data
Needs:     a run of experiments.nsmc, whose newest reviews, the last 0.5 % of the tokens, were held out
Expected:  perplexity within 1 % of bfloat16's in at most 0.55 of its bytes; records/int8.json
Time:      9 minutes on 2 busy cores
"""

from __future__ import annotations

import itertools
import json
from dataclasses import dataclass
from typing import Any

import jax
import tyro

import polyglot_jax
from experiments import record
from polyglot_jax.data import find_corpus
from polyglot_jax.evaluate.perplexity import Counts, documents, windows
from polyglot_jax.token_files import TokenFile

KINDS = {"float32": ("float32", None), "bfloat16": ("bfloat16", None), "int8": ("bfloat16", "int8")}


@dataclass(frozen=True, kw_only=True)
class Int8:
    """Compare weights in int8 with those of bfloat16 on held-out documents."""

    checkpoint: str
    """A run or checkpoint."""
    data: str
    """The token files it was trained on."""
    heldout: float = 0.005
    """Share of the tokens, at the end, that was held out (the run's data.heldout)."""


def heldout_starts(data: str, share: float) -> int:
    """Number of the first document that lies within the last `share` of the tokens."""
    corpus = TokenFile(find_corpus(data))
    border = len(corpus.tokens) - int(len(corpus.tokens) * share)
    return next(i for i, start in enumerate(corpus.document_starts) if start >= border)


def measured(command: Int8, kind: str) -> dict[str, Any]:
    dtype, quantize = KINDS[kind]
    lm = polyglot_jax.load(command.checkpoint, dtype=dtype, quantize=quantize)
    context, counts, pairs = lm.config.model.context, Counts(), []
    for document in itertools.islice(
        documents(command.data, lm.tokenizer), heldout_starts(command.data, command.heldout), None
    ):
        counts.add(document)
        pairs += windows(document.ids, lm.config.data.eos_id, context, context // 2)
    counts.nats = -sum(float(batch.log_probabilities.sum()) for batch in lm.scored(pairs))
    return counts.summary() | {"weight_bytes": sum(leaf.nbytes for leaf in jax.tree.leaves(lm.params))}


def main(command: Int8) -> None:
    found = {kind: measured(command, kind) for kind in KINDS}
    half, byte = found["bfloat16"], found["int8"]
    numbers = found | {
        "perplexity_over_bfloat16": round(byte["perplexity"] / half["perplexity"], 5),
        "bytes_over_bfloat16": round(byte["weight_bytes"] / half["weight_bytes"], 3),
    }
    line = f"python -m experiments.int8 --checkpoint {command.checkpoint} --data {command.data}"
    path = record.write("int8", "weights in int8 beside bfloat16, held-out text", line, ("jax", "numpy"), numbers)
    print(f"{json.dumps(numbers, indent=1)}\nwrote {path}")


if __name__ == "__main__":
    main(tyro.cli(Int8, prog="python -m experiments.int8"))
