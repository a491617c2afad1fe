"""Several processes that train as one, on JAX's own multi-controller runtime: they find each other, agree, and end.

Every process runs the same program and meets the others in the same order. What is said to be of all processes is a
collective: each must come to it. With one process everything here is free.
"""

from __future__ import annotations

import atexit
import contextlib
import faulthandler
import os
import socket
import sys
import threading
from collections.abc import Iterator

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from polyglot_jax import cli
from polyglot_jax.config import DistributedConfig, InputError


def is_first() -> bool:
    """Whether this is the process that prints, logs, and writes what is written once."""
    return jax.process_index() == 0


class Missing(InputError):
    """A process lives and does not come. What all do together is at an end then, whatever else is configured."""


_meeting_timeout = DistributedConfig.meeting_timeout  # cluster() sets what was asked for


def gather(text: str) -> list[str]:
    """The `text` of every process, in the order of their numbers; of all processes.

    Missing if one of them lives, and does not come within distributed.meeting_timeout.
    """
    if jax.process_count() == 1:
        return [text]
    _await_all("gather", _meeting_timeout)  # the collectives below would wait for ever
    content = np.frombuffer(text.encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.int32(content.size))
    width = 1 << int(sizes.max()).bit_length()  # powers of two, so that few programs are compiled
    rows = multihost_utils.process_allgather(np.pad(content, (0, width - content.size)))
    return [row[:size].tobytes().decode() for row, size in zip(rows, sizes, strict=True)]


def agree(ready: bool) -> bool:
    """Whether it is so on every process; of all processes."""
    return bool(multihost_utils.process_allgather(np.bool_(ready)).all())


@contextlib.contextmanager
def together() -> Iterator[None]:
    """What fails inside on one process raises on all: there its own error, on the others an InputError that names it.

    Of all processes; Missing as in `gather`. What is inside must meet no other process: one that failed would not come.
    """
    mine = None
    try:
        yield
    except Exception as error:
        if jax.process_count() == 1:
            raise
        mine = error
    try:
        said = gather("" if mine is None else str(mine) or type(mine).__name__)
    except (Missing, jax.errors.JaxRuntimeError) as lost:
        if mine is None:
            raise
        raise Missing(f"{mine}; and then {lost}") from mine
    if mine is not None:
        raise mine
    for process, message in enumerate(said):
        if message:
            raise InputError(f"process {process}: {message}")


def meet(place: str, seconds: int = 10) -> bool:
    """Whether all processes come to `place` within that time. Needs no device, so it may follow any error."""
    try:
        _await_all(place, seconds)
    except (Missing, jax.errors.JaxRuntimeError):
        return False
    return True


def _await_all(place: str, seconds: int) -> None:
    """Missing if not all come in time, JaxRuntimeError if one is lost."""
    try:
        ocp.multihost.get_barrier_sync_fn()(key=f"polyglot_jax {place}", timeout_ms=1000 * seconds)
    except jax.errors.JaxRuntimeError as error:
        if "DEADLINE_EXCEEDED" not in str(error):
            raise
        raise Missing(
            f"process {jax.process_index()}: others did not come within distributed.meeting_timeout={seconds} seconds: "
            f"{str(error).splitlines()[0]}; look at what the missing one waits for (its file system?), or give more "
            "time; the same command on all goes on from the newest checkpoint"
        ) from error


@contextlib.contextmanager
def cluster(where: DistributedConfig) -> Iterator[None]:
    """Inside, this process is one of those that `where` describes; nothing may have used a device before.

    An expected error is said at once; the process ends (SystemExit) when the others have failed too, or after 10 s.
    InputError if another is lost. The engine itself ends a process that waits for one whose heartbeat stopped.
    """
    if where.coordinator is None:
        yield
        return
    global _meeting_timeout
    _meeting_timeout = where.meeting_timeout
    try:
        _join(where)
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(sys.stdout if is_first() else nowhere):
            yield
    except cli.EXPECTED as error:
        status = cli.say(error)  # now: the engine ends a process that waits for one that is slow to part
        _part()
        raise SystemExit(status) from error
    except BaseException as error:
        if _part() or not isinstance(error, jax.errors.JaxRuntimeError):
            raise
        raise InputError(
            f"process {jax.process_index()}: can no longer compute with the others: {str(error).splitlines()[0]}; "
            "if another process has ended, it has said why; the same command on all goes on from the newest "
            "checkpoint"
        ) from error


def _part() -> bool:
    """Whether all have failed alike, and part in good order."""
    if meet("failed"):
        return True
    # JAX would wait for the others at exit, and they for this process; so it just goes, and is missed.
    atexit.register(_leave)
    return False


def _leave() -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)


def _join(where: DistributedConfig) -> None:
    what = f"distributed.coordinator={where.coordinator}"
    if where.processes is not None:
        what = f"process {where.process} of {where.processes}: {what}"
        print(f"{what}: waiting for the others", file=sys.stderr)

    if where.process == 0 and not _is_free(where.coordinator):
        raise InputError(f"{what}: the port is taken; name another")

    def give_up() -> None:
        print(
            f"error: {what}: not all processes came together there within distributed.start_timeout="
            f"{where.start_timeout} seconds; look whether process 0 runs, its address can be reached from here, and "
            "every number is given once",
            file=sys.stderr,
        )
        _leave()

    # The engine would end the process with a stack trace of its own, so it is given longer.
    timer = threading.Timer(where.start_timeout, give_up)
    timer.daemon = True
    timer.start()
    faulthandler.enable()  # a process that the engine ends says where it waited
    try:
        jax.distributed.initialize(
            None if where.coordinator == "auto" else where.coordinator,
            where.processes,
            where.process,
            initialization_timeout=where.start_timeout + 30,
            heartbeat_timeout_seconds=where.heartbeat_timeout,
        )
        found = jax.process_count()  # the devices of all processes are known from here on
    except (ValueError, RuntimeError) as error:
        hint = "" if where.processes else "; give HOST:PORT, and distributed.processes and distributed.process, instead"
        raise InputError(f"{what}: {str(error).splitlines()[0].rstrip('.')}{hint}") from error
    finally:
        timer.cancel()
    if where.processes not in (None, found):
        raise InputError(f"{what}: {found} processes came; give all the same distributed.processes")


def _is_free(address: str) -> bool:
    """Whether the port can be listened at; the engine ends without a word where it cannot."""
    try:
        with socket.create_server(("", int(address.rpartition(":")[2]))):
            return True
    except OSError:
        return False
