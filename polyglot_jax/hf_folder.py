"""Hugging Face model folders: config.json, safetensors in one file or shards, tokenizer files.

Read and written tensor by tensor: memory stays at a few tensors however large the model.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open
from tqdm import tqdm

from polyglot_jax import names
from polyglot_jax.config import Config, InputError
from polyglot_jax.files import new_folder
from polyglot_jax.tokenizer import END

# numpy dtype -> (its code in a safetensors header, its name in config.json)
_DTYPES = {
    np.dtype(np.float32): ("F32", "float32"),
    np.dtype(np.float16): ("F16", "float16"),
    np.dtype(ml_dtypes.bfloat16): ("BF16", "bfloat16"),
}


def is_hf_folder(path: str | Path) -> bool:
    """Whether `path` has a config.json of Hugging Face's kind (one of ours names no model_type)."""
    try:
        return "model_type" in json.loads((Path(path) / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False


class HfFolder:
    """A folder with config.json and safetensors. .config .tokenizer (text of tokenizer.json, or None)"""

    def __init__(self, path: str | Path):
        """InputError naming the file if something is missing, damaged, unknown or of the wrong shape."""
        self.path = Path(path)
        self.config = names.config_from_theirs(self._json("config.json"), source=str(self.path / "config.json"))
        tokenizer = self.path / "tokenizer.json"
        self.tokenizer = tokenizer.read_bytes().decode() if tokenizer.is_file() else None
        self._files = self._where()
        self._check()

    def _json(self, name: str) -> Any:
        try:
            return json.loads((self.path / name).read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise InputError(f"{self.path / name}: missing; is {self.path} a Hugging Face model folder?") from error
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise InputError(f"{self.path / name}: not JSON: {error}") from error

    def _where(self) -> dict[str, Path]:
        """Key -> the file that holds it."""
        if (self.path / "model.safetensors.index.json").is_file():
            index = self._json("model.safetensors.index.json")
            try:
                return {key: self.path / name for key, name in index["weight_map"].items()}
            except (AttributeError, KeyError, TypeError) as error:
                raise InputError(
                    f"{self.path}/model.safetensors.index.json: no weight_map of file names; fetch it again"
                ) from error
        file = self.path / "model.safetensors"
        if not file.is_file():
            raise InputError(f"{self.path}: has neither model.safetensors nor model.safetensors.index.json")
        with self._open(file) as tensors:
            return dict.fromkeys(tensors.keys(), file)

    def _open(self, file: Path) -> Any:
        try:
            return safe_open(file, framework="np")
        except FileNotFoundError as error:
            raise InputError(f"{file}: missing, though model.safetensors.index.json names it") from error
        except SafetensorError as error:
            raise InputError(f"{file}: damaged or not safetensors: {error}; fetch it again") from error

    def _check(self) -> None:
        expected = {tensor.key: tensor.shape for tensor in names.tensors(self.config.model)}
        missing = sorted(expected.keys() - self._files.keys())
        if missing:
            raise InputError(f"{self.path}: {missing[0]} is missing, and {len(missing) - 1} more tensors")
        extra = sorted(
            key for key in self._files.keys() - expected.keys() if not names.is_dropped(key, self.config.model)
        )
        if extra:
            raise InputError(f"{self.path}: {extra[0]} belongs to no weight of this model ({len(extra)} such tensors)")
        for file in sorted(set(self._files.values())):
            with self._open(file) as tensors:
                there = set(tensors.keys())
                for key in (key for key, place in self._files.items() if place == file and key in expected):
                    if key not in there:
                        raise InputError(f"{file}: {key} is missing, though model.safetensors.index.json names it")
                    shape = tuple(tensors.get_slice(key).get_shape())
                    if shape != expected[key]:
                        raise InputError(
                            f"{file}: {key} has shape {shape}; config.json makes it {expected[key]}: not the same model"
                        )

    @property
    def leaf_count(self) -> int:
        """How many `leaves` there are."""
        return sum(len(tensor.paths) for tensor in names.tensors(self.config.model))

    def read(self, name: str, layer: int | None = None) -> np.ndarray:
        """One parameter of ours, or one layer of a stacked one, in the file's dtype."""
        tensor = next(t for t in names.tensors(self.config.model) if name in t.paths and t.layer == layer)
        with self._open(self._files[tensor.key]) as tensors:
            return tensor.to_ours(tensors.get_tensor(tensor.key))[tensor.paths.index(name)]

    def leaves(self) -> Iterator[tuple[str, int | None, np.ndarray]]:
        """(our name, layer or None, array in the file's dtype) of every parameter, in the order of the files."""
        for tensor in names.tensors(self.config.model):
            with self._open(self._files[tensor.key]) as tensors:
                ours = tensor.to_ours(tensors.get_tensor(tensor.key))
            yield from ((name, tensor.layer, array) for name, array in zip(tensor.paths, ours, strict=True))


def write(
    path: str | Path,
    config: Config,
    read: Callable[[str, int | None], np.ndarray],
    dtype: Any,
    tokenizer: str | None = None,
    *,
    shard_bytes: int = 10**9,
    overwrite: bool = False,
) -> None:
    """Write a folder that AutoModelForCausalLM and AutoTokenizer open.

    `read(name, layer)` gives our parameters one at a time; all are of `dtype`. The folder appears when it is whole;
    InputError if it exists (unless `overwrite`).
    """
    dtype = np.dtype(dtype)
    if dtype not in _DTYPES:
        raise InputError(f"dtype={dtype}: Hugging Face folders are written in float32, float16 or bfloat16")
    with new_folder(path, is_hf_folder, overwrite=overwrite) as folder:
        _write_shards(folder, list(names.tensors(config.model)), read, dtype, shard_bytes)
        _dump(folder / "config.json", names.config_to_theirs(config, _DTYPES[dtype][1]))
        _dump(folder / "generation_config.json", {"_from_model_config": True, "eos_token_id": config.data.eos_id})
        if tokenizer is not None:
            _write_tokenizer(folder, config, tokenizer)


def _dump(file: Path, value: Any) -> None:
    file.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _write_tokenizer(path: Path, config: Config, tokenizer: str) -> None:
    (path / "tokenizer.json").write_bytes(tokenizer.encode())
    special = [token["content"] for token in json.loads(tokenizer)["added_tokens"] if token["special"]]
    # A name the tokenizer lacks would get an id of its own, beyond the model's rows.
    ends = {"eos_token": END, "pad_token": END} if END in special else {}
    _dump(
        path / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            **ends,
            "model_max_length": config.model.context,
            "clean_up_tokenization_spaces": False,
            # GPT-NeoX takes no token types, and generate() refuses them.
            "model_input_names": ["input_ids", "attention_mask"],
        },
    )
    _dump(path / "special_tokens_map.json", {"additional_special_tokens": special, **ends})


def _write_shards(
    path: Path,
    tensors: list[names.Tensor],
    read: Callable[[str, int | None], np.ndarray],
    dtype: np.dtype,
    shard_bytes: int,
) -> None:
    """Files of at most `shard_bytes` (or one tensor), and the index when there are several."""
    sizes = [int(np.prod(tensor.shape)) * dtype.itemsize for tensor in tensors]
    shards: list[list[int]] = [[]]
    for i, size in enumerate(sizes):
        if shards[-1] and sum(sizes[j] for j in shards[-1]) + size > shard_bytes:
            shards.append([])
        shards[-1].append(i)
    weight_map = {}
    with tqdm(total=sum(sizes), unit="B", unit_scale=True, desc=f"writing {path.stem}") as progress:
        for number, shard in enumerate(shards, 1):
            several = len(shards) > 1
            file = f"model-{number:05d}-of-{len(shards):05d}.safetensors" if several else "model.safetensors"
            with open(path / file, "wb") as out:
                out.write(_header([tensors[i] for i in shard], dtype))
                for i in shard:
                    array = tensors[i].to_theirs([read(name, tensors[i].layer) for name in tensors[i].paths])
                    if array.dtype != dtype or array.shape != tensors[i].shape:
                        raise ValueError(f"{tensors[i].key}: {array.dtype}{array.shape}, not {dtype}{tensors[i].shape}")
                    # Bytes, because NumPy's own file writing does not know bfloat16.
                    out.write(np.ascontiguousarray(array).view(np.uint8).reshape(-1).data)
                    weight_map[tensors[i].key] = file
                    progress.update(sizes[i])
    if len(shards) > 1:
        _dump(path / "model.safetensors.index.json", {"metadata": {"total_size": sum(sizes)}, "weight_map": weight_map})


def _header(tensors: list[names.Tensor], dtype: np.dtype) -> bytes:
    """The start of a safetensors file: u64 length, then JSON of dtype, shape and byte range, padded to 8 bytes."""
    table: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in tensors:
        end = offset + int(np.prod(tensor.shape)) * dtype.itemsize
        table[tensor.key] = {"dtype": _DTYPES[dtype][0], "shape": tensor.shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
