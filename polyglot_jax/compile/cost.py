"""What a compiled program costs: the compiler's cycles, custom kernels by their products, collectives by their bytes.

The compiler estimates each of its own instructions, once, and counts custom kernels and collectives as nothing. Here
loops are multiplied out, kernels cost the products they do at a stated efficiency, and collectives the time of their
bytes on the links. What cannot be costed is an error.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from polyglot_jax.compile.hlo import Computation, Instruction, Program, Shape, trip_count
from polyglot_jax.config import InputError
from polyglot_jax.hardware import Chip

_COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute",
                "collective-broadcast")  # fmt: skip
# These make no work of their own, or none but what the instruction that ends them is waited for.
FREE = {
    "parameter", "constant", "get-tuple-element", "tuple", "bitcast", "after-all", "partition-id", "replica-id",
    "domain", "add-dependency", "optimization-barrier", "copy-done", "slice-done", "async-done", "send", "send-done",
    "recv", "recv-done",
} | {f"{kind}-done" for kind in _COLLECTIVES}  # fmt: skip
FREE_CALLS = {
    "AllocateBuffer", "AssumeGatherIndicesInBound", "AsyncCollectiveDone", "AsyncCollectiveStart", "ConcatBitcast",
    "GatherScatterIndicesBitpacked", "Sharding", "SliceId", "SPMDFullToShardShape", "SPMDShardToFullShape", "ZeroCrop",
}  # fmt: skip
HOP = 1e-6
"""Seconds from a chip to its neighbour, however little is sent: assumed, of the order published for TPUs."""
# What tells a transfer to other slices from another; a send and its recv have the same.
_RENDEZVOUS = "_xla_host_transfer_rendezvous"


@dataclass(frozen=True)
class Kernel:
    """A custom kernel, run `times` times: the FLOPs of its products, and seconds at the efficiency given, each."""

    name: str
    times: int
    flops: int
    seconds: float


@dataclass(frozen=True)
class Collective:
    """A collective, run `times` times. bytes: what it makes (all-gather) or takes; link_bytes: on its busiest link.

    covered: seconds of it that go by while the chip computes what is scheduled meanwhile.
    """

    name: str
    kind: str
    source: str
    times: int
    bytes: int
    devices: int
    link_bytes: float
    seconds: float
    overlaps: bool
    covered: float = 0.0


@dataclass
class Cost:
    """Of one step on one chip, in seconds.

    compute: what the compiler estimates, through loops; moved: instructions it does not estimate, by their bytes from
    and to memory; copies: copies in the background, by their bytes.
    """

    compute: float = 0.0
    moved: float = 0.0
    copies: float = 0.0
    kernels: list[Kernel] = field(default_factory=list)
    collectives: list[Collective] = field(default_factory=list)
    loops: dict[str, int] = field(default_factory=dict)

    @property
    def kernel_seconds(self) -> float:
        return sum(kernel.times * kernel.seconds for kernel in self.kernels)

    @property
    def busy(self) -> float:
        """The chip computes."""
        return self.compute + self.moved + self.kernel_seconds

    @property
    def links(self) -> float:
        """Collectives that overlap with computing, as if all used the same links."""
        return sum(c.times * c.seconds for c in self.collectives if c.overlaps)

    @property
    def waiting(self) -> float:
        """Collectives during which nothing else happens."""
        return sum(c.times * (c.seconds - c.covered) for c in self.collectives if not c.overlaps)

    @property
    def step(self) -> float:
        return max(self.busy, self.links, self.copies) + self.waiting

    def add(self, other: Cost) -> None:
        for each in dataclasses.fields(self):
            mine, theirs = getattr(self, each.name), getattr(other, each.name)
            setattr(self, each.name, mine | theirs if isinstance(mine, dict) else mine + theirs)


class Estimator:
    """Walks a program for one chip.

    coordinates: of each device of a slice on the torus, in the order of the program's partitions. slices: how many
    there are; what they exchange is, in the program, sent to the host. kernel_flops: (name, shape of the queries) ->
    FLOPs, None for a kernel it does not know.
    """

    def __init__(
        self,
        program: Program,
        chip: Chip,
        peak: float,
        coordinates: Sequence[Sequence[int]],
        kernel_flops: Callable[[str, tuple[int, ...]], int | None],
        efficiency: float,
        slices: int = 1,
    ):
        self._program, self._chip, self._peak, self._slices = program, chip, peak, slices
        self._coordinates = np.array([list(place) for place in coordinates])
        self._torus = self._coordinates.max(0) + 1
        self._kernel_flops, self._efficiency = kernel_flops, efficiency
        self._chains: set[tuple[str, str]] = set()

    def cost(self) -> Cost:
        return self._computation(self._program.entry, 1)

    def _computation(self, name: str, times: int) -> Cost:
        computation, cost = self._program.computations[name], Cost()
        sent: dict[str | None, float] = {}
        covering = 0.0  # transfers share one network, so computing covers one of them at a time
        for it in computation.instructions.values():
            if it.opcode == "send":
                sent[it.attribute(_RENDEZVOUS)] = cost.busy
            elif it.opcode == "recv-done":
                received = computation.instructions[it.operands[0]]
                covering = max(covering, sent[received.attribute(_RENDEZVOUS)])
                found = self._between_slices(received, times, (cost.busy - covering) / times)
                covering += times * found.covered
                cost.collectives.append(found)
            cost.add(self.instruction(computation, it, times))
        return cost

    def _between_slices(self, it: Instruction, times: int, meanwhile: float) -> Collective:
        """An all-reduce over the slices: each chip's share is reduced and gathered through its host's network."""
        kind, size = it.attribute("_xla_megascale_transfer_type"), it.shapes[0].bytes
        if kind != "ALL_REDUCE":
            raise InputError(f"%{it.name}: a transfer of kind {kind}, which is not known and so cannot be estimated")
        passed = 2 * size * (self._slices - 1) / self._slices
        seconds = passed / self._chip.network
        return Collective(it.name, "all-reduce between slices", it.op_name, times, size, self._slices, passed, seconds,
                          overlaps=False, covered=min(seconds, meanwhile))  # fmt: skip

    def instruction(self, scope: Computation, it: Instruction, times: int) -> Cost:
        if it.opcode == "while":
            trips = trip_count(self._program, scope, it)
            cost = Cost(loops={it.name: trips})
            for kind in ("condition", "body"):
                cost.add(self._computation(it.called(kind)[0], times * trips))
            return cost
        if it.opcode == "call":
            return self._computation(it.called("to_apply", "calls")[0], times)
        if it.opcode == "conditional":
            branches = it.called("branch_computations", "true_computation", "false_computation")
            return max((self._computation(branch, times) for branch in branches), key=lambda cost: cost.step)
        parts = list(self._parts(scope, it))
        found = [self._collective(body, part, times, it) for body, part in parts if _kind(part) is not None]
        cost = Cost(collectives=[collective for collective in found if collective is not None])
        cost.kernels = [self._kernel(body, part, times) for body, part in parts if _is_kernel(part)]
        if it.opcode in ("copy-start", "slice-start"):
            cost.copies = times * 2 * min(shape.bytes for shape in it.shapes[:2]) / self._chip.bandwidth
        elif it.cycles is not None and not _is_kernel(it):
            cost.compute = times * it.cycles / self._chip.clock
        elif not found and not cost.kernels and it.opcode not in FREE and it.opcode != "custom-call":
            cost.moved = times * (it.bytes + scope.operand_bytes(it)) / self._chip.bandwidth
        return cost

    def _parts(self, scope: Computation, it: Instruction) -> Iterator[tuple[Computation, Instruction]]:
        """An instruction and, of a fusion or of one that only starts others, all that it holds, each with its scope."""
        yield scope, it
        for name in it.called("calls", *["to_apply"] * (it.opcode == "call")):  # of others, what sums two numbers
            body = self._program.computations[name]
            for part in body.instructions.values():
                if part.opcode in ("while", "conditional"):
                    raise InputError(f"%{it.name}: holds a {part.opcode}, %{part.name}, that cannot be estimated there")
                yield from self._parts(body, part)

    def _kernel(self, scope: Computation, it: Instruction, times: int) -> Kernel:
        shapes = [shape for name in it.operands for shape in scope.instructions[name].shapes]
        # What comes before them are tables of blocks, integers; a batch of one row has lost its axis.
        queries = next((s.dims for s in shapes if "f" in s.dtype and len(s.dims) >= 3), ())
        flops = self._kernel_flops(it.name, queries)
        if flops is None:
            raise InputError(
                f"%{it.name}: custom call to {it.attribute('custom_call_target')} ({it.op_name or 'no source'}), whose "
                "products are not known, so that the step cannot be estimated; use another kernel (--train.attention)"
            )
        return Kernel(it.name, times, flops, flops / (self._peak * self._efficiency))

    def _collective(self, scope: Computation, it: Instruction, times: int, outer: Instruction) -> Collective | None:
        """What a collective costs; None for a fusion that another one's progress is woven into."""
        kind, overlaps = _kind(it), it.opcode.endswith("-start")
        chain = re.search(r'chain_id="(\d+)"', it.attributes)
        if it is not outer and chain:  # started in one fusion, carried on in others, ended in one
            targets = {i.attribute("custom_call_target") for i in scope.instructions.values()}
            if "AsyncCollectiveStart" not in targets:
                if chain[1] not in self._chains:
                    raise InputError(f"%{it.name}: goes on with a collective that was not started")
                return None
            self._chains.add(chain[1])
            overlaps = True
        if kind == "all-reduce" and it is not outer and "all-reduce-scatter" in scope.name:
            kind = "reduce-scatter"
        operands = sum(Shape(s.dtype, s.dims).bytes for name in it.operands for s in scope.instructions[name].shapes)
        made = it.bytes - operands if it.opcode.endswith("-start") else it.bytes
        size = made if kind == "all-gather" else operands
        groups = replica_groups(it, len(self._coordinates))
        link_bytes = self._on_busiest_link(kind, size, groups)
        seconds = max(link_bytes / self._chip.link, self._hops(kind, groups) * HOP)
        return Collective(it.name, kind, it.op_name, times, size, groups.shape[1], link_bytes, seconds, overlaps)

    def _hops(self, kind: str, groups: np.ndarray) -> int:
        """Links passed one after the other: along each axis to the chip farthest off; for a sum, there and back."""
        if kind == "collective-permute":
            return 1
        far = 0
        for axis, places in self._spanned(groups).items():
            far += self._torus[axis] // 2 if self._is_ring(axis, places) else places[-1] - places[0]
        return int(far) * (2 if kind == "all-reduce" else 1)

    def _on_busiest_link(self, kind: str, size: int, groups: np.ndarray) -> float:
        """Bytes that the busiest link carries in one direction.

        A group that spans axes of the torus uses all their links: two a chip and axis on a ring, one on a line, less
        where other groups lie over the same. A ring passes (n - 1)/n of the data by each chip; an all-reduce does so
        twice; an all-to-all goes a quarter of the group far along each axis. A permute is costed as one hop.
        """
        if kind == "collective-permute":
            return float(size)
        n, spanned = groups.shape[1], self._spanned(groups)
        if not spanned:
            return 0.0
        links = {axis: (1 + self._is_ring(axis, at)) / self._sharing(axis, groups) for axis, at in spanned.items()}
        if kind == "all-to-all":
            return size * max(len(places) / 4 / links[axis] for axis, places in spanned.items())
        return (2.0 if kind == "all-reduce" else 1.0) * size * (n - 1) / n / sum(links.values())

    def _spanned(self, groups: np.ndarray) -> dict[int, np.ndarray]:
        """The axes of the torus that a group spans, with the places it has on each."""
        places = map(np.unique, self._coordinates[groups[0]].T)
        return {axis: found for axis, found in enumerate(places) if len(found) > 1}

    def _is_ring(self, axis: int, places: np.ndarray) -> bool:
        """The axis is closed, and the way round from a group's last place to its first no longer than inside it."""
        length = self._torus[axis]
        return bool(length % self._chip.wraps == 0 and places[0] + length - places[-1] <= np.diff(places).max())

    def _sharing(self, axis: int, groups: np.ndarray) -> int:
        """How many groups lie over the same link of an axis, at most: those interleaved share what it carries."""
        places = self._coordinates[groups]  # [groups, devices of a group, axes]
        here = np.delete(places == places[0, 0], axis, -1).all(-1)  # on one line of links
        first = np.where(here, places[..., axis], self._torus[axis]).min(1)
        last = np.where(here, places[..., axis], -1).max(1)
        links = np.arange(self._torus[axis])[:, None]
        return max(1, ((first <= links) & (links < last)).sum(1).max())


