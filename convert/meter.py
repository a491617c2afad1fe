"""What a conversion cost: time, bytes, and the most memory it held."""

from __future__ import annotations

import threading
import time
from pathlib import Path

_STATUS = Path("/proc/self/status")


def anonymous_bytes() -> int | None:
    """Memory of this process that is no file's (Linux's RssAnon): what it truly holds. None on other systems."""
    if not _STATUS.is_file():
        return None
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024


class Meter:
    """Measures while it is open. .seconds; .peak: the most anonymous memory, in bytes, looked at 100 times a second.

    Files that are mapped do not count: the system takes their pages back whenever it needs them.
    """

    def __enter__(self) -> Meter:
        self.peak = anonymous_bytes()
        self._start = time.perf_counter()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        if self.peak is not None:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.seconds = time.perf_counter() - self._start
        self._done.set()
        if self.peak is not None:
            self._thread.join()

    def _watch(self) -> None:
        while not self._done.wait(0.01):
            self.peak = max(self.peak, anonymous_bytes())

    def __str__(self) -> str:
        memory = "" if self.peak is None else f", at most {self.peak / 2**20:.0f} MiB of memory"
        return f"{self.seconds:.1f} s{memory}"
