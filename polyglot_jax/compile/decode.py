"""python -m polyglot_jax compile --mode decode: would this model fit, and how fast would a token be, on TPUs not here?

What is compiled is `generate`'s own loop. Its body, run once, is a decode step: one token of each row.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from polyglot_jax import quantise, sharding
from polyglot_jax.attention import kernel_flops
from polyglot_jax.checkpoint import flatten, unflatten
from polyglot_jax.compile import hlo
from polyglot_jax.compile.cost import HOP, Collective, Estimator
from polyglot_jax.compile.output import new_file
from polyglot_jax.compile.timeline import Timeline, Times
from polyglot_jax.compile.topology import describe
from polyglot_jax.config import Config, InputError, MeshConfig
from polyglot_jax.generate import Generator
from polyglot_jax.hardware import PEAK_BF16, Card, Chip
from polyglot_jax.model import Params, Transformer
from polyglot_jax.preflight import Memory, gib, on_device
from polyglot_jax.store import is_stacked


@dataclass(frozen=True)
class Decode:
    """What is decoded. rows: prompts at a time; slots: of the cache; quantize: "int8" or None, as for `load`."""

    rows: int
    slots: int
    quantize: str | None

    def check(self, config: Config) -> None:
        if self.rows < 1:
            raise InputError(f"batch_size={self.rows}: must be above 0")
        if not 1 < self.slots <= config.model.context:
            raise InputError(f"slots={self.slots}: must be above 1, and at most model.context={config.model.context}")


@dataclass(frozen=True)
class Estimate:
    """What is known of a decode step before it ever ran. weights, cache: bytes of a chip's that a step must read.

    step: the likeliest tokens are taken; drawn: drawn with top-k and top-p; once: what a call does beside its steps.
    """

    config: Config
    decode: Decode
    topology: str
    chip: Chip
    chips: int
    memory: Memory
    weights: int
    cache: int
    step: Times
    drawn: Times
    once: Times
    compile_seconds: float

    @property
    def fits(self) -> bool:
        return self.memory.total <= self.chip.memory

    @property
    def utilisation(self) -> float:
        """Of HBM's bandwidth: weights and cache, read once, in the time of a step."""
        return (self.weights + self.cache) / self.chip.bandwidth / self.step.end

    def to_json(self) -> str:
        values: dict[str, Any] = {
            "what": "an estimate from the compiled program, not a measurement",
            "topology": self.topology,
            "chips": self.chips,
            **dataclasses.asdict(self.decode),
            "memory": dataclasses.asdict(self.memory) | {"total": self.memory.total, "free_on_chip": self.chip.memory},
            "fits": self.fits,
            "bytes": {"weights": self.weights, "cache": self.cache, "passed": self.step.traffic},
            "seconds": {
                "step": self.step.end,
                "computing": self.step.computing,
                "waiting_for_memory": self.step.waiting,
                "collectives": self.step.exchanging,
                "step_with_top_k_and_top_p": self.drawn.end,
                "once_a_call": self.once.end,
                "compiling": self.compile_seconds,
            },
            "tokens_per_second": self.decode.rows / self.step.end,
            "bandwidth_utilisation": self.utilisation,
            "collectives": [dataclasses.asdict(collective) for collective in self.step.collectives],
            "config": dataclasses.asdict(self.config),
        }
        return json.dumps(values, indent=1) + "\n"

    def __str__(self) -> str:
        decode, memory, step = self.decode, self.memory, self.step
        mesh = " x ".join(f"{name} {size}" for name, size in dataclasses.asdict(self.config.mesh).items() if size > 1)

        def ms(seconds: float) -> str:
            return f"{seconds * 1e3:.3f} ms"

        lines = [
            f"ESTIMATE, not a measurement: one decode step compiled for {self.chips} x {self.chip.kind} "
            f"({self.topology}), mesh {mesh or 1}",
            f"  {self.config.model.parameters():,} parameters in {decode.quantize or 'bfloat16'}, {decode.rows:,} "
            f"row{'s' * (decode.rows > 1)}, {decode.slots:,} slots",
            f"memory of a chip: {gib(memory.total)} of {gib(self.chip.memory)} that it leaves free: "
            f"{'fits' if self.fits else 'DOES NOT FIT'}",
            f"  arguments {gib(memory.arguments)}, temporaries {gib(memory.temporaries)}, outputs beside them "
            f"{gib(memory.outputs - memory.aliased)}, code {gib(memory.code)}",
            f"a step must read {self.weights / 1e6:,.1f} MB of weights and {self.cache / 1e6:,.1f} MB of cache: "
            f"{ms((self.weights + self.cache) / self.chip.bandwidth)} at {self.chip.bandwidth / 1e9:g} GB/s; the "
            f"program moves {step.traffic / 1e6:,.1f} MB",
            f"step: {ms(step.end)} = computing {ms(step.computing)} + collectives {ms(step.exchanging)} + waiting for "
            f"memory {ms(step.end - step.computing - step.exchanging)}",
            f"  drawing with top-k and top-p instead of taking the likeliest: {ms(self.drawn.end)}; once a call: "
            f"{ms(self.once.end)}",
            f"collectives, at {self.chip.link / 1e9:g} GB/s a link and direction and {HOP * 1e6:g} us a hop (assumed):",
        ]
        kinds: dict[tuple[str, int, int], list[Collective]] = {}
        for one in step.collectives:
            kinds.setdefault((one.kind, one.bytes, one.devices), []).append(one)
        for (kind, size, devices), found in kinds.items():
            count = sum(one.times for one in found)
            lines.append(f"  {count:>4} x {kind} of {size:,} bytes over {devices}: {found[0].seconds * 1e6:.1f} us")
        lines.append(
            f"estimated utilisation of HBM's bandwidth: {self.utilisation:.1%}; {decode.rows / step.end:,.0f} tokens/s"
        )
        return "\n".join(lines)


