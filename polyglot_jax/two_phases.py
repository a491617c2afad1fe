"""Work in the background that every process does its part of, and one commits."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax

from polyglot_jax import hosts


class TwoPhases:
    """`work` on every process, and when all have succeeded `commit` on the first, with what they returned.

    The main threads ask one another how far it is, in `done` and `result`: the phases themselves run beside them and
    meet nobody. One process has nobody to ask, and commits at once.
    """

    def __init__(self, held: contextlib.ExitStack, work: Callable[[], Any], commit: Callable[[list[Any]], None]):
        """`held`: closed after the commit, or with the exception of whichever failed. work: gives what JSON can say."""
        self._held, self._commit = held, commit
        self._is_alone = jax.process_count() == 1
        self._is_ending = self._is_alone
        self._future = _in_background(lambda: self._end(lambda: [work()]) if self._is_alone else work())

    def _end(self, parts: Callable[[], list[Any]]) -> None:
        with self._held:
            found = parts()
            if hosts.is_first():
                self._commit(found)

    def _end_together(self) -> None:
        failure, parts = None, []
        try:
            with hosts.together():
                mine = self._future.result()
            parts = [json.loads(text) for text in hosts.gather(json.dumps(mine))]
        except hosts.Missing:
            with self._held:
                raise  # there is nobody to end it with
        except Exception as error:
            failure = error

        def found() -> list[Any]:
            if failure:
                raise failure
            return parts

        self._is_ending = True
        self._future = _in_background(lambda: self._end(found))

    def done(self) -> bool:
        """Whether `result` has nothing to wait for; of all processes."""
        if self._is_alone:
            return self._future.done()
        if not hosts.agree(self._future.done()):
            return False
        if self._is_ending:
            return True
        self._end_together()
        return False

    def result(self) -> None:
        """Wait for the end; of all processes: what went wrong on one is raised on each."""
        if not self._is_ending:
            self._end_together()
        with hosts.together():
            self._future.result()


def _in_background(work: Callable[[], Any]) -> Future[Any]:
    pool = ThreadPoolExecutor(1, thread_name_prefix="save")
    future = pool.submit(work)
    pool.shutdown(wait=False)  # it takes no more work; Python waits for what it has
    return future
