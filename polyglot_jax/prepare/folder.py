"""The folder a command makes: guarded before, whole or absent after, and known by its manifest."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from polyglot_jax.config import InputError
from polyglot_jax.files import new_folder

MANIFEST = "manifest.json"
FORMAT = "polyglot-jax-"
"""What the "format" of every manifest made here begins with."""


@contextmanager
def result_folder(out: str, overwrite: bool, inputs: Iterable[Path]) -> Iterator[Path]:
    """Yields a folder to write into, which becomes `out` at the end and is gone after any exception.

    An `out` that exists is only replaced when empty or, with `overwrite`, when made here; it stays until then.
    Raises InputError for any other `out`, for one that holds an input, and when it cannot be written or the disk fills.
    """
    for file in inputs:
        if Path(out).resolve() in file.resolve().parents:
            raise InputError(f"out={out}: holds the input {file}; choose another")
    try:
        with new_folder(out, _made_here, overwrite=overwrite) as folder:
            yield folder
    except (PermissionError, NotADirectoryError) as error:
        raise InputError(f"out={out}: cannot be written ({error.strerror}); choose another") from error


def write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    """Write manifest.json, by whose "format" a folder is known as made here."""
    text = json.dumps(manifest, ensure_ascii=False, indent=2) + "\n"
    # A path may hold bytes of another encoding.
    (folder / MANIFEST).write_text(text, encoding="utf-8", errors="backslashreplace")


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of a folder made here; None if it has none, or one of somebody else's."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        return manifest if manifest["format"].startswith(FORMAT) else None
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return None


def _made_here(folder: Path) -> bool:
    return read_manifest(folder) is not None
