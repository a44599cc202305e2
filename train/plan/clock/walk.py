"""Walks a scheduled HLO module, and sums the seconds, FLOPs and bytes of each group of work.

The compiler writes the cycles that it expects of an instruction into the HLO; `while` bodies count
by their trips. An asynchronous collective runs beside what stands between its start and its done:
until then it is *in flight*. A *tally* has the costs of a computation that runs once.
"""

import functools
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from lora_jax.models.decoder.dispatch import UNEVEN
from train.plan.clock.groups import (
    AFTER,
    COLLECTIVES,
    COPIES,
    Group,
    group_of,
    phase_of,
    scope_of,
)
from train.plan.clock.traffic import Traffic, moved_between_memories, traffic_of
from train.plan.hlo.collectives import COLLECTIVES as KINDS_SENT
from train.plan.hlo.collectives import LATER_PARTS, collective_kind, sent_bytes
from train.plan.hlo.kernels import FLOPS_PER_CYCLE, KernelCall, kernel_flops, kernel_of
from train.plan.hlo.module import (
    PARSE_ERRORS,
    Computation,
    HloModule,
    Instruction,
    NotUnderstood,
    is_scalar,
)
from train.plan.hlo.origins import KernelOrigins
from train.plan.hlo.products import is_product, kernel_call, product_flops
from train.plan.hlo.slices import crosses_slices, slice_transfer, transferred_bytes

_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
# Among the instructions without an estimate: a rejection sampler's loop, for example.
LOOP_COUNTED_ONCE = "while (of unknown length, counted once)"
_NO_ESTIMATE = 2**63 - 1
_FREE_OPCODES = {
    "parameter",
    "constant",
    "bitcast",
    "tuple",
    "get-tuple-element",
    "after-all",
    "domain",
}
_FREE_OPCODES |= {"partition-id", "replica-id", "opt-barrier", "add-dependency", "reshape"}
_ALLOCATION_TARGETS = ("AllocateBuffer", "ConcatBitcast")  # custom calls that give arrays memory
_LINKS = Group(COLLECTIVES, AFTER)

SentBytes = Counter[tuple[str, bool]]  # (kind of collective, whether it leaves a slice) -> bytes


class DeviceRates(NamedTuple):
    """The speeds of a device, by which work is converted to seconds.

    Attributes:
      clock: cycles that the compiler counts.
      peak: FLOPs of the matrix units.
      kernel: FLOPs of kernels, whose cycles it does not know; an assumption.
      link: bytes that a device sends in collectives; an assumption.
      memory: bytes that kernels read and write, where these decide; an assumption.
    """

    clock: float
    peak: float
    kernel: float
    link: float
    memory: float


class Cost(NamedTuple):
    """The cost of a group.

    Attributes:
      seconds: time that the group takes, by the rates.
      flops: FLOPs of products and kernels.
      bytes: bytes of operands and results, or those that a device sends in collectives.
      memory: bytes that the device's main memory reads and writes.
    """

    seconds: float = 0.0
    flops: int = 0
    bytes: int = 0
    memory: int = 0

    def plus(self, other: "Cost", times: int = 1) -> "Cost":
        """Returns the sum of this cost and `times` times another cost."""
        return Cost(
            self.seconds + times * other.seconds,
            self.flops + times * other.flops,
            self.bytes + times * other.bytes,
            self.memory + times * other.memory,
        )


class Tally(NamedTuple):
    """The cost of a computation that runs once.

    Attributes:
      costs: the cost of each group.
      seconds: time from beginning to end, with waits for links.
      kernels: seconds of kernels, within the costs.
      links: seconds that the links are busy, waited for or not.
      sent: bytes that a device sends, of each kind of collective.
      unknown: how often a kind of instruction ran whose cycles the HLO does not state.
    """

    costs: dict[Group, Cost]
    seconds: float
    kernels: float
    links: float
    sent: SentBytes
    unknown: Counter[str]


