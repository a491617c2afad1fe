"""The signal with which clusters and people ask a run to end."""

from __future__ import annotations

import signal
import threading
from types import FrameType

import jax
from jax.experimental import multihost_utils


class Preemption:
    """While it is open, SIGTERM ends nothing, but is noted, for a loop to stop where it can.

    With several processes JAX notes it, from when they come together, whichever of them gets it.
    """

    def __init__(self) -> None:
        self._asked = False

    def __enter__(self) -> Preemption:
        self._before = None
        is_main = threading.current_thread() is threading.main_thread()  # Python lets only that one handle signals
        if is_main and jax.process_count() == 1:
            self._before = signal.signal(signal.SIGTERM, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)

    def _note(self, number: int, _: FrameType | None) -> None:
        self._asked = True

    def reached(self, step: int) -> bool:
        """Whether to stop after `step`: somebody asked, and all processes stop after the same. Ask after every step."""
        return self._asked if jax.process_count() == 1 else multihost_utils.reached_preemption_sync_point(step)
