"""Parameters on disk, piece by piece: an Orbax PyTree of zarr3 arrays that is never whole in memory.

A piece is a parameter, or one layer of a stacked one ([layers, ...], its name begins with "layers/"). It is written in
chunks of at most CHUNK bytes, each a file of its own that holds nothing but the values. They keep the order in which
the source has them in memory (zarr's transpose codec says which), so that converting moves bytes and turns no matrix.
"""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import jax
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import tensorstore
from isal.isal_zlib import crc32

from polyglot_jax.files import write_values

CHUNK = 4 * 2**20
Index = tuple[slice, ...]

# Exponent bits: all set in infinities and NaNs, and only there.
_EXPONENTS = {
    np.dtype(np.float16): 0x7C00,
    np.dtype(ml_dtypes.bfloat16): 0x7F80,
    np.dtype(np.float32): 0x7F80_0000,
}


def is_stacked(name: str) -> bool:
    """Whether the parameter `name` has a leading axis of layers."""
    return name.startswith("layers/")


def pieces(params: dict[str, Any]) -> Iterator[tuple[str, int | None]]:
    """(name, layer) of every piece: what has no layers first (layer is None), then layer by layer."""
    yield from ((name, None) for name in params if not is_stacked(name))
    names = [name for name in params if is_stacked(name)]
    for layer in range(params[names[0]].shape[0]):
        yield from ((name, layer) for name in names)


def piece_shape(params: dict[str, Any], name: str, layer: int | None) -> tuple[int, ...]:
    """Shape of a piece, without the axis of layers."""
    return tuple(params[name].shape[layer is not None :])


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Orbax warns, at every save, of files that this format does without."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


@dataclass(frozen=True)
class _Streamed:
    """Stands for an array in the tree that Orbax is given; its values are written later, by `Writer`."""

    shape: tuple[int, ...]
    dtype: np.dtype


class _Streaming(ocp.type_handlers.TypeHandler):
    """Tells Orbax that a `_Streamed` is an array like any other, which any Orbax restores."""

    def typestr(self) -> str:
        return "np.ndarray"

    async def serialize(self, values: Any, infos: Any, args: Any = None) -> Any:
        return [ocp.future.NoopFuture()]

    async def deserialize(self, infos: Any, args: Any = None) -> Any:
        raise NotImplementedError

    async def metadata(self, infos: Any) -> Any:
        raise NotImplementedError


class Layout(NamedTuple):
    """How the pieces of a parameter are stored. shape: of a piece; order: its axes, slowest first in a file;
    step: rows of the slowest axis in a file."""

    folder: str
    shape: tuple[int, ...]
    dtype: np.dtype
    order: tuple[int, ...]
    step: int

    def file(self, layer: int | None, number: int) -> str:
        """Name of a chunk's file: zarr's, by the position of the chunk along each axis."""
        position = [0] * len(self.order)
        position[self.order[0]] = number
        return "/".join(map(str, [self.folder, "c", *([] if layer is None else [layer]), *position]))


class Block(NamedTuple):
    """A chunk's worth of a piece. index: where in the piece; values: a view of it, in the axes of the parameter."""

    name: str
    layer: int | None
    index: Index
    values: np.ndarray


class Written(NamedTuple):
    """What became of a block. file: in the folder of parameters; crc32: of that file; non_finite: infs and NaNs."""

    file: str
    bytes: int
    crc32: int
    non_finite: int


class Writer:
    """Writes parameters into a new folder, block by block, from any number of threads."""

    def __init__(self, path: Path, tree: Any, params: dict[str, Any]):
        """`params`: name -> shape and dtype; `tree`: the same, nested as Orbax is to find it."""
        self._path, self._params = path, params
        self._layouts: dict[str, Layout] = {}
        self._folders: set[Path] = set()
        registry = ocp.type_handlers.create_type_handler_registry(
            (_Streamed, _Streaming()), (jax.Array, ocp.type_handlers.ArrayHandler())
        )
        handler = ocp.PyTreeCheckpointHandler(
            use_zarr3=True, use_ocdbt=False, use_compression=False, type_handler_registry=registry
        )
        streamed = jax.tree.map(lambda leaf: _Streamed(tuple(leaf.shape), np.dtype(leaf.dtype)), tree)
        with quiet(), ocp.Checkpointer(handler) as checkpointer:
            checkpointer.save(path, args=ocp.args.PyTreeSave(streamed))

    def blocks(self, name: str, layer: int | None, values: np.ndarray) -> Iterator[Block]:
        """Cut a piece into blocks for `write`. The first piece of a parameter decides the order of all its values."""
        shape = piece_shape(self._params, name, layer)
        if values.shape != shape:
            raise ValueError(f"{name}: {values.shape}, not {shape}")
        if name not in self._layouts:
            order = tuple(sorted(range(values.ndim), key=lambda axis: -values.strides[axis]))
            self._layouts[name] = self._create(name, order, layer is not None)
        layout = self._layouts[name]
        index, slowest = [slice(0, size) for size in shape], layout.order[0]
        for start in range(0, shape[slowest], layout.step):
            index[slowest] = slice(start, min(start + layout.step, shape[slowest]))
            yield Block(name, layer, tuple(index), values[tuple(index)])

    def write(self, block: Block) -> Written:
        """Write a block in the dtype of its parameter; it must not have been written before."""
        layout = self._layouts[block.name]
        values = np.ascontiguousarray(rounded(block.values.transpose(layout.order), self._params[block.name].dtype))
        content = values.reshape(-1).view(np.uint8)
        short = layout.step - values.shape[0]  # the last chunk of an array is filled up with zeros
        if short:
            content = np.concatenate([content, np.zeros(short * values[0].nbytes, np.uint8)])
        # Before writing: a system call that meets mapped pages nobody has read yet copies them piecemeal.
        checksum, non_finite = crc32(content.data), count_non_finite(values)
        name = layout.file(block.layer, block.index[layout.order[0]].start // layout.step)
        file = self._path / name
        if file.parent not in self._folders:
            file.parent.mkdir(parents=True, exist_ok=True)
            self._folders.add(file.parent)
        with open(file, "xb") as opened:
            write_values(opened, content.data)
        return Written(name, content.nbytes, checksum, non_finite)

    def _create(self, name: str, order: tuple[int, ...], stacked: bool) -> Layout:
        leaf = self._params[name]
        shape, dtype, lead = tuple(leaf.shape), np.dtype(leaf.dtype), int(stacked)
        chunk = [1] * lead + list(shape[lead:])
        slowest = lead + order[0]
        parts = math.ceil(math.prod(chunk) * dtype.itemsize / CHUNK)
        chunk[slowest] = math.ceil(chunk[slowest] / parts)
        spec = {
            "driver": "zarr3",
            "kvstore": {"driver": "file", "path": f"{self._path / dotted(name)}/"},
            "metadata": {
                "shape": shape,
                "data_type": dtype.name,
                "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": chunk}},
                "codecs": [
                    {"name": "transpose", "configuration": {"order": [*range(lead), *(lead + axis for axis in order)]}},
                    {"name": "bytes", "configuration": {"endian": "little"}},
                ],
            },
        }
        tensorstore.open(spec, create=True, open=True).result()
        return Layout(dotted(name), shape[lead:], dtype, order, chunk[slowest])


