"""Conversions in processes of their own, killed at a moment that is chosen; imports little, to be started quickly."""

import multiprocessing
import os
import signal
import sys
from multiprocessing.connection import Connection
from pathlib import Path

from convert.hf import hf_to_orbax, orbax_to_hf
from polyglot_jax import store
from polyglot_jax.hf_folder import is_hf_folder

CHUNK = 20_000
_CHANGES = ("os.rename", "os.mkdir", "os.remove", "os.rmdir")


def convert(source: Path, destination: Path, *, overwrite: bool) -> None:
    """In either direction, with chunks small enough that even a small model has many."""
    store.CHUNK = CHUNK
    (hf_to_orbax if is_hf_folder(source) else orbax_to_hf)(str(source), destination, overwrite=overwrite)


def _convert(source: Path, destination: Path, overwrite: bool, kill_at: int | None, connection: Connection) -> None:
    changes: list[str] = []

    def before(event: str, arguments: tuple) -> None:
        if event in _CHANGES or (event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR)):
            if len(changes) == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            changes.append(event)

    sys.addaudithook(before)
    convert(source, destination, overwrite=overwrite)
    connection.send(changes)


def changes_of(source: Path, destination: Path, *, overwrite: bool) -> list[str]:
    """Convert; returns the changes to the file system that it took, in their order."""
    process, connection = _start(source, destination, overwrite, None)
    assert connection.poll(60)
    changes = connection.recv()
    process.join(60)
    assert process.exitcode == 0
    return changes


def killed_at(change: int, source: Path, destination: Path, *, overwrite: bool) -> bool:
    """Convert, and kill the process just before a change to the file system; whether it came so far."""
    process, _ = _start(source, destination, overwrite, change)
    process.join(60)
    assert process.exitcode in (0, -signal.SIGKILL)
    return process.exitcode != 0


def _start(*arguments: object) -> tuple[multiprocessing.Process, Connection]:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["kills"])  # imported once, for all
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_convert, args=(*arguments, theirs))
    process.start()
    theirs.close()
    return process, ours
