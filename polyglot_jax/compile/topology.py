"""Devices that are not here: TPU slices as libtpu describes them, GPUs as they are described to the CUDA compiler."""

from __future__ import annotations

import contextlib
import importlib.util
import math
import os
import re
from typing import Any

import jax

from polyglot_jax.config import InputError
from polyglot_jax.hardware import CARDS, CHIPS, Card, Chip

# libtpu otherwise asks a metadata server that only Google's machines have, and refuses to be loaded by two processes.
_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_MIN_LOG_LEVEL": "3",
}


# With limits that all GPUs of the table share, cuDNN 9.10 and CUDA 12.8.
_TARGET = """
gpu_device_info {{
  cuda_compute_capability {{ major: {card.capability[0]} minor: {card.capability[1]} feature_extension: {extension} }}
  core_count: {card.units} fpus_per_core: {card.lanes} clock_rate_ghz: {card.clock}
  device_memory_size: {card.memory} memory_bandwidth: {card.bandwidth} l2_cache_size: {card.l2}
  shared_memory_per_core: {card.shared} shared_memory_per_block_optin: {shared_per_block}
  shared_memory_per_block: 49152 registers_per_core_limit: 65536 registers_per_block_limit: 65536
  threads_per_warp: 32 threads_per_block_limit: 1024 threads_per_core_limit: 2048
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
runtime_version {{ major: 12 minor: 8 patch: 0 }}
device_description_str: "{card.kind}"
"""


def describe(name: str, slices: int = 1) -> tuple[Chip | Card, list[jax.Device]]:
    """The devices that `name` says, and of what kind; InputError if there are none of that name.

    "v5e:16x16": a slice of TPUs, and with `slices` as many of them. "h100:4x8": 4 nodes of 8 GPUs; "h100:8": one node.
    """
    found = re.fullmatch(r"(\w+):(\d+(?:x\d+)*)", name)
    if found is None or found[1] not in CHIPS | CARDS:
        raise InputError(
            f"--topology {name}: expected CHIP:SIZE, CHIP one of {', '.join(CHIPS)}, such as v5e:16x16 or v5p:4x8x8, "
            f"or GPU:NODESxGPUS, GPU one of {', '.join(CARDS)}, such as h100:8 or h100:4x8"
        )
    if found[1] in CARDS:
        return _gpus(name, CARDS[found[1]], _lengths(found[2]))
    return _tpus(name, found[1], _lengths(found[2]), slices)


def _gpus(name: str, card: Card, size: list[int]) -> tuple[Card, list[jax.Device]]:
    nodes, gpus = size if len(size) == 2 else (1, math.prod(size))
    if len(size) > 2 or not 0 < nodes <= 1024 or not 0 < gpus <= 72:
        raise InputError(
            f"--topology {name}: expected GPUS or NODESxGPUS, up to 1024 nodes of up to 72, such as 8 or 4x8"
        )
    if not any(importlib.util.find_spec(f"jax_cuda{version}_plugin") for version in (12, 13)):
        raise InputError(f"--topology {name}: needs the CUDA compiler; pip install -r requirements-gpu.txt")
    free = card._replace(memory=int(card.memory * _share_of_memory()))
    target = _TARGET.format(
        card=card,
        shared_per_block=card.shared - 1024,  # the system keeps 1 KiB
        extension="ACCELERATED_FEATURES" if card.capability >= (9, 0) else "NONE",
    )
    return free, _topology_of(name, "cuda", target_config=target, topology=f"1x{nodes}x{gpus}")


def _share_of_memory() -> float:
    """Of a GPU's, that JAX takes."""
    names = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")  # the second is the older name
    for name in names:
        if text := os.environ.get(name):
            with contextlib.suppress(ValueError):
                if 0 < float(text) <= 1:
                    return float(text)
            raise InputError(f"{name}={text}: must be above 0 and at most 1, or not be set")
    return 0.75


def _tpus(name: str, kind: str, size: list[int], slices: int) -> tuple[Chip, list[jax.Device]]:
    chip = CHIPS[kind]
    largest = _lengths(chip.sizes[-1])  # libtpu describes larger ones too, and of more dimensions, that nobody built
    instead = f"there are, for instance, {', '.join(f'{kind}:{sold}' for sold in chip.sizes)}"
    if len(size) != len(largest) or any(a > b for a, b in zip(sorted(size), sorted(largest), strict=True)):
        raise InputError(f"--topology {name}: no slice is larger than {chip.sizes[-1]} or has another number of "
                         f"dimensions; {instead}")  # fmt: skip
    if importlib.util.find_spec("libtpu") is None:
        raise InputError(f"--topology {name}: needs the TPU compiler; pip install -r requirements-tpu.txt")
    for key, value in _ENVIRONMENT.items():
        os.environ.setdefault(key, value)
    how: dict[str, Any] = {"num_slices": slices} if slices > 1 else {}
    if math.prod(size) == 1:  # libtpu otherwise takes a host to have several chips
        how["chips_per_host_bounds"] = (1, 1, 1)
    devices = _topology_of(name, "tpu", instead, **how)
    if len(devices) != slices * math.prod(size):
        raise InputError(f"--topology {name}: has {len(devices)} devices, not one for each chip")
    return chip, devices


def _topology_of(name: str, platform: str, instead: str = "", /, **how: Any) -> list[jax.Device]:
    jax.config.update("jax_platforms", "cpu")  # with its plugin installed, JAX would look for such devices here
    from jax.experimental import topologies

    try:
        return list(topologies.get_topology_desc(name, platform=platform, **how).devices)
    except (RuntimeError, ValueError, NotImplementedError) as error:
        why = f"the compiler knows none of that name ({error})"
        raise InputError(f"--topology {name}: {'; '.join(filter(None, (why, instead)))}") from error


def _lengths(size: str) -> list[int]:
    return [int(length) for length in size.split("x")]
