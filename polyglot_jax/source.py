"""What every holder of a model's weights offers, and their tensors under our names."""

from __future__ import annotations

import abc
import math
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from polyglot_jax.config import Config, InputError
from polyglot_jax.names import Tensor, family_of, is_dropped, tensors


class Source(Protocol):
    """Whatever holds a model's weights.

    .path .config .tokenizer (text of tokenizer.json, or None) .params ({name: shape and dtype, layers stacked})
    """

    path: Path
    config: Config
    tokenizer: str | None
    params: Mapping[str, Any]

    def read(self, name: str, layer: int | None = None, index: tuple[slice, ...] = ()) -> np.ndarray:
        """A parameter of ours, one layer of a stacked one, or a part of it, in the dtype it is stored in."""

    def chunk(self, name: str) -> tuple[int, ...]:
        """Shape of the parts in which a piece is stored; reading less than one costs as much."""


class Stored(NamedTuple):
    """A tensor of theirs as it is stored. dtype: None if weights come in no such one; kind: what the file calls it."""

    shape: tuple[int, ...]
    dtype: np.dtype | None
    kind: str
    file: str


class Outgoing(NamedTuple):
    """A tensor of theirs, and the dtype it is written in."""

    tensor: Tensor
    dtype: np.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.tensor.shape) * self.dtype.itemsize


def to_write(source: Source, dtype: Any = None) -> tuple[list[Outgoing], str]:
    """Every tensor of theirs, in the order of their files, and the name of the dtype that most bytes are in.

    dtype: that of all; None: of each parameter its own. InputError if it is none that weights are written in, or if
    none of their architectures computes what the model does.
    """
    outgoing = [
        Outgoing(tensor, np.dtype(dtype or source.params[tensor.paths[0]].dtype))
        for tensor in tensors(source.config.model)
    ]
    sizes: Counter[str] = Counter()
    for each in outgoing:
        sizes[each.dtype.name] += each.nbytes
    if other := sizes.keys() - {"float32", "float16", "bfloat16"}:
        raise InputError(f"dtype={min(other)}: weights are written in float32, float16 or bfloat16")
    return outgoing, sizes.most_common(1)[0][0]


def bits(array: np.ndarray) -> np.ndarray:
    """The values as unsigned integers, so that NaNs and zeros of either sign compare as they are stored."""
    return array.view(f"u{array.dtype.itemsize}")


class Leaf(NamedTuple):
    """A parameter of ours, layers stacked."""

    shape: tuple[int, ...]
    dtype: np.dtype


class Renamed(Source, abc.ABC):
    """Tensors of theirs under our names. Also .notes: what whoever converts them should know."""

    def __init__(self, path: Path, config: Config, stored: Mapping[str, Stored]):
        """InputError if the tensors stored are not those of the model: one missing, surplus, misshapen or mistyped."""
        self.path, self.config = path, config
        self.params: dict[str, Leaf] = {}
        self._where: dict[tuple[str, int | None], tuple[Tensor, int]] = {}
        left = dict(stored)
        for tensor in tensors(config.model):
            found = left.pop(tensor.key, None)
            if found is None:
                raise InputError(f"{path}: {tensor.key} is missing; the config makes it {tensor.shape}")
            if found.shape != tensor.shape:
                raise InputError(
                    f"{found.file}: {tensor.key} has shape {found.shape}; the config makes it {tensor.shape}: not the "
                    "same model"
                )
            if found.dtype is None:
                raise InputError(
                    f"{found.file}: {tensor.key} is {found.kind}; weights are float32, float16 or bfloat16"
                )
            for part, (name, shape) in enumerate(zip(tensor.paths, tensor.our_shapes, strict=True)):
                self._where[name, tensor.layer] = tensor, part
                lead = () if tensor.layer is None else (config.model.layers,)
                leaf = self.params.setdefault(name, Leaf((*lead, *shape), found.dtype))
                if leaf.dtype != found.dtype:
                    raise InputError(
                        f"{found.file}: {tensor.key} is {found.dtype} where the layers before it are {leaf.dtype}; "
                        "save the model in one dtype first"
                    )
        surplus = sorted(key for key in left if not is_dropped(key, config.model))
        if surplus:
            raise InputError(f"{path}: {surplus[0]} belongs to no weight of this model ({len(surplus)} such tensors)")
        self.notes: list[str] = []
        head = family_of(config.model).HEAD
        if head in left:
            self._check_tied(head, left.pop(head))
            self.notes.append(f"{head} is the embedding once more, and was left out")
        if left:
            self.notes.append(f"{len(left)} computed buffers were left out, such as {min(left)}")

    def _check_tied(self, head: str, stored: Stored) -> None:
        """InputError unless a head that the config calls tied has the bits of the embedding."""
        embedding, leaf = self._where["embed/kernel", None][0].key, self.params["embed/kernel"]
        same = (stored.shape, stored.dtype) == leaf and all(
            np.array_equal(*(bits(self.theirs(key)[start : start + 1024]) for key in (embedding, head)))
            for start in range(0, leaf.shape[0], 1024)
        )
        if not same:
            raise InputError(
                f"{stored.file}: {head} is not {embedding}, though config.json ties them; set tie_word_embeddings to "
                "false to use it, or remove it"
            )

    @abc.abstractmethod
    def theirs(self, key: str) -> np.ndarray:
        """One of their tensors, where possible as a view of the file."""

    def read(self, name: str, layer: int | None = None, index: tuple[slice, ...] = ()) -> np.ndarray:
        """As in `Source`; a view where `theirs` gives one."""
        tensor, part = self._where[name, layer]
        return tensor.to_ours(self.theirs(tensor.key))[part][index]

    def chunk(self, name: str) -> tuple[int, ...]:
        """As in `Source`: their files can be read from anywhere."""
        return (1,) * len(self.params[name].shape[name.startswith("layers/") :])