def estimate(config: Config, topology: str, decode: Decode, dump: Callable[[str], object]) -> Estimate:
    """Compile `generate`'s loop for `topology` and cost a step. InputError where that cannot be done.

    Where mesh.data is -1, all chips that the other axes leave share the heads and the hidden layer (mesh.tensor).
    dump: takes the text of the compiled program before it is costed.
    """
    decode.check(config)
    chip, devices = describe(topology)
    if isinstance(chip, Card):
        raise InputError(f"--topology {topology}: --mode decode is for TPUs; for GPUs the compiler counts no cycles")
    mesh = sharding.make_mesh(_decoding(config.mesh, len(devices)), devices)
    config = dataclasses.replace(config, mesh=MeshConfig(**mesh.shape))
    sharding.check_decoding(config.model, mesh)
    sharding.check_divides({axis: mesh.shape[axis] for axis in ("slices", "data")}, "--batch-size", decode.rows)
    model = Transformer(config.model, jnp.bfloat16, layout="decoding")
    params = abstract_weights(model, mesh, decode.quantize)
    generator, start = Generator(model, config, platform="tpu"), time.perf_counter()
    try:
        with jax.set_mesh(mesh):
            compiled, state = generator.compile(params, decode.rows, decode.slots)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise InputError(f"does not fit: the compiler finds no room. {_HELPS}. It says: {error}") from error
    seconds, text = time.perf_counter() - start, compiled.as_text()
    dump(text)
    program, places = hlo.parse(text), [device.coords for device in mesh.devices.flat]
    estimator = Estimator(program, chip, PEAK_BF16[chip.kind], places, kernel_flops, 1.0)
    body = main_loop(program).called("body")[0]
    step, drawn = (Timeline(program, estimator, chip.bandwidth, branch).run(body) for branch in (min, max))
    once = Timeline(program, estimator, chip.bandwidth).run(program.entry, without=main_loop(program).name)
    read = {name: leaf for name, leaf in params.items() if name != "embed" or config.model.tied}
    return Estimate(config, decode, topology, chip, mesh.size, Memory.of(compiled), on_device(read),
                    on_device(state.cache), step, drawn, once, seconds)  # fmt: skip


_HELPS = "What helps: fewer --batch-size or --slots, --quantize int8, or more chips"


def _decoding(mesh: MeshConfig, chips: int) -> MeshConfig:
    if mesh.slices > 1:
        raise InputError(f"mesh.slices={mesh.slices}: a decode step is estimated on one slice; leave it at 1")
    others = mesh.fsdp * mesh.tensor * mesh.sequence
    if mesh.data != -1 or chips % others:  # which make_mesh refuses
        return mesh
    return dataclasses.replace(mesh, data=1, tensor=mesh.tensor * (chips // others))


def abstract_weights(model: Transformer, mesh: Mesh, quantize: str | None) -> Params:
    """Shapes and shardings of what `load` gives on `mesh`: a subtree for each layer, in the model's dtype or int8."""
    config, leaves = model.config, {}

    def leaf(names: tuple[str, ...], dtype: Any) -> jax.ShapeDtypeStruct:
        where = sharding.shardings(mesh, names, config.sizes, "decoding")
        return jax.ShapeDtypeStruct([config.sizes[name] for name in names], dtype, sharding=where)

    for name, names in flatten(model.axes()).items():
        stacked = is_stacked(name)
        names = names[1:] if stacked else names
        made = {name: leaf(names, model.dtype)}
        if quantize and quantise.is_quantised(name):
            inputs = quantise.inputs_of(name)
            outputs = tuple(axis for place, axis in enumerate(names) if place not in inputs)
            made = {name: leaf(names, jnp.int8), name + quantise.SCALE: leaf(outputs, jnp.float32)}
        for layer in range(config.layers if stacked else 1):
            leaves |= {path.replace("layers/", f"layer_{layer}/"): shape for path, shape in made.items()}
    return unflatten(leaves)


def main_loop(program: hlo.Program) -> hlo.Instruction:
    """The loop over tokens: of those that the program itself runs, the one that carries most."""
    loops = [it for it in program.computations[program.entry].instructions.values() if it.opcode == "while"]
    if not loops:
        raise InputError("the compiled program has no loop, so that there is no decode step to estimate")
    return max(loops, key=lambda it: it.bytes)


def compile_decode(config: Config, topology: str, decode: Decode, dump_hlo: str | None, json_file: str | None) -> None:
    """Print the estimate; InputError at the end if the step does not fit."""
    with new_file(dump_hlo) as dump, new_file(json_file) as write:
        found = estimate(config, topology, decode, dump)
        print(found)
        write(found.to_json())
    if not found.fits:
        raise InputError(
            f"does not fit: a chip needs {gib(found.memory.total)} and has {gib(found.chip.memory)}. {_HELPS}"
        )