class Walk:
    """A walk over the computations of a module, each of which is counted once."""

    def __init__(
        self,
        module: HloModule,
        rates: DeviceRates | None,
        n_slices: int,
        slices: Sequence[int] = (),
        origins: KernelOrigins | None = None,
    ) -> None:
        """Prepares a walk, which counts no computation yet.

        Args:
          module: the module.
          rates: the rates of a device; without rates, nothing has seconds.
          n_slices: number of TPU slices that exchange data.
          slices: the slice of each device, which tells what leaves one; () where none does.
          origins: the kernels of the module, by which `group_of` finds attention.
        """
        self.module = module
        self.origins = origins
        self.n_slices = n_slices
        self.slices = slices
        self.rates = rates
        self.tally = functools.cache(self._tally)

    def _tally(self, name: str) -> Tally:
        """Returns the tally of a computation, in the order of its schedule."""
        computation = self.module.computations[name]
        timeline = _Timeline()
        for op in computation.values():
            if op.opcode in _FREE_OPCODES:
                continue
            if op.opcode in ("while", "call", "async-start"):
                times = self._iterations(op, timeline) if op.opcode == "while" else 1
                for called in op.called if times else ():
                    timeline.add(self.tally(called), times)
            elif op.opcode == "conditional":
                # Where tokens choose experts evenly, the branch without further turns runs.
                choose = min if UNEVEN in op.op_name else max
                timeline.add(choose(map(self.tally, op.called), key=_branch_cost))
            elif op.opcode in ("send", "recv") and slice_transfer(op.text):
                self._add_slice_transfer(op, computation, timeline)
            else:
                self._add_instruction(op, name, computation, timeline)
        timeline.wait(timeline.links_free)
        return Tally(
            costs=timeline.costs,
            seconds=timeline.now,
            kernels=timeline.kernels,
            links=timeline.links,
            sent=timeline.sent,
            unknown=timeline.unknown,
        )

    def _iterations(self, loop: Instruction, timeline: "_Timeline") -> int:
        """Returns the iterations of a loop.

        Of the loops of unknown length, one over the turns of an uneven choice of experts has none,
        and one without real work has one.

        Raises:
          NotUnderstood: the length is unknown, and the loop has products, kernels or collectives.
        """
        try:
            return self.module.turns(loop)
        except (NotUnderstood, *PARSE_ERRORS):
            if UNEVEN in loop.op_name:
                return 0
            if any(self._is_counted_work(op, body) for op, body in self.module.inside(loop)):
                raise
        timeline.unknown[LOOP_COUNTED_ONCE] += 1
        return 1

    def _is_counted_work(self, op: Instruction, computation: Computation) -> bool:
        """Returns True if an instruction has FLOPs or sends data."""
        is_collective = op.opcode.removesuffix("-start") in KINDS_SENT
        return is_collective or is_product(op) or kernel_call(op, computation) is not None

    def _add_slice_transfer(
        self, op: Instruction, computation: Computation, timeline: "_Timeline"
    ) -> None:
        """Adds the bytes that a send transfers to other slices; a recv adds nothing."""
        transfer = slice_transfer(op.text)
        if transfer is None or op.opcode == "recv":
            return
        if transfer.kind not in KINDS_SENT:
            raise NotUnderstood(f"slices exchange data by the unknown collective {transfer.kind}")
        n_bytes = transferred_bytes(op, transfer, computation, self.n_slices)
        timeline.spend(_LINKS, Cost(bytes=n_bytes))
        timeline.sent[transfer.kind, True] += n_bytes
        timeline.count_unknown(op)

    def _add_instruction(
        self, op: Instruction, name: str, computation: Computation, timeline: "_Timeline"
    ) -> None:
        """Adds an instruction that does not call a scheduled computation.

        Args:
          op: the instruction.
          name: the name of its computation.
          computation: its computation.
          timeline: the state of the walk, to which it is added.
        """
        # A collective occupies the links: its start returns, and any other waits for the arrival.
        sent = self._bytes_sent_by(op, name, computation)
        flight = timeline.flight_of(op, computation)
        if sent:
            timeline.sent.update(sent)
            n_bytes = sent.total()
            arrival = timeline.transfer(n_bytes / self.rates.link if self.rates else 0.0, n_bytes)
            if _starts_collective(op):
                timeline.arrivals[op.name] = arrival
                return
            timeline.wait(arrival)
        # The end of a collective waits for its arrival; a fusion beside it belongs to its flight.
        if flight is not None and _ends_collective(op):
            timeline.wait(timeline.arrivals[flight])
            return
        if flight is not None:
            timeline.flight_of_fusion[op.name] = flight
        has_no_work = (
            _starts_collective(op) or _ends_collective(op) or (sent and op.opcode != "fusion")
        )
        if has_no_work:
            move = moved_between_memories(op)
            if move.memory:
                phase = phase_of(scope_of(self.module, op))
                timeline.spend(Group(COPIES, phase), Cost(memory=move.memory))
            return
        # All other instructions compute: count their time, their FLOPs and their traffic.
        call = kernel_call(op, computation)
        if call:
            self._add_kernel(op, call, computation, timeline)
            return
        traffic = traffic_of(self.module, op, computation)
        flops = 0
        for inner, inner_computation in ((op, computation), *self.module.inside(op)):
            if is_product(inner):
                flops += product_flops(inner, inner_computation)
            # A kernel inside of a fusion takes its own time, beside the cycles of the fusion.
            inner_call = kernel_call(inner, inner_computation)
            if inner_call:
                traffic = traffic.minus(traffic_of(self.module, inner, inner_computation))
                self._add_kernel(inner, inner_call, inner_computation, timeline)
        cost = Cost(
            seconds=self._instruction_seconds(op, timeline),
            flops=flops,
            bytes=traffic.all,
            memory=traffic.memory,
        )
        timeline.spend(group_of(self.module, op, computation, self.origins), cost)

    def _add_kernel(
        self, op: Instruction, call: KernelCall, computation: Computation, timeline: "_Timeline"
    ) -> None:
        """Adds a kernel: the cycles of its schedule, or a share of the peak.

        Args:
          op: the instruction that calls the kernel, in the schedule or inside of a fusion.
          call: its call.
          computation: the computation of the instruction.
          timeline: the state of the walk, to which it is added.
        """
        kernel = kernel_of(call)
        traffic = traffic_of(self.module, op, computation)
        if kernel:
            unread_bytes = kernel.unread(call)
            traffic = traffic.minus(Traffic(unread_bytes, unread_bytes))
        flops = kernel_flops(call)
        seconds = 0.0
        if self.rates:
            if kernel is None:
                timeline.count_unknown(op)
            seconds = flops / self.rates.kernel
            if kernel and kernel.cycles:
                clock = self.rates.clock
                if kernel.fills_units:
                    clock = self.rates.peak / FLOPS_PER_CYCLE
                seconds = max(kernel.cycles(call) / clock, traffic.all / self.rates.memory)
        timeline.kernels += seconds
        cost = Cost(seconds=seconds, flops=flops, bytes=traffic.all, memory=traffic.memory)
        timeline.spend(group_of(self.module, op, computation), cost)

    def _bytes_sent_by(self, op: Instruction, name: str, computation: Computation) -> SentBytes:
        """Returns the bytes that an instruction sends; empty for other than collectives."""
        sent = SentBytes()
        collectives = [
            _PlacedInstruction(op, name, computation, caller=""),
            *self._inner_instructions(op),
        ]
        for placed in collectives:
            kind = collective_kind(placed.op, placed.computation_name, placed.caller)
            if kind:
                n_bytes = sent_bytes(self.module, placed.op, placed.computation, kind)
                sent[kind, crosses_slices(placed.op.text, self.slices)] += n_bytes
        return sent

    def _inner_instructions(self, op: Instruction) -> "list[_PlacedInstruction]":
        """Returns the instructions inside a fusion or an asynchronous computation."""
        if op.opcode not in ("fusion", "async-start"):
            return []
        inside: list[_PlacedInstruction] = []
        for called in op.called:
            computation = self.module.computations[called]
            for inner in computation.values():
                inside.append(_PlacedInstruction(inner, called, computation, caller=op.name))
                inside += self._inner_instructions(inner)
        return inside

    def _instruction_seconds(self, op: Instruction, timeline: "_Timeline") -> float:
        """Returns the seconds of an instruction by the compiler's cycles, without its kernels."""
        if self.rates is None:
            return 0.0
        cycles = _estimated_cycles(self.module, op)
        if cycles is None and op.target not in _ALLOCATION_TARGETS and not is_scalar(op):
            timeline.count_unknown(op)
        return (cycles or 0) / self.rates.clock


