"""GPT-NeoX's own checkpoints, read from any tensor-parallel size. The files are those of `convert.neox_files`.

They are mapped, and ranks merged a tensor at a time: memory does not grow with the model.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from convert import neox_config
from convert.neox_config import Settings
from convert.neox_files import find_tokenizer, layer_files, layer_name, rank_files, rank_name, read_states, step_folder
from polyglot_jax import names, torch_files
from polyglot_jax.config import Config, InputError
from polyglot_jax.families import gpt_neox as tables
from polyglot_jax.names import Tensor
from polyglot_jax.safetensors_files import DTYPES
from polyglot_jax.source import Renamed, Stored, bits

_DTYPES = {dtype.name: dtype for dtype in DTYPES.values()}
_CHECKED_ARGS = {"num_attention_heads", "max_position_embeddings", "model_parallel_size"}
_CHECKED_ARGS |= {key for _, key in tables.NEOX_SIZES}


class _Part(NamedTuple):
    """A tensor on one rank. origin: where it is, for messages."""

    tensor: Any
    origin: str

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.tensor.shape)

    @property
    def kind(self) -> str:
        return torch_files.kind(self.tensor)


class NeoxFolder(Renamed):
    """A checkpoint of GPT-NeoX under our names (see `source.Renamed`)."""

    def __init__(self, path: str | Path, config_files: Sequence[str | Path] = ()):
        """`config_files`: the run's .yml files, in place of the checkpoint's own.

        InputError, naming the file, if one is missing, damaged or of another step, or if a tensor or a setting is not
        this model's. A mp_rank file that cannot be read is only noted on stderr where the weights are elsewhere.
        """
        path = Path(path)
        self._folder = folder = step_folder(path)
        settings = Settings(path)
        configs = (file for kind in ("yml", "yaml", "json") for file in sorted((folder / "configs").glob(f"*.{kind}")))
        for file in map(Path, config_files or configs):
            settings.add_file(file)
        self._layer_files = layer_files(folder)
        states = read_states(folder, needed=not self._layer_files)
        for file, state in states.items():
            arguments = state.get("args")
            if isinstance(arguments, dict):
                settings.add({key: arguments[key] for key in _CHECKED_ARGS & arguments.keys()}, file)
        neox_config.refuse_other_models(settings)
        self._parts = self._read_layers(settings) if self._layer_files else _read_modules(folder, states, settings)
        config = neox_config.read_config(settings, self._sizes(settings))
        self.tokenizer = find_tokenizer(path, folder, settings)
        self._merged = lru_cache(maxsize=1)(self._merge)  # q, k and v ask for the same one in turn
        self._rules: dict[str, tuple[list[_Part], str]] = {}
        super().__init__(path, config, self._stored(config))
        if config.model.activation == "gelu_fast":
            self.notes.append("bias_gelu_fusion computes the tanh form of gelu, here gelu_fast")

    def _read_layers(self, settings: Settings) -> dict[tuple[int, str], list[_Part]]:
        """(number of the layer's file, name) -> the tensor on each rank."""
        ranks = _ranks(settings, {rank for _, rank in self._layer_files})
        found: dict[tuple[int, str], list[_Part]] = {}
        for number in sorted({number for number, _ in self._layer_files}):
            for rank in range(ranks):
                file = self._layer_file(number, rank)
                if not file.is_file():
                    raise InputError(f"{file}: missing, and the model is split over {ranks} ranks; fetch it again")
                for name, tensor in _state(torch_files.load(file), str(file)).items():
                    _append(found, (number, name), _Part(tensor, str(file)), rank)
        return _complete(found, ranks)

    def _layer_file(self, number: int, rank: int = 0) -> Path:
        return self._layer_files.get((number, rank)) or self._folder / layer_name(number, rank)

    def _need(self, number: int, alternatives: str) -> tuple[str, list[_Part]]:
        """The name, of alternatives, that a layer has, and its tensor on each rank."""
        present = [name for name in alternatives.split("|") if (number, name) in self._parts]
        if len(present) == 1:
            return present[0], self._parts[number, present[0]]
        where = str(self._layer_file(number)) if self._layer_files else f"{self._folder}: sequential.{number}"
        if self._layer_files and not self._layer_file(number).is_file():
            raise InputError(f"{where}: missing; the model's {alternatives.split('|')[0]} is in it; fetch it again")
        wanted = f"both {' and '.join(present)}" if present else f"no {' or '.join(alternatives.split('|'))}"
        raise InputError(f"{where}: has {wanted}; it is not of this model")

    def _sizes(self, settings: Settings) -> dict[str, int]:
        """Sizes as the tensors have them; the number of layers from where the final norm is."""
        rows = {row[0]: row for row in tables.NEOX_WEIGHTS}
        _, _, norm, _ = rows["gpt_neox.final_layer_norm.weight"]
        numbers = [number for number, name in self._parts if name == norm]
        offset = _number(rows["gpt_neox.final_layer_norm.weight"][1], layers=0)
        layers = numbers[0] - offset if numbers else settings.get("num_layers")
        if not isinstance(layers, int) or layers < 1:
            raise InputError(f"{self._folder}: has no {norm}, the final norm; fetch the last layers again")
        _, embedding = self._need(0, rows["gpt_neox.embed_in.weight"][2])
        _, up = self._need(2, rows["gpt_neox.layers.{}.mlp.dense_h_to_4h.weight"][2])
        for part in (*embedding, *up):
            if len(part.shape) != 2:
                raise InputError(f"{part.origin}: has a weight of shape {part.shape}; a matrix is expected")
        return {
            "vocab": sum(part.shape[0] for part in embedding),
            "layers": layers,
            "embed": embedding[0].shape[1],
            "mlp": sum(part.shape[0] for part in up),
        }

    def _stored(self, config: Config) -> dict[str, Stored]:
        """The merged tensors by Hugging Face's keys; InputError if ranks disagree or a tensor is nobody's."""
        left = dict(self._parts)
        stored = {}
        for tensor in names.tensors(config.model):
            number, alternatives, rule = place(tensor, config)
            name, parts = self._need(number, alternatives)
            del left[number, name]
            first = parts[0]
            for part in parts[1:]:
                if (part.shape, part.kind) != (first.shape, first.kind):
                    raise InputError(
                        f"{part.origin}: {name} is {part.kind} {part.shape}, but {first.kind} {first.shape} in "
                        f"{first.origin}; take all ranks from one checkpoint"
                    )
            rules = rule.split("|")
            rule = next((r for r in rules if _merged_shape(parts, r) == tensor.shape), rules[0])
            self._rules[tensor.key] = parts, rule
            shape = _merged_shape(parts, rule)
            stored[tensor.key] = Stored(shape, _DTYPES.get(first.kind), first.kind, first.origin)
        for (number, name), parts in left.items():
            origin, key = parts[0].origin, f"gpt_neox.layers.{number - 2}.{name}"
            if name == tables.NEOX_WEIGHTS[-1][2] and config.model.tied:
                raise InputError(
                    f"{origin}: {name} is there, but no_weight_tying is false or in no .yml; {neox_config.REMEDY}"
                )
            if not names.is_dropped(key, config.model):
                raise InputError(f"{origin}: {name} belongs to no weight of this model; it is of another kind")
            stored[key] = Stored((), None, parts[0].kind, origin)
        return stored

    def theirs(self, key: str) -> np.ndarray:
        """A tensor: of one rank as a view of the file, of several merged anew. InputError if copies differ."""
        return self._merged(key)

    def _merge(self, key: str) -> np.ndarray:
        parts, rule = self._rules[key]
        arrays = [torch_files.to_numpy(part.tensor) for part in parts]
        if len(arrays) == 1:
            return arrays[0]
        if rule == "copy":
            for part, array in zip(parts, arrays, strict=True):
                if not np.array_equal(bits(array), bits(arrays[0])):
                    raise InputError(
                        f"{part.origin}: its part of {key} differs from the copy in {parts[0].origin}, though ranks "
                        "share it; take all ranks from one checkpoint"
                    )
            return arrays[0]
        if rule == "sum":
            return _sum(arrays)
        return np.concatenate(arrays, axis=0 if rule == "rows" else 1)


def _ranks(settings: Settings, found: set[int]) -> int:
    """How many tensor-parallel ranks there must be, by the settings or else by the files."""
    ranks = settings.get("model_parallel_size", max(found) + 1)
    if not isinstance(ranks, int) or ranks <= max(found):
        raise InputError(
            f"{settings.where('model_parallel_size')}: model_parallel_size={ranks!r}, but there are files of rank "
            f"{max(found)}; these are not its settings"
        )
    return ranks


def _state(value: Any, origin: str) -> dict[str, Any]:
    if not isinstance(value, dict) or not value:
        raise InputError(f"{origin}: holds no tensors by name, so it is no layer of a model")
    return value


def _append(found: dict[tuple[int, str], list[_Part]], key: tuple[int, str], part: _Part, rank: int) -> None:
    parts = found.setdefault(key, [])
    if len(parts) != rank:
        raise InputError(f"{part.origin}: {key[1]} is not on every rank; take all ranks from one checkpoint")
    if any(name in key[1] for name in tables.NEOX_TRANSFORMER_ENGINE):
        raise InputError(
            f"{part.origin}: {key[1]} is of a layer of Transformer Engine, which this program does not read"
        )
    if not torch_files.is_tensor(part.tensor):
        raise InputError(f"{part.origin}: {key[1]} is no tensor; it is not of this model")
    parts.append(part)


def _complete(found: dict[tuple[int, str], list[_Part]], ranks: int) -> dict[tuple[int, str], list[_Part]]:
    for (_, name), parts in found.items():
        if len(parts) != ranks:
            raise InputError(f"{parts[0].origin}: {name} is not on every rank; take all ranks from one checkpoint")
    return found


def _read_modules(
    folder: Path, states: dict[Path, dict[str, Any]], settings: Settings
) -> dict[tuple[int, str], list[_Part]]:
    """(number of the layer, name) -> the tensor on each rank, in the sequential form."""
    files = rank_files(folder)
    if not files:
        raise InputError(f"{folder}: has neither layer files nor mp_rank files; fetch it again")
    ranks = _ranks(settings, set(files))
    found: dict[tuple[int, str], list[_Part]] = {}
    for rank in range(ranks):
        file = files.get(rank) or folder / rank_name(rank)
        if file not in states:
            raise InputError(f"{file}: missing, and the model is split over {ranks} ranks; fetch it again")
        module = states[file].get("module")
        if not isinstance(module, dict):
            raise InputError(
                f"{file}: holds no weights, and there are no layer files either; fetch the checkpoint again"
            )
        for key, tensor in module.items():
            match = re.fullmatch(r"sequential\.(\d+)\.(.+)", str(key))
            if not match:
                raise InputError(f"{file}: {key} belongs to no layer; the names of this model are sequential.N.NAME")
            _append(found, (int(match[1]), match[2]), _Part(tensor, str(file)), rank)
    return _complete(found, ranks)


def place(tensor: Tensor, config: Config) -> tuple[int, str, str]:
    """Number of its layer file, its names there and the rule by which ranks merge."""
    pattern = re.sub(r"\.\d+\.", ".{}.", tensor.key)
    _, number, alternatives, rule = next(row for row in tables.NEOX_WEIGHTS if row[0] == pattern)
    # In the parallel residual each rank adds its bias before the ranks are summed; else it is added once, after.
    if rule == "sum" and config.model.residual == "sequential":
        rule = "copy"
    return _number(number, layer=tensor.layer, layers=config.model.layers), alternatives, rule


def _number(rule: str, **sizes: int | None) -> int:
    """Of a layer file: "layers + 3" -> 15 for 12 layers."""
    return sum(int(term) if term.isdigit() else sizes[term] for term in rule.split(" + "))


def _merged_shape(parts: Sequence[_Part], rule: str) -> tuple[int, ...]:
    shape = list(parts[0].shape)
    axis = {"rows": 0, "columns": 1}.get(rule)
    if axis is not None and axis < len(shape):
        shape[axis] *= len(parts)
    return tuple(shape)


def _sum(arrays: Sequence[np.ndarray]) -> np.ndarray:
    """In float32, rounded once. What is alone, because the others are -0.0, keeps its bits, those of a NaN too."""
    first, *others = arrays
    with np.errstate(all="ignore"):  # infinities of both signs; sums that a half cannot hold
        total = first.astype(np.float32)
        for other in others:
            total += other.astype(np.float32)
        summed = total.astype(first.dtype)
    nothing = bits(np.full((), -0.0, first.dtype))
    alone = np.all([bits(other) == nothing for other in others], axis=0)
    return np.where(alone, bits(first), bits(summed)).view(first.dtype)
