"""Folders that appear whole or not at all."""

from __future__ import annotations

import errno
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from polyglot_jax.config import InputError


def incomplete(path: str | Path) -> Path:
    """Where what will be `path` lies while it is written."""
    return Path(path).with_name(f"{Path(path).name}.incomplete")


@contextmanager
def new_folder(path: str | Path, is_ours: Callable[[Path], bool], *, overwrite: bool = False) -> Iterator[Path]:
    """Yields a folder beside `path` to write into; renamed to `path` at the end, removed if anything goes wrong.

    InputError if something is at `path` (unless `overwrite`, and `is_ours(path)` says that it is the kind of folder
    to be replaced), before anything is written, or if the disk fills; what was at `path` stays until the new one is
    whole.
    """
    path = Path(path).resolve()  # where a link leads: the new folder has to be on that disk
    temporary, old = incomplete(path), path.with_name(f"{path.name}.replaced")
    if path.exists() and not path.is_dir():
        raise InputError(f"{path}: is a file; name a folder")
    if path.exists() and any(path.iterdir()):
        if not overwrite:
            raise InputError(f"{path}: exists; choose another place, or replace it with --overwrite")
        # So that a slip of the pen deletes nobody's home.
        if not is_ours(path):
            raise InputError(f"{path}: was not made by this command; remove it yourself, or choose another place")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        yield temporary
        if path.exists():
            shutil.rmtree(old, ignore_errors=True)  # left there by a process that was killed
            path.rename(old)
        temporary.rename(path)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if old.exists() and not path.exists():
            old.rename(path)
        is_full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
        # TensorStore reports a full disk in the text of an exception of its own.
        if is_full or "No space left on device" in str(error):
            for _ in range(5):  # Orbax's other threads write on for a moment, and make the folder anew
                time.sleep(0.1)
                shutil.rmtree(temporary, ignore_errors=True)
            raise InputError(f"{path}: the disk is full, nothing was written there; make room and retry") from error
        raise
    shutil.rmtree(old, ignore_errors=True)
