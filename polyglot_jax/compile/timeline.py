"""How long a program takes in the order it was scheduled, where memory may be what it waits for.

A step of training is products, and what it copies hides behind them. A decode step is reading: each weight, for a
few rows. So memory is a queue of its own here, beside computing. A copy in the background takes its bytes' time in that
queue from when it starts, and what needs it waits for its end; an instruction that reads memory itself is over when
both its cycles and its bytes are. Every byte passes the queue, so no estimate is quicker than memory.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from polyglot_jax.compile.cost import FREE, FREE_CALLS, Collective, Estimator
from polyglot_jax.compile.hlo import Computation, Instruction, Program, trip_count

LAUNCH = 1.22e-6
"""Seconds of an instruction whose cycles the compiler does not tell: what it says of its smallest fusions."""

# Bytes of a result up to which such an instruction is one of the scalar unit's.
_SCALARS = 4096
# What reads of its first operand only as much as it makes; what changes of it only as much as the operand named holds.
_CUTS, _CHANGES = ("dynamic-slice", "gather", "slice"), {"dynamic-update-slice": 1, "scatter": 2}


@dataclass
class Times:
    """Of one run, in seconds.

    now: when it is over; memory: when the queue is empty; computing, exchanging (collectives), waiting (for memory):
    what they add up to. traffic: bytes from and to memory.
    """

    now: float = 0.0
    memory: float = 0.0
    computing: float = 0.0
    exchanging: float = 0.0
    waiting: float = 0.0
    traffic: int = 0
    collectives: list[Collective] = field(default_factory=list)

    @property
    def end(self) -> float:
        return max(self.now, self.memory)


class Timeline:
    """Runs a program's computations on one chip's clocks. estimator: what an instruction costs by itself.

    branch: min or max, which of a conditional's branches is taken, by time.
    """

    def __init__(self, program: Program, estimator: Estimator, bandwidth: float, branch: Callable[..., Any] = max):
        self._program, self._estimator, self._bandwidth, self._branch = program, estimator, bandwidth, branch

    def run(self, *names: str, without: str | None = None) -> Times:
        """Computations one after the other. without: an instruction that is left out."""
        times = Times()
        for name in names:
            self._computation(name, times, without)
        return times

    def _computation(self, name: str, times: Times, without: str | None = None) -> None:
        scope, landed = self._program.computations[name], {}
        for it in scope.instructions.values():
            if it.name == without:
                continue
            if it.opcode == "while":
                once = self.run(*(it.called(kind)[0] for kind in ("condition", "body")))
                _add(times, once, trip_count(self._program, scope, it))
            elif it.opcode == "conditional":
                kinds = ("branch_computations", "true_computation", "false_computation")
                _add(times, self._branch(map(self.run, it.called(*kinds)), key=lambda branch: branch.end), 1)
            elif it.opcode == "call":
                self._computation(it.called("to_apply", "calls")[0], times)
            elif it.opcode in ("copy-start", "slice-start"):
                landed[it.name] = self._read(times, _copied(it))
            elif it.opcode in ("copy-done", "slice-done"):
                _wait(times, landed[it.operands[0]])
            elif it.opcode not in FREE and it.attribute("custom_call_target") not in FREE_CALLS:
                self._instruction(scope, it, times)

    def _instruction(self, scope: Computation, it: Instruction, times: Times) -> None:
        cost = self._estimator.instruction(scope, it, 1)
        seconds = cost.compute + cost.kernel_seconds
        if it.cycles is None and not cost.collectives and not cost.kernels and it.bytes > _SCALARS:
            seconds = LAUNCH
        done = self._read(times, self.touched(scope, it))
        times.computing += seconds
        times.now += seconds
        _wait(times, done)
        for collective in cost.collectives:  # as if none overlapped with computing; what is copied meanwhile does
            times.exchanging += collective.seconds
            times.now += collective.seconds
        times.collectives += cost.collectives

    def _read(self, times: Times, size: int) -> float:
        """When `size` bytes, asked for now, have passed."""
        if not size:
            return times.now
        times.traffic += size
        times.memory = max(times.memory, times.now) + size / self._bandwidth
        return times.memory

    def touched(self, scope: Computation, it: Instruction) -> int:
        """Bytes of main memory that an instruction reads and writes."""
        operands = [scope.instructions.get(name) for name in it.operands]
        total = sum(
            self._of_operand(scope, it, place, operand.shapes[0].held)
            for place, operand in enumerate(operands)
            if operand is not None and operand.shapes and operand.shapes[0].space == 0
        )
        inner, root = scope, it
        while root.opcode == "fusion":
            inner = self._program.computations[root.called("calls")[0]]
            root = inner.source(inner.root)
        made = [inner.source(name) for name in root.operands] if root.opcode == "tuple" else [root]
        for shape, maker in zip(it.shapes, made, strict=False):
            if shape.space == 0:
                place = _CHANGES.get(maker.opcode)
                total += inner.instructions[maker.operands[place]].shapes[0].held if place else shape.held
        return total

    def _of_operand(self, scope: Computation, user: Instruction, place: int, size: int) -> int:
        """Bytes that `user` reads of its operand at `place`, which has `size`."""
        if place == 0 and user.opcode in _CUTS:
            return min(size, user.shapes[0].held)
        if place == 0 and user.opcode in _CHANGES:
            return 0
        if user.opcode == "bitcast":
            return self._of_value(scope, user.name, size)
        if user.opcode == "fusion":
            inner = self._program.computations[user.called("calls")[0]]
            inside = (i for i in inner.instructions.values() if i.opcode == "parameter" and i.operands == (str(place),))
            return self._of_value(inner, next(inside).name, size)
        return size

    def _of_value(self, scope: Computation, name: str, size: int) -> int:
        """Bytes that are read of a value of `size` by those who use it in a fusion."""
        if name == scope.root:
            return size
        users = [
            (it, place) for it in scope.instructions.values() for place, used in enumerate(it.operands) if used == name
        ]
        return min(size, sum(self._of_operand(scope, it, place, size) for it, place in users))


def _wait(times: Times, until: float) -> None:
    times.waiting += max(0.0, until - times.now)
    times.now = max(times.now, until)


def _copied(it: Instruction) -> int:
    """Bytes of main memory that a copy in the background passes: read, written or both."""
    if it.opcode == "slice-start":  # of the part, not of the whole that it is cut from
        return it.shapes[1].held * sum(shape.space == 0 for shape in it.shapes[:2])
    return it.shapes[0].held * sum(shape.space == 0 for shape in it.shapes[:2])


def _add(times: Times, run: Times, count: int) -> None:
    """`run`, `count` times over, after all that is there."""
    start = times.end if run.traffic else times.now
    times.now = start + count * run.end
    times.memory = max(times.memory, times.now if run.traffic else 0.0)
    times.computing += count * run.computing
    times.exchanging += count * run.exchanging
    times.waiting += count * run.waiting
    times.traffic += count * run.traffic
    times.collectives += [dataclasses.replace(c, times=c.times * count) for c in run.collectives]