class Reader:
    """Reads parameters from a folder of Orbax, written by `Writer` or by Orbax itself."""

    def __init__(self, path: Path, load: Callable[[str], np.ndarray]):
        """`load`: gives the bytes of a file of chunks by its name in `path`."""
        self._path, self._load = path, load
        self.is_database = (path / "manifest.ocdbt").is_file()
        """Whether all arrays share a few files, as when Orbax writes jax.Arrays."""
        self._array, self._layout = cache(self._open), cache(self._read_layout)

    def _open(self, name: str) -> Any:
        files = {"driver": "file", "path": f"{self._path}/"}
        if self.is_database:
            store = {"driver": "ocdbt", "base": files, "path": dotted(name)}
        else:
            store = {"driver": "file", "path": f"{self._path / dotted(name)}/"}
        return tensorstore.open({"driver": "zarr3", "kvstore": store}, open=True, read=True).result()

    def _read_layout(self, name: str) -> Layout:
        array, lead = self._array(name), int(is_stacked(name))
        order = tuple(axis - lead for axis in array.chunk_layout.inner_order if axis >= lead)
        step = array.chunk_layout.read_chunk.shape[lead + order[0]]
        return Layout(dotted(name), array.shape[lead:], array.dtype.numpy_dtype, order, step)

    def chunk(self, name: str) -> tuple[int, ...]:
        """Shape of the parts in which a piece is stored; reading less than one costs as much."""
        return self._array(name).chunk_layout.read_chunk.shape[is_stacked(name) :]

    def read(self, name: str, layer: int | None, index: Index) -> np.ndarray:
        """A part of a piece, of whatever strides; what lies in one file is a view of what `load` gives."""
        if self.is_database:
            array = self._array(name)
            return np.asarray((array if layer is None else array[layer])[index].read().result())
        layout = self._layout(name)
        slowest = layout.order[0]
        index += (slice(None),) * (len(layout.order) - len(index))
        start, stop, _ = index[slowest].indices(layout.shape[slowest])
        parts = []
        for number in range(start // layout.step, math.ceil(stop / layout.step)):
            first = number * layout.step
            rows = slice(max(start - first, 0), min(stop - first, layout.step))
            stored = (rows, *(index[axis] for axis in layout.order[1:]))
            shape = (layout.step, *(layout.shape[axis] for axis in layout.order[1:]))
            chunk = self._load(layout.file(layer, number)).view(layout.dtype).reshape(shape)
            parts.append(chunk[stored])
        values = parts[0] if len(parts) == 1 else np.concatenate(parts)
        return values.transpose(np.argsort(layout.order))


def dotted(name: str) -> str:
    """The parameter's name as Orbax has it in file names."""
    return name.replace("/", ".")


def rounded(values: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """The values in another dtype, a view if it is their own; what is too large for it becomes infinite in silence."""
    with np.errstate(over="ignore", invalid="ignore"):
        return values.astype(dtype, copy=False)


def count_non_finite(values: np.ndarray) -> int:
    """How many values are infinite or NaN; exact for every dtype weights come in."""
    exponent = np.array(_EXPONENTS[values.dtype], f"u{values.dtype.itemsize}")
    bits = np.ravel(values).view(exponent.dtype)
    # In parts that stay in the processor's cache; masking, then looking for a maximum, is what NumPy does quickest.
    magnitudes = (bits[start : start + 2**16] & exponent for start in range(0, bits.size, 2**16))
    return sum(int((part == exponent).sum()) for part in magnitudes if part.max() == exponent)
