"""Causal attention: which kernel on which hardware.

Today one kernel serves everywhere, `jax.nn.dot_product_attention` as XLA compiles it (softmax in float32). Others join
here, behind the same two functions, without the model knowing.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp


def causal(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """softmax(q k^T / sqrt(D)) v, each position seeing itself and what is before it. q, k, v: [B, T, H, D]."""
    return _attend(q, k, v, is_causal=True)


def cached(q: jax.Array, k: jax.Array, v: jax.Array, positions: jax.Array) -> jax.Array:
    """Attention of new tokens to a cache. q: [B, T, H, D]; k, v: [B, S, H, D]; positions: int[B, T], slots of q.

    A query at position p sees slots 0..p. So what lies in later slots (padding of a shorter prompt, an older
    generation) never matters, and needs no mask of its own.
    """
    mask = jnp.arange(k.shape[1])[None, None, None, :] <= positions[:, None, :, None]
    return _attend(q, k, v, mask=mask)


def _attend(q: jax.Array, k: jax.Array, v: jax.Array, **how: Any) -> jax.Array:
    with jax.numpy_dtype_promotion("standard"):  # JAX's own function mixes bfloat16 with float32 inside
        return jax.nn.dot_product_attention(q, k, v, implementation="xla", **how)
