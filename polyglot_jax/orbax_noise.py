"""Keeps Orbax from printing what it raises as well: a full disk is one line, not hundreds of tracebacks."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

# Its threads log what ended them; asyncio, whenever the garbage is collected, each write that failed after the first.
logging.getLogger("absl").addFilter(lambda record: not (record.exc_info and "orbax" in record.pathname))
logging.getLogger("asyncio").addFilter(
    lambda record: not any(name in record.getMessage() for name in ("orbax", "OCDBT database"))
)
# And Python of the writes that were still to begin.
warnings.filterwarnings("ignore", "coroutine 'async_serialize", RuntimeWarning)


@contextmanager
def quiet() -> Iterator[None]:
    """Open while Orbax writes: after one failure the others find its event loop closed, which Python would report."""
    report = sys.unraisablehook

    def hook(what: sys.UnraisableHookArgs) -> None:
        if not (isinstance(what.exc_value, RuntimeError) and str(what.exc_value) == "Event loop is closed"):
            report(what)

    sys.unraisablehook = hook
    try:
        yield
    finally:
        sys.unraisablehook = report
