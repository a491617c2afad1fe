"""Beam search on the device: the likeliest continuation as a whole, token for token what transformers' search finds.

A prompt's beams are rows beside each other. After each token their tokens, counts and cache are gathered by the beam
that each goes on from.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from polyglot_jax import steps
from polyglot_jax.config import SampleConfig
from polyglot_jax.generate import Batch, Decoding, Generator, Made, adjusted, check_batch, start
from polyglot_jax.model import Params, Transformer
from polyglot_jax.sampling import Form, Sampling

_NEVER = (
    -1e9
)  # what is not to be chosen scores this much less; finite, as in transformers, so that it still has an order
_EARLY = ("no", "yes", "never")


class Rules(NamedTuple):
    """The settings of `SampleConfig` for beam search, as arrays; early_stopping: its place in (no, yes, never)."""

    limit: jax.Array
    length_penalty: jax.Array
    early_stopping: jax.Array

    @classmethod
    def of(cls, config: SampleConfig) -> Rules:
        early = _EARLY.index(config.early_stopping)
        return cls(jnp.int32(config.max_new_tokens), jnp.float32(config.length_penalty), jnp.int32(early))


class Found(NamedTuple):
    """The best finished beams so far, best first. tokens: int32[P, N, S]; log_probabilities: float32[P, N, S];
    made: int32[P, N]; scores: float32[P, N], by length; is_there: bool[P, N]."""

    tokens: jax.Array
    log_probabilities: jax.Array
    made: jax.Array
    scores: jax.Array
    is_there: jax.Array


class Search(NamedTuple):
    """State of the search. running: its rows are the P prompts' N beams, all with as many tokens made; scores:
    float32[P, N], their summed log-probabilities; found; is_going: bool[P], whether better ones may be found."""

    running: Decoding
    scores: jax.Array
    found: Found
    is_going: jax.Array


def _taken(tree: Any, index: jax.Array) -> Any:
    """Of each leaf [P, M, ...] the entries `index`, int[P, N]."""
    return jax.tree.map(lambda x: jax.vmap(lambda of, at: of[at])(x, index), tree)


def _search(
    model: Transformer, valid_ids: int, slots: int, beams: int, ends: tuple[int, ...], form: Form, params: Params,
    tokens: jax.Array, lengths: jax.Array, is_filler: jax.Array, settings: Sampling, rules: Rules,
) -> Found:  # fmt: skip
    prompts, vocab = tokens.shape[0], model.config.vocab
    # Room for as many running beams though every end of each were among the best.
    kept = max(2, 1 + len(ends)) * beams
    end_ids = jnp.array(ends or (-1,), jnp.int32)
    offsets = jnp.arange(prompts)[:, None] * beams

    def step(search: Search) -> Search:
        state, found = search.running, search.found
        made = state.made[0] + 1  # with this token
        positions = state.lengths.reshape(prompts, beams)[:, :1] + made - 1
        logs = jax.nn.log_softmax(state.logits, axis=-1)
        sums = adjusted(state, logs, valid_ids, form, end_ids, settings).reshape(prompts, beams, vocab)
        sums = (sums + search.scores[..., None]).reshape(prompts, -1)
        scores, index = jax.lax.top_k(sums, kept)
        parents, chosen = index // vocab, index % vocab
        by_beam = (state.tokens, state.log_probabilities)
        new_tokens, new_logs = _taken(jax.tree.map(lambda x: x.reshape(prompts, beams, -1), by_beam), parents)
        here = jnp.arange(slots) == positions[..., None]
        new_tokens = jnp.where(here, chosen[..., None], new_tokens)
        log = jnp.take_along_axis(logs.reshape(prompts, -1), index, axis=1)
        new_logs = jnp.where(here, log[..., None], new_logs)
        is_end = jnp.isin(chosen, end_ids) | (made >= rules.limit)

        # What ends among the best N may be kept; the rest are only there to go on from.
        is_new = is_end & (jnp.arange(kept) < beams)
        is_full = (rules.early_stopping == 1) & found.is_there.all(-1)
        by_length = scores / made.astype(jnp.float32) ** rules.length_penalty
        is_shut = (is_full | ~search.is_going)[:, None] | ~is_new
        candidates = Found(new_tokens, new_logs, jnp.full_like(chosen, made), by_length + _NEVER * is_shut, is_new)
        both = jax.tree.map(lambda *x: jnp.concatenate(x, axis=1), found, candidates)
        found = _taken(both, jax.lax.top_k(both.scores, beams)[1])

        # The best N that go on.
        scores, picked = jax.lax.top_k(scores + _NEVER * is_end, beams)
        parents, chosen, new_tokens, new_logs = _taken((parents, chosen, new_tokens, new_logs), picked)
        rows, chosen = (parents + offsets).reshape(-1), chosen.reshape(-1)
        counts, cache = jax.tree.map(lambda x: x[rows], (state.counts, state.cache))
        at = jnp.repeat(positions, beams, axis=1).reshape(-1)
        logits, cache = steps.decode_step(model, params, chosen, at, cache)
        running = state._replace(
            tokens=new_tokens.reshape(-1, slots), log_probabilities=new_logs.reshape(-1, slots), made=state.made + 1,
            logits=logits, counts=None if counts is None else counts.add(chosen, jnp.ones_like(chosen, bool)),
            cache=cache,
        )  # fmt: skip
        # transformers' estimate of what the best running beam may yet reach.
        is_never = (rules.early_stopping == 2) & (rules.length_penalty > 0)
        length = jnp.where(is_never, rules.limit, made).astype(jnp.float32)
        worst = jnp.where(found.is_there, found.scores.min(-1, keepdims=True), _NEVER)
        may_improve = (scores[:, :1] / length**rules.length_penalty > worst).any(-1)
        return Search(running, scores, found, search.is_going & may_improve)

    def is_going(search: Search) -> jax.Array:
        is_full = (rules.early_stopping == 1) & search.found.is_there.all(-1)
        return (search.running.made[0] < rules.limit) & jnp.any(search.is_going & ~is_full)

    running = start(model, slots, beams, form, params, tokens, lengths, is_filler, jax.random.key(0), jnp.int32(0))
    shape = (prompts, beams)
    found = Found(jnp.zeros((*shape, slots), jnp.int32), jnp.zeros((*shape, slots), jnp.float32),
                  jnp.zeros(shape, jnp.int32), jnp.full(shape, _NEVER), jnp.zeros(shape, bool))  # fmt: skip
    # All beams of a prompt are the same at first: only one of them may be gone on from.
    scores = jnp.broadcast_to(jnp.where(jnp.arange(beams) == 0, 0, _NEVER), shape)
    return jax.lax.while_loop(is_going, step, Search(running, scores, found, ~is_filler)).found


class BeamSearch:
    """Jitted beam search for one model."""

    def __init__(self, generator: Generator):
        self._generator = generator
        config = generator.config
        search = functools.partial(_search, generator.model, config.data.valid_ids or config.model.vocab)
        self._search = jax.jit(search, static_argnums=(0, 1, 2, 3))

    def run(
        self, params: Params, prompts: Sequence[Sequence[int]], sample: SampleConfig, ends: Sequence[int]
    ) -> list[list[Made]]:
        """sample.beams continuations of each prompt, best first. InputError as of `Generator.run`."""
        batch = Batch.of(prompts, sample.max_new_tokens, self._generator.config.model.context, self._generator.replicas)
        copies = 2 * sample.beams  # those gone on from, and their next
        check_batch(self._generator.model, batch, copies, f"{sample.beams} beams")
        found = self._search(
            batch.slots, sample.beams, tuple(ends), Form.of(sample), params, batch.tokens, batch.lengths,
            batch.is_filler, Sampling.of(sample), Rules.of(sample),
        )  # fmt: skip
        found = jax.tree.map(np.asarray, jax.device_get(found))

        def one(row: int, beam: int) -> Made:
            part = slice(batch.lengths[row], batch.lengths[row] + found.made[row, beam])
            ids = found.tokens[row, beam, part].tolist()
            return Made(ids, found.log_probabilities[row, beam, part].tolist(), ids[-1:] != [] and ids[-1] in ends)

        return [[one(row, beam) for beam in range(sample.beams)] for row in range(len(prompts))]
