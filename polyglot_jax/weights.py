"""Opens whatever holds weights, and puts them on devices: a checkpoint or run of ours, a Hugging Face folder or name.

Every source is a `source.Source`. What is built from it, a stacked or a split tree, is decided here and nowhere else.
"""

from __future__ import annotations

import functools
import gc
import hashlib
import math
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm

from polyglot_jax import checkpoint, hf_folder, hosts, store
from polyglot_jax.checkpoint import Checkpoint, flatten, unflatten
from polyglot_jax.config import Config, InputError
from polyglot_jax.hardware import free_memory, readable
from polyglot_jax.hf_folder import HfFolder
from polyglot_jax.model import Params, Transformer
from polyglot_jax.parallel import in_order
from polyglot_jax.quantise import SCALE, inputs_of, is_quantised, quantised
from polyglot_jax.sharding import RULES, Layout, parts, shardings
from polyglot_jax.source import Source
from polyglot_jax.tokenizer import Tokenizer


def open_source(path: str | Path) -> Checkpoint | HfFolder:
    """A checkpoint, a run (its newest checkpoint), a Hugging Face folder, or a name on the hub (see `hub.download`).

    InputError if `path` is none of these, or cannot be had.
    """
    if not isinstance(path, (str, Path)) or not str(path):
        raise InputError(f"path={path!r}: must name a run, a checkpoint, a Hugging Face folder or a model on the hub")
    local = Path(path)
    try:
        is_here = local.exists()
    except OSError as error:  # a name too long, say
        raise InputError(f"{str(path)[:80]}: {error.strerror}") from error
    if is_here:
        newest = checkpoint.newest(local)
        if newest is not None:
            return Checkpoint(newest)
        if checkpoint.is_checkpoint(local):
            return Checkpoint(local)
        if hf_folder.is_hf_folder(local):
            return HfFolder(local)
        raise InputError(f"{path}: neither a checkpoint, nor a run with one, nor a Hugging Face model folder")
    from polyglot_jax import hub  # here, because huggingface_hub takes a while to import

    if not hub.is_hub_name(str(path)):
        raise InputError(f"{path}: no such folder (and not a name like EleutherAI/polyglot-ko-1.3b)")
    return HfFolder(hub.download(str(path)))


def read_tokenizer(source: Source) -> tuple[Config, Tokenizer | None]:
    """The source's tokenizer and its config with what the tokenizer says of the ids; InputError if they disagree."""
    if source.tokenizer is None:
        return source.config, None
    file = f"{source.path}/tokenizer.json"
    tokenizer = Tokenizer(source.tokenizer, origin=file)
    eos = tokenizer.special.get("<|endoftext|>", source.config.data.eos_id)
    try:
        return source.config.with_tokenizer(tokenizer.valid_ids, eos), tokenizer
    except InputError as error:
        raise InputError(f"{file}: {error}") from error


def preflight(source: Source, mesh: Mesh | None, dtype: Any, quantize: str | None = None) -> str:
    """What decoding with weights and cache in `dtype` needs on each device, in a line; InputError if that is not free.

    Nothing is read but metadata.
    """
    model, dtype = source.config.model, np.dtype(dtype)
    axes, devices = flatten(Transformer(model).axes()), jax.devices()[:1] if mesh is None else list(mesh.devices.flat)

    def size(names: tuple[str, ...]) -> int:
        where = _where(mesh, names, model.sizes, "decoding")
        return math.prod(where.shard_shape(tuple(model.sizes[name] for name in names)))

    def bytes_of(name: str) -> int:
        names = axes[name]
        if not (quantize and is_quantised(name)):
            return dtype.itemsize * size(names)
        summed = [axis + store.is_stacked(name) for axis in inputs_of(name)]  # a float32 for each of the others
        return size(names) + 4 * size(tuple(axis for i, axis in enumerate(names) if i not in summed))

    weights = sum(map(bytes_of, source.params))
    cache = 2 * model.layers * size(("heads", "head_dim")) * model.context * dtype.itemsize
    needed = (
        f"{source.path.name}: {readable(weights)} of {quantize or dtype} weights and {readable(cache)} for the cache "
        f"of a row of {model.context:,} tokens on each device"
    )
    names = {axis for axis, rule in RULES.items() if axis in model.sizes and rule.decoding}
    whole = [] if mesh is None else sorted(n for n in names if size((n,)) * parts(n, mesh, "decoding") > model.sizes[n])
    if whole:
        needed += f" (mesh.fsdp and mesh.sequence do not divide model.{', model.'.join(whole)}: split less, or not)"
    free = free_memory(devices)
    if free is None:
        return needed
    if weights + cache > free:
        narrower = "" if quantize else "quantize='int8' takes a byte a weight; "
        if dtype == np.float32 and not quantize:
            narrower = "dtype='bfloat16' halves it; " + narrower
        raise InputError(
            f"{needed}, but only {readable(free)} are free; {narrower}a mesh with fsdp or tensor shares it"
        )
    return f"{needed}; {readable(free)} are free"


