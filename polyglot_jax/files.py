"""Folders that appear whole or not at all; values, checksums and configs in files."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from polyglot_jax.config import Config, InputError


def beside(path: Path) -> tuple[Path, Path]:
    """Where a new folder is written before it takes the name `path`, and where what it replaces is put meanwhile."""
    return path.with_name(f"{path.name}.incomplete"), path.with_name(f"{path.name}.replaced")


_UNFINISHED = ".unfinished"
"""Marks a folder that is being written, or deleted."""


@contextmanager
def new_folder(path: str | Path, is_ours: Callable[[Path], bool], *, overwrite: bool = False) -> Iterator[Path]:
    """Yields a folder beside `path` to write into; renamed to `path` at the end, removed if anything goes wrong.

    InputError if something is at `path` (unless `overwrite`, and `is_ours(path)` says that it is the kind of folder
    to be replaced), before anything is written, or if the disk fills; what was at `path` stays until the new one is
    whole. A process killed between the last two renames leaves it beside, as `path`.replaced, always whole; the next
    one puts it back.
    """
    path = Path(path).resolve()  # where a link leads: the new folder has to be on that disk
    temporary, old = beside(path)
    if path.exists() and not path.is_dir():
        raise InputError(f"{path}: is a file; name a folder")
    if path.is_mount():
        raise InputError(f"{path}: is where a disk is mounted and cannot be replaced; name a folder inside it")

    def is_taken() -> bool:
        return path.exists() and any(path.iterdir())

    def check() -> None:
        if is_taken():
            if not overwrite:
                raise InputError(f"{path}: exists; choose another place, or replace it with --overwrite")
            # So that a slip of the pen deletes nobody's home.
            if not is_ours(path):
                raise InputError(f"{path}: was not made by this command; remove it yourself, or choose another place")

    def delete_old() -> None:
        clear(temporary)
        old.rename(temporary)
        (temporary / _UNFINISHED).touch()
        for name in ("manifest.json", "config.json"):  # without them nothing loads what is being deleted
            (temporary / name).unlink(missing_ok=True)
        clear(temporary)

    def clear(folder: Path) -> None:
        """Delete a folder of ours; the mark that says so goes last."""
        if folder.is_symlink() or folder.is_file() or (folder.exists() and not is_unfinished(folder)):
            raise InputError(f"{folder}: is in the way and was not made by this command; move it away")
        for item in folder.iterdir() if folder.exists() else ():
            if item.is_dir() and not item.is_symlink():
                shutil.rmtree(item, ignore_errors=True)
            elif item.name != _UNFINISHED:
                item.unlink(missing_ok=True)
        shutil.rmtree(folder, ignore_errors=True)

    def is_unfinished(folder: Path) -> bool:
        # A process killed just after it made the folder, or just before it renamed it, leaves it without the mark.
        return (folder / _UNFINISHED).exists() or not any(folder.iterdir()) or is_ours(folder)

    if not old.exists():
        check()  # before anything is made, the lock's folder too
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise InputError(f"{path}: lies in a file; name another place") from error
    with locked(path.with_name(f".{path.name}.lock")):
        if old.exists():
            if not is_ours(old):
                raise InputError(f"{old}: is in the way and was not made by this command; move it away")
            if not is_taken():
                old.rename(path)
        check()
        clear(temporary)
        try:
            if old.exists():
                delete_old()
            temporary.mkdir()
            (temporary / _UNFINISHED).touch()
            yield temporary
            sync(temporary, *temporary.rglob("*"))  # as the name must not reach the disk before what it stands for
            check()  # again: somebody may have put something there meanwhile
            if is_taken():
                path.rename(old)
            (temporary / _UNFINISHED).unlink()
            temporary.rename(path)
            sync(path.parent)
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
        if old.exists():
            delete_old()


def sync(*paths: Path) -> None:
    """Wait until what is in these files, and the names in these folders, would outlast a loss of power."""

    def wait(path: Path) -> None:
        opened = os.open(path, os.O_RDONLY)
        try:
            os.fsync(opened)
        except OSError as error:
            if path.is_dir() and error.errno in (errno.EINVAL, errno.ENOTSUP):
                return  # some networks' disks cannot do it for folders
            raise OSError(error.errno, error.strerror, str(path)) from error
        finally:
            os.close(opened)

    with ThreadPoolExecutor(8) as pool:  # the disk writes its journal once for several
        list(pool.map(wait, paths))


@contextmanager
def locked(file: Path) -> Iterator[None]:
    """Keeps other processes that lock `file`, and other threads, out; InputError if one is in.

    The file is deleted at the end. A process that dies leaves it, but the system lets go of the lock.
    """
    while True:
        with open(file, "a+", encoding="utf-8") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                lock.seek(0)
                holder = lock.read() or "another process"
                raise InputError(f"{file}: {holder} is writing there; wait for it, or stop it") from error
            if not (file.exists() and os.path.samestat(os.fstat(lock.fileno()), file.stat())):
                continue  # whoever held it deleted it
            lock.truncate(0)
            with suppress(OSError):  # a full disk holds the lock, if not the name
                os.write(lock.fileno(), f"process {os.getpid()} on {socket.gethostname()}".encode())
            try:
                yield
            finally:
                file.unlink(missing_ok=True)
            return


def write_values(file: IO[bytes], content: memoryview) -> None:
    """Write much of one kind, 64 KiB at a time, as cp does.

    For a larger write Linux looks for larger pages, and on a virtual machine its host has to find those first: 0.4 GB/s
    instead of 1.6, measured on ext4.
    """
    for start in range(0, content.nbytes, 2**16):
        file.write(content[start : start + 2**16])


def write_checksums(folder: Path, files: dict[str, dict[str, int]]) -> None:
    """Write checksums.json: the CRC-32 of every tensor's bytes, by file and name, for whoever wants to compare."""
    sums = {file: {name: f"{value:08x}" for name, value in tensors.items()} for file, tensors in files.items()}
    text = json.dumps({"algorithm": "crc32", "files": sums}, indent=1) + "\n"
    (folder / "checksums.json").write_text(text, encoding="utf-8")


def read_config(file: str | Path) -> Config:
    """The Config in a JSON file; InputError, naming the file, if it is missing or not one."""
    try:
        return Config.from_json(Path(file).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"{file}: no such file") from error
    except ValueError as error:  # InputErrors among them
        raise InputError(f"{file}: {error}") from error
