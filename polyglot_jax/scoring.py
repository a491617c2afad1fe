"""Log-probabilities of continuations: each context is read once, however many continuations are asked about.

What is scored is sorted by length and cut into batches whose shapes are rounded up to buckets, so that there are few
compilations. What a pair scores does not depend on its company, beyond the rounding of sums.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import numpy as np

from polyglot_jax import steps
from polyglot_jax.config import InputError
from polyglot_jax.generate import bucket, check_room, width
from polyglot_jax.model import Params, Transformer

BATCH_TOKENS, BATCH_LOGITS = 4096, 1 << 27
"""Most tokens read and most logits made at a time, where the number of contexts in a batch is not given."""


class Pair(NamedTuple):
    """A context and a continuation of it, both of at least one token."""

    context: Sequence[int]
    continuation: Sequence[int]

    def fitted(self, most: int) -> Pair:
        """Without as much of the context's beginning as does not fit into a model that reads `most` tokens.

        The last token of a continuation is only predicted, so pairs may have `most` + 1 tokens. InputError if the
        continuation is empty, or too long by itself.
        """
        count = len(self.continuation)
        if not self.context:
            raise InputError("context: holds no tokens; begin with <|endoftext|>")
        if not 0 < count <= most:
            raise InputError(f"continuation of {count} tokens; it must have 1 to model.context={most}")
        return Pair(self.context[-(most + 1 - count) :], self.continuation)

    def fits(self, most: int) -> bool:
        return len(self.context) + len(self.continuation) <= most + 1


class Scored(NamedTuple):
    """A batch: numbers of the pairs in it; their float64 sums of log-probabilities; bool, whether they are greedy."""

    numbers: list[int]
    log_probabilities: np.ndarray
    is_greedy: np.ndarray


@dataclass(frozen=True)
class Scorer:
    """Jitted scoring with one model; params as `apply` takes them, layers split."""

    model: Transformer

    @functools.cached_property
    def _score(self) -> Any:
        return jax.jit(functools.partial(steps.score_continuations, self.model))

    def run(
        self, params: Params, pairs: Sequence[Pair], batch_size: int | None = None, replicas: int = 1
    ) -> Iterator[Scored]:
        """Score all pairs, those with the longest contexts first; yields batch by batch.

        batch_size: contexts read at a time; None: by BATCH_TOKENS and BATCH_LOGITS. Either way fewer if there are no
        more, and a multiple of `replicas`, the devices that share out a batch. Contexts longer than the model's lose
        their beginning (`Pair.fitted`).
        """
        most = self.model.config.context
        groups: dict[tuple[int, ...], list[int]] = {}
        fitted = [pair.fitted(most) for pair in pairs]
        for number, pair in enumerate(fitted):
            groups.setdefault(tuple(pair.context), []).append(number)

        def shape(item: tuple[tuple[int, ...], list[int]]) -> tuple[int, int, int]:
            context, numbers = item
            longest = max(len(fitted[number].continuation) for number in numbers)
            return width(len(context), 16, most), width(longest, 1, most), len(numbers)

        ordered = sorted(groups.items(), key=lambda item: (shape(item), item[0]), reverse=True)
        while ordered:
            read, longest, _ = shape(ordered[0])
            vocab = self.model.config.vocab
            size = batch_size or min(BATCH_TOKENS // (read + longest), BATCH_LOGITS // (longest * vocab))
            rows = -(-max(1, min(size, bucket(len(ordered), 1, size))) // replicas) * replicas
            batch, ordered = ordered[:rows], ordered[rows:]
            _, longest, count = np.max([shape(item) for item in batch], axis=0)
            tokens, lengths = np.zeros((rows, read), np.int32), np.ones(rows, np.int32)
            continuations = np.zeros((rows, count, longest), np.int32)
            counts = np.zeros((rows, count), np.int32)
            for row, (context, numbers) in enumerate(batch):
                tokens[row, : len(context)], lengths[row] = context, len(context)
                for column, number in enumerate(numbers):
                    ids = fitted[number].continuation
                    continuations[row, column, : len(ids)], counts[row, column] = ids, len(ids)
            what, room = f"batch_size={rows}: contexts of {read:,} tokens", {"cache": (rows, read + longest)}
            room |= {"read": (rows, read), "logits": (2 * rows, longest)}
            check_room(self.model.config, self.model.dtype, what, "a smaller one", **room)
            sums, greedy = jax.device_get(self._score(params, tokens, lengths, continuations, counts))
            where = [(row, column) for row, (_, numbers) in enumerate(batch) for column in range(len(numbers))]
            index = tuple(np.array(where).T)
            yield Scored([n for _, numbers in batch for n in numbers], sums[index].astype(np.float64), greedy[index])
