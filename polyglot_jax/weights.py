"""Opens whatever holds weights, and puts them on devices: a checkpoint or run of ours, a Hugging Face folder or name.

Every source has .config, .tokenizer (the text of a tokenizer.json, or None) and .leaves(), an iterator over
(name, layer or None, NumPy array). What is built from it, a stacked or a split tree, is decided here and nowhere else.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm

from polyglot_jax import checkpoint, hf_folder
from polyglot_jax.checkpoint import Checkpoint, flatten, unflatten
from polyglot_jax.config import Config, InputError
from polyglot_jax.hf_folder import HfFolder
from polyglot_jax.model import Params, Transformer
from polyglot_jax.sharding import shardings
from polyglot_jax.tokenizer import Tokenizer

_HUB_FILES = (
    "*.safetensors",
    "model.safetensors.index.json",
    "config.json",
    "tokenizer*.json",
    "special_tokens_map.json",
)


def open_source(path: str | Path) -> Checkpoint | HfFolder:
    """A checkpoint, a run (its newest checkpoint), a Hugging Face folder, or a name on the hub (downloaded once).

    InputError if `path` is none of these.
    """
    local = Path(path)
    if local.exists():
        newest = checkpoint.newest(local)
        if newest is not None:
            return Checkpoint(newest)
        if checkpoint.is_checkpoint(local):
            return Checkpoint(local)
        if hf_folder.is_hf_folder(local):
            return HfFolder(local)
        raise InputError(f"{path}: neither a checkpoint, nor a run with one, nor a Hugging Face model folder")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(path)):
        raise InputError(f"{path}: no such folder (and not a name like EleutherAI/polyglot-ko-1.3b)")
    return HfFolder(_download(str(path)))


def _download(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=list(_HUB_FILES)))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(f"{name}: no such folder here, and the hub did not give it: {reason}") from error


def read_tokenizer(source: Checkpoint | HfFolder) -> tuple[Config, Tokenizer | None]:
    """The source's tokenizer and its config with what the tokenizer says of the ids; InputError if they disagree."""
    if source.tokenizer is None:
        return source.config, None
    tokenizer = Tokenizer(source.tokenizer, origin=f"{source.path}/tokenizer.json")
    eos = tokenizer.special.get("<|endoftext|>", source.config.data.eos_id)
    return source.config.with_tokenizer(tokenizer.valid_ids, eos), tokenizer


def stacked(
    source: Checkpoint | HfFolder, dtype: Any = None, *, progress: bool = True
) -> Iterator[tuple[str, np.ndarray]]:
    """(name, array) of every parameter, layers stacked, each as soon as its last layer was read."""
    layers = source.config.model.layers
    stacks: dict[str, np.ndarray] = {}
    for name, layer, array in _shown(source, progress):
        if layer is None:
            yield name, array if dtype is None else array.astype(dtype)
        else:
            if name not in stacks:
                stacks[name] = np.empty((layers, *array.shape), dtype or array.dtype)
            stacks[name][layer] = array
            if layer == layers - 1:
                yield name, stacks.pop(name)


def load_params(source: Checkpoint | HfFolder, mesh: Mesh | None, dtype: Any = None, *, split: bool) -> Params:
    """The source's parameters as jax.Arrays, laid out on `mesh` (None: the first device), one leaf at a time.

    dtype: of the result (None: the source's own). split: a subtree for each layer, as decoding wants; else stacked.
    """
    axes = flatten(Transformer(source.config.model).axes())

    def place(array: np.ndarray, names: tuple[str, ...]) -> jax.Array:
        target = jax.devices()[0] if mesh is None else shardings(mesh, names)
        return jax.device_put(np.ascontiguousarray(array, dtype), target)

    if not split:
        return unflatten({name: place(array, axes[name]) for name, array in stacked(source, dtype)})
    return unflatten(
        {
            name.replace("layers/", f"layer_{layer}/"): place(array, axes[name][layer is not None :])
            for name, layer, array in _shown(source, True)
        }
    )


def _shown(source: Checkpoint | HfFolder, progress: bool) -> Iterator[tuple[str, int | None, np.ndarray]]:
    return iter(tqdm(source.leaves(), total=source.leaf_count, desc=f"reading {source.path.name}", unit="leaf",
                     disable=not progress))  # fmt: skip
