"""Hugging Face folders to checkpoints and back."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from polyglot_jax import checkpoint, hf_folder
from polyglot_jax.checkpoint import Checkpoint, Copied
from polyglot_jax.config import InputError
from polyglot_jax.files import beside
from polyglot_jax.hf_folder import HfFolder
from polyglot_jax.source import Renamed
from polyglot_jax.weights import open_source, read_tokenizer


def check_apart(source: Path, destination: str | Path) -> None:
    """InputError if one is, or lies in, the other or what is cleared away for it: a source is never changed."""
    a, b = source.resolve(), Path(destination).resolve()
    if a.is_relative_to(b) or b.is_relative_to(a):
        raise InputError(f"{destination}: is, holds or lies in the source, {source}; choose another place")
    for place in beside(b):
        if a.is_relative_to(place):
            raise InputError(f"{source}: is in the way of writing {destination}; rename it, or choose another place")


def hf_to_orbax(source: str, destination: str | Path, dtype: Any = None, *, overwrite: bool = False) -> Copied:
    """Write a checkpoint from a Hugging Face folder or hub name; dtype None keeps the source's own."""
    folder = open_source(source)
    if not isinstance(folder, HfFolder):
        raise InputError(f"{source}: is a checkpoint already, not a Hugging Face folder")
    return copy(folder, destination, dtype, overwrite=overwrite)


def copy(source: Renamed, destination: str | Path, dtype: Any = None, *, overwrite: bool = False) -> Copied:
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


def orbax_to_hf(
    source: str, destination: str | Path, dtype: Any = None, *, shard_bytes: int = 10**9, overwrite: bool = False
) -> None:
    """Write a Hugging Face folder from a checkpoint or a run; dtype None keeps the source's own.

    Values that are infinite or NaN, in that dtype, are counted on stderr by the names of their tensors.
    """
    opened = open_source(source)
    if not isinstance(opened, Checkpoint):
        raise InputError(f"{source}: is a Hugging Face folder already, not a checkpoint")
    check_apart(opened.path, destination)
    say_non_finite(hf_folder.write(destination, opened, dtype, shard_bytes=shard_bytes, overwrite=overwrite))
