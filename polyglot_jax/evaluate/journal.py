"""What an evaluation has scored so far, so that an interrupted one goes on."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from polyglot_jax.config import InputError


class Journal:
    """Lines of JSON in FILE.partial, one per batch, beside the result that the evaluation will write.

    A last line that was not finished is forgotten. Without a path nothing is kept.
    """

    def __init__(self, out: str | None, settings: Mapping[str, Any]) -> None:
        """InputError if what is there was made with other settings."""
        self._path = Path(f"{out}.partial") if out else None
        self._scores: dict[str, dict[int, float]] = {}
        header = json.dumps(settings, sort_keys=True, ensure_ascii=False)
        if self._path is None:
            return
        if self._path.is_file():
            self._read(header)
        else:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._path.write_text(header + "\n", encoding="utf-8")

    def _read(self, header: str) -> None:
        content = self._path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        first, *lines = whole.decode(errors="replace").split("\n")
        if whole and first != header:
            raise InputError(
                f"{self._path}: left by an evaluation of something else; remove it, or choose another --out"
            )
        if len(whole) < len(content) or not whole:
            self._path.write_bytes(whole or (header + "\n").encode())
        for line in lines:
            if line:
                self._remember(json.loads(line))

    def _remember(self, batch: Mapping[str, Any]) -> None:
        scores = self._scores.setdefault(batch["what"], {})
        scores.update(zip(batch["numbers"], batch["scores"], strict=True))

    def scores(self, what: str) -> dict[int, float]:
        """Number of a pair -> its score, of those of `what` that are done."""
        return self._scores.get(what, {})

    def add(self, what: str, numbers: list[int], scores: np.ndarray) -> None:
        batch = {"what": what, "numbers": numbers, "scores": scores.tolist()}
        self._remember(batch)
        if self._path is not None:
            with open(self._path, "a", encoding="utf-8") as file:
                file.write(json.dumps(batch) + "\n")

    def finish(self) -> None:
        if self._path is not None:
            self._path.unlink(missing_ok=True)