def load_params(
    source: Source,
    mesh: Mesh | None,
    dtype: Any = None,
    *,
    split: bool,
    layout: Layout = "training",
    quantize: str | None = None,
) -> Params:
    """The source's parameters as jax.Arrays, laid out on `mesh` (None: the first device), a layer at a time.

    dtype: of the result (None: the source's own). split: a subtree for each layer, as decoding wants; else stacked.
    layout: which column of `sharding.RULES`. quantize: "int8" for the weights of products, each layer's as it is read
    (split only). Of files, only what the devices of this process need is read; to be quantised, whole pieces.
    """
    axes = flatten(Transformer(source.config.model).axes())
    total = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in source.params.values())
    leaves: dict[str, jax.Array] = {}
    with tqdm(total=total, unit="B", unit_scale=True, desc=f"reading {source.path.name}",
              disable=not hosts.is_first()) as progress:  # fmt: skip

        def where(names: tuple[str, ...]) -> jax.sharding.Sharding:
            return _where(mesh, names, source.config.model.sizes, layout)

        def place(name: str, layer: int | None) -> dict[str, jax.Array]:
            names = axes[name] if layer is None else axes[name][1:]
            if quantize and is_quantised(name):
                inputs = inputs_of(name)
                values, scale = quantised(source.read(name, layer), inputs)
                outputs = tuple(axis for i, axis in enumerate(names) if i not in inputs)
                made = {name: _laid_out(values, where(names)), name + SCALE: _laid_out(scale, where(outputs))}
            else:
                made = {name: _place(source, name, layer, where(names), dtype)}
            progress.update(math.prod(made[name].shape) * source.params[name].dtype.itemsize)
            return made

        if split:
            pieces = list(store.pieces(source.params))
            for (_, layer), made in zip(pieces, in_order(lambda piece: place(*piece), pieces), strict=True):
                leaves |= {name.replace("layers/", f"layer_{layer}/"): array for name, array in made.items()}
        else:
            for name in source.params:
                leaves |= place(name, None)
    return unflatten(leaves)


def fingerprint(source: Source) -> str:
    """SHA-256, in hex, of the parameters as they are stored: names, dtypes and values, in whatever format."""
    digest = hashlib.sha256()
    pieces = list(store.pieces(source.params))

    def checksum(piece: tuple[str, int | None]) -> str:
        values = np.ascontiguousarray(source.read(*piece))
        return f"{piece} {values.shape} {values.dtype} {hashlib.sha256(values.view(np.uint8)).hexdigest()}\n"

    for line in in_order(checksum, sorted(pieces, key=str)):
        digest.update(line.encode())
    return digest.hexdigest()


def _where(mesh: Mesh | None, names: tuple[str, ...], sizes: dict[str, int], layout: Layout) -> jax.sharding.Sharding:
    if mesh is None:
        return jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return shardings(mesh, names, sizes, layout)


def _laid_out(values: np.ndarray, where: jax.sharding.Sharding) -> jax.Array:
    return jax.make_array_from_callback(values.shape, where, lambda index: values[index])


def _place(source: Source, name: str, layer: int | None, where: jax.sharding.Sharding, dtype: Any) -> jax.Array:
    """A parameter, or one layer of it, laid out as `where` says."""
    leaf = source.params[name]
    shape = leaf.shape if layer is None else leaf.shape[1:]
    whole = layer is None and store.is_stacked(name)

    @functools.cache  # devices that hold the same part share it
    def part(*region: tuple[int, int]) -> np.ndarray:
        index = tuple(slice(*ends) for ends in region)
        values = np.empty([stop - start for start, stop in region], dtype or leaf.dtype)

        def fill(number: int) -> None:
            values[number - region[0][0]] = source.read(name, number, index[1:])

        if whole:
            for _ in in_order(fill, range(*region[0])):
                pass
        else:
            values[...] = source.read(name, layer, index)
        return values

    array = jax.make_array_from_callback(
        shape, where, lambda index: part(*(axis.indices(size)[:2] for axis, size in zip(index, shape, strict=True)))
    )
    if whole:  # JAX lets go of the arrays it copied from when Python collects, which could be a whole model later
        array.block_until_ready()
        gc.collect(0)
    return array
