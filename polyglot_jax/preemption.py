"""The signal with which clusters and people ask a run to end."""

from __future__ import annotations

import signal
import threading
from types import FrameType


class Preemption:
    """While it is open, SIGTERM ends nothing, but is noted, for a loop to stop where it can.

    .asked: the signal's name, or None.
    """

    def __init__(self) -> None:
        self.asked: str | None = None

    def __enter__(self) -> Preemption:
        self._before = None
        if threading.current_thread() is threading.main_thread():  # Python lets only that one handle signals
            self._before = signal.signal(signal.SIGTERM, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)

    def _note(self, number: int, _: FrameType | None) -> None:
        self.asked = signal.Signals(number).name
