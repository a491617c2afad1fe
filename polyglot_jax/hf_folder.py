"""Hugging Face model folders: config.json, weights in one file or shards, tokenizer files.

Weights are read from safetensors, or from PyTorch's .bin where there are none; written as safetensors. Both go by
views of mapped files and by slabs of a tensor: memory does not grow with the model.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from polyglot_jax import names, safetensors_files, store, torch_files
from polyglot_jax.config import Config, InputError
from polyglot_jax.files import new_folder, write_checksums
from polyglot_jax.names import Tensor
from polyglot_jax.parallel import in_order
from polyglot_jax.safetensors_files import DTYPES, SafetensorsFile
from polyglot_jax.source import Outgoing, Renamed, Source, Stored, to_write
from polyglot_jax.tokenizer import END, read_text

# In the order transformers looks for them; an index ends in .index.json.
WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)


_SLOW_TOKENIZERS = ("vocab.json", "sentencepiece.bpe.model", "spiece.model", "tokenizer.model", "vocab.txt")
"""Of transformers' tokenizers that are written in Python."""

_EXPORTED = re.compile(
    r"config\.json|generation_config\.json|(model|pytorch_model)[\w-]*\.(safetensors|bin)(\.index\.json)?|checksums\.json|"
    r"tokenizer\.json|tokenizer_config\.json|special_tokens_map\.json|\..*"
)


def is_hf_folder(path: str | Path) -> bool:
    """Whether `path` has a config.json of Hugging Face's kind (one of ours names no model_type), or a damaged one."""
    file = Path(path) / "config.json"
    try:
        return "model_type" in json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        return True
    except (OSError, TypeError, RecursionError):
        return False


def _is_export(path: Path) -> bool:
    """Whether `path` holds a model as `write` makes them, and nothing that would be lost with it."""
    return is_hf_folder(path) and all(item.is_file() and _EXPORTED.fullmatch(item.name) for item in path.iterdir())


class HfFolder(Renamed):
    """A folder with config.json and weights, under our names (see `source.Renamed`)."""

    def __init__(self, path: str | Path):
        """InputError naming the file if something is missing, damaged, unknown or of the wrong shape."""
        path = Path(path)
        theirs = _json(path / "config.json")
        config = names.config_from_theirs(theirs, source=str(path / "config.json"))
        self.tokenizer = read_text(path / "tokenizer.json")
        files, index = _find(path)
        self._views: dict[str, Any] = {}
        stored: dict[str, Stored] = {}
        for file in files:
            opened = _BinFile(file) if file.suffix == ".bin" else SafetensorsFile(file)
            for key, (shape, kind, *_) in opened.table.items():
                if key in stored:
                    raise InputError(f"{file}: {key} is in {stored[key].file} too; one of the two does not belong here")
                stored[key] = Stored(shape, DTYPES.get(kind), kind, str(file))
                self._views[key] = opened.view
        for key, name in index.items():
            if key not in stored or Path(stored[key].file).name != name:
                raise InputError(f"{path / name}: {key} is missing, though the index names it; fetch both again")
        super().__init__(path, config, stored)
        slow = next((name for name in _SLOW_TOKENIZERS if (path / name).is_file()), None)
        if self.tokenizer is None and slow:
            self.notes.append(
                f"{slow} is left out: tokenizers are read from tokenizer.json, which AutoTokenizer.from_pretrained(...)"
                ".save_pretrained(...) of transformers writes"
            )
        said, found = theirs.get("dtype") or theirs.get("torch_dtype"), self.params["embed/kernel"].dtype.name
        if said not in (None, "auto", found):
            self.notes.append(f"config.json says {said}, the weights are {found}, and that is what they stay")

    def theirs(self, key: str) -> np.ndarray:
        """A tensor as a view of its file."""
        return self._views[key](key)


class _BinFile:
    """A state dict of PyTorch, with the interface of a SafetensorsFile."""

    def __init__(self, path: Path):
        self._tensors = torch_files.load(path)
        if not isinstance(self._tensors, dict) or not all(map(torch_files.is_tensor, self._tensors.values())):
            raise InputError(f"{path}: holds more than tensors by name, so it is no model's weights")
        kinds = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
        self.table = {}
        for key, tensor in self._tensors.items():
            kind = torch_files.kind(tensor)
            self.table[str(key)] = (tuple(tensor.shape), kinds.get(kind, kind))

    def view(self, key: str) -> np.ndarray:
        return torch_files.to_numpy(self._tensors[key])


def _json(file: Path) -> Any:
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"{file}: missing; is {file.parent} a Hugging Face model folder?") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{file}: not JSON: {error}") from error
    if not isinstance(value, dict):
        raise InputError(f"{file}: not an object of fields")
    return value


