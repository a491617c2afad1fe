"""What a training step needs of a device's memory, said before anything is allocated, and which settings need less."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax

from polyglot_jax.config import InputError
from polyglot_jax.program import Program
from polyglot_jax.sharding import divisors, parts


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes of a compiled program on one device, as the compiler allots them."""

    arguments: int
    outputs: int
    aliased: int
    temporaries: int
    code: int

    @classmethod
    def of(cls, compiled: Any) -> Memory:
        found = compiled.memory_analysis()
        return cls(
            found.argument_size_in_bytes,
            found.output_size_in_bytes,
            found.alias_size_in_bytes,
            found.temp_size_in_bytes,
            found.generated_code_size_in_bytes,
        )

    @property
    def total(self) -> int:
        """Outputs that take the place of arguments counted once."""
        return self.arguments + self.outputs - self.aliased + self.temporaries + self.code


def on_device(abstract: Any) -> int:
    """Bytes on one device of a tree of shapes with shardings."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(abstract)
    )


def compile_step(program: Program, room: int | None) -> Any:
    """The step of `program`, compiled; InputError, with what helps, if `room` bytes of a device do not hold its state.

    That is known before anything is compiled: parameters, the optimizer's state and, since clipping needs all of them
    at once, the gradients.
    """
    params, optimizer = on_device(program.abstract.params), on_device(program.abstract.optimizer)
    state = 2 * params + optimizer
    if room is not None and state > room:
        raise InputError(
            f"does not fit: a device needs {gib(state)} for the state alone (parameters {gib(params)}, optimizer "
            f"{gib(optimizer)}, gradients {gib(params)}) and has {gib(room)}; "
            f"{_split_further(program, state, room) or 'take a smaller --preset, or devices with more memory'}"
        )
    try:
        return program.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        helps = _what_helps(program, state, (room or 2 * state) - state, state)
        raise InputError(f"does not fit: the compiler finds no room. {helps}. It says: {error}") from error


def check_step(program: Program, memory: Memory, room: int | None) -> str:
    """What the compiled step takes of `room` bytes, in a line; InputError if that is too little, with what helps."""
    params, optimizer = on_device(program.abstract.params), on_device(program.abstract.optimizer)
    state, rest = 2 * params + optimizer, memory.total - 2 * params - optimizer
    line = (
        f"{gib(memory.total)}{'' if room is None else f' of {gib(room)}'} (parameters {gib(params)}, optimizer "
        f"{gib(optimizer)}, gradients {gib(params)}, activations and the rest {gib(rest)})"
    )
    if room is not None and memory.total > room:
        raise InputError(f"does not fit: a device needs {line}. {_what_helps(program, state, rest, room - rest)}")
    return f"memory of a device: {line}"


def _what_helps(program: Program, state: int, rest: int, room: int) -> str:
    """In order: what makes the larger of the two parts smaller, then what makes the other so. room: for the state."""
    fewer, split = _fewer_activations(program), [_split_further(program, state, max(room, state // 2))]
    found = [*fewer, *split] if rest > state else [*split, *fewer]
    return f"What helps: {'; '.join(filter(None, found)) or 'a smaller --preset, or devices with more memory'}"


def gib(size: float) -> str:
    return f"{size / 2**30:.2f} GiB"


def _split_further(program: Program, state: int, room: int) -> str:
    """A larger mesh.fsdp with which the state, now `state` bytes a device, takes at most `room`; "" if none does.

    On as many devices if one will do there, else on more.
    """
    model, train, shape = program.config.model, program.config.train, program.mesh.shape
    data, fsdp, others = shape["data"], shape["fsdp"], shape["sequence"] * shape["tensor"] * shape["slices"]
    sizes = [
        size
        for size in divisors(model.embed // shape["sequence"])
        if size > fsdp and model.mlp % (size * shape["sequence"] * shape["tensor"]) == 0 and state * fsdp / size <= room
    ]
    for size in sizes:
        if data * fsdp % size == 0:
            less = gib(state * fsdp / size)
            return f"--mesh.fsdp {size} --mesh.data {data * fsdp // size} (the state in {less} a device)"
    for size in sizes:
        if train.batch_size // train.accumulate % (size * shape["slices"]) == 0:
            return (
                f"{size * others} devices with as much memory each, with --mesh.fsdp {size} (the state in "
                f"{gib(state * fsdp / size)} a device), or a smaller --preset"
            )
    return ""


def _fewer_activations(program: Program) -> list[str]:
    """Settings that keep fewer activations, first the one that costs least time."""
    model, train, mesh, found = program.config.model, program.config.train, program.mesh, []
    replicas = parts("batch", mesh)
    rows = train.batch_size // train.accumulate // replicas
    if rows > 1:
        count = next(count for count in divisors(rows) if count > 1)
        found.append(
            f"--train.accumulate {train.accumulate * count} ({rows // count} sequences at a time on a device instead "
            f"of {rows})"
        )
    if train.remat != "full":
        found.append(f"--train.remat full instead of {train.remat} (keeps of each layer its input alone)")
    sequence = mesh.shape["sequence"] * 2
    if rows == 1 and model.heads % (mesh.shape["tensor"] * sequence) == 0 and train.sequence_length % sequence == 0:
        found.append(
            f"--mesh.sequence {sequence} for half the mesh.data or mesh.fsdp, with --train.accumulate "
            f"{2 * train.accumulate} (1/{sequence} of a sequence at a time on a device)"
        )
    if train.batch_size > replicas * train.accumulate:
        found.append(f"--train.batch-size {replicas * train.accumulate}, the least for this mesh (of a new run)")
    return found
