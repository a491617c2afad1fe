"""The attention kernels agree with the plain formula, and the table sends each size to one that takes it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import off_by

from polyglot_jax import attention
from polyglot_jax.attention import choose, kernel_flops, splash_block
from polyglot_jax.config import PRESETS, MeshConfig
from polyglot_jax.sharding import make_mesh


def plain(q, k, v):
    """The formula as it is written, in float64."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    scores = np.einsum("bthk,bshk->bhts", q, k) / np.sqrt(q.shape[-1])
    scores[..., ~np.tri(q.shape[1], dtype=bool)] = -np.inf
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return np.einsum("bhts,bshk->bthk", weights / weights.sum(-1, keepdims=True), v)


def some_heads(length, heads, head_dim, dtype=jnp.float32, batch=2):
    return [jax.random.normal(jax.random.key(i), (batch, length, heads, head_dim), dtype) for i in range(3)]


def value_and_gradients(kernel, *qkv):
    weights = jnp.cos(jnp.arange(qkv[0].size, dtype=jnp.float32)).reshape(qkv[0].shape)

    def loss(*qkv):
        y = kernel(*qkv)
        return (y.astype(jnp.float32) * weights).sum(), y

    with jax.default_matmul_precision("highest"):
        gradients, y = jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))(*qkv)
    return y, *gradients


def interpreted(q, k, v):
    return attention.splash(q, k, v, interpret=True)


@pytest.mark.parametrize("length", [2, 3, 5, 13, 64])
def test_quarters_of_the_queries_agree_with_the_formula(length):
    qkv = some_heads(length, 3, 16)
    ours = value_and_gradients(attention.causal, *qkv)
    assert off_by(ours[0], plain(*qkv)) < 1e-6
    # And their gradients with those of all queries at once.
    positions = jnp.broadcast_to(jnp.arange(length), (2, length))

    def whole(q, k, v):
        return attention.cached(q, k.swapaxes(1, 2), v.swapaxes(1, 2), positions)

    for name, mine, theirs in zip(("y", "dq", "dk", "dv"), ours, value_and_gradients(whole, *qkv), strict=True):
        assert off_by(mine, theirs) < 1e-6, name


def test_a_long_prompt_is_read_some_queries_at_a_time(monkeypatch):
    """The formula's numbers, and scores of no more queries at once."""
    monkeypatch.setattr(attention, "QUERIES", 16)
    q, k, v = some_heads(40, 3, 16)
    positions = jnp.broadcast_to(jnp.arange(40), (2, 40))
    slots = [jnp.pad(x.swapaxes(1, 2), ((0, 0), (0, 0), (0, 24), (0, 0)), constant_values=9.0) for x in (k, v)]
    with jax.default_matmul_precision("highest"):
        read = jax.jit(attention.cached)
        assert off_by(read(q, *slots, positions), plain(q, k, v)) < 1e-6
        text = read.lower(q, *slots, positions).as_text()
    assert "x16x64xf32" in text and "x40x64xf32" not in text


# A block alone, several blocks (of which some are skipped), and the heads of 256 of the 5.8B model.
@pytest.mark.parametrize("length, heads, head_dim", [(128, 2, 128), (640, 1, 128), (256, 1, 256)])
def test_splash_agrees_with_the_formula_and_its_gradients_with_xla(length, heads, head_dim):
    qkv = some_heads(length, heads, head_dim, batch=1)
    ours, xla = value_and_gradients(interpreted, *qkv), value_and_gradients(attention.causal, *qkv)
    assert off_by(ours[0], plain(*qkv)) < 1e-5
    for name, mine, theirs in zip(("y", "dq", "dk", "dv"), ours, xla, strict=True):
        assert off_by(mine, theirs) < 1e-5, name


def test_splash_in_bfloat16_is_as_near_the_formula_as_xla():
    qkv = some_heads(256, 1, 128, jnp.bfloat16)
    error = {kernel: off_by(kernel(*qkv).astype(np.float32), plain(*qkv)) for kernel in (interpreted, attention.causal)}
    assert error[interpreted] < 2 * error[attention.causal] < 0.02


