"""The Transformer: GPT-NeoX, GPT-2, GPT-J and XGLM in Flax Linen, pure `init` and `apply` over a plain tree of arrays.

Shapes: B batch, T new tokens, S cache slots, D width (embed), H heads, K head dimensions, V vocabulary.
Every weight is declared once, by the names of its axes; sizes come from the config by those names. The model knows no
mesh, no disk and not whether it trains or decodes.

Forward pass after Hugging Face's modeling_gpt_neox.py, _gpt2.py, _gptj.py and _xglm.py, and GPT-NeoX's
megatron/model/transformer.py. What tells the four apart is `ModelConfig`'s.
"""

from __future__ import annotations

import contextlib
import functools
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from flax.core import meta
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import layout as memory

from polyglot_jax import attention, quantise
from polyglot_jax.config import ModelConfig
from polyglot_jax.sharding import Layout, constrain, on_each

Params = dict[str, Any]
Cache = tuple[dict[str, jax.Array], ...]

# Names of what may be kept for the backward pass: the MLP's hidden layer before its activation, LayerNorms' statistics.
MLP_HIDDEN, NORM = "mlp_hidden", "norm_statistics"

# TrainConfig.remat -> what the backward pass finds kept of each layer, besides its input. What it does not, it computes
# again. experiments/LOG.md has the table of what each costs and saves.
_keep = jax.checkpoint_policies.save_only_these_names
REMAT: dict[str, Any] = {
    "full": None,
    "attention": _keep(NORM, attention.QUERY_KEY, attention.VALUE, attention.OUTPUT),
    "mlp": _keep(NORM, attention.OUTPUT, MLP_HIDDEN),
    "value": _keep(NORM, attention.QUERY_KEY, attention.OUTPUT, MLP_HIDDEN),
    "products": _keep(NORM, attention.QUERY_KEY, attention.VALUE, attention.OUTPUT, MLP_HIDDEN),
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}

CACHE_AXES = ("batch", "attention_heads", None, "head_dim")
"""The axes of a layer's cache, [B, H, S, K]."""
_ROWS = {"tpu": 64, "cpu": 16}
"""Rows of a device up to which each is written by an instruction of its own, which takes compiling time."""

_TANH_GELU = ("gelu_new", "gelu_fast", "gelu_pytorch_tanh")


def activate(name: str, x: jax.Array) -> jax.Array:
    if name == "relu":
        return jax.nn.relu(x)
    if name in _TANH_GELU:
        return jax.nn.gelu(x, approximate=True)
    # By erf in float32; jax.nn.gelu's erfc, which bfloat16 would need, costs several times as much and is not fused.
    wide = x.astype(jnp.float32)
    return (0.5 * wide * (1 + jax.lax.erf(wide * math.sqrt(0.5)))).astype(x.dtype)


def rotate(x: jax.Array, positions: jax.Array, dims: int, base: float, interleaved: bool) -> jax.Array:
    """Rotary position embedding on the first `dims` of each head. x: [B, T, H, K]; positions: [B, T].

    Pair i turns by position * base^(-2i/dims): dimensions i and i + dims/2 or, interleaved (GPT-J's form), 2i and
    2i + 1. Angles are float32.
    """
    frequencies = base ** (-jnp.arange(0, dims, 2, dtype=jnp.float32) / dims)
    angles = positions[..., None, None].astype(jnp.float32) * frequencies
    angles = jnp.repeat(angles, 2, -1) if interleaved else jnp.concatenate((angles, angles), -1)
    rest = ((0, 0),) * (angles.ndim - 1) + ((0, x.shape[-1] - dims),)
    cos = jnp.pad(jnp.cos(angles), rest, constant_values=1).astype(x.dtype)
    sin = jnp.pad(jnp.sin(angles), rest).astype(x.dtype)
    # Each dimension's partner, signed, by a product with a constant: exact, and nothing is cut along a head.
    return x * cos + (x @ jnp.asarray(_partners(x.shape[-1], dims, interleaved), x.dtype)) * sin