def collectives(program: Program, devices: int, slices: int = 1) -> list[Collective]:
    """Those of a program of `devices` devices, whatever these are; what they take is not told.

    slices: for how many slices there is such a program, as the TPU compiler makes them.
    """
    fast = Chip("any", math.inf, 0, math.inf, math.inf, 1, math.inf, ())
    places = [(number,) for number in range(devices)]
    return Estimator(program, fast, math.inf, places, lambda *_: 0, 1.0, slices).cost().collectives


def _is_kernel(it: Instruction) -> bool:
    return it.opcode == "custom-call" and it.attribute("custom_call_target") not in FREE_CALLS


def _kind(it: Instruction) -> str | None:
    name = it.opcode.removesuffix("-start")
    return name if name in _COLLECTIVES else None


def replica_groups(it: Instruction, devices: int) -> np.ndarray:
    """int[groups, devices of a group] from the ways HLO writes them; InputError for another."""
    text, found = it.attributes, None
    if found := re.search(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\((.*?)\))? \{([^}:]*)\}", text):
        axes = re.findall(r"'([^']+)'=(\d+)", found[1])
        names, sizes = [name for name, _ in axes], [int(size) for _, size in axes]
        inside = [names.index(name) for name in re.findall(r"'([^']+)'", found[3])]
        outside = [place for place in range(len(names)) if place not in inside]
        ids = _iota(found[2] or f"[{math.prod(sizes)}]").reshape(sizes).transpose(outside + inside)
        return ids.reshape(-1, math.prod(sizes[place] for place in inside))
    if found := re.search(r"replica_groups=\[([\d,]+)\]<=(\[[\d,]+\](?:T\([\d,]+\))?)", text):
        return _iota(found[2]).reshape(_integers(found[1]))
    if found := re.search(r"(?:replica_groups|source_target_pairs)=\{((?:\{[\d,]*\},?)*)\}", text):
        groups = [_integers(group) for group in re.findall(r"\{([\d,]+)\}", found[1])]
        return np.array(groups or [list(range(devices))])
    raise InputError(f"%{it.name}: its devices cannot be read: {text[:120]}")


def _iota(text: str) -> np.ndarray:
    """[2,4]T(1,0): 0 to 7 as a matrix of 2 x 4, transposed; 0,2,1,3: as it stands."""
    found = re.fullmatch(r"\[([\d,]+)\](?:T\(([\d,]+)\)?)?", text)
    if found is None:
        return np.array(_integers(text))
    sizes = _integers(found[1])
    ids = np.arange(math.prod(sizes)).reshape(sizes)
    return ids.transpose(_integers(found[2])) if found[2] else ids


def _integers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]
