"""Devices that are not here: TPU topologies as libtpu describes them."""

from __future__ import annotations

import importlib.util
import math
import os
import re
from typing import Any

import jax

from polyglot_jax.config import InputError
from polyglot_jax.hardware import CHIPS, Chip

# libtpu otherwise asks a metadata server that only Google's machines have, and refuses to be loaded by two processes.
_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_MIN_LOG_LEVEL": "3",
}


def describe(name: str, slices: int = 1) -> tuple[Chip, list[jax.Device]]:
    """ "v5e:16x16" -> the chip and the devices of `slices` such; InputError if there is none of that name."""
    found = re.fullmatch(r"(\w+):(\d+(?:x\d+)*)", name)
    if found is None or found[1] not in CHIPS:
        raise InputError(
            f"--topology {name}: expected CHIP:SIZE, CHIP one of {', '.join(CHIPS)}, such as v5e:16x16 or v5p:4x8x8. "
            "(GPUs: XLA compiles for a GPU only where its driver and a card are)"
        )
    chip, size = CHIPS[found[1]], _lengths(found[2])
    largest = _lengths(chip.sizes[-1])  # libtpu describes larger ones too, and of more dimensions, that nobody built
    instead = f"there are, for instance, {', '.join(f'{found[1]}:{sold}' for sold in chip.sizes)}"
    if len(size) != len(largest) or any(a > b for a, b in zip(sorted(size), sorted(largest), strict=True)):
        raise InputError(f"--topology {name}: no slice is larger than {chip.sizes[-1]} or has another number of "
                         f"dimensions; {instead}")  # fmt: skip
    if importlib.util.find_spec("libtpu") is None:
        raise InputError(f"--topology {name}: needs the TPU compiler; pip install -r requirements-tpu.txt")
    for key, value in _ENVIRONMENT.items():
        os.environ.setdefault(key, value)
    if not jax.config.jax_platforms:  # with libtpu installed, JAX would look for TPUs here first
        jax.config.update("jax_platforms", "cpu")
    from jax.experimental import topologies

    try:
        how: dict[str, Any] = {"num_slices": slices} if slices > 1 else {}
        if math.prod(size) == 1:  # libtpu otherwise takes a host to have several chips
            how["chips_per_host_bounds"] = (1, 1, 1)
        devices = topologies.get_topology_desc(name, platform="tpu", **how).devices
    except (RuntimeError, ValueError, jax.errors.JaxRuntimeError) as error:
        raise InputError(f"--topology {name}: the TPU compiler knows none of that name ({error}); {instead}") from error
    if len(devices) != slices * math.prod(size):
        raise InputError(f"--topology {name}: has {len(devices)} devices, not one for each chip")
    return chip, list(devices)


def _lengths(size: str) -> list[int]:
    return [int(length) for length in size.split("x")]
