"""Where arrays live: one table from axis names to mesh axes.

The model names the axes of its weights and activations; this file alone says over which mesh axes they are split, in
training and in decoding. An axis name that the table does not hold raises (Flax would quietly replicate it).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from polyglot_jax.config import Config, InputError, MeshConfig, ModelConfig

# Outermost, and slowest, first.
MESH_AXES = ("slices", "data", "fsdp", "tensor", "sequence")

Layout = Literal["training", "decoding"]


class Rule(NamedTuple):
    """The mesh axes that an axis is split over, outermost first; one that does not divide it is left out."""

    training: tuple[str, ...] = ()
    decoding: tuple[str, ...] = ()


# Decoding gathers no weights: what splits them in training splits heads, hidden layer and vocabulary too.
_ALL = ("tensor", "sequence", "fsdp")

RULES: dict[str, Rule] = {
    # weights
    "layers": Rule(),
    "vocab": Rule(("tensor",), _ALL),
    "embed": Rule(),
    "heads": Rule(("tensor",), _ALL),
    "head_dim": Rule(),
    "mlp": Rule(("tensor",), _ALL),
    "context": Rule(),
    # activations
    "batch": Rule(("slices", "data", "fsdp"), ("slices", "data")),
    "length": Rule(("sequence",)),
    "features": Rule(),
    # of whole sequences, as attention needs them
    "attention_heads": Rule(("tensor", "sequence"), _ALL),
}

# Weights in training are split over _SHARES along the first of _FSDP that they have: where possible their outermost in
# memory, so that what is gathered needs no transposing. Devices that share a sequence share the weights out too.
_FSDP = ("embed", "mlp")
_SHARES = ("fsdp", "sequence")


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh of MESH_AXES over `devices` (default: all); InputError if they do not suffice."""
    devices = jax.devices() if devices is None else list(devices)
    sizes = {name: getattr(config, name) for name in MESH_AXES}
    others = {name: size for name, size in sizes.items() if name != "data"}
    fixed = math.prod(others.values())
    if config.data == -1:
        if len(devices) % fixed:
            raise InputError(
                f"{product(others)}: {fixed} does not divide the {len(devices)} devices here; give mesh.data too, or "
                f"sizes whose product is {_any_of(divisors(len(devices)))}"
            )
        sizes["data"] = len(devices) // fixed
    needed = math.prod(sizes.values())
    if needed > len(devices):
        raise InputError(
            f"{product(sizes)}: needs {needed} devices, but {len(devices)} are here ({devices[0].platform}); lower "
            "the sizes"
        )
    inner, auto = tuple(sizes[name] for name in MESH_AXES[1:]), (AxisType.Auto,) * len(MESH_AXES)
    slices = [
        jax.make_mesh(inner, MESH_AXES[1:], axis_types=auto[1:], devices=part[: math.prod(inner)]).devices
        for part in _slices(devices, config.slices)
    ]
    return Mesh(np.stack(slices), MESH_AXES, axis_types=auto)


def _slices(devices: list[jax.Device], count: int) -> list[list[jax.Device]]:
    """The devices in `count` groups, by TPU slice and process; InputError if a group would lie on several slices."""

    def place(device: jax.Device) -> tuple[int, int]:
        return getattr(device, "slice_index", None) or 0, device.process_index

    found = len({place(device)[0] for device in devices})
    if found > 1 and count != found:
        raise InputError(f"mesh.slices={count}: these devices lie on {found} slices; give --mesh.slices {found}")
    if len(devices) % count:
        raise InputError(
            f"mesh.slices={count}: does not divide the {len(devices)} devices here; "
            f"{_any_of(divisors(len(devices)))} would"
        )
    size = len(devices) // count
    in_order = sorted(devices, key=place) if count > 1 else devices
    return [in_order[start : start + size] for start in range(0, len(devices), size)]


