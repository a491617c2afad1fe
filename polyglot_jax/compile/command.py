"""python -m polyglot_jax compile: would this step fit, and how fast would it be, on devices that are not here?"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable
from typing import Any, ClassVar

import jax

from polyglot_jax import preflight, sharding
from polyglot_jax.attention import kernel_flops
from polyglot_jax.compile import hlo
from polyglot_jax.compile.cost import Collective, Cost, Estimator, collectives
from polyglot_jax.compile.output import new_file
from polyglot_jax.compile.topology import describe
from polyglot_jax.config import Config, MeshConfig
from polyglot_jax.hardware import PEAK_BF16, Card, Chip, step_flops
from polyglot_jax.preflight import Memory, gib
from polyglot_jax.program import Program

EFFICIENCY = 0.5
"""Share of the peak that custom kernels are taken to reach on the products they do."""
SHOWN = 16
"""Collectives that are printed."""


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What is known of a training step on `topology` before it ever ran: all but the time it takes."""

    program: Program
    topology: str
    chip: Chip | Card
    memory: Memory
    collectives: list[Collective]
    compile_seconds: float

    _free: ClassVar[str] = "that JAX takes (XLA_CLIENT_MEM_FRACTION, 0.75 if not set)"

    @property
    def config(self) -> Config:
        return self.program.config

    @property
    def chips(self) -> int:
        return self.program.mesh.size

    @property
    def attention(self) -> str:
        return self.program.model.attention

    @property
    def fits(self) -> bool:
        return self.memory.total <= self.chip.memory

    def values(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "what": "a compiled program, not a run; how long it takes is not known",
            "topology": self.topology,
            "chips": self.chips,
            "attention": self.attention,
            "memory": dataclasses.asdict(self.memory) | {"total": self.memory.total, "free_on_chip": self.chip.memory},
            "fits": self.fits,
            "seconds": {"compiling": self.compile_seconds},
            "collectives": [
                {name: getattr(one, name) for name in ("name", "kind", "source", "times", "bytes", "devices")}
                for one in self.collectives
            ],
            "config": dataclasses.asdict(self.config),
        }

    def _header(self, what: str) -> list[str]:
        config, train, memory = self.config, self.config.train, self.memory
        mesh = " x ".join(f"{name} {size}" for name, size in dataclasses.asdict(config.mesh).items() if size > 1)
        return [
            f"{what}: one training step compiled for {self.chips} x {self.chip.kind} "
            f"({self.topology}{f', {config.mesh.slices} slices' if config.mesh.slices > 1 else ''}), mesh {mesh or 1}",
            f"  {config.model.parameters():,} parameters, {train.batch_size:,} x {train.sequence_length:,} tokens, "
            f"{train.dtype}, remat {train.remat}, attention {self.attention}",
            f"memory of a chip: {gib(memory.total)} of {gib(self.chip.memory)} {self._free}: "
            f"{'fits' if self.fits else 'DOES NOT FIT'}",
            f"  arguments {gib(memory.arguments)}, temporaries {gib(memory.temporaries)}, outputs beside them "
            f"{gib(memory.outputs - memory.aliased)}, code {gib(memory.code)}",
        ]

    def __str__(self) -> str:
        lines = self._header("COMPILED, not run")
        lines.append(f"collectives:{'' if self.collectives else ' none'}")
        for c in sorted(self.collectives, key=lambda c: -c.times * c.bytes)[:SHOWN]:
            lines.append(f"  {c.times:>4} x {c.kind} of {c.bytes / 1e6:,.1f} MB over {c.devices}{_from(c)}")
        lines += self._rest()
        lines.append(
            "not known without these GPUs: the time of a step, since the compiler counts no cycles for them; and what "
            "scratch the products take, since it chooses how to compute them by trying, and here took its first guess"
        )
        return "\n".join(lines)

    def _rest(self) -> list[str]:
        more = len(self.collectives) - SHOWN
        return [f"  ... {more} smaller ones (--json has them)"] * (more > 0)