@pytest.mark.parametrize("axis", ["tensor", "sequence"])
def test_splash_on_a_mesh_splits_rows_and_heads(axis):
    qkv = some_heads(128, 2, 128, batch=4)
    alone = value_and_gradients(interpreted, *qkv)
    with jax.set_mesh(make_mesh(MeshConfig(data=2, fsdp=2, **{axis: 2}))):
        split = value_and_gradients(interpreted, *qkv)
        text = jax.jit(interpreted).lower(*qkv).compile().as_text()
    assert "entry_computation_layout={(f32[1,128,1,128]" in text  # of 4 rows and 2 heads, one each
    for mine, theirs in zip(split, alone, strict=True):
        assert off_by(mine, theirs) < 1e-6


@pytest.mark.parametrize(
    "platform, dtype, head_dim, length, kernel",
    [
        ("tpu", "bfloat16", 128, 2048, "splash"),
        ("tpu", "bfloat16", 256, 2048, "splash"),
        ("tpu", "float32", 128, 2048, "splash"),
        ("gpu", "bfloat16", 128, 2048, "cudnn"),
        ("cpu", "float32", 16, 13, "xla"),
    ],
)
def test_each_platform_has_its_kernel(platform, dtype, head_dim, length, kernel, caplog):
    assert choose("auto", platform, dtype, head_dim, length) == kernel
    assert not caplog.records


@pytest.mark.parametrize(
    "asked, platform, dtype, head_dim, length, reason",
    [
        ("auto", "tpu", "bfloat16", 120, 2048, "xla instead of splash, because head_dim=120 is no multiple of 128"),
        ("auto", "tpu", "bfloat16", 128, 2000, "xla instead of splash, because length=2000 is no multiple of 128"),
        ("auto", "gpu", "bfloat16", 256, 2048, "xla instead of cudnn, because head_dim=256 is above 128"),
        ("auto", "gpu", "float32", 128, 2048, "xla instead of cudnn, because the dtype is float32"),
        ("splash", "cpu", "float32", 16, 13, "the platform is cpu; head_dim=16 is no multiple of 128; length=13"),
    ],
)
def test_what_a_kernel_does_not_take_goes_to_xla_with_one_line(
    asked, platform, dtype, head_dim, length, reason, caplog
):
    assert choose(asked, platform, dtype, head_dim, length) == "xla"
    assert len(caplog.records) == 1 and reason in caplog.records[0].message


def test_splash_serves_every_size_of_polyglot():
    for name in ("polyglot-ko-1.3b", "polyglot-ko-3.8b", "polyglot-ko-5.8b", "polyglot-ko-12.8b"):
        config = PRESETS[name]
        length = config.train.sequence_length
        assert choose("auto", "tpu", config.train.dtype, config.model.head_dim, length) == "splash"


def products(jaxpr, inside=""):
    """Kernel name -> number of matrix products in it, of every Pallas call in a jaxpr."""
    found = {}
    for eqn in jaxpr.eqns:
        name = eqn.params["name"] if eqn.primitive.name == "pallas_call" else inside
        if inside and eqn.primitive.name == "dot_general":
            found[inside] = found.get(inside, 0) + 1
        for value in jax.tree.leaves(
            list(eqn.params.values()), is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")
        ):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                for kernel, count in products(inner, name).items():
                    found[kernel] = found.get(kernel, 0) + count
    return found


def test_the_products_an_estimate_counts_are_those_in_the_kernels():
    """At one block, in which nothing is skipped, kernel_flops is the number of products times that of one product."""
    qkv = some_heads(128, 2, 128, batch=3)
    gradient = jax.grad(lambda *qkv: interpreted(*qkv).sum(), argnums=(0, 1, 2))
    found = products(jax.make_jaxpr(gradient)(*qkv).jaxpr)
    assert len(found) == 3
    for kernel, count in found.items():
        assert kernel_flops(kernel, (3, 2, 128, 128)) == count * 2 * 3 * 2 * 128 * 128 * 128, kernel


def test_blocks_above_the_diagonal_are_not_counted():
    one = kernel_flops("splash_mha_fwd_residuals.3", (1, 512, 128))
    assert splash_block(2048) == 512
    assert kernel_flops("splash_mha_fwd_residuals.3", (1, 2048, 128)) == 10 * one  # of 16 blocks
    assert kernel_flops("another", (1, 512, 128)) is None
