"""safetensors files: read as views of the mapped file, written piece by piece.

The library checks a file before anything is read from it; the views and the writing are our own, because the library
copies what it reads and wants a whole file in memory to write one.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path

import ml_dtypes
import numpy as np
from isal.isal_zlib import crc32
from safetensors import SafetensorError, safe_open

from polyglot_jax.config import InputError
from polyglot_jax.files import write_values

DTYPES = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
"""The dtypes weights come in, by their names in these files."""


class SafetensorsFile:
    """A file opened. .table: {key: (shape, dtype's name, first byte)}"""

    def __init__(self, path: Path):
        """InputError, naming the file, if it is missing, cut short or not safetensors."""
        try:
            with open(path, "rb") as file:
                with safe_open(path, framework="np"):  # checks sizes, offsets and the header's JSON
                    pass
                length = int.from_bytes(file.read(8), "little")
                header = json.loads(file.read(length))
        except FileNotFoundError as error:
            raise InputError(f"{path}: missing, though the index names it; fetch it again") from error
        except (SafetensorError, ValueError) as error:
            raise InputError(f"{path}: damaged or not safetensors: {error}; fetch it again") from error
        self.table = {
            key: (tuple(entry["shape"]), entry["dtype"], 8 + length + entry["data_offsets"][0])
            for key, entry in header.items()
            if key != "__metadata__"
        }
        self._bytes = np.memmap(path, np.uint8, mode="r")

    def view(self, key: str) -> np.ndarray:
        """A tensor, of one of DTYPES, as a view of the file: its bytes are read when they are used."""
        shape, kind, start = self.table[key]
        size = math.prod(shape) * DTYPES[kind].itemsize
        return self._bytes[start : start + size].view(np.ndarray).view(DTYPES[kind]).reshape(shape)


def write(
    path: Path, tensors: Sequence[tuple[str, tuple[int, ...], np.dtype]], values: Iterable[np.ndarray]
) -> dict[str, int]:
    """Write a file of `tensors` (key, shape, dtype); returns the CRC-32 of each one's bytes.

    `values`: their values in this order, each in one part or several.
    """
    names = {dtype: name for name, dtype in DTYPES.items()}
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for key, shape, dtype in tensors:
        end = offset + math.prod(shape) * dtype.itemsize
        header[key] = {"dtype": names[dtype], "shape": shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    parts = iter(values)
    checksums = {}
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for key, shape, dtype in tensors:
            left, checksum = math.prod(shape) * dtype.itemsize, 0
            while left > 0:
                # Bytes, because NumPy's own file writing does not know bfloat16.
                content = np.ascontiguousarray(next(parts)).reshape(-1).view(np.uint8).data
                checksum = crc32(content, checksum)
                write_values(file, content)
                left -= content.nbytes
            if left:
                raise ValueError(f"{path}: {-left} bytes too many for {key}")
            checksums[key] = checksum
    return checksums
