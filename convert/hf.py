"""Hugging Face folders to checkpoints and back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from convert.conversion import check_apart, say_non_finite, to_checkpoint
from polyglot_jax import hf_folder
from polyglot_jax.checkpoint import Checkpoint, Copied
from polyglot_jax.config import InputError
from polyglot_jax.hf_folder import HfFolder
from polyglot_jax.weights import open_source


def hf_to_orbax(source: str, destination: str | Path, dtype: Any = None, *, overwrite: bool = False) -> Copied:
    """Write a checkpoint from a Hugging Face folder or hub name; dtype None keeps the source's own."""
    folder = open_source(source)
    if not isinstance(folder, HfFolder):
        raise InputError(f"{source}: is a checkpoint already, not a Hugging Face folder")
    return to_checkpoint(folder, destination, dtype, overwrite=overwrite)


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
