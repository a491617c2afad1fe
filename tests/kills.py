"""Work in processes of its own, killed at a moment that is chosen."""

import contextlib
import io
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

import jax

from convert.hf import hf_to_orbax, orbax_to_hf
from polyglot_jax import report, store
from polyglot_jax.config import Config
from polyglot_jax.hf_folder import is_hf_folder
from polyglot_jax.train import train

CHUNK = 20_000
_CHANGES = ("os.rename", "os.mkdir", "os.remove", "os.rmdir")


def convert(source: Path, destination: Path, *, overwrite: bool) -> None:
    """In either direction, with chunks small enough that even a small model has many."""
    store.CHUNK = CHUNK
    (hf_to_orbax if is_hf_folder(source) else orbax_to_hf)(str(source), destination, overwrite=overwrite)


def train_quickly(config: Config, run: Path, compiled: Path, said: Path | None = None) -> None:
    """As the tests of training do, with their compiled programs; `said`: where standard output goes."""
    jax.config.update("jax_compilation_cache_dir", str(compiled))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    report.peak_flops = lambda dtype, devices: (1e12, "assumed")
    with contextlib.redirect_stdout(said.open("w", encoding="utf-8") if said else io.StringIO()) as output, output:
        train(config, run)


Moment = int | tuple[str, str] | None
"""The number of a change to the file system, or its kind and the end of the path it is made to."""


def _work(work: Callable[[], None], moment: Moment, connection: Connection) -> None:
    changes: list[str] = []

    def before(event: str, arguments: tuple) -> None:
        if event in _CHANGES or (event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR)):
            is_there = isinstance(moment, tuple) and event == moment[0] and str(arguments[0]).endswith(moment[1])
            if is_there or len(changes) == moment:
                os.kill(os.getpid(), signal.SIGKILL)
            changes.append(f"{event} {arguments[0]}")

    sys.addaudithook(before)
    work()
    connection.send(changes)


def changes_of(work: Callable[[], None]) -> list[str]:
    """Do the work; returns the changes to the file system that it took, in their order."""
    process, connection = start(work)
    changes = _changes(process, connection)
    assert process.exitcode == 0
    return changes


def killed_at(moment: Moment, work: Callable[[], None]) -> bool:
    """Do the work, and kill the process just before a change to the file system; whether it came so far."""
    process, connection = start(work, moment)
    _changes(process, connection)
    assert process.exitcode in (0, -signal.SIGKILL)
    return process.exitcode != 0


def _changes(process: multiprocessing.Process, connection: Connection) -> list[str]:
    """What a process sends before it ends: nothing, if it is killed. It waits for a reader of more than 64 KiB."""
    changes: list[str] = []
    assert connection.poll(300)
    with contextlib.suppress(EOFError):
        changes = connection.recv()
    process.join(60)
    return changes


def start(work: Callable[[], None], moment: Moment = None) -> tuple[multiprocessing.Process, Connection]:
    """Begin the work in a process of its own, which sends its changes at the end."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["kills"])  # imported once, for all
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(work, moment, theirs))
    process.start()
    theirs.close()
    return process, ours
