"""Hugging Face folders to checkpoints and back, and whether two hold the same weights."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from polyglot_jax import checkpoint, hf_folder
from polyglot_jax.checkpoint import Checkpoint, flatten, unflatten
from polyglot_jax.config import InputError
from polyglot_jax.hf_folder import HfFolder
from polyglot_jax.model import abstract_params
from polyglot_jax.weights import open_source, read_tokenizer, stacked


def hf_to_orbax(source: str, destination: str | Path, dtype: Any = None, *, overwrite: bool = False) -> None:
    """Write a checkpoint from a Hugging Face folder or hub name; dtype None keeps the source's own."""
    folder = open_source(source)
    if not isinstance(folder, HfFolder):
        raise InputError(f"{source}: is a checkpoint already, not a Hugging Face folder")
    config, _ = read_tokenizer(folder)
    params = unflatten(dict(stacked(folder, dtype)))
    checkpoint.save(destination, config, params, tokenizer=folder.tokenizer, overwrite=overwrite)


def orbax_to_hf(
    source: str, destination: str | Path, dtype: Any = None, *, shard_bytes: int = 10**9, overwrite: bool = False
) -> None:
    """Write a Hugging Face folder from a checkpoint or a run; dtype None keeps the source's own."""
    opened = open_source(source)
    if not isinstance(opened, Checkpoint):
        raise InputError(f"{source}: is a Hugging Face folder already, not a checkpoint")
    dtypes = {leaf.dtype for leaf in opened.params.values()}
    if dtype is None and len(dtypes) > 1:
        raise InputError(f"{source}: holds {', '.join(map(str, sorted(dtypes, key=str)))}; choose one with --dtype")
    dtype = np.dtype(dtype or dtypes.pop())
    hf_folder.write(
        destination,
        opened.config,
        lambda name, layer: opened.read(name, layer).astype(dtype, copy=False),
        dtype,
        opened.tokenizer,
        shard_bytes=shard_bytes,
        overwrite=overwrite,
    )


def differences(a: str, b: str) -> Iterator[str]:
    """A line for each way in which the weights at `a` and `b` (of any kind) are not the same bits; none if they are.

    Settings that are no weights (an initialiser, a tokenizer) do not count.
    """
    first, second = open_source(a), open_source(b)
    shapes = [
        {name: leaf.shape for name, leaf in flatten(abstract_params(s.config.model)).items()} for s in (first, second)
    ]
    if shapes[0] != shapes[1]:
        for name in sorted(shapes[0].keys() | shapes[1].keys()):
            ours, theirs = (shape.get(name, "absent") for shape in shapes)
            if ours != theirs:
                yield f"{name}: {ours} in {a}, {theirs} in {b}"
        return
    for name, layer, ours in tqdm(first.leaves(), total=first.leaf_count, desc="comparing", unit="leaf"):
        theirs = second.read(name, layer)
        where = name if layer is None else f"{name}, layer {layer}"
        if ours.dtype != theirs.dtype:
            yield f"{where}: {ours.dtype} in {a}, {theirs.dtype} in {b}"
            continue
        differ = _bits(ours) != _bits(theirs)
        if differ.any():
            at = tuple(map(int, np.argwhere(differ)[0]))
            count = f"{int(differ.sum()):,} of {differ.size:,} values differ"
            yield f"{where}: {count}, first {list(at)}: {ours[at]} and {theirs[at]}"


def _bits(array: np.ndarray) -> np.ndarray:
    """The values as unsigned integers, so that NaNs and zeros of either sign compare as they are stored."""
    return array.view(f"u{array.dtype.itemsize}")
