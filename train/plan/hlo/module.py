"""Parses the text of optimised HLO: computations, instructions, and how often loops run."""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator, Mapping, Sequence

_BYTES = {"pred": 1, "s4": 0.5, "u4": 0.5, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2}
_BYTES |= {"f16": 2, "s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8, "c64": 8}
_ARRAY = re.compile(r"\b(" + "|".join(_BYTES) + r"|f8\w+)\[([\d,]*)\](\{[^}]*\})?")
_OTHER_MEMORY = re.compile(r"S\([1-9]\d*\)")  # of a layout: a chip's own memory, or the host's
_DEVICES = re.compile(r"\b(?:num_partitions|replica_count)=(\d+)")
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")
_END = re.compile(r'^\}(, execution_thread="\w+")?\s*$')
_INSTRUCTION = re.compile(r"^\s*(ROOT )?%?([\w.\-]+) = (.*)$")
_NAME = re.compile(r"%([\w.\-]+)")
_CALLED = re.compile(
    r"\b(?:body|to_apply|calls|branch_computations|called_computations|true_computation|"
    r"false_computation)=(?:\{([^}]*)\}|%?([\w.\-]+))"
)
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_OP_NAME = re.compile(r'\bop_name="([^"]*)"')
_TARGET = re.compile(r'custom_call_target="([^"]*)"')
_INT = re.compile(r"\((\d+)\)").match
# Errors of parsing text in an unexpected form: a missing name, a number that is none, …
PARSE_ERRORS = (LookupError, ValueError, TypeError, AttributeError, ArithmeticError, RecursionError)

Shape = tuple[int, ...]
Array = tuple[str, Shape]  # (dtype, shape), the dtype as HLO writes it: "bf16"


class NotUnderstood(ValueError):
    """The error for HLO that does not state its work in a known form."""


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation.

    Attributes:
      name, opcode: its name and its opcode.
      shapes: the arrays of its result.
      in_memory: for each of these arrays, whether it is in the device's main memory.
      operands: the names of its operands.
      text: everything after the opcode.
      root: whether its result is the computation's.
    """

    name: str
    opcode: str
    shapes: tuple[Array, ...]
    in_memory: tuple[bool, ...]
    operands: tuple[str, ...]
    text: str
    root: bool

    def attribute(self, name: str) -> list[int]:
        """Returns the numbers of an attribute such as ``lhs_contracting_dims={1}``, or []."""
        match = re.search(rf"\b{name}=\{{([\d,]*)\}}", self.text)
        return [int(n) for n in match[1].split(",") if n] if match else []

    @functools.cached_property
    def called(self) -> tuple[str, ...]:
        """The names of the computations that it calls, except a loop's condition."""
        names: list[str] = []
        for braced_names, single_name in _CALLED.findall(self.text):
            names += [name.strip().lstrip("%") for name in (braced_names or single_name).split(",")]
        return tuple(name for name in names if name)

    @functools.cached_property
    def op_name(self) -> str:
        """The scopes and the primitive of the instruction; "" without metadata."""
        match = _OP_NAME.search(self.text)
        return match[1] if match else ""

    @functools.cached_property
    def target(self) -> str:
        """The target of a custom call; "" for other instructions."""
        match = _TARGET.search(self.text) if self.opcode == "custom-call" else None
        return match[1] if match else ""


Computation = Mapping[str, Instruction]  # by name, in the order of the schedule


class HloModule:
    """The computations of a module.

    Attributes:
      computations: name -> its instructions by name.
      entry: the name of the computation that runs.
      devices: the number of devices that run the module.
    """

    def __init__(self, text: str) -> None:
        """Parses a module; raises NotUnderstood if it has no entry computation."""
        self.computations: dict[str, Computation] = {}
        self.entry = ""
        self.devices = math.prod(int(count) for count in _DEVICES.findall(text.partition("\n")[0]))
        for is_entry, name, instructions in _parse_computations(text):
            self.computations[name] = instructions
            if is_entry:
                self.entry = name
        if not self.entry:
            raise NotUnderstood("the HLO has no entry")

    def turns(self, loop: Instruction) -> int:
        """Returns the number of iterations of a loop.

        Taken from XLA's trip count or, for a loop that counts i from 0 in steps of k while i < n,
        computed as n / k.

        Raises:
          NotUnderstood: the HLO does not say how often it runs.
        """
        trip_count = _TRIPS.search(loop.text)
        if trip_count:
            return int(trip_count[1])
        condition = self.computations[_match_group(r"\bcondition=%?([\w.\-]+)", loop.text)]
        body = self.computations[_match_group(r"\bbody=%?([\w.\-]+)", loop.text)]
        comparison = root_of(condition)
        if comparison.opcode == "fusion":
            condition = self.computations[comparison.called[0]]
            comparison = root_of(condition)
        limit = _only_constant_operand(comparison, condition)
        counters = [op for op in condition.values() if op.opcode == "get-tuple-element"]
        is_less_than = comparison.opcode == "compare" and "direction=LT" in comparison.text
        if is_less_than and len(counters) == 1:
            index = int(_match_group(r"index=(\d+)", counters[0].text))
            increment = _copy_source(body[root_of(body).operands[index]], body)
            if increment.opcode == "fusion":
                body = self.computations[increment.called[0]]
                increment = _copy_source(root_of(body), body)
            step = _only_constant_operand(increment, body) if increment.opcode == "add" else None
            if limit and step:
                return -(-limit // step)
        raise NotUnderstood(f"the HLO does not say how often the loop {loop.name} runs")

    def inside(self, op: Instruction) -> Iterator[tuple[Instruction, Computation]]:
        """Yields all instructions that one calls, at any depth, with their computations."""
        for name in op.called:
            computation = self.computations[name]
            for inner in computation.values():
                yield inner, computation
                yield from self.inside(inner)


def root_of(computation: Computation) -> Instruction:
    """Returns the root instruction of a computation, which computes its result."""
    roots = [op for op in computation.values() if op.root]
    if len(roots) != 1:
        raise NotUnderstood(f"a computation has {len(roots)} roots: {', '.join(computation)[:200]}")
    return roots[0]


def is_scalar(op: Instruction) -> bool:
    """Returns True if each array of an instruction's result has at most one element."""
    return all(math.prod(shape) <= 1 for _, shape in op.shapes)


def bytes_of_arrays(arrays: Sequence[Array]) -> int:
    """Returns the total bytes of arrays."""
    return int(sum(_BYTES.get(kind, 1) * math.prod(shape) for kind, shape in arrays))


def operand_arrays(op: Instruction, computation: Computation) -> tuple[Array, ...]:
    """Returns the arrays of an instruction's operands, in order."""
    return tuple(array for name in op.operands for array in computation[name].shapes)


def _only_constant_operand(op: Instruction, computation: Computation) -> int | None:
    """Returns the single constant operand; None unless there is exactly one."""
    constants: list[int] = []
    for name in op.operands:
        operand = _copy_source(computation[name], computation)
        match = _INT(operand.text)
        if operand.opcode == "constant" and match:
            constants.append(int(match[1]))
    return constants[0] if len(constants) == 1 else None


def _match_group(pattern: str, text: str) -> str:
    """Returns the text of a pattern's group; raises NotUnderstood if nothing matches."""
    match = re.search(pattern, text)
    if match is None:
        raise NotUnderstood(f"nothing matches {pattern} in {text[:200]}")
    return match[1]


def _copy_source(op: Instruction, computation: Computation) -> Instruction:
    """Returns the instruction whose result this one copies, or this one itself."""
    while op.opcode in ("copy", "bitcast", "convert"):
        op = computation[op.operands[0]]
    return op


def _parse_computations(text: str) -> Iterator[tuple[bool, str, dict[str, Instruction]]]:
    """Yields for each computation whether it is the entry, its name, and its instructions."""
    name = ""
    is_entry = False
    instructions: dict[str, Instruction] = {}
    op: Instruction | None = None
    for line in text.splitlines():
        header = _HEADER.match(line)
        instruction = _INSTRUCTION.match(line)
        if header:
            name = header[2]
            is_entry = header[1] is not None
            instructions = {}
        elif _END.match(line):
            yield is_entry, name, instructions
        elif instruction:
            op = _parse_instruction(instruction[2], instruction[3], instruction[1] is not None)
            instructions[op.name] = op
        elif op and op.name in instructions:  # a kernel's attributes have lines of their own
            op = dataclasses.replace(op, text=op.text + line)
            instructions[op.name] = op


def _parse_instruction(name: str, definition: str, is_root: bool) -> Instruction:
    """Parses the right side of an instruction: its shapes, opcode and operands."""
    if definition.startswith("("):  # the shapes of a tuple
        shapes_end = _closing_bracket(definition) + 1
    else:
        shapes_end = definition.index(" ")
    opcode, _, arguments = definition[shapes_end:].strip().partition("(")
    text = f"({arguments}"
    shapes, in_memory = _parse_arrays(definition[:shapes_end])
    return Instruction(
        name=name,
        opcode=opcode,
        shapes=shapes,
        in_memory=in_memory,
        operands=tuple(_NAME.findall(text[: _closing_bracket(text)])),
        text=text,
        root=is_root,
    )


def _closing_bracket(text: str) -> int:
    """Returns the index of the bracket that closes the first bracket of a text."""
    depth = 0
    for index, character in enumerate(text):
        if character == "(":
            depth += 1
        elif character == ")":
            depth -= 1
        if depth == 0:
            return index
    raise NotUnderstood(f"a bracket is not closed: {text[:100]}")


def _parse_arrays(text: str) -> tuple[tuple[Array, ...], tuple[bool, ...]]:
    """Parses the arrays of a result, such as "bf16[8,128]{1,0:T(8,128)S(1)}".

    Returns:
      The dtype and shape of each array, and whether it is in the device's main memory.
    """
    arrays: list[Array] = []
    in_memory: list[bool] = []
    for dtype, sizes, layout in _ARRAY.findall(text):
        shape = tuple(int(size) for size in sizes.split(",") if size)
        arrays.append((dtype, shape))
        in_memory.append(_OTHER_MEMORY.search(layout) is None)
    return tuple(arrays), tuple(in_memory)
