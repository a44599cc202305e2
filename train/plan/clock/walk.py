"""Walks a scheduled module: seconds, FLOPs and bytes of each group, and where links are waited for.

The compiler writes the cycles that it expects of an instruction into the HLO; `while` bodies count
by their trips. An asynchronous collective runs beside what stands between its start and its done.
"""

import functools
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from lora_jax.models.decoder.dispatch import UNEVEN
from train.plan.clock.groups import AFTER, COLLECTIVES, Group, group_of
from train.plan.clock.traffic import traffic_of
from train.plan.hlo.collectives import COLLECTIVES as KINDS_SENT
from train.plan.hlo.collectives import LATER_PARTS, collective_kind, sent_bytes
from train.plan.hlo.kernels import kernel_flops, kernel_of
from train.plan.hlo.module import Computation, HloModule, Instruction, NotUnderstood, is_scalar
from train.plan.hlo.products import is_product, kernel_call, product_flops
from train.plan.hlo.slices import crosses, slice_transfer, transferred_bytes

_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_NO_ESTIMATE = 2**63 - 1
_FREE = {"parameter", "constant", "bitcast", "tuple", "get-tuple-element", "after-all", "domain"}
_FREE |= {"partition-id", "replica-id", "opt-barrier", "add-dependency", "reshape"}
_PLACES = ("AllocateBuffer", "ConcatBitcast")  # custom calls that give arrays a place
_LINKS = Group(COLLECTIVES, AFTER)

Sent = Counter[tuple[str, bool]]  # (kind of collective, whether it leaves a slice) -> bytes


class DeviceRates(NamedTuple):
    """Speeds of a device, which turn work into seconds.

    Attributes:
      clock: cycles that the compiler counts.
      kernel: FLOPs of kernels, whose cycles it does not know; an assumption.
      link: bytes that a device sends in collectives; an assumption.
      memory: bytes that kernels read and write, where these decide; an assumption.
    """

    clock: float
    kernel: float
    link: float
    memory: float