def product(sizes: dict[str, int]) -> str:
    """mesh.data=2 x mesh.fsdp=4: those above 1, or else the first."""
    given = {name: size for name, size in sizes.items() if size > 1} or dict(list(sizes.items())[:1])
    return " x ".join(f"mesh.{name}={size}" for name, size in given.items())


def divisors(number: int) -> list[int]:
    """From 1 to the number itself."""
    return [size for size in range(1, number + 1) if number % size == 0]


def _any_of(numbers: Sequence[int]) -> str:
    shown = [str(number) for number in numbers[:12]]
    if len(numbers) > len(shown):
        return f"{', '.join(shown)}, ..."
    return " or ".join([", ".join(shown[:-1]), shown[-1]]) if len(shown) > 1 else shown[0]


def check_model(model: ModelConfig, mesh: Mesh) -> None:
    """InputError, by dotted name, if a size of the model does not divide over `mesh` in training."""
    for name, size in model.sizes.items():
        axes = RULES["attention_heads" if name == "heads" else name].training
        check_divides({axis: mesh.shape[axis] for axis in (*axes, *(_SHARES if name in _FSDP else ()))},
                      f"model.{name}", size)  # fmt: skip


def check_decoding(model: ModelConfig, mesh: Mesh) -> None:
    """InputError if `mesh` is not of `make_mesh`, or its tensor axis does not divide what it is there to split.

    The axes that share out what they can, fsdp and sequence, are not asked.
    """
    if mesh.axis_names != MESH_AXES:
        raise InputError(f"mesh: its axes are {mesh.axis_names}; they must be {MESH_AXES}, as make_mesh has them")
    for name, size in model.sizes.items():
        if "tensor" in RULES[name].decoding:
            check_divides({"tensor": mesh.shape["tensor"]}, f"model.{name}", size)


def check_divides(sizes: dict[str, int], name: str, size: int) -> None:
    """InputError, with sizes that would do, if `sizes` of mesh axes together do not divide the `size` of `name`."""
    parts = math.prod(sizes.values())
    if size % parts:
        which = [n for n in divisors(size) if n < 2 * parts]
        raise InputError(f"{product(sizes)}: does not divide {name}={size}; {_any_of(which)} would")


