"""Choosing a token: a pure function of logits, of the tokens so far, of a key for each row, and of settings.

The order is that of transformers: repetition penalty, frequency penalty, n-grams, fewest tokens; then temperature,
top-k, top-p, min-p. Settings are arrays, so that other values compile nothing; what costs room or time even when it
changes nothing is compiled only where it is asked for (`Form`).
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from polyglot_jax.config import SampleConfig


class Sampling(NamedTuple):
    """The settings of `SampleConfig` that choosing a token needs."""

    temperature: jax.Array
    top_k: jax.Array
    top_p: jax.Array
    min_p: jax.Array
    repetition_penalty: jax.Array
    frequency_penalty: jax.Array
    min_new_tokens: jax.Array

    @classmethod
    def of(cls, config: SampleConfig) -> Sampling:
        dtypes = {"float": jnp.float32, "int": jnp.int32}
        return cls(*(dtypes[SampleConfig.__annotations__[name]](getattr(config, name)) for name in cls._fields))


class Form(NamedTuple):
    """What is compiled. counts: whether a penalty asks which tokens came; ngram: size of those not repeated."""

    counts: bool
    ngram: int

    @classmethod
    def of(cls, config: SampleConfig) -> Form:
        return cls(config.repetition_penalty != 1 or config.frequency_penalty != 0, config.no_repeat_ngram)


class Counts(NamedTuple):
    """Which ids came. read: bool[B, V], in the prompt; made: int32[B, V], how often each was made."""

    read: jax.Array
    made: jax.Array

    @classmethod
    def of(cls, tokens: jax.Array, lengths: jax.Array, vocab: int) -> Counts:
        """tokens: int[B, T], of which the first `lengths`, int[B], are the prompt."""
        rows = jnp.arange(tokens.shape[0])
        ids = jnp.where(jnp.arange(tokens.shape[1]) < lengths[:, None], tokens, vocab)
        nothing = jnp.zeros((tokens.shape[0], vocab), jnp.int32)
        return cls(nothing.astype(bool).at[rows[:, None], ids].set(True, mode="drop"), nothing)

    def add(self, ids: jax.Array, goes: jax.Array) -> Counts:
        """With int[B] more, of the rows that go on, bool[B]."""
        return self._replace(made=self.made.at[jnp.arange(ids.shape[0]), ids].add(goes.astype(jnp.int32)))


def penalise(logits: jax.Array, counts: Counts, sampling: Sampling) -> jax.Array:
    """float32[B, V] -> the same, less likely where a token came before.

    Repetition (Keskar et al. 2019, as in transformers): what came, prompt included, is divided by the penalty where
    positive and multiplied where negative. Frequency (as in OpenAI's API): less the penalty for each time it was made.
    """
    weaker = jnp.where(logits > 0, logits / sampling.repetition_penalty, logits * sampling.repetition_penalty)
    logits = jnp.where(counts.read | (counts.made > 0), weaker, logits)
    return logits - sampling.frequency_penalty * counts.made


def forbid_ngrams(logits: jax.Array, tokens: jax.Array, ends: jax.Array, size: int) -> jax.Array:
    """-inf for each token that would end an n-gram of `size` that is already among a row's tokens.

    tokens: int[B, S], of which the first `ends`, int[B], are there.
    """
    rows = jnp.arange(tokens.shape[0])[:, None]
    starts = jnp.arange(tokens.shape[1])
    last = starts + size - 1  # of the n-gram that starts there
    is_same = last < ends[:, None]
    for i in range(size - 1):
        now = jnp.take_along_axis(tokens, (ends - size + 1 + i)[:, None], axis=1, mode="clip")
        is_same &= jnp.take(tokens, starts + i, axis=1, mode="clip") == now
    ids = jnp.take(tokens, last, axis=1, mode="clip")
    return logits.at[rows, jnp.where(is_same, ids, logits.shape[-1])].set(-jnp.inf, mode="drop")


def _likeliest(logits: jax.Array, weights: jax.Array, share: jax.Array) -> jax.Array:
    """bool[B, V]: the fewest of the largest logits whose `weights` add up to `share`; of equal ones all or none.

    The least of them is found bit by bit, as the largest number that still leaves enough: 32 sums instead of a sort.
    """
    bits = jax.lax.bitcast_convert_type(jnp.where(logits == 0, 0, logits), jnp.int32)  # -0 is 0
    # As unsigned numbers in the order of the floats.
    order = jax.lax.bitcast_convert_type(jnp.where(bits < 0, ~bits, bits ^ jnp.int32(-(2**31))), jnp.uint32)

    def add_bit(i: jax.Array, least: jax.Array) -> jax.Array:
        more = least | (jnp.uint32(1) << (31 - i).astype(jnp.uint32))
        reached = jnp.where(order >= more[:, None], weights, 0).sum(-1)
        return jnp.where(reached >= share.astype(weights.dtype), more, least)

    least = jax.lax.fori_loop(0, 32, add_bit, jnp.zeros(logits.shape[0], jnp.uint32))
    return order >= least[:, None]


def filter_logits(logits: jax.Array, sampling: Sampling) -> jax.Array:
    """Temperature, then top-k, top-p and min-p, as in transformers: float32[B, V] -> the same, -inf where not drawn.

    Of several tokens as likely as the last one kept, all are.
    """
    logits = logits / jnp.maximum(sampling.temperature, jnp.finfo(jnp.float32).tiny)

    def keep(is_kept: jax.Array) -> jax.Array:
        return jnp.where(is_kept, logits, -jnp.inf)

    def cut_k() -> jax.Array:
        return keep(_likeliest(logits, jnp.ones_like(logits), jnp.minimum(sampling.top_k, logits.shape[-1])))

    logits = jax.lax.cond(sampling.top_k > 0, cut_k, lambda: logits)

    def cut_p() -> jax.Array:
        return keep(_likeliest(logits, jax.nn.softmax(logits, axis=-1), sampling.top_p))

    # At 1 all are kept: rounding lets the sum reach 1 before the last of them.
    logits = jax.lax.cond(sampling.top_p < 1, cut_p, lambda: logits)
    return keep(logits >= logits.max(-1, keepdims=True) + jnp.log(sampling.min_p))


def choose(logits: jax.Array, keys: jax.Array, sampling: Sampling) -> jax.Array:
    """int32[B] from float32[B, V] and a key for each row: the likeliest at temperature 0, else drawn."""

    def draw() -> jax.Array:
        return jax.vmap(jax.random.categorical)(keys, filter_logits(logits, sampling)).astype(jnp.int32)

    return jax.lax.cond(sampling.temperature > 0, draw, lambda: jnp.argmax(logits, axis=-1).astype(jnp.int32))
