"""Reads a family's tables in both directions: their config and tensors to ours, ours to theirs.

Each row of WEIGHTS is one arrow between axis names. The sizes come from the config by those names, so an arrow is its
own inverse, and the two directions cannot drift apart. Nothing here opens a file or knows JAX.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import einops
import numpy as np

from polyglot_jax.config import Config, InputError, ModelConfig, from_plain

FAMILIES = {"gpt_neox": "polyglot_jax.families.gpt_neox"}


def family(model_type: str) -> ModuleType:
    """The tables of `model_type`, Hugging Face's name of an architecture."""
    if model_type not in FAMILIES:
        raise InputError(
            f"model_type={model_type!r}: not an architecture this project has; it has {', '.join(FAMILIES)}"
        )
    return importlib.import_module(FAMILIES[model_type])


def _flat(config: Mapping[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, dict) and key.endswith("_parameters"):
            flat |= {f"{key}.{inner}": item for inner, item in value.items()}
        elif not (value is None and key.endswith("_parameters")):
            flat[key] = value
    return flat


def config_from_theirs(theirs: Mapping[str, Any], source: str = "config.json") -> Config:
    """Our Config from a Hugging Face config, refusing by name whatever is neither handled nor known to be harmless."""
    if "model_type" not in theirs:
        raise InputError(f"{source}: has no model_type, so it is not a Hugging Face model config")
    try:
        tables = family(theirs["model_type"])
    except InputError as error:
        raise InputError(f"{source}: {error}") from error
    left = {key: value for key, value in _flat(theirs).items() if key not in tables.HARMLESS}
    sections: dict[str, dict[str, Any]] = {"model": {}, "data": {}}
    for ours, keys, default, values in tables.FIELDS:
        found = {key: left.pop(key) for key in keys.split("|") if key in left}
        if any(value != next(iter(found.values())) for value in found.values()):
            raise InputError(f"{source}: {' and '.join(f'{k}={v}' for k, v in found.items())} contradict each other")
        value = next((value for value in found.values() if value is not None), default)
        if values is not None:
            meant = [mine for their, mine in values.items() if their == value]
            if not meant:
                raise InputError(f"{source}: {keys}={value!r}: must be one of {', '.join(map(repr, values))}")
            value = meant[0]
        section, name = ours.split(".")
        sections[section][name] = value
    for key, only in tables.REQUIRED.items():
        value = left.pop(key, only)
        if value != only:
            raise InputError(f"{source}: {key}={value!r}: this model is implemented for {only!r} only")
    if left:
        key, value = next(iter(left.items()))
        raise InputError(f"{source}: {key}={value!r}: unknown setting; it may change what the model computes")
    # A length of its own is training's business; only the context comes from their file.
    sections["train"] = {"sequence_length": min(2048, sections["model"]["context"])}
    try:
        return from_plain(Config, sections)
    except InputError as error:
        raise InputError(f"{source}: {error}") from error


def config_to_theirs(config: Config, dtype: str, model_type: str = "gpt_neox") -> dict[str, Any]:
    """A Hugging Face config.json that says what `config` says; the inverse of `config_from_theirs`."""
    tables = family(model_type)
    theirs: dict[str, Any] = {"architectures": [tables.ARCHITECTURE], "model_type": model_type, "torch_dtype": dtype}
    for ours, keys, _, values in tables.FIELDS:
        section, name = ours.split(".")
        value = getattr(getattr(config, section), name)
        if values is not None:
            value = {mine: their for their, mine in values.items()}[value]
        theirs[keys.split("|")[0]] = value
    theirs |= {key: value for key, value in tables.REQUIRED.items() if "." not in key and value is not None}
    return theirs


@dataclass(frozen=True)
class Tensor:
    """One tensor of theirs and the leaves of ours it holds: usually one; q, k and v in a fused one."""

    key: str
    paths: tuple[str, ...]
    layer: int | None
    left: str
    right: str
    sizes: Mapping[str, int]

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape in their file."""
        dims = re.findall(r"\([^)]*\)|\S+", self.left)
        return tuple(int(np.prod([self.sizes[axis] for axis in dim.strip("()").split()])) for dim in dims)

    def to_ours(self, theirs: np.ndarray) -> Sequence[np.ndarray]:
        """Their array -> ours, one for each of `paths`; views where the arrow allows."""
        ours = self._arrow(theirs, self.left, self.right)
        return list(ours) if len(self.paths) > 1 else [ours]

    def to_theirs(self, ours: Sequence[np.ndarray]) -> np.ndarray:
        """Our arrays, in the order of `paths` -> theirs."""
        return self._arrow(np.stack(ours) if len(self.paths) > 1 else ours[0], self.right, self.left)

    def _arrow(self, array: np.ndarray, left: str, right: str) -> np.ndarray:
        names = set(re.findall(r"\w+", left))
        return einops.rearrange(array, f"{left} -> {right}", **{n: self.sizes[n] for n in names})


def tensors(model: ModelConfig, model_type: str = "gpt_neox") -> Iterator[Tensor]:
    """Every tensor of a model of theirs, in the order of their files."""
    tables = family(model_type)
    rows = [row for row in tables.WEIGHTS if not (model.tied and row[1] == tables.HEAD)]
    per_layer = [i for i, row in enumerate(rows) if "{}" in row[1]]
    first, last = per_layer[0], per_layer[-1] + 1

    def tensor(row: tuple[str, str, str], layer: int | None) -> Tensor:
        paths, (left, right) = tuple(row[0].split()), row[2].split(" -> ")
        key = row[1] if layer is None else row[1].format(layer)
        return Tensor(key, paths, layer, left, right, model.sizes | {"part": len(paths)})

    yield from (tensor(row, None) for row in rows[:first])
    for layer in range(model.layers):
        yield from (tensor(row, layer) for row in rows[first:last])
    yield from (tensor(row, None) for row in rows[last:])


def is_dropped(key: str, model: ModelConfig, model_type: str = "gpt_neox") -> bool:
    """Whether `key` is one of their computed buffers, or a tied head stored all the same."""
    tables = family(model_type)
    name = re.sub(r"\.\d+\.", ".{}.", key)
    return name in tables.DROPPED or (model.tied and key == tables.HEAD)
