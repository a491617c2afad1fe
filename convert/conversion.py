"""What conversions share: the source is spared, and what one should know of the weights is said on stderr."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from polyglot_jax import checkpoint
from polyglot_jax.checkpoint import Copied
from polyglot_jax.config import InputError
from polyglot_jax.files import beside
from polyglot_jax.source import Renamed
from polyglot_jax.weights import read_tokenizer


def check_apart(source: Path, destination: str | Path) -> None:
    """InputError if one is, or lies in, the other or what is cleared away for it: a source is never changed."""
    a, b = source.resolve(), Path(destination).resolve()
    if a.is_relative_to(b) or b.is_relative_to(a):
        raise InputError(f"{destination}: is, holds or lies in the source, {source}; choose another place")
    for place in beside(b):
        if a.is_relative_to(place):
            raise InputError(f"{source}: is in the way of writing {destination}; rename it, or choose another place")


def to_checkpoint(source: Renamed, destination: str | Path, dtype: Any = None, *, overwrite: bool = False) -> Copied:
    """Write a checkpoint of weights in another format; what one should know of them is said on stderr."""
    check_apart(source.path, destination)
    source.config, _ = read_tokenizer(source)
    copied = checkpoint.copy(destination, source, dtype, overwrite=overwrite)
    for note in source.notes:
        print(f"note: {note}", file=sys.stderr)
    say_non_finite(copied.non_finite)
    return copied


def say_non_finite(counts: dict[str, int]) -> None:
    """Notes on stderr of what was written infinite or NaN, be it that a narrower dtype could not hold it."""
    for where, count in counts.items():
        print(f"note: {where} has {count:,} infinite or NaN values", file=sys.stderr)
