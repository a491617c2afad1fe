"""Reads a family's tables in both directions: their config and tensors to ours, ours to theirs.

Each row of WEIGHTS is one arrow between axis names. The sizes come from the config by those names, so an arrow is its
own inverse, and the two directions cannot drift apart. No config says which family its model belongs to: it is the one
whose FIXED fields have the model's values. Nothing here opens a file or knows JAX.
"""

from __future__ import annotations

import dataclasses
import importlib
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import einops
import numpy as np

from polyglot_jax.config import Config, InputError, ModelConfig, from_plain

FAMILIES = ("gpt_neox", "gpt2", "gptj", "xglm")


def family(model_type: str) -> ModuleType:
    """The tables of `model_type`, Hugging Face's name of an architecture."""
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise InputError(
            f"model_type={model_type!r}: not an architecture this project has; it has {', '.join(FAMILIES)}"
        )
    return importlib.import_module(f"polyglot_jax.families.{model_type}")


def family_of(model: ModelConfig) -> ModuleType:
    """The tables of the architecture that computes what `model` does.

    InputError if there is none; it names the fields in which the nearest one differs.
    """
    differences = {name: _differences(model, family(name)) for name in FAMILIES}
    # What positions are tells the families apart; the other fields are what one might have set wrongly.
    nearest = min(FAMILIES, key=lambda name: ("model.positions" in differences[name], len(differences[name])))
    if differences[nearest]:
        has = ", ".join(f"{field}={_get(model, field)!r}" for field in differences[nearest])
        needs = ", ".join(f"{field}={' or '.join(map(repr, values))}" for field, values in differences[nearest].items())
        raise InputError(f"{has}: Hugging Face's {nearest}, the nearest to this model, needs {needs}")
    return family(nearest)


def _differences(model: ModelConfig, tables: ModuleType) -> dict[str, Sequence[Any]]:
    """Field -> the values the family has, of each field in which `model` has another."""
    known = {field: (only,) for field, only in tables.FIXED.items()}
    known |= {field: list(values.values()) for field, _, _, values in tables.FIELDS if isinstance(values, dict)}
    return {field: values for field, values in known.items() if _get(model, field) not in values}


def _get(model: ModelConfig, field: str) -> Any:
    return getattr(model, field.removeprefix("model."))


def _size(model: Mapping[str, Any], name: str) -> int:
    if type(model[name]) is not int or model[name] < 1:
        raise InputError(f"depends on model.{name}={model[name]!r}, which must be a whole number above 0")
    return model[name]


def _four_widths_if_null(mlp: Any, model: Mapping[str, Any]) -> Any:
    return 4 * _size(model, "embed") if mlp is None else mlp


def _share_of_a_head(dims: Any, model: Mapping[str, Any]) -> float:
    head_dim = _size(model, "embed") // _size(model, "heads")
    if type(dims) is not int or dims % 2 or not 2 <= dims <= head_dim:
        raise InputError(f"must be an even number, from 2 to the {head_dim} dimensions of a head")
    share = dims / head_dim
    # The nearest float may lie below, and then model.rotary_dims, which rounds down, would be one less.
    return share if int(head_dim * share) == dims else math.nextafter(share, 1)


def _one_id(ids: Any, model: Mapping[str, Any]) -> Any:
    if ids is None or (isinstance(ids, list) and len(ids) != 1):
        raise InputError("generation stops at one id; leave the one to stop at")
    return ids[0] if isinstance(ids, list) else ids


# What a table's dict cannot say, by the name the tables have for it: to ours, from their value and the fields of our
# model that stand above it in the table; to theirs, from our value and our model.
CONVERSIONS: dict[str, tuple[Callable[[Any, Mapping[str, Any]], Any], Callable[[Any, ModelConfig], Any]]] = {
    "4 x embed if null": (_four_widths_if_null, lambda mlp, model: mlp),
    "dims of a head": (_share_of_a_head, lambda share, model: model.rotary_dims),
    "one id": (_one_id, lambda eos_id, model: eos_id),
}


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
    left = _flat(theirs)
    for key, values in tables.REQUIRED.items():
        value = left.pop(key, values[0])
        if value not in values:
            known = ", ".join(map(repr, values))
            raise InputError(f"{source}: {key}={value!r}: this model is implemented for {known} only")
    left = {key: value for key, value in left.items() if key not in tables.HARMLESS}
    sections: dict[str, dict[str, Any]] = {"model": {}, "data": {}}
    for field, value in tables.FIXED.items():
        sections["model"][field.removeprefix("model.")] = value
    for ours, keys, default, values in tables.FIELDS:
        found = {key: left.pop(key) for key in keys.split("|") if key in left}
        if any(value != next(iter(found.values())) for value in found.values()):
            raise InputError(f"{source}: {' and '.join(f'{k}={v}' for k, v in found.items())} contradict each other")
        value = next(iter(found.values()), default)
        try:
            value = _from_theirs(value, values, sections["model"])
        except InputError as error:
            raise InputError(f"{source}: {next(iter(found), keys)}={value!r}: {error}") from error
        section, name = ours.split(".")
        sections[section][name] = value
    if left:
        key, value = next(iter(left.items()))
        raise InputError(f"{source}: {key}={value!r}: unknown setting; it may change what the model computes")
    # A length of its own is training's business; only the context comes from their file.
    context = sections["model"]["context"]
    sections["train"] = {"sequence_length": min(2048, context) if type(context) is int else 2048}
    try:
        return from_plain(Config, sections)
    except InputError as error:
        raise InputError(f"{source}: {error}") from error


