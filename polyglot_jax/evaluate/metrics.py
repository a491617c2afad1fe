"""Choices from scores, and metrics from choices. N documents, C choices."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

NEAR_TIE = 1e-4
"""Two log-probabilities that differ by less may change places with the order in which sums were rounded."""


def macro_f1(confusion: np.ndarray) -> np.ndarray:
    """Mean F1 over the labels that occur in either, as scikit-learn's; [..., gold, predicted] counts -> [...]."""
    hits = np.diagonal(confusion, axis1=-2, axis2=-1)
    both = confusion.sum(-1) + confusion.sum(-2)
    occurs = both > 0
    return (2 * hits / np.where(occurs, both, 1)).sum(-1) / occurs.sum(-1)


def accuracy(confusion: np.ndarray) -> np.ndarray:
    return np.trace(confusion, axis1=-2, axis2=-1) / confusion.sum((-2, -1))


def choose(scores: Sequence[float], lengths: Sequence[int] | None = None) -> int:
    """The first of the likeliest, by sums of log-probabilities or by these divided by `lengths`."""
    return int(np.argmax(np.divide(scores, lengths) if lengths else scores))


def is_near_tie(scores: Sequence[float], lengths: Sequence[int] | None = None) -> bool:
    """Whether rounding may turn what `choose` chooses: half of NEAR_TIE is each score's, and is divided with it."""
    parts = 1 / np.asarray(lengths or [1] * len(scores))
    means, best = scores * parts, choose(scores, lengths)
    return bool((means[best] - means < NEAR_TIE * (parts[best] + parts) / 2).sum() > 1)


def summary(gold: Sequence[int], predicted: Sequence[int], choices: int, resamples: int) -> dict[str, dict[str, Any]]:
    """{"acc" and "macro_f1": {"", "_low" and "_high": value}}; between the two are 95 % of bootstrap resamples.

    Drawing N documents with replacement is drawing the counts of the confusion matrix from a multinomial.
    """
    confusion = np.zeros((choices, choices), np.int64)
    np.add.at(confusion, (list(gold), list(predicted)), 1)
    total = confusion.sum()
    drawn = np.random.default_rng(0).multinomial(total, confusion.ravel() / total, resamples)
    result = {}
    for name, metric in (("acc", accuracy), ("macro_f1", macro_f1)):
        low, high = np.quantile(metric(drawn.reshape(-1, choices, choices)), (0.025, 0.975)).tolist()
        result[name] = {"": float(metric(confusion)), "_low": low, "_high": high}
    return result