def _partners(head_dim: int, dims: int, interleaved: bool) -> np.ndarray:
    """[K, K]: a head times this has at first[i] its -second[i], and at second[i] its first[i]; beyond `dims`, zeros."""
    first = np.arange(0, dims, 2) if interleaved else np.arange(dims // 2)
    second = first + (1 if interleaved else dims // 2)
    matrix = np.zeros((head_dim, head_dim), np.float32)
    matrix[second, first], matrix[first, second] = -1, 1
    return matrix


def sinusoids(positions: jax.Array, width: int) -> jax.Array:
    """XGLM's position embedding, computed: int[B, T] -> float32[B, T, width], sines in the first half, then cosines.

    Position p is row p + 2 of its table, and frequency i of n is 10000^(-i / (n - 1)).
    """
    half = width // 2
    frequencies = jnp.exp(jnp.arange(half, dtype=jnp.float32) * (-math.log(10_000) / (half - 1)))
    angles = (positions + 2)[..., None].astype(jnp.float32) * frequencies
    return jnp.concatenate((jnp.sin(angles), jnp.cos(angles)), axis=-1)


class _Named(struct.PyTreeNode, meta.AxisMetadata):
    """A weight with the names of its axes. (Flax's own boxes also lay it out on the mesh; that is sharding's alone.)"""

    value: Any
    names: tuple[str, ...] = struct.field(pytree_node=False)

    def unbox(self) -> Any:
        return self.value

    def replace_boxed(self, value: Any) -> _Named:
        return self.replace(value=value)

    def add_axis(self, index: int, params: dict[str, Any]) -> _Named:
        return self.replace(names=(*self.names[:index], params[nn.PARTITION_NAME], *self.names[index:]))

    def remove_axis(self, index: int, params: dict[str, Any]) -> _Named:
        return self.replace(names=self.names[:index] + self.names[index + 1 :])


class _Part(nn.Module):
    config: ModelConfig
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    layout: Layout = "training"

    def weight(self, name: str, axes: tuple[str, ...], init: Any) -> jax.Array:
        """Declare a weight by its axis names."""
        shape = tuple(self.config.sizes[axis] for axis in axes)
        return self.param(name, lambda *args: _Named(init(*args), axes), shape, self.param_dtype)

    def scaled(self, y: jax.Array) -> jax.Array:
        """y, [..., outputs], times the outputs' scales where the kernel is int8 (see quantise.py)."""
        name = "kernel" + quantise.SCALE
        return y * self.get_variable("params", name).astype(y.dtype) if self.has_variable("params", name) else y

    def part(self, cls: type[_Part], **more: Any) -> Any:
        return cls(self.config, self.dtype, self.param_dtype, self.layout, **more)

    def constrain(self, x: jax.Array, *axes: str | None) -> jax.Array:
        return constrain(x, *axes, layout=self.layout)


@jax.custom_vjp
def _apart(x: jax.Array) -> jax.Array:
    """x; its gradient is complete before anything is computed from it.

    XLA would fuse a LayerNorm's sums over the width into the product that makes the gradient, which then takes twice
    as long on a TPU.
    """
    return x


_apart.defvjp(lambda x: (x, None), lambda _, gradient: (jax.lax.optimization_barrier(gradient),))


class LayerNorm(_Part):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., D] -> [..., D]; statistics and scaling in float32."""
        scale = self.weight("scale", ("embed",), nn.initializers.ones)
        bias = self.weight("bias", ("embed",), nn.initializers.zeros)
        wide = x.astype(jnp.float32)
        wide = wide - checkpoint_name(wide.mean(-1, keepdims=True), NORM)
        variance = jnp.square(wide).mean(-1, keepdims=True)
        wide = wide * checkpoint_name(jax.lax.rsqrt(variance + self.config.norm_eps), NORM)
        return _apart((wide * scale.astype(jnp.float32) + bias.astype(jnp.float32)).astype(self.dtype))


class Linear(_Part):
    """x W + b over named axes: `inputs` are contracted, `outputs` are made."""

    inputs: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()
    std: float = 0.02
    use_bias: bool = True

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        kernel = self.weight("kernel", self.inputs + self.outputs, nn.initializers.normal(self.std))
        y = self.scaled(jnp.tensordot(x, kernel.astype(self.dtype), axes=len(self.inputs)))
        if self.use_bias:
            y += self.weight("bias", self.outputs, nn.initializers.zeros).astype(self.dtype)
        return y


class Attention(_Part):
    kernel: str = "xla"

    @nn.compact
    def __call__(self, x: jax.Array, positions: jax.Array, cache: Any) -> tuple[jax.Array, Any]:
        config = self.config
        linear = functools.partial(self.part, Linear, use_bias=config.attention_bias)
        per_head = {"inputs": ("embed",), "outputs": ("heads", "head_dim"), "std": config.init_std}
        q, k, v = (linear(**per_head, name=name)(x) for name in "qkv")
        if config.is_rotary:
            rotary = (positions, config.rotary_dims, config.rotary_base, config.positions == "rotary_interleaved")
            q, k = rotate(q, *rotary), rotate(k, *rotary)
        # Where sequences are split, heads are split further instead while attention needs whole ones. Both sides are
        # named, so that one all-to-all goes between them, forward and backward.
        part, whole = ("batch", "length", "heads", "head_dim"), ("batch", None, "attention_heads", "head_dim")
        q, k, v = (self.constrain(self.constrain(y, *part), *whole) for y in (q, k, v))
        if cache is None:
            # Weights are made by reading one token, which not every kernel takes.
            y = attention.causal(q, k, v, "xla" if self.is_initializing() else self.kernel)
        else:
            cache = {
                name: self.constrain(_stored(cache[name], new, positions), *CACHE_AXES)
                for name, new in (("k", k), ("v", v))
            }
            y = attention.cached(q, cache["k"].astype(self.dtype), cache["v"].astype(self.dtype), positions)
        y = self.constrain(self.constrain(y, *whole), *part)
        std = config.init_std / math.sqrt(2 * config.layers)
        return linear(inputs=("heads", "head_dim"), outputs=("embed",), std=std, name="out")(y), cache


def _stored(slots: jax.Array, new: jax.Array, positions: jax.Array) -> jax.Array:
    """[B, H, S, K] with `new`, [B, T, H, K], in the slots `positions`, int[B, T]; a slot that is not there is none."""
    new = new.swapaxes(1, 2).astype(slots.dtype)
    if new.shape[2] > 1:
        return _scattered(slots, new, positions)
    arrays = ((slots, CACHE_AXES), (new, CACHE_AXES), (positions, ("batch", None)))
    return on_each(_stored_token, *arrays, layout="decoding")


def _stored_token(slots: jax.Array, new: jax.Array, positions: jax.Array) -> jax.Array:
    by_row = {platform: _row_by_row for platform, most in _ROWS.items() if len(slots) <= most}
    return jax.lax.platform_dependent(slots, new, positions, **by_row, default=_scattered)


@jax.vmap
def _scattered(slots: jax.Array, new: jax.Array, positions: jax.Array) -> jax.Array:
    return slots.at[:, positions].set(new, mode="drop")


def _row_by_row(slots: jax.Array, new: jax.Array, positions: jax.Array) -> jax.Array:
    """For one token a row; beyond the last slot it takes the last, which is right for rows that are over.

    For a scatter, XLA copies the whole cache on CPUs, and on TPUs turns it round, for this too unless told not to.
    """
    for row in range(len(slots)):
        slots = jax.lax.dynamic_update_slice(slots, new[row : row + 1], (row, 0, positions[row, 0], 0))
    return memory.with_layout_constraint(slots, memory.Layout((0, 1, 2, 3)))


class MLP(_Part):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        config = self.config
        y = self.part(Linear, inputs=("embed",), outputs=("mlp",), std=config.init_std, name="up")(x)
        y = checkpoint_name(self.constrain(y, "batch", "length", "mlp"), MLP_HIDDEN)
        y = activate(config.activation, y)
        std = config.init_std / math.sqrt(2 * config.layers)
        return self.part(Linear, inputs=("mlp",), outputs=("embed",), std=std, name="down")(y)


class Layer(_Part):
    kernel: str = "xla"

    @nn.compact
    def __call__(self, x: jax.Array, positions: jax.Array, cache: Any) -> tuple[jax.Array, Any]:
        normed = self.part(LayerNorm, name="attention_norm")(x)
        attended, cache = self.part(Attention, kernel=self.kernel, name="attention")(normed, positions, cache)
        middle = x + attended
        if self.config.residual != "parallel_shared":
            normed = self.part(LayerNorm, name="mlp_norm")(x if self.config.residual == "parallel" else middle)
        y = middle + self.part(MLP, name="mlp")(normed)
        return self.constrain(y, "batch", "length", "features"), cache


class Embedding(_Part):
    """A table with a row of width D for each id along `axis`."""

    axis: str = "vocab"

    def setup(self) -> None:
        self.kernel = self.weight("kernel", (self.axis, "embed"), nn.initializers.normal(self.config.init_std))

    def __call__(self, ids: jax.Array) -> jax.Array:
        # Rows are gathered whole: from a table split along its width, XLA would copy the result to every device first.
        rows = self.constrain(self.kernel.astype(self.dtype), self.axis, "features")[ids]
        if self.has_variable("params", "kernel" + quantise.SCALE):
            rows *= self.get_variable("params", "kernel" + quantise.SCALE)[ids][..., None].astype(self.dtype)
        return rows


class Head(_Part):
    @nn.compact
    def __call__(self, x: jax.Array, embedding: Embedding) -> jax.Array:
        """[..., D] -> float32[..., V]; the kernel is that of `embedding` where the two are tied."""
        config = self.config
        kernel = embedding.kernel
        if not config.tied:
            kernel = self.weight("kernel", ("vocab", "embed"), nn.initializers.normal(config.init_std))
        logits = jnp.einsum("...d,vd->...v", x, kernel.astype(self.dtype), preferred_element_type=jnp.float32)
        logits = (embedding if config.tied else self).scaled(logits)
        if config.head_bias:
            logits += self.weight("bias", ("vocab",), nn.initializers.zeros).astype(jnp.float32)
        return logits


class Transformer(nn.Module):
    """`init(key, tokens) -> {"params": tree}` and `apply({"params": tree}, tokens) -> logits`.

    `init` stacks the layers ([layers, ...] leaves under "layers"), which is also the form on disk; `apply` scans them.
    Given the tree of `split_layers`, `apply` runs them one by one instead, which is what decoding wants: a product
    with a slice of a stacked array copies the slice first.

    dtype is the precision of the products, param_dtype that of the weights `init` makes, remat what the backward pass
    recomputes (`TrainConfig.remat`), attention the kernel where there is no cache (a name of `attention.KERNELS`),
    layout the column of `sharding.RULES`. In float32 every product is full float32 on every platform.
    """

    config: ModelConfig
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    remat: str = "none"
    attention: str = "xla"
    layout: Layout = "training"

    def setup(self) -> None:
        parts = (self.config, jnp.dtype(self.dtype), jnp.dtype(self.param_dtype), self.layout)
        layer = Layer
        of_layer = (*parts, self.attention)
        if self.remat != "none":
            layer = nn.remat(Layer, policy=REMAT[self.remat], prevent_cse=False)
        self.embed = Embedding(*parts)
        if self.config.positions == "learned":
            self.positions = Embedding(*parts, axis="context")
        if self.is_initializing() or self.has_variable("params", "layers"):
            self.layers = nn.scan(
                layer,
                variable_axes={"params": 0},
                split_rngs={"params": True},
                in_axes=nn.broadcast,
                length=self.config.layers,
                metadata_params={nn.PARTITION_NAME: "layers"},
            )(*of_layer)
        else:
            self.layer = [layer(*of_layer) for _ in range(self.config.layers)]
        self.final_norm = LayerNorm(*parts)
        self.head = Head(*parts)

    def init(self, rngs: Any, *args: Any, **kwargs: Any) -> Params:
        """As `flax.linen.Module.init`, over plain arrays (axis names: `axes`)."""
        return nn.unbox(super().init(rngs, *args, **kwargs))

    def axes(self) -> Params:
        """The tree of parameters with each leaf replaced by the tuple of its axis names."""
        boxed = jax.eval_shape(lambda key: super(Transformer, self).init(key, jnp.zeros((1, 1), jnp.int32)),
                               jax.random.key(0))  # fmt: skip
        return jax.tree.map(lambda box: box.names, boxed["params"], is_leaf=lambda x: isinstance(x, _Named))

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """int[B, T] -> float32[B, T, V]: at each position, the logits of the next token."""
        return self.logits(self.features(tokens)[0])

    def features(
        self, tokens: jax.Array, positions: jax.Array | None = None, cache: Cache | None = None
    ) -> tuple[jax.Array, Cache | None]:
        """int[B, T] -> [B, T, D], normalised, ready for `logits`.

        With a cache (`init_cache`; split layers only), `positions` int[B, T] says which slot each token takes; a token
        sees the slots up to its own, and the new cache is returned.
        """
        with self._products():
            if positions is None:
                positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
            x = self._constrain(self._embedded(tokens, positions), "features")
            if hasattr(self, "layers"):
                if cache is not None:
                    raise ValueError("a cache needs split layers: apply with split_layers(params)")
                x, _ = self.layers(x, positions, None)
            else:
                caches = cache or (None,) * self.config.layers
                new = []
                for layer, slots in zip(self.layer, caches, strict=True):
                    x, slots = layer(x, positions, slots)
                    new.append(slots)
                cache = tuple(new) if cache is not None else None
            return self.final_norm(x), cache

    def _embedded(self, tokens: jax.Array, positions: jax.Array) -> jax.Array:
        x = self.embed(tokens)
        if self.config.embedding_scale == "sqrt_embed":
            x *= math.sqrt(self.config.embed)
        if self.config.positions == "learned":
            x += self.positions(positions)
        if self.config.positions == "sinusoidal":
            x += sinusoids(positions, self.config.embed).astype(x.dtype)
        return x

    def logits(self, x: jax.Array) -> jax.Array:
        """[..., D] -> float32[..., V], rows of padding included, as in GPT-NeoX."""
        with self._products():
            logits = self.head(x, self.embed)
            return self._constrain(logits, "vocab") if logits.ndim == 3 else logits

    def _constrain(self, x: jax.Array, last: str) -> jax.Array:
        return constrain(x, "batch", "length", last, layout=self.layout)

    def _products(self) -> contextlib.AbstractContextManager[Any]:
        if jnp.dtype(self.dtype) == jnp.float32:
            return jax.default_matmul_precision("highest")
        return contextlib.nullcontext()


def abstract_params(config: ModelConfig, param_dtype: Any = jnp.float32) -> Params:
    """The tree of parameters with shapes and dtypes only; nothing is computed."""
    model = Transformer(config, param_dtype=param_dtype)
    return jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]


def split_layers(params: Params) -> Params:
    """Stacked tree -> the same weights with a subtree "layer_0", "layer_1", ... of its own for each layer."""
    rest = {name: part for name, part in params.items() if name != "layers"}
    count = len(jax.tree.leaves(params["layers"])[0])
    return rest | {f"layer_{i}": jax.tree.map(lambda leaf, i=i: leaf[i], params["layers"]) for i in range(count)}


def init_cache(config: ModelConfig, batch: int, slots: int, dtype: Any) -> Cache:
    """Zeros [B, H, S, K] for keys and values of each layer, on the mesh split by rows and heads."""

    def zeros() -> jax.Array:
        zeros = jnp.zeros((batch, config.heads, slots, config.head_dim), dtype)
        return constrain(zeros, *CACHE_AXES, layout="decoding")

    return tuple({"k": zeros(), "v": zeros()} for _ in range(config.layers))
