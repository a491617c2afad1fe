"""The settings of `evaluate`, and their checks; without JAX, so that --help is quick."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from typing import Literal

from polyglot_jax.config import InputError, MeshConfig
from polyglot_jax.evaluate import data
from polyglot_jax.evaluate.tasks import Protocol, find_tasks


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Evaluate a model on KoBEST, as the published tables were made, and on the bits per byte of texts."""

    checkpoint: str
    """A checkpoint, a run (its newest checkpoint), a Hugging Face folder or a hub name."""
    tasks: str = ""
    """kobest_boolq, kobest_copa, kobest_wic, kobest_hellaswag, kobest_sentineg, with commas; kobest: all five."""
    shots: str = "0"
    """Numbers of examples before each question, with commas: 0,5,10,50."""
    data: str = data.HUB
    """KoBEST's folder (BoolQ/test.tsv, ...), or what the `datasets` library takes, such as the hub's name."""
    protocol: Protocol = "branch"
    """branch: as the published tables were made; harness: as lm-evaluation-harness 0.4 does it."""
    limit: int | None = None
    """Only the first so many test documents of each task, with the prompts they have among all: for a quick look."""
    text: tuple[str, ...] = ()
    """Text files, folders of .txt files, or prepared corpora, to take the bits per byte of."""
    stride: int | None = None
    """Tokens of a long text scored by each window; none: half the model's context."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Of weights and products; none: float32 on a CPU, bfloat16 elsewhere. (The published scores: float16.)"""
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    batch_size: int | None = None
    """Contexts read at a time; none: by their length."""
    resamples: int = 1000
    """Bootstrap resamples that the intervals are made from."""
    out: str | None = None
    """JSON file to write: settings, results, and every document's scores. An interrupted evaluation goes on."""
    overwrite: bool = False
    """Replace what is at --out."""

    def __post_init__(self) -> None:
        if not self.tasks and not self.text:
            raise InputError("tasks=: nothing to do; name --tasks kobest_copa,kobest_hellaswag, or --text FILE")
        for name, least in (("limit", 1), ("batch_size", 1), ("stride", 1), ("resamples", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise InputError(f"{name}={value}: must be at least {least}")
        if self.limit and not self.tasks:
            raise InputError(f"limit={self.limit}: there are no --tasks that it could limit; a --text is read whole")
        self.task_names()
        self.shot_numbers()

    def task_names(self) -> list[str]:
        """What --tasks lists, without repeats."""
        return find_tasks(self.tasks) if self.tasks else []

    def shot_numbers(self) -> list[int]:
        """What --shots lists, without repeats."""
        parts = [part.strip() for part in self.shots.split(",")]
        if not all(re.fullmatch(r"\d{1,9}", part, re.ASCII) for part in parts):
            raise InputError(f"shots={self.shots}: must be numbers with commas, such as 0,5,10,50, of at most 9 digits")
        return list(dict.fromkeys(int(part) for part in parts))
