"""The decode loop: prompts are read once, then tokens are made one after the other without leaving the device.

Shapes are rounded up to buckets, so that another prompt seldom means another compilation. The key of each token is made
from (seed, the prompt's number in the call, the token's position), so a prompt's tokens do not depend on its company.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from polyglot_jax import steps
from polyglot_jax.config import Config, InputError, SampleConfig
from polyglot_jax.model import Cache, Params, Transformer, init_cache


class Sampling(NamedTuple):
    """What choosing a token needs, as arrays, so that other values compile nothing."""

    temperature: jax.Array
    top_k: jax.Array
    top_p: jax.Array

    @classmethod
    def of(cls, config: SampleConfig) -> Sampling:
        return cls(jnp.float32(config.temperature), jnp.int32(config.top_k), jnp.float32(config.top_p))


def filter_logits(logits: jax.Array, sampling: Sampling) -> jax.Array:
    """Temperature, then top-k, then top-p, as in transformers: float32[B, V] -> the same with -inf where not drawn."""
    logits = logits / jnp.maximum(sampling.temperature, jnp.finfo(jnp.float32).tiny)
    ordered = jnp.sort(logits, axis=-1, descending=True)
    size = logits.shape[-1]
    k = jnp.where(sampling.top_k > 0, jnp.minimum(sampling.top_k, size), size)
    kth = jnp.take_along_axis(ordered, jnp.full((logits.shape[0], 1), k - 1), axis=-1)
    ordered = jnp.where(ordered >= kth, ordered, -jnp.inf)
    probabilities = jax.nn.softmax(ordered, axis=-1)
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    # A token is kept while those likelier than it have not reached top_p; the likeliest always is. (At 1 all are kept:
    # rounding lets the sum reach 1 before the last of them.)
    is_kept = (before < sampling.top_p) | (sampling.top_p >= 1)
    kept = jnp.where(is_kept & jnp.isfinite(ordered), ordered, jnp.inf)
    return jnp.where(logits >= kept.min(axis=-1, keepdims=True), logits, -jnp.inf)


def choose(logits: jax.Array, keys: jax.Array, sampling: Sampling) -> jax.Array:
    """int32[B] from float32[B, V] and a key for each row: the likeliest at temperature 0, else drawn."""

    def draw() -> jax.Array:
        return jax.vmap(jax.random.categorical)(keys, filter_logits(logits, sampling)).astype(jnp.int32)

    return jax.lax.cond(sampling.temperature > 0, draw, lambda: jnp.argmax(logits, axis=-1).astype(jnp.int32))


class Decoding(NamedTuple):
    """State of the loop. tokens: int32[B, N], made[B] of which are made; logits: those of the next token."""

    tokens: jax.Array
    made: jax.Array
    done: jax.Array
    logits: jax.Array
    lengths: jax.Array
    cache: Cache


def _start(
    model: Transformer, slots: int, room: int, params: Params, tokens: jax.Array, lengths: jax.Array, done: jax.Array
) -> Decoding:
    rows = tokens.shape[0]
    cache = init_cache(model.config, rows, slots, model.dtype)
    logits, cache = steps.prefill(model, params, tokens, lengths, cache)
    return Decoding(jnp.zeros((rows, room), jnp.int32), jnp.zeros(rows, jnp.int32), done, logits, lengths, cache)


def _continue(
    model: Transformer, valid_ids: int, params: Params, state: Decoding, limit: jax.Array, ends: jax.Array,
    key: jax.Array, sampling: Sampling,
) -> Decoding:  # fmt: skip
    """Until every row is done or has `limit` tokens. ends: int[E], ids that end a row."""
    rows = jnp.arange(state.tokens.shape[0])
    is_padding = jnp.arange(model.config.vocab) >= valid_ids

    def is_going(state: Decoding) -> jax.Array:
        return ~jnp.all(state.done | (state.made >= limit))

    def one(state: Decoding) -> Decoding:
        positions = state.lengths + state.made
        keys = jax.vmap(lambda row, at: jax.random.fold_in(jax.random.fold_in(key, row), at))(rows, positions)
        chosen = choose(jnp.where(is_padding, -jnp.inf, state.logits), keys, sampling)
        goes = ~state.done & (state.made < limit)
        at = jnp.where(goes, state.made, state.tokens.shape[1])
        tokens = state.tokens.at[rows, at].set(chosen, mode="drop")
        made = state.made + goes
        # A row that rests writes behind the slots of the cache, so that it may go on later.
        logits, cache = steps.decode_step(
            model, params, chosen, jnp.where(goes, positions, state.cache[0]["k"].shape[1]), state.cache
        )
        logits = jnp.where(goes[:, None], logits, state.logits)
        return Decoding(tokens, made, state.done | (goes & jnp.isin(chosen, ends)), logits, state.lengths, cache)

    return jax.lax.while_loop(is_going, one, state)


def bucket(size: int, least: int, most: int) -> int:
    """`size` rounded up to `least` times a power of two, at most `most`."""
    rounded = least
    while rounded < size:
        rounded *= 2
    return min(rounded, most)


@dataclass(frozen=True)
class Generator:
    """Jitted generation for one model."""

    model: Transformer
    config: Config

    @functools.cached_property
    def _start(self) -> Any:
        return jax.jit(functools.partial(_start, self.model), static_argnums=(0, 1))

    @functools.cached_property
    def _continue(self) -> Any:
        valid = self.config.data.valid_ids or self.config.model.vocab
        return jax.jit(functools.partial(_continue, self.model, valid), donate_argnames="state")

    def run(
        self,
        params: Params,
        prompts: Sequence[Sequence[int]],
        sample: SampleConfig,
        ends: Sequence[int],
        chunk: int = 0,
    ) -> Iterator[list[list[int]]]:
        """Yield the tokens each prompt has so far: once at the end, or after the first and then every `chunk` tokens.

        The caller stops by no longer asking. A row ends with one of `ends` (included; at most 8)
        or at sample.max_new_tokens. InputError if a prompt is empty or leaves too little room in the context.
        """
        context, count = self.config.model.context, len(prompts)
        longest = max(map(len, prompts))
        if not all(prompts):
            raise InputError("prompt: holds no tokens; begin with <|endoftext|>")
        if longest + sample.max_new_tokens > context:
            less = f"lower it to {context - longest} or shorten" if longest < context else "shorten"
            raise InputError(
                f"sample.max_new_tokens={sample.max_new_tokens}: with a prompt of {longest} tokens that is more than "
                f"model.context={context}; {less} the prompt"
            )
        rows = bucket(count, 1, 1 << 30)
        width = bucket(longest, 16, context)
        room = bucket(sample.max_new_tokens, 16, context)
        tokens = np.zeros((rows, width), np.int32)
        lengths = np.ones(rows, np.int32)
        for i, prompt in enumerate(prompts):
            tokens[i, : len(prompt)] = prompt
            lengths[i] = len(prompt)
        state = self._start(bucket(longest + sample.max_new_tokens, 64, context), room, params, tokens, lengths,
                            np.arange(rows) >= count)  # fmt: skip
        limit = 1 if chunk else sample.max_new_tokens
        end_ids = jnp.array([*ends, *[-1] * (8 - len(ends))], jnp.int32)  # of one shape, however many
        key, sampling = jax.random.key(sample.seed), Sampling.of(sample)
        while True:
            state = self._continue(params, state, jnp.int32(limit), end_ids, key, sampling)
            made, done, new = jax.device_get((state.made, state.done, state.tokens))
            yield [new[i, : made[i]].tolist() for i in range(count)]
            if limit == sample.max_new_tokens or done.all():
                return
            limit = min(limit + chunk, sample.max_new_tokens)
