"""python -m polyglot_jax explain: where each tensor of a step lies, and what the devices exchange."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import math

import jax

from polyglot_jax import sharding
from polyglot_jax.compile import hlo
from polyglot_jax.compile.cost import collectives
from polyglot_jax.compile.topology import describe
from polyglot_jax.config import Config, InputError
from polyglot_jax.program import Program


def explain(config: Config, topology: str | None) -> str:
    """A table of tensors (shape, spec, bytes a device) and one of the compiled step's collectives with their bytes.

    topology: of TPUs or GPUs that are not here; None: simulated CPU devices, as many as the mesh's sizes ask for (data
    -1: 1).
    """
    devices = describe(topology, config.mesh.slices)[1] if topology else _simulated(config)
    mesh = sharding.make_mesh(config.mesh, devices)
    sharding.check(config, mesh)
    program = Program.make(config, mesh)
    lines = [f"{'tensor':<44}{'shape':<26}{'split':<44}{'a device':>12}"]
    sizes: collections.Counter[str] = collections.Counter()
    for path, leaf in jax.tree_util.tree_leaves_with_path((program.abstract, program.batch)):
        name = jax.tree_util.keystr(path[1:], simple=True, separator="/")
        shard = math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        parts = [(part,) if isinstance(part, str) else part or "-" for part in leaf.sharding.spec]
        spec = ", ".join(map(" ".join, parts))
        sizes[name.split("/")[0]] += shard
        lines.append(f"{name:<44}{leaf.shape!s:<26}{f'({spec})':<44}{shard:>12,}")
    lines += [f"{f'all of {name}':<114}{size:>12,}" for name, size in sizes.items()]

    with jax.set_mesh(mesh):
        text = program.compile().as_text()
    # The TPU compiler makes a program for each slice, the others one for all.
    is_tpu = mesh.devices.flat[0].platform == "tpu"
    slices = mesh.shape["slices"] if is_tpu else 1
    found = collectives(hlo.parse(text), mesh.size // slices, slices)
    lines += ["", f"collectives of a step, compiled for {topology or 'simulated CPU devices'}:"]
    for c in sorted(found, key=lambda c: -c.times * c.bytes):
        lines.append(f"{c.times:>6} x {c.kind:<20}over {c.devices:<5}{c.bytes:>14,} bytes  {c.source[-70:]}")
    total = sum(c.times * c.bytes for c in found)
    return "\n".join([*lines, f"{len(found)} collectives, {total:,} bytes a step"])


def _simulated(config: Config) -> list[jax.Device]:
    count = math.prod(max(size, 1) for size in dataclasses.astuple(config.mesh))
    jax.config.update("jax_platforms", "cpu")
    with contextlib.suppress(RuntimeError):  # JAX has started, and what it has must do
        jax.config.update("jax_num_cpu_devices", count)
    devices = jax.devices("cpu")
    if len(devices) < count:
        raise InputError(f"mesh: {count} devices to simulate, but {len(devices)} are here already; run it by itself")
    return devices[:count]