@dataclasses.dataclass(frozen=True)
class Estimate(Compiled):
    """And how long it takes, where the compiler counts cycles: on TPUs."""

    chip: Chip
    cost: Cost
    _free: ClassVar[str] = "that it leaves free"

    def mfu(self, with_attention: bool) -> float:
        flops = step_flops(self.config, with_attention)
        return flops / (self.cost.step * self.chips * PEAK_BF16[self.chip.kind])

    def values(self) -> dict[str, Any]:
        cost, tokens = self.cost, self.config.train.batch_size * self.config.train.sequence_length
        return super().values() | {
            "what": "an estimate from the compiled program, not a measurement",
            "kernel_efficiency": EFFICIENCY,
            "seconds": {
                "step": cost.step,
                "compute": cost.compute,
                "moved": cost.moved,
                "kernels": cost.kernel_seconds,
                "busiest_link": cost.links,
                "not_overlapped_collectives": cost.waiting,
                "background_copies": cost.copies,
                "compiling": self.compile_seconds,
            },
            "tokens_per_second": tokens / cost.step,
            "mfu_6n": self.mfu(False),
            "mfu_6n_and_attention": self.mfu(True),
            "loops": cost.loops,
            "kernels": [dataclasses.asdict(kernel) for kernel in cost.kernels],
            "collectives": [dataclasses.asdict(collective) for collective in self.collectives],
        }

    def __str__(self) -> str:
        train, cost = self.config.train, self.cost

        def ms(seconds: float) -> str:
            return f"{seconds * 1e3:.1f} ms"

        lines = self._header("ESTIMATE, not a measurement")
        lines += [
            f"step: {ms(cost.step)} = the largest of (computing {ms(cost.busy)}, links {ms(cost.links)}, copies in the "
            f"background {ms(cost.copies)}) + collectives that nothing overlaps {ms(cost.waiting)}",
            f"  computing: {ms(cost.compute)} by the compiler's cycles at {self.chip.clock / 1e9:g} GHz, "
            f"{ms(cost.kernel_seconds)} in custom kernels at {EFFICIENCY:.0%} of the peak, {ms(cost.moved)} by bytes",
            f"  loops: {', '.join(f'{name} x {times}' for name, times in cost.loops.items()) or 'none'}",
        ]
        for kernel in cost.kernels:
            lines.append(f"  {kernel.times:>4} x {kernel.name}: {kernel.flops / 1e9:,.1f} GFLOP, {ms(kernel.seconds)}")
        between = f", {self.chip.network / 1e9:g} GB/s a chip between slices" if self.config.mesh.slices > 1 else ""
        lines.append(f"collectives, at {self.chip.link / 1e9:g} GB/s a link and direction{between}:")
        for c in sorted(self.collectives, key=lambda c: -c.times * c.seconds)[:SHOWN]:
            lines.append(
                f"  {c.times:>4} x {c.kind} of {c.bytes / 1e6:,.1f} MB over {c.devices}: {c.link_bytes / 1e6:,.2f} MB "
                f"a link, {ms(c.seconds)}, {_waited(c)}{_from(c)}"
            )
        lines += self._rest()
        tokens = train.batch_size * train.sequence_length
        lines.append(
            f"estimated MFU: {self.mfu(False):.1%} counting 6N, {self.mfu(True):.1%} counting 6N + causal attention; "
            f"{tokens / cost.step:,.0f} tokens/s"
        )
        return "\n".join(lines)


def _from(collective: Collective) -> str:
    return f" ({collective.source[-60:]})" if collective.source else ""


def _waited(collective: Collective) -> str:
    if collective.overlaps or 0 < collective.seconds == collective.covered:
        return "overlaps"
    return f"{1 - collective.covered / collective.seconds:.0%} waited for" if collective.covered else "waited for"


def compiled(config: Config, topology: str, dump: Callable[[str], object]) -> Compiled:
    """Compile the training step of `config` for `topology`; for TPUs cost it too. InputError where that cannot be done.

    dump: takes the text of the compiled program before it is costed.
    """
    chip, devices = describe(topology, config.mesh.slices)
    mesh = sharding.make_mesh(config.mesh, devices)
    sharding.check(config, mesh)
    config = dataclasses.replace(config, mesh=MeshConfig(**mesh.shape))
    program, start = Program.make(config, mesh), time.perf_counter()
    with jax.set_mesh(mesh):
        executable = preflight.compile_step(program, chip.memory)
    seconds, text = time.perf_counter() - start, executable.as_text()
    dump(text)
    memory, parsed = Memory.of(executable), hlo.parse(text)
    if isinstance(chip, Card):
        return Compiled(program, topology, chip, memory, collectives(parsed, mesh.size), seconds)
    places = [device.coords for device in mesh.devices[0].flat]
    estimator = Estimator(parsed, chip, PEAK_BF16[chip.kind], places, kernel_flops, EFFICIENCY, config.mesh.slices)
    cost = estimator.cost()
    return Estimate(program, topology, chip, memory, cost.collectives, seconds, cost)


def compile_step(config: Config, topology: str, dump_hlo: str | None, json_file: str | None) -> None:
    """Print what is known of the step; InputError at the end if it does not fit."""
    with new_file(dump_hlo) as dump, new_file(json_file) as write:
        found = compiled(config, topology, dump)
        print(found)
        write(json.dumps(found.values(), indent=1) + "\n")
    preflight.check_step(found.program, found.memory, found.chip.memory)
