"""What the devices can do at best: the denominators of utilisation, and of estimates."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp

from polyglot_jax.config import Config

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


class Chip(NamedTuple):
    """What an estimate needs to know of a chip.

    kind: jax.Device.device_kind. clock: Hz of the matrix units, the compiler's cycles. memory: bytes of HBM that the
    runtime leaves free. bandwidth: of HBM, bytes/s. link: bytes/s of one link in one direction. wraps: a torus axis is
    closed to a ring where its size is a multiple of this. network: bytes/s of a chip's share of the network between
    slices. sizes: of slices that are sold, some of them, the largest last.
    """

    kind: str
    clock: float
    memory: int
    bandwidth: float
    link: float
    wraps: int
    network: float
    sizes: tuple[str, ...]


# By the name a topology starts with. Google's documentation of v5e and v5p (network: 6.4 Tbit/s a pod of 256 and 50
# Gbit/s a chip); the clock is the peak over the products the matrix units start in a cycle (v5e four of 128 x 128, v5p
# eight).
CHIPS = {
    "v5e": Chip("TPU v5 lite", 1.50e9, int(15.75 * 2**30), 819e9, 45e9, wraps=16, network=3.125e9,
                sizes=("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")),
    "v5p": Chip("TPU v5", 1.75e9, 95 * 2**30, 2765e9, 90e9, wraps=4, network=6.25e9,
                sizes=("2x2x1", "2x2x2", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16", "8x16x16", "16x16x16",
                       "16x16x24")),
}  # fmt: skip


class Card(NamedTuple):
    """A GPU, as the CUDA compiler has to be told of one that is not here.

    kind: jax.Device.device_kind. memory, l2: bytes. capability: compute capability. units: streaming multiprocessors,
    each with `lanes` float32 units and `shared` bytes of shared memory. bandwidth: bytes/s. clock: GHz.
    """

    kind: str
    memory: int
    capability: tuple[int, int]
    units: int
    lanes: int
    shared: int
    l2: int
    bandwidth: int
    clock: float


# By the name a topology starts with. What the driver says of them; the same figures are in OpenXLA's own target specs.
CARDS = {
    "a100": Card(
        "NVIDIA A100-SXM4-80GB", 85_100_068_864, (8, 0), 108, 64, 164 * 1024, 40 * 2**20, 2_039_040_000_000, 1.41
    ),
    "h100": Card(
        "NVIDIA H100 80GB HBM3", 84_942_979_072, (9, 0), 132, 128, 228 * 1024, 50 * 2**20, 3_352_320_000_000, 1.98
    ),
    "h200": Card("NVIDIA H200", 151_397_597_184, (9, 0), 132, 128, 228 * 1024, 50 * 2**20, 4_800_000_000_000, 1.98),
}


def readable(size: int) -> str:
    """A number of bytes, in MB or GB."""
    return f"{size / 1e9:,.2f} GB" if size >= 1e8 else f"{size / 1e6:,.1f} MB"


def free_memory(devices: Sequence[jax.Device]) -> int | None:
    """Bytes free on the fullest of the devices of this process; of a CPU's, which share it, its part. None: unknown."""
    local = [device for device in devices if device.process_index == jax.process_index()]
    stats = [device.memory_stats() for device in local]
    if all(stats) and all({"bytes_limit", "bytes_in_use"} <= known.keys() for known in stats):
        return min(known["bytes_limit"] - known["bytes_in_use"] for known in stats)
    about = Path("/proc/meminfo")
    found = re.search(r"MemAvailable:\s+(\d+) kB", about.read_text()) if about.exists() else None
    return int(found[1]) * 1024 // len(local) if found and local[0].platform == "cpu" else None


def step_flops(config: Config, with_attention: bool) -> int:
    """FLOPs that a training step needs: 6 a parameter and token and, if asked, causal attention's.

    That adds 6 L T D a token: two products of T x T x D, forward and twice backward, half of each masked.
    """
    model, train = config.model, config.train
    attention = 6 * model.layers * model.embed * train.sequence_length
    flops = 6 * model.parameters() + (attention if with_attention else 0)
    return flops * train.batch_size * train.sequence_length


def peak_flops(dtype: str, devices: int) -> tuple[float, str]:
    """FLOP/s of `devices` devices together, and where the figure is from.

    For chips in the table their bf16 peak; for others the best a large matrix product in `dtype` reaches on one of
    them, times their number, except that the simulated devices of a process share the one figure of its CPU.
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
    count = jax.process_count() if is_cpu else devices
    return reached * count, f"{kind}, measured with a product of {size} x {size} in {dtype}"
