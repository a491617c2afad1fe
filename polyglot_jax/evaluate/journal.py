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

    A list of pairs is known by a key made from all its tokens, so that scores are taken over only for the same ones,
    whatever else was changed: the size of batches after one was too large, the tasks asked for. A last line that was
    not finished is forgotten. Without a path nothing is kept.
    """

    def __init__(self, out: str | None, model: Mapping[str, Any]) -> None:
        """model: what, besides tokens, scores depend on. InputError if what is there was made with another."""
        self._path = Path(f"{out}.partial") if out else None
        self._scores: dict[str, dict[int, float]] = {}
        header = json.dumps(model, sort_keys=True, ensure_ascii=False)
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
                f"{self._path}: left by an evaluation of another model, dtype or version; remove it, or choose another "
                "--out"
            )
        if len(whole) < len(content) or not whole:
            self._path.write_bytes(whole or (header + "\n").encode())
        try:
            for line in filter(None, lines):
                self._remember(json.loads(line))
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{self._path}: is damaged ({error}); remove it to begin anew") from error

    def _remember(self, batch: Mapping[str, Any]) -> None:
        scores = self._scores.setdefault(batch["pairs"], {})
        scores.update(zip(batch["numbers"], batch["scores"], strict=True))

    def scores(self, pairs: str) -> dict[int, float]:
        """Number of a pair -> its score, of those that are done."""
        return self._scores.get(pairs, {})

    def add(self, pairs: str, numbers: list[int], scores: np.ndarray) -> None:
        batch = {"pairs": pairs, "numbers": numbers, "scores": scores.tolist()}
        self._remember(batch)
        if self._path is not None:
            with open(self._path, "a", encoding="utf-8") as file:
                file.write(json.dumps(batch) + "\n")

    def finish(self) -> None:
        if self._path is not None:
            self._path.unlink(missing_ok=True)
