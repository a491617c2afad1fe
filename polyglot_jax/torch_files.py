"""PyTorch's own files (.bin, .pt): the only module that knows torch, which is needed for them and for nothing else.

A file is mapped, not read, and only tensors and plain values come out of it: torch refuses a pickle that names
anything else, so nothing in a file is ever run.
"""

from __future__ import annotations

import contextlib
import os
import re
import struct
import warnings
import zipfile
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from polyglot_jax.config import InputError


def torch() -> Any:
    """The package; InputError that says how to get it when it is not installed."""
    try:
        import torch
    except ImportError as error:
        raise InputError(
            "torch is not installed, and PyTorch's .bin and .pt files need it: pip install torch "
            "(safetensors files need nothing)"
        ) from error
    return torch


def load(path: Path, *, with_numpy: bool = False) -> Any:
    """What `torch.save` wrote at `path`, its tensors mapped from the file.

    with_numpy: also arrays of NumPy, as in the state of a random number generator; still nothing is run.
    InputError, naming the file, if it is missing, damaged, or holds anything but tensors and plain values.
    """
    package = torch()
    allowed = contextlib.nullcontext()
    if with_numpy:
        rebuild = np.empty(0).__reduce__()[0]
        numbers = [type(np.dtype(code)) for code in "?bBhHiIlLqQefd"]
        old_names = [(rebuild, "numpy.core.multiarray._reconstruct"), rebuild]
        allowed = package.serialization.safe_globals([*old_names, np.ndarray, np.dtype, *numbers])
    try:
        with allowed, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of old storage classes, in files that are what they are
            _check_archive(path)
            try:
                return package.load(path, map_location="cpu", weights_only=True, mmap=True)
            except RuntimeError as error:
                if "mmap can only be used" not in str(error):
                    raise
                # Written before torch 1.6: such a file cannot be mapped.
                return package.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise InputError(f"{path}: missing") from error
    except Exception as error:  # zip, pickle and torch each raise their own
        if isinstance(error, OSError) and error.filename:
            raise
        # Of torch's page what was refused, and not its advice to load the file all the same.
        refused = re.search(r"(?i)unsupported (global|operand|class)[^\n]*?(?=\. |\n|$)", str(error))
        lines = [refused[0]] if refused else str(error).strip().splitlines() or [type(error).__name__]
        raise InputError(
            f"{path}: refused: it is damaged, or holds more than tensors and plain values ({lines[0]})"
        ) from error


def _check_archive(path: Path) -> None:
    """Raise what zipfile raises if the parts of the zip that `torch.save` writes do not fit together.

    When torch maps a file, one wrong bit of where an entry begins gives another's values, and no error.
    """
    with open(path, "rb") as file:
        if file.read(4) != b"PK\x03\x04":
            return  # written before torch 1.6, or no file of torch's
        with zipfile.ZipFile(file) as archive:
            for entry in archive.infolist():
                archive.open(entry).close()  # compares its name there with the directory's
                if entry.filename.endswith(".pkl") and entry.CRC:  # 0: torch was told to leave checksums out
                    archive.read(entry)
                file.seek(entry.header_offset + 26)
                name, extra = struct.unpack("<HH", file.read(4))
                file.seek(name + extra + entry.file_size, os.SEEK_CUR)
                # Its descriptor, if it has one; else another entry, or the directory.
                if file.read(4) not in ([b"PK\x07\x08"] if entry.flag_bits & 8 else [b"PK\x03\x04", b"PK\x01\x02"]):
                    raise zipfile.BadZipFile(f"{entry.filename} is not where the directory says")


def is_tensor(value: Any) -> bool:
    return isinstance(value, torch().Tensor)


def kind(tensor: Any) -> str:
    """What a tensor's values are: its dtype where they lie in memory one by one, else that they do not."""
    if tensor.layout != torch().strided or tensor.is_meta:
        return "sparse or without values"
    return str(tensor.dtype).removeprefix("torch.")


def to_numpy(tensor: Any) -> np.ndarray:
    """A tensor's values, without a copy."""
    tensor = tensor.detach().resolve_neg()
    if tensor.dtype == torch().bfloat16:
        return tensor.view(torch().int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


def from_numpy(array: np.ndarray) -> Any:
    """The inverse of `to_numpy`, without a copy where the array is in C order."""
    array = np.ascontiguousarray(array)
    if array.dtype == ml_dtypes.bfloat16:
        return torch().from_numpy(array.view(np.int16)).view(torch().bfloat16)
    return torch().from_numpy(array)


def save(value: Any, path: Path) -> None:
    """Write what `load` reads: tensors and plain values. OSError if the disk fills."""
    try:
        with open(path, "wb") as file:
            torch().save(value, file)
    except RuntimeError as error:
        # torch closes its zip file all the same, and complains of that instead of the full disk.
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise
