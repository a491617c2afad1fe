"""Hugging Face folders of random weights, of any size, made shard by shard; and the model of the benchmarks."""

from __future__ import annotations

import contextlib
import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tqdm import tqdm

from polyglot_jax import names, safetensors_files
from polyglot_jax.config import Config, DataConfig, ModelConfig
from polyglot_jax.names import Tensor

_ROWS = 2**22  # values drawn at a time
MODEL = ModelConfig(layers=8, embed=512, heads=8, mlp=2048)
"""56M parameters, with the released tokenizer's vocabulary: what benchmarks of running a model run."""


@contextlib.contextmanager
def benchmark_folder(out: str, tokenizer: str) -> Iterator[Path]:
    """The folder `out`, removed in the end, with MODEL in its folder model; tokenizer: a file, the released one."""
    folder = Path(out).resolve()
    if folder.exists():
        raise SystemExit(f"error: {folder}: exists; remove it, or choose another place with --out")
    text = Path(tokenizer).read_text(encoding="utf-8")
    try:
        write_random_model(folder / "model", Config(model=MODEL, data=DataConfig(valid_ids=30_003)), tokenizer=text)
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def write_random_model(path: Path, config: Config, tokenizer: str | None = None, shard_bytes: int = 10**9) -> None:
    """Make the folder `path`: float16, uniform with the standard deviation of a new model; norms as in one."""
    path.mkdir(parents=True)
    rng = np.random.Generator(np.random.SFC64(0))
    shards: list[list[Tensor]] = [[]]
    for tensor in names.tensors(config.model):
        if shards[-1] and sum(map(_bytes, shards[-1])) + _bytes(tensor) > shard_bytes:
            shards.append([])
        shards[-1].append(tensor)
    weight_map = {}
    total = sum(_bytes(tensor) for shard in shards for tensor in shard)
    with tqdm(total=total, unit="B", unit_scale=True, desc=f"making {path.name}") as progress:
        for number, shard in enumerate(shards, 1):
            file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            table = [(tensor.key, tensor.shape, np.dtype(np.float16)) for tensor in shard]
            values = (part for tensor in shard for part in _values(rng, tensor, config.model.init_std, progress))
            safetensors_files.write(path / file, table, values)
            weight_map |= {tensor.key: file for tensor in shard}
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (path / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    (path / "config.json").write_text(json.dumps(names.config_to_theirs(config, "float16"), indent=2) + "\n")
    if tokenizer is not None:
        (path / "tokenizer.json").write_text(tokenizer, encoding="utf-8")


def _bytes(tensor: Tensor) -> int:
    return 2 * math.prod(tensor.shape)


def _values(rng: np.random.Generator, tensor: Tensor, std: float, progress: tqdm) -> Iterator[np.ndarray]:
    """A tensor's values in parts: a matrix uniform on +-std sqrt(3), biases 0, scales 1."""
    size = math.prod(tensor.shape)
    for start in range(0, size, _ROWS):
        count = min(_ROWS, size - start)
        if len(tensor.shape) > 1:
            part = ((rng.random(count, np.float32) - 0.5) * np.float32(std * math.sqrt(12))).astype(np.float16)
        else:
            part = np.full(count, tensor.key.endswith("norm.weight"), np.float16)
        yield part
        progress.update(part.nbytes)
