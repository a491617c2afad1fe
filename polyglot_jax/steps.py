"""The pure functions everyone jits: loss, training step, evaluation step, scores, prefill and decode step."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from polyglot_jax.model import Cache, Params, Transformer, init_cache


class TrainState(NamedTuple):
    """Everything training changes: the stacked parameters and the optimizer's state."""

    params: Params
    optimizer: Any


class Batch(NamedTuple):
    """tokens: int32[B, T + 1], each row predicts its tokens 1..T; weights: float32[B, T], 0 where nothing is asked."""

    tokens: jax.Array
    weights: jax.Array


def token_losses(model: Transformer, params: Params, tokens: jax.Array) -> jax.Array:
    """int[B, T + 1] -> float32[B, T]: -log p of tokens 1..T, over the whole padded vocabulary as in GPT-NeoX."""
    return losses_from_logits(model.apply({"params": params}, tokens[:, :-1]), tokens[:, 1:])


def losses_from_logits(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """float32[..., V], int[...] -> float32[...]: -log p of the targets."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, targets)


def loss_sum(model: Transformer, params: Params, batch: Batch) -> jax.Array:
    """The weighted sum of the batch's losses, in nats."""
    return (token_losses(model, params, batch.tokens) * batch.weights).sum()


def gradients(model: Transformer, params: Params, batch: Batch, parts: int) -> tuple[jax.Array, Params]:
    """Mean loss over the batch's tokens and its gradient, computed in `parts` one after the other.

    The parts' sums are added and divided by the whole batch's weight, so a part with fewer tokens weighs less.
    """
    total = batch.weights.sum()
    part_gradient = jax.value_and_grad(lambda params, part: loss_sum(model, params, part) / total)
    if parts == 1:
        return part_gradient(params, batch)

    def add(sums: Any, part: Batch) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, sums, part_gradient(params, part)), None

    # Interleaved, so that every device keeps its own rows: row i of the batch goes to part i % parts.
    split = jax.tree.map(lambda x: x.reshape(-1, parts, *x.shape[1:]).swapaxes(0, 1), batch)
    zeros = (jnp.zeros((), jnp.float32), jax.tree.map(jnp.zeros_like, params))
    return jax.lax.scan(add, zeros, split)[0]


def train_step(
    model: Transformer, optimizer: optax.GradientTransformation, parts: int, state: TrainState, batch: Batch
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One optimizer step. Metrics: loss (nats per token) and gradient_norm, before clipping; both float32[]."""
    loss, grads = gradients(model, state.params, batch, parts)
    updates, opt_state = optimizer.update(grads, state.optimizer, state.params)
    params = optax.apply_updates(state.params, updates)
    metrics = {"loss": loss, "gradient_norm": optax.tree.norm(grads).astype(jnp.float32)}
    return TrainState(params, opt_state), metrics


def prefill(
    model: Transformer, params: Params, tokens: jax.Array, lengths: jax.Array, cache: Cache
) -> tuple[jax.Array, Cache]:
    """Read the prompts. tokens: int[B, T], each row's prompt first, then anything; lengths: int[B].

    Returns the logits after each prompt, float32[B, V], and the cache. What padding leaves in the cache lies in slots
    that no token sees before they are overwritten.
    """
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    x, cache = model.apply({"params": params}, tokens, positions, cache, method="features")
    last = jnp.take_along_axis(x, (lengths - 1)[:, None, None], axis=1)[:, 0]
    return model.apply({"params": params}, last, method="logits"), cache


def decode_step(
    model: Transformer, params: Params, tokens: jax.Array, positions: jax.Array, cache: Cache
) -> tuple[jax.Array, Cache]:
    """One token of each row at its position, both int[B] -> logits of the next, float32[B, V], and the cache."""
    x, cache = model.apply({"params": params}, tokens[:, None], positions[:, None], cache, method="features")
    return model.apply({"params": params}, x[:, 0], method="logits"), cache


def score_continuations(
    model: Transformer, params: Params, contexts: jax.Array, lengths: jax.Array, continuations: jax.Array,
    counts: jax.Array,
) -> tuple[jax.Array, jax.Array]:  # fmt: skip
    """Sums of log-probabilities of N continuations of each context, which is read once; params: layers split.

    contexts: int[B, T], lengths: int[B]; continuations: int[B, N, K], counts: int[B, N]; padding on the right.
    Returns float32[B, N], and bool[B, N], whether every token of a continuation is the likeliest (0 and True where
    there are no tokens). Logits are computed for the continuations' tokens alone.
    """
    rows, most = contexts.shape[0], continuations.shape[2]
    cache = init_cache(model.config, rows, contexts.shape[1] + most - 1, model.dtype)
    first, cache = prefill(model, params, contexts, lengths, cache)
    positions = lengths[:, None] + jnp.arange(most - 1)

    def one(continuation: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        tokens, count = continuation
        logits = first[:, None]
        if most > 1:
            x, _ = model.apply({"params": params}, tokens[:, :-1], positions, cache, method="features")
            logits = jnp.concatenate((logits, model.apply({"params": params}, x, method="logits")), axis=1)
        is_asked = jnp.arange(most) < count[:, None]
        losses = losses_from_logits(logits, tokens)
        is_likeliest = jnp.argmax(logits, axis=-1) == tokens
        return -jnp.where(is_asked, losses, 0).sum(-1), jnp.where(is_asked, is_likeliest, True).all(-1)

    sums, greedy = jax.lax.map(one, (continuations.swapaxes(0, 1), counts.swapaxes(0, 1)))
    return sums.T, greedy.T
