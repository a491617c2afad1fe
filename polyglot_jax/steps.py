"""The pure functions everyone jits: loss, training step, evaluation step, scores, prefill and decode step."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from polyglot_jax import sharding
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
    x, _ = model.apply({"params": params}, tokens[:, :-1], method="features")
    _, losses = jax.lax.scan(lambda _, part: (None, _losses(model, params, *part)), None, _chunks(x, tokens[:, 1:]))
    return _whole(losses, x.shape[1])


def losses_from_logits(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """float32[..., V], int[...] -> float32[...]: -log p of the targets."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, targets)


def loss_sum(model: Transformer, params: Params, batch: Batch) -> jax.Array:
    """The weighted sum of the batch's losses, in nats."""
    x, _ = model.apply({"params": params}, batch.tokens[:, :-1], method="features")
    head = {name: params[name] for name in ("embed", "head") if name in params}
    return _head_loss_sum(model, head, x, batch.tokens[:, 1:], batch.weights)


# Positions of a device, of all its sequences, whose logits, float32[POSITIONS, V], are held at a time: 0.5 GB where V
# is 30,080.
POSITIONS = 4096


def _chunks(*arrays: jax.Array) -> tuple[jax.Array, ...]:
    """[B, T, ...] -> [N, B, T / N, ...]; zeros fill the last chunk, but where T is split N divides each part of it.

    Interleaved, so that every device keeps its own positions: position t goes to chunk t % N.
    """

    def cut(x: jax.Array) -> jax.Array:
        rows, length = (-(-x.shape[axis] // sharding.parts(name)) for axis, name in enumerate(("batch", "length")))
        count = -(-length // max(1, POSITIONS // rows))
        if sharding.parts("length") > 1:
            count = next(n for n in range(count, length + 1) if length % n == 0)
        x = jnp.pad(x, ((0, 0), (0, -x.shape[1] % count), *((0, 0),) * (x.ndim - 2)))
        return jnp.moveaxis(x.reshape(x.shape[0], -1, count, *x.shape[2:]), 2, 0)

    return tuple(map(cut, arrays))


def _whole(chunks: jax.Array, length: int) -> jax.Array:
    """The inverse of `_chunks`: [N, B, T / N, ...] -> [B, length, ...]."""
    x = jnp.moveaxis(chunks, 0, 2)
    return x.reshape(x.shape[0], -1, *x.shape[3:])[:, :length]


def _losses(model: Transformer, head: Params, x: jax.Array, targets: jax.Array) -> jax.Array:
    return losses_from_logits(model.apply({"params": head}, x, method="logits"), targets)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _head_loss_sum(model: Transformer, head: Params, x: jax.Array, targets: jax.Array, weights: jax.Array) -> jax.Array:
    """The weighted sum of the losses of features x: [B, T, D]; head: the parameters that `Transformer.logits` reads."""
    parts = _chunks(x, targets, weights)
    return jax.lax.scan(lambda total, part: (total + _chunk(model, head, *part), None), jnp.float32(0), parts)[0]


def _chunk(model: Transformer, head: Params, x: jax.Array, targets: jax.Array, weights: jax.Array) -> jax.Array:
    return (_losses(model, head, x, targets) * weights).sum()


def _head_forward(model: Transformer, head: Params, x: jax.Array, targets: jax.Array, weights: jax.Array) -> Any:
    """The sum and, while the logits of a chunk are there, what the backward pass will ask of them."""

    def add(sums: Any, part: tuple[jax.Array, ...]) -> tuple[Any, jax.Array]:
        loss, (of_head, of_x) = jax.value_and_grad(functools.partial(_chunk, model), argnums=(0, 1))(head, *part)
        return jax.tree.map(jnp.add, sums, (loss, of_head)), of_x

    zeros = (jnp.float32(0), jax.tree.map(jnp.zeros_like, head))
    (total, of_head), of_x = jax.lax.scan(add, zeros, _chunks(x, targets, weights))
    return total, (of_head, _whole(of_x, x.shape[1]))


def _head_backward(_: Transformer, gradients: Any, of_sum: jax.Array) -> Any:
    of_head, of_x = jax.tree.map(lambda gradient: gradient * of_sum.astype(gradient.dtype), gradients)
    return of_head, of_x, None, None


_head_loss_sum.defvjp(_head_forward, _head_backward)


def gradients(model: Transformer, params: Params, batch: Batch, parts: int) -> tuple[jax.Array, Params]:
    """Mean loss over the batch's tokens and its gradient, computed in `parts` one after the other.

    The parts' sums are added and divided by the whole batch's weight, so a part with fewer tokens weighs less.
    """
    batch = batch._replace(weights=batch.weights / batch.weights.sum())
    part_gradient = jax.value_and_grad(functools.partial(loss_sum, model))
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
    """One optimizer step, or none where loss or gradient are not finite: the state is then what it was.

    Metrics, float32[]: loss (nats per token), gradient_norm (before clipping), parameter_norm (after the update).
    """
    loss, grads = gradients(model, state.params, batch, parts)

    def update(state: TrainState) -> TrainState:
        updates, opt_state = optimizer.update(grads, state.optimizer, state.params)
        return TrainState(optax.apply_updates(state.params, updates), opt_state)

    metrics = {"loss": loss, "gradient_norm": _norm(grads)}
    is_finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(metrics["gradient_norm"])

    def branch(state: TrainState) -> TrainState:
        return jax.lax.cond(is_finite, update, lambda state: state, state)

    def select(state: TrainState) -> TrainState:
        return jax.tree.map(lambda new, old: jnp.where(is_finite, new, old), update(state), state)

    # XLA copies the whole state for a branch on GPUs; on CPUs selecting takes more memory and time, on TPUs the same.
    state = jax.lax.platform_dependent(state, cuda=select, rocm=select, default=branch)
    return state, metrics | {"parameter_norm": _norm(state.params)}


def _norm(tree: Any) -> jax.Array:
    return optax.tree.norm(tree).astype(jnp.float32)


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