def _find(path: Path) -> tuple[list[Path], dict[str, str]]:
    """The files of weights; key -> name of the file that holds it, as the index says, where there is one."""
    found = next((path / name for name in WEIGHT_FILES if (path / name).is_file()), None)
    if found is None:
        raise InputError(f"{path}: has no weights: none of {', '.join(WEIGHT_FILES)}")
    if found.suffix != ".json":
        return [found], {}
    where = _json(found).get("weight_map")
    # A name with a folder in it could lead anywhere.
    if not where or not isinstance(where, dict) or not all(n == Path(str(n)).name for n in where.values()):
        raise InputError(f"{found}: no weight_map of file names; fetch it again")
    return [path / name for name in sorted(set(where.values()))], where


def write(
    path: str | Path,
    source: Source,
    dtype: Any = None,
    *,
    shard_bytes: int = 10**9,
    overwrite: bool = False,
) -> dict[str, int]:
    """Write the weights, config and tokenizer of `source` as AutoModelForCausalLM and AutoTokenizer open them.

    dtype: float32, float16 or bfloat16; None: of each parameter its own. The folder appears when it is whole;
    InputError if it exists (unless `overwrite`). Returns how many values of which tensors are infinite or NaN.
    """
    if shard_bytes < 1:
        raise InputError(f"shard_bytes={shard_bytes}: must be above 0")
    tensors, common_dtype = to_write(source, dtype)
    config = names.config_to_theirs(source.config, common_dtype)
    with new_folder(path, _is_export, overwrite=overwrite) as folder:
        non_finite = _write_shards(folder, source, tensors, shard_bytes)
        if source.tokenizer is not None:
            _write_tokenizer(folder, source.config, source.tokenizer)
        _dump(
            folder / "generation_config.json", {"_from_model_config": True, "eos_token_id": source.config.data.eos_id}
        )
        _dump(folder / "config.json", config)  # with it the folder is a model, so it comes last
    return non_finite


def _dump(file: Path, value: Any) -> None:
    file.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _write_tokenizer(path: Path, config: Config, tokenizer: str) -> None:
    (path / "tokenizer.json").write_bytes(tokenizer.encode())
    added = json.loads(tokenizer).get("added_tokens", ())
    special = {token["content"]: token["id"] for token in added if token["special"]}
    # A name the tokenizer lacks would get an id of its own, beyond the model's rows.
    end = END if END in special else next((name for name in special if special[name] == config.data.eos_id), None)
    ends = {"eos_token": end, "pad_token": end} if end else {}
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
    _dump(path / "special_tokens_map.json", {"additional_special_tokens": list(special), **ends})


def _write_shards(path: Path, source: Source, tensors: list[Outgoing], shard_bytes: int) -> dict[str, int]:
    """Files of at most `shard_bytes` (or one tensor), and the index when there are several; returns as `write`."""
    total = sum(tensor.nbytes for tensor in tensors)
    shards: list[list[Outgoing]] = [[]]
    for tensor in tensors:
        if shards[-1] and sum(other.nbytes for other in shards[-1]) + tensor.nbytes > shard_bytes:
            shards.append([])
        shards[-1].append(tensor)
    files = [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
    if len(shards) == 1:
        files = ["model.safetensors"]
    non_finite: Counter[str] = Counter()
    with tqdm(total=total, unit="B", unit_scale=True, desc=f"writing {path.stem}") as progress:

        def write_one(file: str, shard: list[Outgoing]) -> dict[str, int]:
            table = [(tensor.key, tensor.shape, dtype) for tensor, dtype in shard]
            return safetensors_files.write(path / file, table, _slabs(source, shard, progress, non_finite))

        # A few at once: the system lets one write at a time into a file.
        written = in_order(lambda item: write_one(*item), zip(files, shards, strict=True))
        checksums = dict(zip(files, written, strict=True))
    if len(shards) > 1:
        weight_map = {tensor.key: file for file, shard in zip(files, shards, strict=True) for tensor, _ in shard}
        _dump(path / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map})
    write_checksums(path, checksums)
    return dict(non_finite)


def _slabs(source: Source, shard: list[Outgoing], progress: tqdm, non_finite: Counter[str]) -> Iterator[np.ndarray]:
    """The values of a shard's tensors, slab by slab, read ahead by a few threads; counts infs and NaNs by key."""

    def read(item: tuple[Tensor, int | None, np.dtype, tuple[slice, ...]]) -> tuple[str, np.ndarray, int]:
        tensor, layer, dtype, index = item
        values = tensor.to_theirs([source.read(name, layer, index) for name in tensor.paths])
        values = store.rounded(values, dtype)
        return tensor.key, values, store.count_non_finite(values)

    items = (
        (slab, tensor.layer, dtype, index) for tensor, dtype in shard for slab, index in tensor.slabs(source.chunk)
    )
    for key, array, count in in_order(read, items):
        # Before the values go: after the last of a file nobody comes back here.
        progress.update(array.nbytes)
        if count:
            non_finite[key] += count
        yield array