class _PlacedInstruction(NamedTuple):
    """An instruction with its computation, and the name of the computation's caller."""

    op: Instruction
    computation_name: str
    computation: Computation
    caller: str


class _Timeline:
    """The state of a walk at one point of a schedule.

    Attributes:
      costs: the cost of each group so far.
      now: seconds since the beginning.
      links_free: when the links have carried all that was sent.
      kernels, links, sent, unknown: see `Tally`.
      arrivals: the name of a collective's start -> when the collective ends.
      flight_of_fusion: a fusion that a collective runs beside -> the start of the collective.
    """

    def __init__(self) -> None:
        """Creates a timeline at second 0 without costs."""
        self.costs: dict[Group, Cost] = {}
        self.now = 0.0
        self.links_free = 0.0
        self.kernels = 0.0
        self.links = 0.0
        self.arrivals: dict[str, float] = {}
        self.flight_of_fusion: dict[str, str] = {}
        self.sent = SentBytes()
        self.unknown = Counter[str]()

    def spend(self, group: Group, cost: Cost, times: int = 1) -> None:
        """Adds a cost to a group, and advances the time by its seconds."""
        self.costs[group] = self.costs.get(group, Cost()).plus(cost, times)
        self.now += times * cost.seconds

    def add(self, tally: Tally, times: int = 1) -> None:
        """Adds a computation that runs `times` times."""
        start = self.now
        for group, cost in tally.costs.items():
            self.spend(group, cost, times)
        # Waits for links make a computation take another time than the sum of its costs.
        self.now = start + times * tally.seconds
        self.kernels += times * tally.kernels
        self.links += times * tally.links
        self.sent.update({key: times * n_bytes for key, n_bytes in tally.sent.items()})
        self.unknown.update({kind: times * count for kind, count in tally.unknown.items()})

    def count_unknown(self, op: Instruction) -> None:
        """Counts an instruction without an estimate, by its name without a number."""
        name = op.name if op.opcode in ("fusion", "custom-call") else op.opcode
        self.unknown[re.sub(r"[.\d]+$", "", name)] += 1

    def transfer(self, seconds: float, n_bytes: int) -> float:
        """Starts a transfer when the links are free, and returns the time of its arrival."""
        self.links += seconds
        self.links_free = max(self.links_free, self.now) + seconds
        self.spend(_LINKS, Cost(bytes=n_bytes))
        return self.links_free

    def wait(self, arrival: float) -> None:
        """Advances the time to the arrival of a transfer."""
        if arrival > self.now:
            self.spend(_LINKS, Cost(seconds=arrival - self.now))

    def flight_of(self, op: Instruction, computation: Computation) -> str | None:
        """Returns the start of the collective that overlaps or ends at an instruction, or None."""
        runs_beside = any(called.startswith(LATER_PARTS) for called in op.called)
        if not (runs_beside or _ends_collective(op)):
            return None
        for name in op.operands:
            start = self._flight_start(name, computation)
            if start:
                return start
        return None

    def _flight_start(self, name: str, computation: Mapping[str, Instruction]) -> str | None:
        """Returns the name of the collective's start that an operand comes from, or None."""
        while computation[name].opcode == "get-tuple-element":
            name = computation[name].operands[0]
        return name if name in self.arrivals else self.flight_of_fusion.get(name)


def _branch_cost(tally: Tally) -> tuple[float, int, int]:
    """Returns the key by which the costliest branch is chosen: seconds, then FLOPs, then bytes."""
    costs = tally.costs.values()
    flops = sum(cost.flops for cost in costs)
    n_bytes = sum(cost.bytes for cost in costs)
    return tally.seconds, flops, n_bytes


def _starts_collective(op: Instruction) -> bool:
    return op.opcode.endswith("-start") or op.name.startswith("async-collective-start")


def _ends_collective(op: Instruction) -> bool:
    return op.opcode.endswith("-done") or op.name.startswith("async-collective-done")


def _estimated_cycles(module: HloModule, op: Instruction) -> int | None:
    """Returns the estimated cycles of an instruction or of its inner ones, or None."""
    match = _CYCLES.search(op.text)
    if match:
        cycles = int(match[1])
        return None if cycles == _NO_ESTIMATE else cycles
    inner_cycles: list[int] = []
    for name in op.called:
        for inner in module.computations[name].values():
            estimate = _estimated_cycles(module, inner)
            if estimate is not None:
                inner_cycles.append(estimate)
    return sum(inner_cycles) if inner_cycles else None
