"""Files that the command writes: places are tried before anything is compiled, and no file is overwritten."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from polyglot_jax.config import InputError


@contextmanager
def new_file(name: str | None) -> Iterator[Callable[[str], None]]:
    """Yields what writes the text of a file that is not there yet (None: of none); InputError at once if it cannot be.

    The file appears whole, as soon as it is written, and what goes wrong later leaves it.
    """
    if name is None:
        yield lambda _: None
        return
    path = Path(name)
    temporary = path.with_name(f"{path.name}.incomplete")

    def check() -> None:
        if os.path.lexists(path):
            raise InputError(f"{path}: exists; name another file, or delete it")

    def write(text: str) -> None:
        temporary.write_text(text, encoding="utf-8")
        check()  # again: somebody may have put something there meanwhile
        temporary.rename(path)

    check()
    try:
        temporary.open("x").close()
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error}); name another file, or mend that") from error
    try:
        yield write
    finally:
        temporary.unlink(missing_ok=True)