def _from_theirs(value: Any, values: Mapping[Any, Any] | str | None, model: Mapping[str, Any]) -> Any:
    if values is None:
        return value
    if isinstance(values, str):
        return CONVERSIONS[values][0](value, model)
    meant = [mine for their, mine in values.items() if their == value]
    if not meant:
        raise InputError(f"must be one of {', '.join(map(repr, values))}")
    return meant[0]


def config_to_theirs(config: Config, dtype: str) -> dict[str, Any]:
    """A Hugging Face config.json that says what `config` says; the inverse of `config_from_theirs`.

    InputError if none of the architectures computes what `config.model` does.
    """
    tables = family_of(config.model)
    theirs = {"architectures": [tables.ARCHITECTURE], "model_type": tables.MODEL_TYPE, "torch_dtype": dtype}
    for ours, keys, _, values in tables.FIELDS:
        section, name = ours.split(".")
        value = getattr(getattr(config, section), name)
        if isinstance(values, str):
            value = CONVERSIONS[values][1](value, config.model)
        elif values is not None:
            value = {mine: their for their, mine in values.items()}[value]
        theirs[keys.split("|")[0]] = value
    return theirs


@dataclass(frozen=True)
class Tensor:
    """One tensor of theirs and the leaves of ours it holds: usually one; q, k and v in a fused one.

    key: its name among theirs; paths: the leaves' names; layer: which, if there is one for each; left, right: its axes
    in their file and in ours, einops' words, "part" being the axis of `paths`; sizes: of those axes.
    """

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
        return tuple(math.prod(self.sizes[axis] for axis in dim.strip("()").split()) for dim in dims)

    @property
    def our_shapes(self) -> tuple[tuple[int, ...], ...]:
        """The shape of each of `paths`, of one layer where there are layers."""
        return (tuple(self.sizes[axis] for axis in self.right.split() if axis != "part"),) * len(self.paths)

    def to_ours(self, theirs: np.ndarray) -> Sequence[np.ndarray]:
        """Their array -> ours, one for each of `paths`: views of theirs, so nothing is read or copied yet."""
        ours = einops.rearrange(theirs, f"{self.left} -> {self.right}", **self._axes())
        return list(ours) if len(self.paths) > 1 else [ours]

    def _axes(self) -> dict[str, int]:
        return {name: self.sizes[name] for name in re.findall(r"\w+", self.left)}

    def to_theirs(self, ours: Sequence[np.ndarray]) -> np.ndarray:
        """Our arrays, in the order of `paths` -> theirs; a view where one array has their order in memory."""
        if len(self.paths) == 1:
            return einops.rearrange(ours[0], f"{self.right} -> {self.left}", **self._axes())
        theirs = np.empty(self.shape, ours[0].dtype)
        for view, array in zip(self.to_ours(theirs), ours, strict=True):
            view[...] = array
        return theirs

    def slabs(self, chunk: Callable[[str], tuple[int, ...]]) -> Iterator[tuple[Tensor, tuple[slice, ...]]]:
        """Cut into runs of their rows: (a tensor of just these rows, where in ours its values are).

        `chunk(path)` is the shape of the parts in which ours are stored; no slab is smaller, so none is read twice.
        """
        first = self.left.strip("(").split()[0].rstrip(")")
        axes = [axis for axis in self.right.split() if axis != "part"]
        if first not in axes:  # q, k and v one after the other
            yield self, ()
            return
        axis = axes.index(first)
        step = max(chunk(path)[axis] for path in self.paths)
        for start in range(0, self.sizes[first], step):
            stop = min(start + step, self.sizes[first])
            index = (*(slice(None) for _ in range(axis)), slice(start, stop))
            yield dataclasses.replace(self, sizes={**self.sizes, first: stop - start}), index


def tensors(model: ModelConfig) -> Iterator[Tensor]:
    """Every tensor of a model of theirs, in the order of their files, one by one.

    InputError if none of the architectures computes what `model` does.
    """
    tables = family_of(model)
    rows = [row for row in tables.WEIGHTS if _has(model, row, tables)]
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


def _has(model: ModelConfig, row: tuple[str, str, str], tables: ModuleType) -> bool:
    """Whether `model` has the weight of a row; a family's models differ in two of them."""
    if re.fullmatch("layers/attention/[^ ]*/bias.*", row[0]):
        return model.attention_bias
    return not (model.tied and row[1] == tables.HEAD)


def is_dropped(key: str, model: ModelConfig) -> bool:
    """Whether `key` is one of their computed buffers, or a tied head stored all the same."""
    tables = family_of(model)
    name = re.sub(r"\.\d+\.", ".{}.", key)
    return name in tables.DROPPED or (model.tied and key == tables.HEAD)
