"""Causal attention: which kernel on which hardware, and one table of what each takes.

All compute softmax(q k^T / sqrt(K)) v with the softmax in float32; they differ in what they hold and how fast they are.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from polyglot_jax.sharding import spec

logger = logging.getLogger(__name__)

# Names of what may be kept of a layer's attention for the backward pass (see model.REMAT): q and k, rotated; v; its
# output and the log-sum-exp of its scores, without which it runs a second time.
QUERY_KEY, VALUE, OUTPUT = "attention_query_key", "attention_value", "attention_output"


class Kernel(NamedTuple):
    """What a kernel takes. head_dim and length must be multiples of these, head_dim at most max_head_dim."""

    platforms: tuple[str, ...]
    dtypes: tuple[str, ...]
    head_dim: int
    max_head_dim: int
    length: int


KERNELS: dict[str, Kernel] = {
    # Pallas, by JAX's authors: blocks of queries and keys in on-chip memory, blocks above the diagonal are skipped.
    "splash": Kernel(("tpu",), ("bfloat16", "float32"), head_dim=128, max_head_dim=256, length=128),
    # cuDNN's flash attention. It takes heads of 256 (5.8B) on Hopper and newer, which was not tried: they go to xla.
    "cudnn": Kernel(("gpu", "cuda"), ("bfloat16",), head_dim=8, max_head_dim=128, length=64),
    # Plain products; scores of all heads and a quarter of the queries, float32[B, H, T / 4, T], at a time.
    "xla": Kernel(("tpu", "gpu", "cuda", "rocm", "cpu"), ("bfloat16", "float32"), 1, 1 << 30, length=1),
}


def choose(asked: str, platform: str, dtype: Any, head_dim: int, length: int) -> str:
    """The kernel for causal attention of `length` positions on `platform`.

    asked: a name of KERNELS, or "auto", the first that serves there. One that does not take these sizes is replaced by
    xla, with one logged line.
    """
    names = [name for name, kernel in KERNELS.items() if platform in kernel.platforms]
    name = names[0] if asked == "auto" else asked
    kernel, dtype = KERNELS[name], jnp.dtype(dtype).name
    reasons = [
        f"the platform is {platform}" if platform not in kernel.platforms else "",
        f"the dtype is {dtype}" if dtype not in kernel.dtypes else "",
        f"head_dim={head_dim} is no multiple of {kernel.head_dim}" if head_dim % kernel.head_dim else "",
        f"head_dim={head_dim} is above {kernel.max_head_dim}" if head_dim > kernel.max_head_dim else "",
        f"length={length} is no multiple of {kernel.length}" if length % kernel.length else "",
    ]
    if not any(reasons):
        return name
    logger.warning("attention: xla instead of %s, because %s", name, "; ".join(filter(None, reasons)))
    return "xla"


def causal(q: jax.Array, k: jax.Array, v: jax.Array, kernel: str = "xla") -> jax.Array:
    """softmax(q k^T / sqrt(K)) v, each position seeing itself and what is before it. q, k, v: [B, T, H, K]."""
    if kernel == "splash":
        return splash(q, k, v)
    q, k, v = _named(q, k, v)
    attend = _blocks if kernel == "xla" else _cudnn
    return checkpoint_name(attend(q, k, v), OUTPUT)


QUERIES = 512
"""Of a long prompt, the queries whose scores, float32[B, H, QUERIES, S], are held at a time while it is read."""


def cached(q: jax.Array, k: jax.Array, v: jax.Array, positions: jax.Array) -> jax.Array:
    """Attention of new tokens to a cache. q: [B, T, H, K]; k, v: [B, H, S, K]; positions: int[B, T], slots of q.

    A query at position p sees slots 0..p. So what lies in later slots (padding of a shorter prompt, an older
    generation) never matters, and needs no mask of its own.
    """
    parts = []
    for start in range(0, q.shape[1], QUERIES):
        at = slice(start, start + QUERIES)
        is_seen = jnp.arange(k.shape[2]) <= positions[:, None, at, None]
        parts.append(_attend(q[:, at].swapaxes(1, 2), k, v, is_seen))
    return jnp.concatenate(parts, axis=2).swapaxes(1, 2)


def _blocks(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """`causal`, a quarter of the queries at a time: each quarter leaves out the keys that none of it sees."""
    q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
    length = q.shape[2]
    size = -(-length // 4)
    parts = []
    for start in range(0, length, size):
        stop = min(start + size, length)
        is_seen = np.tri(stop - start, stop, start, dtype=bool)
        parts.append(_attend(q[:, :, start:stop], k[:, :, :stop], v[:, :, :stop], is_seen))
    return jnp.concatenate(parts, axis=2).swapaxes(1, 2)


def _attend(q: jax.Array, k: jax.Array, v: jax.Array, is_seen: Any) -> jax.Array:
    """q: [B, H, T, K]; k, v: [B, H, S, K], heads first, as both products read them; is_seen: bool[..., T, S]."""
    scores = jnp.einsum("bhtk,bhsk->bhts", q, k, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5
    weights = jax.nn.softmax(jnp.where(is_seen, scores, -jnp.inf), axis=-1).astype(v.dtype)
    return jnp.einsum("bhts,bhsk->bhtk", weights, v)


def _cudnn(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    with jax.numpy_dtype_promotion("standard"):  # JAX's own function mixes bfloat16 with float32 inside
        return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="cudnn")


def _named(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    return checkpoint_name(q, QUERY_KEY), checkpoint_name(k, QUERY_KEY), checkpoint_name(v, VALUE)


def splash(q: jax.Array, k: jax.Array, v: jax.Array, interpret: bool = False) -> jax.Array:
    """`causal` by JAX's splash attention; `interpret` runs the same kernels, slowly, on any platform.

    On a mesh each device computes its own rows and heads, whole sequences of them.
    """

    def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return jax.vmap(_splash_kernel(q.shape[2], q.shape[1], interpret))(q, k, v)

    scale = jnp.asarray(q.shape[-1] ** -0.5, q.dtype)
    # Kept for the backward pass as the kernels read them: heads before positions, q scaled.
    q, k, v = _named(*(x.swapaxes(1, 2) for x in (q * scale, k, v)))
    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.empty:
        where = spec(("batch", "attention_heads", None, "head_dim"), q.shape, mesh)
        attend = jax.shard_map(attend, in_specs=(where,) * 3, out_specs=where, check_vma=False)
    return attend(q, k, v).swapaxes(1, 2)


def splash_block(length: int) -> int:
    """Queries, and keys, that the kernels hold at a time. Smaller blocks skip more of what is above the diagonal."""
    return next(size for size in (512, 384, 256, 128) if length % size == 0)


# Name of a splash kernel -> the products it does of a block of queries with a block of keys. Forward: scores, values.
# Backward recomputes the scores in both of its kernels; dq: scores, dp, dq; dkv: scores, dp, dv, dk.
SPLASH_PRODUCTS = {"splash_mha_fwd": 2, "splash_mha_dq": 3, "splash_mha_dkv": 4}


def kernel_flops(name: str, shape: tuple[int, ...]) -> int | None:
    """FLOPs of the products in the splash kernel called `name`, blocks that it skips left out; None for another kernel.

    shape: of its queries, [..., T, K].
    """
    products = next((count for start, count in SPLASH_PRODUCTS.items() if name.startswith(start)), None)
    if products is None or len(shape) < 2:
        return None
    *outer, length, head_dim = shape
    blocks = length // splash_block(length)
    pairs = blocks * (blocks + 1) // 2 * splash_block(length) ** 2
    return products * 2 * math.prod(outer) * pairs * head_dim


def _splash_kernel(length: int, heads: int, interpret: bool) -> Callable[..., jax.Array]:
    # Imported here: Pallas takes a while, and only TPUs need it.
    from jax.experimental.pallas.ops.tpu import splash_attention as pallas

    sizes = [field.name for field in dataclasses.fields(pallas.BlockSizes) if field.name.startswith("block_")]
    return pallas.make_splash_mha_single_device(
        pallas.MultiHeadMask([pallas.CausalMask((length, length))] * heads),
        block_sizes=pallas.BlockSizes(**dict.fromkeys(sizes, splash_block(length))),
        residual_checkpoint_name=OUTPUT,
        interpret=interpret,
    )
