"""What counting alone reaches on a held-out text: unigram and trigram models over the same ids and the same split."""

from __future__ import annotations

import math

import numpy as np


def unigram_bits(train: np.ndarray, heldout: np.ndarray, vocab: int) -> float:
    """Bits per token of heldout[1:] (int[N]) under the frequencies of `train` (int[M]), one added to every count."""
    counts = np.bincount(train, minlength=vocab) + 1.0
    return float(-np.log2(counts / counts.sum())[heldout[1:]].mean())


def trigram_bits(train: np.ndarray, heldout: np.ndarray, vocab: int, discount: float = 0.75) -> float:
    """Bits per token of heldout[1:] under an interpolated trigram: absolute discounting, Kneser-Ney lower orders.

    p(w | u v) = max(c(u v w) - d, 0) / c(u v) + d n(u v .) / c(u v) * p(w | v), where the lower orders count in how
    many contexts a token was seen, and the lowest is mixed with the uniform distribution. Chen and Goodman, 1999.
    """
    size = np.int64(vocab)
    train, heldout = train.astype(np.int64), heldout.astype(np.int64)
    trigrams, trigram_counts = np.unique((train[:-2] * size + train[1:-1]) * size + train[2:], return_counts=True)
    bigrams, bigram_contexts = np.unique(trigrams % (size * size), return_counts=True)
    unigram_contexts = np.bincount(bigrams % size, minlength=vocab).astype(float)

    def grouped(keys: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Contexts (keys without their last token), the counts in each, and how many different tokens follow it."""
        contexts, starts, kinds = np.unique(keys // size, return_index=True, return_counts=True)
        return contexts, np.add.reduceat(counts, starts).astype(float), kinds.astype(float)

    def look_up(keys: np.ndarray, values: np.ndarray, wanted: np.ndarray) -> np.ndarray:
        at = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
        return np.where(keys[at] == wanted, values[at], 0.0)

    def interpolate(keys: np.ndarray, counts: np.ndarray, wanted: np.ndarray, lower: np.ndarray) -> np.ndarray:
        contexts, totals, kinds = grouped(keys, counts)
        total = look_up(contexts, totals, wanted // size)
        seen = np.maximum(look_up(keys, counts.astype(float), wanted) - discount, 0)
        share = discount * look_up(contexts, kinds, wanted // size)
        return np.where(total > 0, (seen + share * lower) / np.maximum(total, 1), lower)

    target = heldout[1:]
    total = unigram_contexts.sum()
    kinds = np.count_nonzero(unigram_contexts)
    probability = (np.maximum(unigram_contexts[target] - discount, 0) + discount * kinds / vocab) / total
    probability = interpolate(bigrams, bigram_contexts, heldout[:-1] * size + target, probability)
    if len(target) > 1:
        three = (heldout[:-2] * size + heldout[1:-1]) * size + heldout[2:]
        probability[1:] = interpolate(trigrams, trigram_counts, three, probability[1:])
    return -float(np.log(probability).mean()) / math.log(2)
