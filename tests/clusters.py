"""Several real processes on this machine that train as one, each with a few simulated devices."""

import io
import multiprocessing
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import jax

from polyglot_jax import report
from polyglot_jax.__main__ import VERBS
from polyglot_jax.cli import run

Setup = Callable[[int], None]
"""Called in each process, with its number, before it does anything: to watch it, or to make it fail."""


class Member:
    """A process of a cluster: `python -m polyglot_jax train ARGUMENTS`. Its output goes to FOLDER/NUMBER.txt."""

    def __init__(self, number: int, file: Path, process: multiprocessing.Process):
        self.number, self._file, self.process = number, file, process

    @property
    def said(self) -> str:
        return self._file.read_text(encoding="utf-8", errors="replace") if self._file.is_file() else ""

    @property
    def errors(self) -> list[str]:
        return [line for line in self.said.splitlines() if line.startswith("error: ")]


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def _work(arguments: list[str], file: Path, devices: int, compiled: Path, number: int, setup: Setup | None) -> None:
    with open(file, "wb") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    sys.stdout = io.TextIOWrapper(os.fdopen(1, "wb", closefd=False), encoding="utf-8", line_buffering=True)
    sys.stderr = io.TextIOWrapper(os.fdopen(2, "wb", closefd=False), encoding="utf-8", line_buffering=True)
    os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={devices}"
    jax.config.update("jax_compilation_cache_dir", str(compiled))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    report.peak_flops = lambda dtype, devices: (1e12, "assumed")
    if setup:
        setup(number)
    sys.exit(run(VERBS, "python -m polyglot_jax", ["train", *arguments]))


@contextmanager
def cluster(
    folder: Path,
    compiled: Path,
    *arguments: object,
    processes: int = 2,
    devices: int = 4,
    numbers: Sequence[int] | None = None,
    others: Mapping[int, Sequence[str]] | None = None,
    place: str | None = None,
    heartbeat: int = 100,
    setup: Setup | None = None,
) -> Iterator[list[Member]]:
    """Start the processes; whatever happens, none is left.

    numbers: those that are started (None: all). others: arguments of one process alone. place: the coordinator.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["clusters", "polyglot_jax.train"])  # imported once, for all
    folder.mkdir(exist_ok=True)
    place, members = place or f"127.0.0.1:{free_port()}", []
    try:
        for number in range(processes) if numbers is None else numbers:
            flags = {"coordinator": place, "heartbeat-timeout": heartbeat}
            if place != "auto":
                flags |= {"processes": processes, "process": number}
            given = [*map(str, arguments), *(others or {}).get(number, ())]
            given += [f"--distributed.{name}={value}" for name, value in flags.items()]
            file = folder / f"{number}.txt"
            file.unlink(missing_ok=True)
            work = (given, file, devices, compiled, number, setup)
            process = context.Process(target=_work, args=work)
            process.start()
            members.append(Member(number, file, process))
        yield members
    finally:
        for member in members:
            member.process.kill()
            member.process.join()


def wait(members: list[Member], seconds: float = 240) -> list[int | None]:
    """Exit statuses, once all have ended; None for one that still runs after that time."""
    end = time.monotonic() + seconds
    for member in members:
        member.process.join(max(0, end - time.monotonic()))
    return [member.process.exitcode for member in members]
