"""The work of a compiled step, read from its optimised HLO: FLOPs of products, bytes sent.

XLA's own analysis counts the body of a loop once; here it counts once per iteration. All figures
are for one device.
"""

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping

import numpy as np

from train.plan.flops.kernels import TARGETS, KernelCall, kernel_flops

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")

_BYTES = {"pred": 1, "s4": 0.5, "u4": 0.5, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2}
_BYTES |= {"f16": 2, "s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8, "c64": 8}
_ARRAY = re.compile(r"\b(" + "|".join(_BYTES) + r"|f8\w+)\[([\d,]*)\]")
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")
_INSTRUCTION = re.compile(r"^\s*(ROOT )?%?([\w.\-]+) = (.*)$")
_NAME = re.compile(r"%([\w.\-]+)")
_CALLED = re.compile(
    r"\b(?:body|to_apply|calls|branch_computations|called_computations|true_computation|"
    r"false_computation)=(?:\{([^}]*)\}|%?([\w.\-]+))"
)
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_WINDOW = re.compile(r"window=\{([^}]*)\}")
_TARGET = re.compile(r'custom_call_target="([^"]*)"')
_KERNEL = re.compile(r'\bname = "([^"]*)"')  # of Triton's; the TPU's name their instructions
_OP_NAME = re.compile(r'\bop_name="([^"]*)"')
_LABELS = re.compile(r"dim_labels=(\w+)_(\w+)->(\w+)")
# The TPU compiler spreads a collective over fusions that overlap it with other work, beginning with
# an async-collective-start, which is counted. (Channels do not identify it: several may share one.)
_LATER_PARTS = ("async_collective_fusion", "async-collective-done")
# Errors of parsing text in an unexpected form: a missing name, a number that is none, …
_SURPRISES = (LookupError, ValueError, TypeError, AttributeError, ArithmeticError, RecursionError)

Shape = tuple[int, ...]


class NotUnderstood(ValueError):
    """The HLO does not state its work in a form known to this module."""


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation; `shapes` are the shapes of its result, `operands` are names."""

    name: str
    opcode: str
    shapes: tuple[tuple[str, Shape], ...]
    operands: tuple[str, ...]
    text: str  # everything after the opcode
    root: bool

    def attribute(self, name: str) -> list[int]:
        """Returns the numbers of an attribute such as ``lhs_contracting_dims={1}``, or []."""
        found = re.search(rf"\b{name}=\{{([\d,]*)\}}", self.text)
        return [int(n) for n in found[1].split(",") if n] if found else []


@dataclasses.dataclass(frozen=True)
class HloWork:
    """The work of one device in one call of a compiled function."""

    flops: int  # of matrix products and convolutions
    sent: dict[str, int]  # kind of collective -> bytes, in the order of `COLLECTIVES`
    kernels: tuple[KernelCall, ...] = ()  # the calls of kernels, each once

    @property
    def sent_bytes(self) -> int:
        """The bytes of all kinds together."""
        return sum(self.sent.values())


def work_of(text: str) -> HloWork:
    """Counts the work of a module.

    A collective counts with its result or its operand, whichever is larger; a conditional with its
    costliest branch.

    Args:
      text: the optimised HLO, as returned by ``compiled.as_text()``.

    Returns:
      The work of one device.

    Raises:
      NotUnderstood: the HLO has an unknown form, or does not say how often a loop runs.
    """
    try:
        return _Counting(text).work()
    except NotUnderstood:
        raise
    except _SURPRISES as error:
        raise NotUnderstood(f"the HLO is not written as expected: {error!r}") from error


class _Counting:
    def __init__(self, text: str) -> None:
        self.computations: dict[str, dict[str, Instruction]] = {}
        self.entry = ""
        for is_entry, name, instructions in _computations(text):
            self.computations[name] = instructions
            self.entry = name if is_entry else self.entry

    def work(self) -> HloWork:
        if not self.entry:
            raise NotUnderstood("the HLO has no entry")
        flops, sent = self.count(self.entry)
        calls = (
            _kernel_call(one, instructions)
            for instructions in self.computations.values()
            for one in instructions.values()
        )
        return HloWork(
            flops,
            {kind: sent[kind] for kind in COLLECTIVES if sent[kind]},
            tuple(call for call in calls if call),
        )

    def count(self, name: str, *, caller: str = "") -> tuple[int, Counter[str]]:
        flops, sent = 0, Counter[str]()
        instructions = self.computations[name]
        for one in instructions.values():
            if one.opcode in ("dot", "convolution"):
                flops += _product_flops(one, instructions)
            if call := _kernel_call(one, instructions):
                flops += kernel_flops(call)
            kind = one.opcode.removesuffix("-start")
            if kind in COLLECTIVES:
                if name.startswith(_LATER_PARTS) or caller.startswith(_LATER_PARTS):
                    continue
                if "all-reduce-scatter" in name:  # the TPU compiler's name for the two fused
                    kind = "reduce-scatter"
                sent[kind] += self._bytes(one, instructions)
                continue
            inner = [self.count(called, caller=one.name) for called in _called(one)]
            if one.opcode == "conditional":
                inner = [max(inner, key=lambda side: (side[0], side[1].total()))]
            times = self._turns(one) if one.opcode == "while" and inner else 1
            for more_flops, more_sent in inner:
                flops += times * more_flops
                sent.update({kind: times * size for kind, size in more_sent.items()})
        return flops, sent

    def _bytes(self, one: Instruction, instructions: Mapping[str, Instruction]) -> int:
        """Returns the bytes that a collective sends or receives."""
        given = _size([s for name in one.operands for s in instructions[name].shapes])
        result = _size(one.shapes)
        if one.opcode.endswith("-start") and len(one.shapes) > len(one.operands):
            result -= given  # the result holds the operands as well
        return max(given, result)

    def _turns(self, loop: Instruction) -> int:
        """Returns the number of iterations of a loop.

        Taken from XLA's trip count or, for a loop that counts i from 0 in steps of k while i < n,
        computed as n / k.
        """
        if known := _TRIPS.search(loop.text):
            return int(known[1])
        condition, body = (
            self.computations[_found(rf"\b{name}=%?([\w.\-]+)", loop.text)]
            for name in ("condition", "body")
        )
        test = _root(condition)
        if test.opcode == "fusion":
            condition = self.computations[_called(test)[0]]
            test = _root(condition)
        limit = self._constant(test, condition)
        counters = [one for one in condition.values() if one.opcode == "get-tuple-element"]
        if test.opcode == "compare" and "direction=LT" in test.text and len(counters) == 1:
            index = int(_found(r"index=(\d+)", counters[0].text))
            counted = _behind(body[_root(body).operands[index]], body)
            if counted.opcode == "fusion":
                body = self.computations[_called(counted)[0]]
                counted = _behind(_root(body), body)
            step = self._constant(counted, body) if counted.opcode == "add" else None
            if limit and step:
                return -(-limit // step)
        raise NotUnderstood(f"the HLO does not say how often the loop {loop.name} runs")

    def _constant(self, one: Instruction, instructions: Mapping[str, Instruction]) -> int | None:
        """Returns the only constant among the operands; None if there is none, or several."""
        given = [_behind(instructions[name], instructions) for name in one.operands]
        numbers = [found[1] for o in given if o.opcode == "constant" and (found := _INT(o.text))]
        return int(numbers[0]) if len(numbers) == 1 else None


_INT = re.compile(r"\((\d+)\)").match


def _found(pattern: str, text: str) -> str:
    found = re.search(pattern, text)
    if found is None:
        raise NotUnderstood(f"no {pattern} in {text[:200]}")
    return found[1]


def _root(instructions: Mapping[str, Instruction]) -> Instruction:
    roots = [one for one in instructions.values() if one.root]
    if len(roots) != 1:
        raise NotUnderstood(
            f"a computation has {len(roots)} roots: {', '.join(instructions)[:200]}"
        )
    return roots[0]


def _behind(one: Instruction, instructions: Mapping[str, Instruction]) -> Instruction:
    """Returns the instruction that this one is a copy of, or itself."""
    while one.opcode in ("copy", "bitcast", "convert"):
        one = instructions[one.operands[0]]
    return one


def _computations(text: str) -> Iterator[tuple[bool, str, dict[str, Instruction]]]:
    name, is_entry, instructions = "", False, dict[str, Instruction]()
    last: Instruction | None = None
    for line in text.splitlines():
        if header := _HEADER.match(line):
            name, is_entry, instructions = header[2], header[1] is not None, {}
        elif line.rstrip() == "}":
            yield is_entry, name, instructions
        elif found := _INSTRUCTION.match(line):
            one = _instruction(found[2], found[3], found[1] is not None)
            instructions[one.name] = last = one
        elif last and last.name in instructions:  # a kernel's attributes have lines of their own
            last = dataclasses.replace(last, text=last.text + line)
            instructions[last.name] = last


def _instruction(name: str, text: str, root: bool) -> Instruction:
    if text.startswith("("):
        end = _closing(text, 0) + 1
    else:
        end = text.index(" ")
    opcode, _, rest = text[end:].strip().partition("(")
    last = _closing(f"({rest}", 0)
    operands = tuple(_NAME.findall(rest[:last]))
    return Instruction(name, opcode, _arrays(text[:end]), operands, f"({rest}", root)


def _closing(text: str, start: int) -> int:
    depth = 0
    for at in range(start, len(text)):
        depth += {"(": 1, ")": -1}.get(text[at], 0)
        if depth == 0:
            return at
    raise NotUnderstood(f"a bracket is not closed: {text[:100]}")


def _arrays(text: str) -> tuple[tuple[str, Shape], ...]:
    return tuple(
        (kind, tuple(int(n) for n in sizes.split(",") if n)) for kind, sizes in _ARRAY.findall(text)
    )


def _size(shapes: tuple[tuple[str, Shape], ...] | list[tuple[str, Shape]]) -> int:
    return int(sum(_BYTES.get(kind, 1) * math.prod(shape) for kind, shape in shapes))


def _called(one: Instruction) -> list[str]:
    names = []
    for many, single in _CALLED.findall(one.text):
        names += [name.strip().lstrip("%") for name in (many or single).split(",")]
    return [name for name in names if name]


def _kernel_call(one: Instruction, instructions: Mapping[str, Instruction]) -> KernelCall | None:
    """Returns the kernel that an instruction calls; None if it calls none."""
    target = _TARGET.search(one.text) if one.opcode == "custom-call" else None
    if target is None or target[1] not in TARGETS:
        return None
    scope = _OP_NAME.search(one.text)
    operands = tuple(shape for name in one.operands for shape in instructions[name].shapes)
    name = _KERNEL.search(one.text)
    return KernelCall(name[1] if name else one.name, scope[1] if scope else "", operands)


def _product_flops(one: Instruction, instructions: Mapping[str, Instruction]) -> int:
    (_, left), (_, right) = (instructions[name].shapes[0] for name in one.operands[:2])
    if one.opcode == "dot":
        contracted = math.prod(left[axis] for axis in one.attribute("lhs_contracting_dims"))
        return 2 * math.prod(one.shapes[0][1]) * contracted
    return _convolution_flops(one, left, right)


def _convolution_flops(one: Instruction, left: Shape, right: Shape) -> int:
    """Counts two FLOPs for each pair of a kernel element and an input element that it multiplies.

    The TPU compiler writes matrix products as convolutions, and batch axes as spatial axes dilated
    so that each output meets one input. Padding and dilation holes are no work.
    """
    labels = _LABELS.search(one.text)
    if labels is None:
        raise NotUnderstood(f"a convolution without dim_labels: {one.text[:200]}")
    of_left, of_right, of_result = labels.groups()
    result = one.shapes[0][1]
    window = _WINDOW.search(one.text)
    fields = dict(part.split("=") for part in window[1].split()) if window else {}
    total = result[of_result.index("b")] * result[of_result.index("f")]
    total *= right[of_right.index("i")]
    for axis, label in enumerate(sorted(c for c in of_left if c.isdigit())):
        along = {
            name: value.split("x")[axis] if "x" in value else value
            for name, value in fields.items()
        }
        total *= pairs_along(
            left[of_left.index(label)],
            right[of_right.index(label)],
            result[of_result.index(label)],
            stride=int(along.get("stride", 1)),
            hole=int(along.get("lhs_dilate", 1)),
            spread=int(along.get("rhs_dilate", 1)),
            before=int(along.get("pad", "0_0").split("_")[0]),
        )
    return 2 * total


def pairs_along(
    n_in: int, n_kernel: int, n_out: int, *, stride: int, hole: int, spread: int, before: int
) -> int:
    """Counts the pairs (output, kernel element) that meet an input along a spatial axis.

    Args:
      n_in, n_kernel, n_out: the sizes of the axis.
      stride: the window stride.
      hole: the dilation of the input; 1 for none.
      spread: the dilation of the kernel; 1 for none.
      before: the padding before the first input.

    Returns:
      The number of pairs; padding and dilation holes are not inputs.
    """
    place = np.arange(n_out)[:, None] * stride + np.arange(n_kernel) * spread - before
    return int(np.sum((place >= 0) & (place % hole == 0) & (place < n_in * hole)))
