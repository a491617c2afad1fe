"""Reads the text of a compiled program (HLO): computations, instructions, how often a loop runs.

Only what an estimate needs is read: names, opcodes, shapes, operands, and the attributes as text.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import NamedTuple

from polyglot_jax.config import InputError

_BITS = {"pred": 8, "token": 0, "opaque": 0, "c64": 64, "c128": 128}
_ARRAY = re.compile(r"\b([a-z]+[0-9]*[a-z0-9]*)\[([0-9,]*)\](?:\{([0-9,]*)(?::([^}]*))?\})?")
_TILE = re.compile(r"\bT\(([0-9,]+)\)")
_SPACE = re.compile(r"\bS\(([0-9]+)\)")
_HEADER = re.compile(r"^(ENTRY )?%?([\w.-]+) .*\{$")
_INSTRUCTION = re.compile(r"^ +(ROOT )?%?([\w.-]+) = ")
_OPCODE = re.compile(r" *([a-z][\w-]*)\(")
_CALLED = re.compile(r"\b(calls|body|condition|to_apply|branch_computations|true_computation|false_computation)="
                     r"(\{[^}]*\}|%?[\w.-]+)")  # fmt: skip


class Shape(NamedTuple):
    """Of an array. order: its dimensions from the one that varies fastest; tile: what the first of them, the slowest of
    these first, are filled up to in memory; space: 0 is the device's main memory, others are on the chip."""

    dtype: str
    dims: tuple[int, ...]
    order: tuple[int, ...] = ()
    tile: tuple[int, ...] = ()
    space: int = 0

    @classmethod
    def of(cls, dtype: str, dims: str, order: str, layout: str) -> Shape:
        """From the parts of s32[8,128]{1,0:T(8,128)S(1)}."""
        tile, space = _TILE.search(layout), _SPACE.search(layout)
        return cls(dtype, _integers(dims), _integers(order), _integers(tile[1] if tile else ""),
                   int(space[1]) if space else 0)  # fmt: skip

    @property
    def bytes(self) -> int:
        return -(-math.prod(self.dims) * self._bits // 8)

    @property
    def held(self) -> int:
        """Bytes with what fills tiles up."""
        dims = list(self.dims)
        for size, place in zip(reversed(self.tile), self.order, strict=False):
            dims[place] = -(-dims[place] // size) * size
        return -(-math.prod(dims) * self._bits // 8)

    @property
    def _bits(self) -> int:
        return _BITS.get(self.dtype) or int(re.match(r"[a-z]+([0-9]+)|$", self.dtype)[1] or 0)


@dataclass(frozen=True)
class Instruction:
    """One line. shapes: of its result, a tuple's flattened. operands: names, or the text of a constant or parameter."""

    name: str
    opcode: str
    shapes: tuple[Shape, ...]
    operands: tuple[str, ...]
    attributes: str

    @property
    def bytes(self) -> int:
        """Of the result."""
        return sum(shape.bytes for shape in self.shapes)

    @property
    def cycles(self) -> int | None:
        """What the compiler estimates this instruction takes; None where it estimates nothing."""
        found = re.search(r'"estimated_cycles":"(\d+)"', self.attributes)
        return int(found[1]) if found else None

    @property
    def op_name(self) -> str:
        """Where in the traced program it comes from."""
        found = re.search(r'op_name="([^"]*)"', self.attributes)
        return found[1] if found else ""

    def attribute(self, name: str) -> str | None:
        """Of the form name=word or name="word"."""
        found = re.search(rf'\b{name}="?([\w.-]+)', self.attributes)
        return found[1] if found else None

    def called(self, *kinds: str) -> list[str]:
        """Names of the computations it calls as one of `kinds` (calls, body, ...)."""
        names = []
        for kind, value in _CALLED.findall(self.attributes):
            if kind in kinds:
                names += [name.strip(" %") for name in value.strip("{}").split(",")]
        return names


@dataclass(frozen=True)
class Computation:
    name: str
    instructions: dict[str, Instruction]
    root: str

    def source(self, name: str) -> Instruction:
        """The instruction that makes the value of `name`: looks through what only passes it on."""
        found = self.instructions[name]
        while found.opcode in (
            "copy",
            "bitcast",
            "convert",
            "reshape",
            "copy-done",
            "copy-start",
            "optimization-barrier",
        ):
            found = self.instructions[found.operands[0]]
        return found

    def operand_bytes(self, instruction: Instruction) -> int:
        return sum(self.instructions[name].bytes for name in instruction.operands if name in self.instructions)


@dataclass(frozen=True)
class Program:
    entry: str
    computations: dict[str, Computation]


def parse(text: str) -> Program:
    """The text of `jax.stages.Compiled.as_text()`; InputError if it is no HLO."""
    computations: dict[str, Computation] = {}
    entry, name, root, lines = "", "", "", {}
    for line in text.splitlines():
        if header := _HEADER.match(line):
            name, root, lines = header[2], "", {}
            entry = name if header[1] else entry
        elif line == "}":
            computations[name] = Computation(name, lines, root)
        elif found := _INSTRUCTION.match(line):
            lines[found[2]] = _instruction(found[2], line[found.end() :])
            root = found[2] if found[1] else root
    if not entry:
        raise InputError("the compiled text has no ENTRY computation: not HLO as this version of JAX prints it")
    return Program(entry, computations)


def _instruction(name: str, rest: str) -> Instruction:
    end = _closing(rest, 0) if rest.startswith("(") else rest.index(" ")
    opcode = _OPCODE.match(rest, end)
    if opcode is None:
        raise InputError(f"the compiled text has an instruction that cannot be read: %{name} = {rest[:80]}")
    close = _closing(rest, opcode.end() - 1)
    operands = re.sub(r"/\*.*?\*/", "", rest[opcode.end() : close - 1])
    words = tuple(word.split()[-1].lstrip("%") for word in _split(operands) if word.strip())
    shapes = tuple(Shape.of(*found) for found in _ARRAY.findall(rest[:end]))
    return Instruction(name, opcode[1], shapes, words, rest[close:])


def _integers(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in text.split(",") if number)


def _closing(text: str, start: int) -> int:
    """The place after the parenthesis that closes the one at `start`."""
    depth = 0
    for place in range(start, len(text)):
        depth += {"(": 1, ")": -1}.get(text[place], 0)
        if depth == 0:
            return place + 1
    raise InputError(f"the compiled text has a parenthesis that is never closed: {text[:80]}")


def _split(operands: str) -> list[str]:
    """Operands apart, where shapes may stand before names: commas inside brackets do not count."""
    parts, depth, start = [], 0, 0
    for place, letter in enumerate(operands):
        depth += (letter in "([{") - (letter in ")]}")
        if letter == "," and depth == 0:
            parts.append(operands[start:place])
            start = place + 1
    return [*parts, operands[start:]]


def trip_count(program: Program, scope: Computation, loop: Instruction) -> int:
    """How often a `while` of `scope` runs, from its condition, its start and its step; InputError if they do not tell.

    Loops of `lax.scan` and `fori_loop` count an integer from a constant by a constant up to a constant.
    """
    condition, body = (program.computations[loop.called(kind)[0]] for kind in ("condition", "body"))

    def refuse(why: str) -> InputError:
        return InputError(f"the compiled loop %{loop.name}: {why}, so how often it runs cannot be told")

    test = condition.instructions[condition.root]
    inside, names = condition, None
    if test.opcode == "fusion":  # the comparison of two of the fusion's operands
        inside, names = program.computations[test.called("calls")[0]], test.operands
        test = inside.instructions[inside.root]
    if test.opcode != "compare":
        raise refuse("its condition is no comparison")

    def resolve(name: str) -> Instruction:
        found = inside.source(name)
        return condition.source(names[int(found.operands[0])]) if names and found.opcode == "parameter" else found

    def element(name: str) -> int | None:
        """The loop's element that a side of the comparison is, None for a constant."""
        found = resolve(name)
        return int(found.attribute("index")) if found.opcode == "get-tuple-element" else None

    def start_of(index: int) -> int:
        source = scope.source(loop.operands[0])
        value = scope.source(source.operands[index]) if source.opcode == "tuple" else source
        return constant(value, f"element {index} of what it starts with")

    def constant(found: Instruction, what: str) -> int:
        if found.opcode != "constant" or not re.fullmatch(r"-?\d+", found.operands[0]):
            raise refuse(f"{what} is a {found.opcode}, no integer constant")
        return int(found.operands[0])

    def step_of(index: int) -> int | None:
        """What the body adds to an element; 0 if it passes it on; None if anything else."""
        value = body.source(body.instructions[body.root].operands[index])
        if value.opcode == "get-tuple-element":
            return 0 if int(value.attribute("index")) == index else None
        inner, arguments = body, None
        if value.opcode == "fusion":
            inner, arguments = program.computations[value.called("calls")[0]], value.operands
            value = inner.source(inner.root)
        if value.opcode != "add":
            return None
        sides = [inner.source(name) for name in value.operands]
        if arguments:
            sides = [body.source(arguments[int(s.operands[0])]) if s.opcode == "parameter" else s for s in sides]
        counters = [s for s in sides if s.opcode == "get-tuple-element" and s.attribute("index") == str(index)]
        constants = [s for s in sides if s.opcode == "constant"]
        return constant(constants[0], "its step") if len(counters) == len(constants) == 1 else None

    direction = test.attribute("direction")
    left, right = test.operands
    if direction in ("GT", "GE"):
        left, right, direction = right, left, {"GT": "LT", "GE": "LE"}[direction]
    counter, limit = element(left), element(right)
    if counter is None or direction not in ("LT", "LE"):
        raise refuse(f"its condition is not of the form counter < limit (direction {direction})")
    if limit is not None and step_of(limit) != 0:
        raise refuse("its limit changes while it runs")
    last = constant(resolve(right), "its limit") if limit is None else start_of(limit)
    step = step_of(counter)
    if not step or step < 0:
        raise refuse("its counter does not grow by a constant")
    return max(0, -(-(last + (direction == "LE") - start_of(counter)) // step))
