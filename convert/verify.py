"""Whether two places hold the same weights, and whether they compute the same."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import numpy as np
from tqdm import tqdm

from convert.hf import orbax_to_hf
from convert.neox import neox_to_orbax, open_any
from convert.neox_files import is_neox
from polyglot_jax import store
from polyglot_jax.config import InputError
from polyglot_jax.hf_folder import HfFolder
from polyglot_jax.language_model import load
from polyglot_jax.parallel import in_order
from polyglot_jax.source import Source, bits
from polyglot_jax.weights import open_source

_STEP = 2**22  # values compared at a time


def differences(a: str, b: str) -> Iterator[str]:
    """A line for each way in which the weights at `a` and `b` (of any kind) are not the same bits; none if they are.

    Settings that are no weights (an initialiser, a tokenizer) do not count.
    """
    first, second = open_any(a), open_any(b)
    shapes = [{name: tuple(leaf.shape) for name, leaf in source.params.items()} for source in (first, second)]
    if shapes[0] != shapes[1]:
        for name in sorted(shapes[0].keys() | shapes[1].keys()):
            ours, theirs = (shape.get(name, "absent") for shape in shapes)
            if ours != theirs:
                yield f"{name}: {ours} in {a}, {theirs} in {b}"
        return
    for name, leaf in first.params.items():
        if leaf.dtype != second.params[name].dtype:
            yield f"{name}: {leaf.dtype} in {a}, {second.params[name].dtype} in {b}"
            return

    def compare(piece: tuple[str, int | None]) -> tuple[str | None, int]:
        return _compare(first, second, *piece)

    total = sum(np.prod(leaf.shape) * leaf.dtype.itemsize for leaf in first.params.values())
    with tqdm(total=total, unit="B", unit_scale=True, desc="comparing") as progress:
        for line, size in in_order(compare, store.pieces(first.params)):
            progress.update(size)
            if line:
                yield line


def other_settings(a: str, b: str) -> list[str]:
    """ "model.rotary_pct: 0.25 in A, 1.0 in B" for each setting by which the same weights compute something else."""
    models = [asdict(open_any(path).config.model) for path in (a, b)]
    names = [name for name in models[0] if name != "init_std" and models[0][name] != models[1][name]]
    return [f"model.{name}: {models[0][name]} in {a}, {models[1][name]} in {b}" for name in names]


def _compare(first: Source, second: Source, name: str, layer: int | None) -> tuple[str | None, int]:
    """What differs in a piece, or None, and the piece's bytes; in parts, because a piece can be large."""
    shape = store.piece_shape(first.params, name, layer)
    rows = max(1, _STEP * shape[0] // int(np.prod(shape)))
    count, at, values = 0, None, None
    for start in range(0, shape[0], rows):
        index = (slice(start, min(start + rows, shape[0])),)
        ours, theirs = (source.read(name, layer, index) for source in (first, second))
        differ = bits(ours) != bits(theirs)
        if differ.any():
            if at is None:
                at = tuple(map(int, np.argwhere(differ)[0]))
                values, at = (ours[at], theirs[at]), [start + at[0], *at[1:]]
            count += int(differ.sum())
    size = int(np.prod(shape)) * first.params[name].dtype.itemsize
    if at is None:
        return None, size
    where = name if layer is None else f"{name}, layer {layer}"
    line = f"{where}: {count:,} of {int(np.prod(shape)):,} values differ, first {at}: {values[0]} and {values[1]}"
    return line, size


def logit_differences(a: str, b: str, length: int) -> np.ndarray:
    """float64[length]: the largest |difference| of float32 logits at each position, ours against transformers'.

    Two rows of random tokens. Ours runs `a` and transformers `b`, or an export of it; the other way round if only `a`
    is a Hugging Face folder. InputError if torch or transformers is not installed, or if the vocabularies differ.
    """
    if length < 1:
        raise InputError(f"--tokens {length}: must be above 0")
    try:
        import torch
        from transformers import AutoModelForCausalLM
    except ImportError as error:
        raise InputError("--logits runs transformers beside this: pip install torch transformers") from error
    if isinstance(open_any(a), HfFolder) and not isinstance(open_any(b), HfFolder):
        a, b = b, a
    with tempfile.TemporaryDirectory() as folder:
        ours, exported = load(_without_neox(a, Path(folder, "a")), dtype="float32"), _without_neox(b, Path(folder, "b"))
        source = open_source(exported)
        if not isinstance(source, HfFolder):
            orbax_to_hf(exported, Path(folder, "hf"))
        model, other = ours.config.model, source.config.model
        if model.vocab != other.vocab:
            raise InputError(f"{a} has {model.vocab} ids and {b} {other.vocab}: their logits cannot be compared")
        length = min(length, model.context, other.context)
        tokens = np.random.default_rng(0).integers(0, ours.config.data.valid_ids or model.vocab, (2, length))
        where = source.path if isinstance(source, HfFolder) else Path(folder, "hf")
        theirs = AutoModelForCausalLM.from_pretrained(where, dtype=torch.float32).eval()
        with torch.no_grad():
            reference = theirs(torch.from_numpy(tokens)).logits.numpy()
        return np.abs(np.asarray(ours.logits(tokens), np.float64) - reference).max(axis=(0, 2))


def _without_neox(path: str, folder: Path) -> str:
    """`path`, or a checkpoint made at `folder` of the one of GPT-NeoX that is there."""
    if not is_neox(path):
        return path
    neox_to_orbax(path, folder)
    return str(folder)
