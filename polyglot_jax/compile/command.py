"""python -m polyglot_jax compile: would this step fit, and how fast would it be, on devices that are not here?"""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import jax

from polyglot_jax import sharding
from polyglot_jax.attention import kernel_flops
from polyglot_jax.compile import hlo
from polyglot_jax.compile.cost import Cost, Estimator
from polyglot_jax.compile.topology import describe
from polyglot_jax.config import Config, InputError
from polyglot_jax.hardware import PEAK_BF16, Chip, step_flops
from polyglot_jax.program import Program

EFFICIENCY = 0.5
"""Share of the peak that custom kernels are taken to reach on the products they do."""


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes on one chip, as the compiler allots them."""

    arguments: int
    outputs: int
    aliased: int
    temporaries: int
    code: int

    @property
    def total(self) -> int:
        """Outputs that take the place of arguments counted once."""
        return self.arguments + self.outputs - self.aliased + self.temporaries + self.code


@dataclasses.dataclass(frozen=True)
class Estimate:
    """What is known of a training step on `topology` before it ever ran."""

    config: Config
    topology: str
    chip: Chip
    chips: int
    attention: str
    memory: Memory
    cost: Cost
    compile_seconds: float

    @property
    def fits(self) -> bool:
        return self.memory.total <= self.chip.memory

    def mfu(self, with_attention: bool) -> float:
        flops = step_flops(self.config, with_attention)
        return flops / (self.cost.step * self.chips * PEAK_BF16[self.chip.kind])

    def to_json(self) -> str:
        cost, tokens = self.cost, self.config.train.batch_size * self.config.train.sequence_length
        values: dict[str, Any] = {
            "what": "an estimate from the compiled program, not a measurement",
            "topology": self.topology,
            "chips": self.chips,
            "attention": self.attention,
            "kernel_efficiency": EFFICIENCY,
            "memory": dataclasses.asdict(self.memory) | {"total": self.memory.total, "free_on_chip": self.chip.memory},
            "fits": self.fits,
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
            "collectives": [dataclasses.asdict(collective) for collective in cost.collectives],
            "config": dataclasses.asdict(self.config),
        }
        return json.dumps(values, indent=1) + "\n"

    def __str__(self) -> str:
        config, train, cost, memory = self.config, self.config.train, self.cost, self.memory
        gib, ms = (lambda size: f"{size / 2**30:.2f} GiB"), (lambda seconds: f"{seconds * 1e3:.1f} ms")
        mesh = " x ".join(f"{name} {size}" for name, size in dataclasses.asdict(config.mesh).items())
        lines = [
            f"ESTIMATE, not a measurement: one training step compiled for {self.chips} x {self.chip.kind} "
            f"({self.topology}), mesh {mesh}",
            f"  {config.model.parameters():,} parameters, {train.batch_size:,} x {train.sequence_length:,} tokens, "
            f"{train.dtype}, remat {train.remat}, attention {self.attention}",
            f"memory of a chip: {gib(memory.total)} of {gib(self.chip.memory)} that it leaves free: "
            f"{'fits' if self.fits else 'DOES NOT FIT'}",
            f"  arguments {gib(memory.arguments)}, temporaries {gib(memory.temporaries)}, outputs beside them "
            f"{gib(memory.outputs - memory.aliased)}, code {gib(memory.code)}",
            f"step: {ms(cost.step)} = the largest of (computing {ms(cost.busy)}, links {ms(cost.links)}, copies in the "
            f"background {ms(cost.copies)}) + collectives that nothing overlaps {ms(cost.waiting)}",
            f"  computing: {ms(cost.compute)} by the compiler's cycles at {self.chip.clock / 1e9:g} GHz, "
            f"{ms(cost.kernel_seconds)} in custom kernels at {EFFICIENCY:.0%} of the peak, {ms(cost.moved)} by bytes",
            f"  loops: {', '.join(f'{name} x {times}' for name, times in cost.loops.items()) or 'none'}",
        ]
        for kernel in cost.kernels:
            lines.append(f"  {kernel.times:>4} x {kernel.name}: {kernel.flops / 1e9:,.1f} GFLOP, {ms(kernel.seconds)}")
        lines.append(f"collectives, at {self.chip.link / 1e9:g} GB/s a link and direction:")
        for c in sorted(cost.collectives, key=lambda c: -c.times * c.seconds)[:16]:
            lines.append(
                f"  {c.times:>4} x {c.kind} of {c.bytes / 1e6:,.1f} MB over {c.devices}: {c.link_bytes / 1e6:,.2f} MB "
                f"a link, {ms(c.seconds)}, {'overlaps' if c.overlaps else 'waited for'} ({c.source[-60:]})"
            )
        if len(cost.collectives) > 16:
            lines.append(f"  ... {len(cost.collectives) - 16} smaller ones (--json has them)")
        tokens = train.batch_size * train.sequence_length
        lines.append(
            f"estimated MFU: {self.mfu(False):.1%} counting 6N, {self.mfu(True):.1%} counting 6N + causal attention; "
            f"{tokens / cost.step:,.0f} tokens/s"
        )
        return "\n".join(lines)


def estimate(config: Config, topology: str, dump_hlo: str | None = None) -> Estimate:
    """Compile the training step of `config` for `topology` and cost it. InputError where that cannot be done."""
    chip, devices = describe(topology)
    mesh = sharding.make_mesh(config.mesh, devices)
    sharding.check(config, mesh)
    sizes = dataclasses.replace(config.mesh, **{name: mesh.shape[name] for name in mesh.shape})
    program, start = Program.make(config, mesh), time.perf_counter()
    try:
        with jax.set_mesh(mesh):
            compiled = program.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise InputError(
            f"does not fit into {chip.memory / 2**30:.2f} GiB a chip; the compiler says: {error}"
        ) from error
    seconds, text = time.perf_counter() - start, compiled.as_text()
    if dump_hlo:
        Path(dump_hlo).write_text(text, encoding="utf-8")
    places = [device.coords for device in mesh.devices.flat]
    estimator = Estimator(hlo.parse(text), chip, PEAK_BF16[chip.kind], places, kernel_flops, EFFICIENCY)
    found = compiled.memory_analysis()
    memory = Memory(
        found.argument_size_in_bytes,
        found.output_size_in_bytes,
        found.alias_size_in_bytes,
        found.temp_size_in_bytes,
        found.generated_code_size_in_bytes,
    )
    config = dataclasses.replace(config, mesh=sizes)
    return Estimate(config, topology, chip, mesh.size, program.model.attention, memory, estimator.cost(), seconds)


def compile_step(config: Config, topology: str, dump_hlo: str | None, json_file: str | None) -> None:
    """Print the estimate; InputError at the end if the step does not fit."""
    found = estimate(config, topology, dump_hlo)
    print(found)
    if json_file:
        Path(json_file).write_text(found.to_json(), encoding="utf-8")
    if not found.fits:
        raise InputError(
            f"does not fit: {found.memory.total / 2**30:.2f} GiB a chip of {found.chip.memory / 2**30:.2f}; try more "
            f"--mesh.fsdp or --mesh.tensor, --train.accumulate, a smaller --train.batch-size, or --train.remat full"
        )