class Cost(NamedTuple):
    """The cost of a group.

    Attributes:
      seconds: time that the group takes, by the rates.
      flops: FLOPs of products and kernels.
      bytes: bytes of operands and results, or those that a device sends in collectives.
    """

    seconds: float = 0.0
    flops: int = 0
    bytes: int = 0

    def plus(self, other: "Cost", times: int = 1) -> "Cost":
        """Returns the sum with another cost, so many times."""
        return Cost(
            self.seconds + times * other.seconds,
            self.flops + times * other.flops,
            self.bytes + times * other.bytes,
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
    sent: Sent
    unknown: Counter[str]


class Walk:
    """A walk over the computations of a module, each of which is counted once."""

    def __init__(
        self,
        module: HloModule,
        rates: DeviceRates | None,
        n_slices: int,
        slices: Sequence[int] = (),
    ) -> None:
        """Makes a walk.

        Args:
          module: the module.
          rates: the rates of a device; without rates, nothing has seconds.
          n_slices: number of TPU slices that exchange data.
          slices: the slice of each device, which tells what leaves one; () where none does.
        """
        self.module = module
        self.n_slices = n_slices
        self.slices = slices
        self.rates = rates
        self.tally = functools.cache(self._tally)

    def _tally(self, name: str) -> Tally:
        """Returns the tally of a computation, in the order of its schedule."""
        computation = self.module.computations[name]
        run = _Run()
        for op in computation.values():
            # A branch that runs only where tokens choose experts unevenly is rare.
            is_rare = op.opcode == "conditional" and UNEVEN in op.op_name
            if op.opcode in _FREE or is_rare:
                continue
            if op.opcode in ("while", "call", "async-start"):
                times = self.module.turns(op) if op.opcode == "while" else 1
                for called in op.called:
                    run.add(self.tally(called), times)
                continue
            if op.opcode == "conditional":
                run.add(max(map(self.tally, op.called), key=_size))
                continue
            self._step(op, name, computation, run)
        run.wait(run.free)
        return Tally(
            costs=run.costs,
            seconds=run.now,
            kernels=run.kernels,
            links=run.links,
            sent=run.sent,
            unknown=run.unknown,
        )

    def _step(self, op: Instruction, name: str, computation: Computation, run: "_Run") -> None:
        """Adds an instruction that calls no schedule of its own."""
        if op.opcode in ("send", "recv") and (transfer := slice_transfer(op.text)):
            if op.opcode == "send":
                if transfer.kind not in KINDS_SENT:
                    raise NotUnderstood(f"slices exchange data by {transfer.kind}")
                size = transferred_bytes(op, transfer, computation, self.n_slices)
                run.spend(_LINKS, Cost(bytes=size))
                run.sent[transfer.kind, True] += size
                run.without_estimate(op)
            return
        sent = self._sent(op, name, computation)
        started = run.started_by(op, computation)
        if sent:
            run.sent.update(sent)
            size = sent.total()
            ends = run.transfer(size / self.rates.link if self.rates else 0.0, size)
            if _is_start(op):
                run.flights[op.name] = ends
                return
            run.wait(ends)
        if started is not None and _is_done(op):
            run.wait(run.flights[started])
            return
        if started is not None:
            run.passed[op.name] = started
        if _is_start(op) or _is_done(op) or (sent and op.opcode != "fusion"):
            return
        moved = traffic_of(self.module, op, computation)
        if (call := kernel_call(op, computation)) and (kernel := kernel_of(call)):
            moved -= kernel.unread(call)
        seconds = self._seconds(op, computation, run, moved)
        flops = self._flops(op, computation)
        group = group_of(self.module, op, computation)
        run.spend(group, Cost(seconds, flops, moved))

    def _sent(self, op: Instruction, name: str, computation: Computation) -> Sent:
        """Returns the bytes that an instruction sends; empty where it is no collective."""
        sent = Sent()
        inside = ((op, name, "", computation), *self._inside(op))
        for inner, at, caller, around in inside:
            if kind := collective_kind(inner, at, caller):
                size = sent_bytes(self.module, inner, around, kind)
                sent[kind, crosses(inner.text, self.slices)] += size
        return sent

    def _inside(self, op: Instruction) -> list[tuple[Instruction, str, str, Computation]]:
        if op.opcode not in ("fusion", "async-start"):
            return []
        match = []
        for called in op.called:
            around = self.module.computations[called]
            for inner in around.values():
                match += [(inner, called, op.name, around), *self._inside(inner)]
        return match

    def _seconds(self, op: Instruction, computation: Computation, run: "_Run", moved: int) -> float:
        if self.rates is None:
            return 0.0
        if call := kernel_call(op, computation):
            kernel = kernel_of(call)
            if kernel is None:
                run.without_estimate(op)
            seconds = kernel_flops(call) / self.rates.kernel
            if kernel and kernel.cycles:
                seconds = max(kernel.cycles(call) / self.rates.clock, moved / self.rates.memory)
            run.kernels += seconds
            return seconds
        cycles = _cycles(self.module, op)
        if cycles is None and op.target not in _PLACES and not is_scalar(op):
            run.without_estimate(op)
        return (cycles or 0) / self.rates.clock

    def _flops(self, op: Instruction, computation: Computation) -> int:
        total = 0
        for inner, around in ((op, computation), *self.module.inside(op)):
            if is_product(inner):
                total += product_flops(inner, around)
            if call := kernel_call(inner, around):
                total += kernel_flops(call)
        return total


class _Run:
    """The state of a walk along a schedule."""

    def __init__(self) -> None:
        self.costs: dict[Group, Cost] = {}
        self.now = self.free = self.kernels = self.links = 0.0
        self.flights: dict[str, float] = {}  # a collective's start -> when it ends
        self.passed: dict[str, str] = {}  # a fusion that a collective runs beside -> its start
        self.sent = Sent()
        self.unknown = Counter[str]()

    def spend(self, group: Group, cost: Cost, times: int = 1) -> None:
        """Adds a cost to a group, whose seconds pass."""
        self.costs[group] = self.costs.get(group, Cost()).plus(cost, times)
        self.now += times * cost.seconds

    def add(self, tally: Tally, times: int = 1) -> None:
        """Adds a computation that runs so many times."""
        before = self.now
        for group, cost in tally.costs.items():
            self.spend(group, cost, times)
        self.now = before + times * tally.seconds
        self.kernels += times * tally.kernels
        self.links += times * tally.links
        self.sent.update({key: times * size for key, size in tally.sent.items()})
        self.unknown.update({kind: times * n for kind, n in tally.unknown.items()})

    def without_estimate(self, op: Instruction) -> None:
        """Counts an instruction that has no estimate, by what it does."""
        of = op.name if op.opcode in ("fusion", "custom-call") else op.opcode
        self.unknown[re.sub(r"[.\d]+$", "", of)] += 1

    def transfer(self, busy: float, sent: int) -> float:
        """Sends bytes once the links are free; returns when they have arrived."""
        self.links += busy
        self.free = max(self.free, self.now) + busy
        self.spend(_LINKS, Cost(bytes=sent))
        return self.free

    def wait(self, until: float) -> None:
        """Waits for what the links still carry."""
        if until > self.now:
            self.spend(_LINKS, Cost(seconds=until - self.now))

    def started_by(self, op: Instruction, computation: Computation) -> str | None:
        """Returns the start of the collective that an instruction runs beside, or ends."""
        if not (_is_done(op) or any(called.startswith(LATER_PARTS) for called in op.called)):
            return None
        return next(
            (start for name in op.operands if (start := self._origin(name, computation))), None
        )

    def _origin(self, name: str, computation: Mapping[str, Instruction]) -> str | None:
        while computation[name].opcode == "get-tuple-element":
            name = computation[name].operands[0]
        return name if name in self.flights else self.passed.get(name)


def _size(tally: Tally) -> tuple[float, int, int]:
    """Returns the seconds of a branch; where nothing has any, its work tells which is costliest."""
    costs = tally.costs.values()
    return tally.seconds, sum(cost.flops for cost in costs), sum(cost.bytes for cost in costs)


def _is_start(op: Instruction) -> bool:
    return op.opcode.endswith("-start") or op.name.startswith("async-collective-start")


def _is_done(op: Instruction) -> bool:
    return op.opcode.endswith("-done") or op.name.startswith("async-collective-done")


def _cycles(module: HloModule, op: Instruction) -> int | None:
    """Returns the cycles of an instruction, or of those that it calls; None if nothing tells."""
    if match := _CYCLES.search(op.text):
        return None if int(match[1]) == _NO_ESTIMATE else int(match[1])
    inside = [
        cycles
        for name in op.called
        for inner in module.computations[name].values()
        if (cycles := _cycles(module, inner)) is not None
    ]
    return sum(inside) if inside else None
