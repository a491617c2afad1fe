"""What the devices can do at best: the denominators of utilisation."""

from __future__ import annotations

import time

import jax
import jax.numpy as jnp

# Dense bf16 FLOP/s of a chip, by jax.Device.device_kind. From the makers' data sheets.
PEAK_BF16 = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H200": 989e12,
}


def peak_flops(dtype: str, devices: int) -> tuple[float, str]:
    """FLOP/s of `devices` devices together, and where the figure is from.

    For chips in the table their bf16 peak; for others the best a large matrix product in `dtype` reaches on one of
    them, times their number, except that the simulated devices of a CPU share its one figure.
    """
    kind = jax.devices()[0].device_kind
    if kind in PEAK_BF16:
        return PEAK_BF16[kind] * devices, f"{kind}, data sheet, bf16"
    is_cpu = jax.default_backend() == "cpu"
    size = 1024 if is_cpu else 8192
    x = jnp.ones((size, size), dtype)
    product = jax.jit(jnp.matmul)
    product(x, x).block_until_ready()
    seconds = []
    for _ in range(8):
        start = time.perf_counter()
        product(x, x).block_until_ready()
        seconds.append(time.perf_counter() - start)
    reached = 2 * size**3 / min(seconds)
    return reached * (1 if is_cpu else devices), f"{kind}, measured with a product of {size} x {size} in {dtype}"
