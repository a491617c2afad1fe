"""Where arrays live: one table from axis names to mesh axes.

The model names the axes of its weights and activations; this file alone says over which mesh axes they are split.
An axis name that the table does not hold raises (Flax would quietly replicate it).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from polyglot_jax.config import Config, InputError, MeshConfig, ModelConfig

MESH_AXES = ("data", "fsdp", "tensor")

# Weights are split over fsdp along the first of these that they have: where possible their outermost in memory, so that
# what is gathered needs no transposing.
_FSDP = ("embed", "mlp")

# Axis name -> the mesh axes it is split over, besides.
RULES: dict[str, tuple[str, ...]] = {
    # weights
    "layers": (),
    "vocab": ("tensor",),
    "embed": (),
    "heads": ("tensor",),
    "head_dim": (),
    "mlp": ("tensor",),
    "context": (),
    # activations
    "batch": ("data", "fsdp"),
    "length": (),
    "features": (),
}


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh with the axes data, fsdp, tensor over `devices` (default: all); InputError if they do not suffice."""
    devices = jax.devices() if devices is None else list(devices)
    fixed = config.fsdp * config.tensor
    if config.data == -1 and len(devices) % fixed:
        raise InputError(
            f"mesh.fsdp={config.fsdp} x mesh.tensor={config.tensor}: {fixed} does not divide the {len(devices)} "
            "devices here; give mesh.data too, or sizes that divide"
        )
    data = len(devices) // fixed if config.data == -1 else config.data
    needed = data * fixed
    if needed > len(devices):
        raise InputError(
            f"mesh.data={data} x mesh.fsdp={config.fsdp} x mesh.tensor={config.tensor}: needs {needed} devices, but "
            f"{len(devices)} are here ({devices[0].platform}); lower the sizes"
        )
    return jax.make_mesh(
        (data, config.fsdp, config.tensor),
        MESH_AXES,
        axis_types=(AxisType.Auto,) * len(MESH_AXES),
        devices=devices[:needed],
    )


def check_model(model: ModelConfig, mesh: Mesh) -> None:
    """InputError, by dotted name, if a size of the model does not divide over `mesh`."""
    for name, size in model.sizes.items():
        axes = (*RULES[name], "fsdp") if name in _FSDP else RULES[name]
        parts = math.prod(mesh.shape[axis] for axis in axes)
        if size % parts:
            given = " x ".join(f"mesh.{axis}={mesh.shape[axis]}" for axis in axes)
            raise InputError(f"{given}: does not divide model.{name}={size}")


def check(config: Config, mesh: Mesh) -> None:
    """InputError, by dotted name, if the model or the training batch of `config` does not divide over `mesh`."""
    check_model(config.model, mesh)
    shape = mesh.shape
    replicas = shape["data"] * shape["fsdp"]
    part = config.train.batch_size // config.train.accumulate
    if part % replicas:
        raise InputError(
            f"train.batch_size={config.train.batch_size}: its {config.train.accumulate} part(s) of {part} sequences do "
            f"not divide over mesh.data={shape['data']} x mesh.fsdp={shape['fsdp']} = {replicas}"
        )


def spec(axes: Sequence[str | None]) -> PartitionSpec:
    """The PartitionSpec of an array with these axis names; None is an axis of no name, never split."""
    unruled = set(axes) - set(RULES) - {None}
    if unruled:
        raise KeyError(f"axes {sorted(unruled)} have no rule in polyglot_jax.sharding.RULES")
    return PartitionSpec(*(RULES.get(axis) or None for axis in axes))


def weight_spec(axes: Sequence[str]) -> PartitionSpec:
    """The PartitionSpec of a weight with these axis names."""
    parts = list(spec(axes))
    for place, axis in enumerate(axes):
        if axis in _FSDP:
            parts[place] = (*RULES[axis], "fsdp")
            break
    return PartitionSpec(*parts)


def shardings(mesh: Mesh, axes: Any) -> Any:
    """A tree of NamedShardings from a tree whose leaves are tuples of a weight's axis names."""
    return jax.tree.map(
        lambda names: NamedSharding(mesh, weight_spec(names)), axes, is_leaf=lambda x: isinstance(x, tuple)
    )


# Bytes above which a tensor that no axis splits is taken for a mistake.
WHOLE = 16 * 2**20


def check_split(abstract: Any) -> None:
    """InputError naming the first tensor of more than 16 MB that is whole on every device, on a mesh for splitting.

    abstract: a tree of shapes with NamedShardings. A mesh with data alone is one of whole copies.
    """
    for path, leaf in jax.tree_util.tree_leaves_with_path(abstract):
        size, mesh = math.prod(leaf.shape) * leaf.dtype.itemsize, leaf.sharding.mesh
        if size > WHOLE and leaf.sharding.is_fully_replicated and mesh.shape["fsdp"] * mesh.shape["tensor"] > 1:
            raise InputError(
                f"{jax.tree_util.keystr(path, simple=True, separator='/')}: {leaf.shape}, {size / 2**20:.0f} MB, would "
                f"be whole on each device of a mesh with mesh.fsdp={mesh.shape['fsdp']} and "
                f"mesh.tensor={mesh.shape['tensor']}; mesh.fsdp splits every matrix"
            )


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Ask the compiler to lay `x` out by its axis names on the mesh of `jax.set_mesh`; without a mesh, nothing.

    A dimension that does not divide (the single row of a prompt, say) is left whole; for training `check` refuses it.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    divides = [
        axis if axis and size % math.prod(mesh.shape[part] for part in RULES.get(axis, ())) == 0 else None
        for size, axis in zip(x.shape, axes, strict=True)
    ]
    return jax.lax.with_sharding_constraint(x, spec(divides))