def check(config: Config, mesh: Mesh) -> None:
    """InputError, by dotted name, if the model or the training batch of `config` does not divide over `mesh`."""
    check_model(config.model, mesh)
    train, sizes = config.train, {axis: mesh.shape[axis] for axis in RULES["batch"].training}
    part, replicas = train.batch_size // train.accumulate, math.prod(sizes.values())
    if part % replicas:
        step = replicas * train.accumulate
        fitting = [n for n in (train.batch_size // step * step, (train.batch_size // step + 1) * step) if n]
        raise InputError(
            f"train.batch_size={train.batch_size}: its {train.accumulate} part(s) of {part} sequences do not divide "
            f"over {product(sizes)}; {_any_of(fitting)} would"
        )
    check_divides({"sequence": mesh.shape["sequence"]}, "train.sequence_length", train.sequence_length)


def parts(name: str, mesh: Mesh | AbstractMesh | None = None, layout: Layout = "training") -> int:
    """How many parts the axis `name` is split into on `mesh` (None: that of `jax.set_mesh`; without one, 1)."""
    mesh = jax.sharding.get_abstract_mesh() if mesh is None else mesh
    return 1 if mesh.empty else math.prod(mesh.shape[axis] for axis in getattr(RULES[name], layout))


def spec(
    axes: Sequence[str | None], shape: Sequence[int], mesh: Mesh | AbstractMesh, layout: Layout = "training"
) -> PartitionSpec:
    """The PartitionSpec of an array of `shape` with these axis names; None is an axis of no name, never split."""
    return PartitionSpec(*(_dividing(_rule(axis, layout), size, mesh) for axis, size in zip(axes, shape, strict=True)))


def _rule(axis: str | None, layout: Layout) -> tuple[str, ...]:
    if axis is None:
        return ()
    if axis not in RULES:
        raise KeyError(f"axis {axis!r} has no rule in polyglot_jax.sharding.RULES")
    return getattr(RULES[axis], layout)


def _dividing(axes: Sequence[str], size: int, mesh: Mesh | AbstractMesh) -> tuple[str, ...] | None:
    """Those of `axes`, one after the other, that divide `size`, as an element of a PartitionSpec."""
    taken: list[str] = []
    for axis in axes:
        if mesh.shape[axis] > 1 and size % mesh.shape[axis] == 0:
            taken.append(axis)
            size //= mesh.shape[axis]
    return tuple(taken) or None


def weight_spec(axes: Sequence[str], shape: Sequence[int], mesh: Mesh, layout: Layout = "training") -> PartitionSpec:
    """The PartitionSpec of a weight of `shape` with these axis names."""
    found = list(spec(axes, shape, mesh, layout))
    if layout == "training":
        place = next((place for place, axis in enumerate(axes) if axis in _FSDP), None)
        if place is not None:
            found[place] = _dividing((*_rule(axes[place], layout), *_SHARES), shape[place], mesh)
    return PartitionSpec(*found)


def shardings(mesh: Mesh, axes: Any, sizes: dict[str, int], layout: Layout = "training") -> Any:
    """A tree of NamedShardings from a tree whose leaves are tuples of a weight's axis names. sizes: of those axes."""
    return jax.tree.map(
        lambda names: NamedSharding(mesh, weight_spec(names, [sizes[name] for name in names], mesh, layout)),
        axes,
        is_leaf=lambda x: isinstance(x, tuple),
    )


# Bytes above which a tensor that no axis splits is taken for a mistake.
WHOLE = 16 * 2**20


def check_split(abstract: Any) -> None:
    """InputError naming the first tensor of more than 16 MB that is whole on every device, on a mesh for splitting.

    abstract: a tree of shapes with NamedShardings. A mesh with slices and data alone is one of whole copies.
    """
    for path, leaf in jax.tree_util.tree_leaves_with_path(abstract):
        size, mesh = math.prod(leaf.shape) * leaf.dtype.itemsize, leaf.sharding.mesh
        splitting = {axis: mesh.shape[axis] for axis in MESH_AXES[2:] if mesh.shape[axis] > 1}
        if size > WHOLE and leaf.sharding.is_fully_replicated and splitting:
            raise InputError(
                f"{jax.tree_util.keystr(path, simple=True, separator='/')}: {leaf.shape}, {size / 2**20:.0f} MB, would "
                f"be whole on each device of a mesh with {product(splitting)}; mesh.fsdp splits every matrix"
            )


def constrain(x: jax.Array, *axes: str | None, layout: Layout = "training") -> jax.Array:
    """Ask the compiler to lay `x` out by its axis names on the mesh of `jax.set_mesh`; without a mesh, nothing.

    A dimension that does not divide (the single row of a prompt, say) is split less; for training `check` refuses it.
    """
    mesh = jax.sharding.get_abstract_mesh()
    return x if mesh.empty else jax.lax.with_sharding_constraint(x, spec(axes, x.shape, mesh, layout))


def shard_shape(axes: Sequence[str | None], shape: Sequence[int], layout: Layout = "training") -> tuple[int, ...]:
    """A device's part of an array of `shape` that `constrain` lays out."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return tuple(shape)
    return NamedSharding(mesh, spec(axes, shape, mesh, layout)).shard_shape(tuple(shape))


def on_each(
    function: Callable[..., jax.Array], *arrays: tuple[jax.Array, Sequence[str | None]], layout: Layout = "training"
) -> jax.Array:
    """`function` of each device's parts of `arrays`, each given with its axis names; of the whole without a mesh.

    The result is laid out as the first of them.
    """
    mesh, values = jax.sharding.get_abstract_mesh(), [x for x, _ in arrays]
    if mesh.empty:
        return function(*values)
    where = tuple(spec(axes, x.shape, mesh, layout) for x, axes in arrays)
    return jax.shard_map(function, in_specs=where, out_specs=where[0], check_vma=False)(*values)
