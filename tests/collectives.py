"""How many bytes a compiled step sends between devices: its optimised HLO, loops multiplied out."""

import math
import re
from typing import Any

_COLLECTIVES = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute"
_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4}
_BYTES |= {"s64": 8, "u64": 8, "f64": 8}
_SHAPE = re.compile(r"\b(" + "|".join(_BYTES) + r")\[([\d,]*)\]")
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")
_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?[\w.\-]+ = (.*)$")
_CALLED = re.compile(
    r"(?:body|to_apply|calls|branch_computations|called_computations)=(?:\{([^}]*)\}|(%?[\w.\-]+))"
)
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')


def collective_bytes(compiled: Any) -> int:
    """The bytes of all collectives of a compiled function, on one device.

    Of each, its result or its operand, whichever is larger. A loop counts as often as it runs.
    """
    computations: dict[str, list[str]] = {}
    lines: list[str] = []
    entry = ""
    for line in compiled.as_text().splitlines():
        if header := _HEADER.match(line):
            lines = computations.setdefault(header[2], [])
            entry = header[2] if header[1] else entry
        elif found := _INSTRUCTION.match(line):
            lines.append(found[1])
    return _bytes_of(entry, computations)


def _bytes_of(name: str, computations: dict[str, list[str]]) -> int:
    total = 0
    for instruction in computations[name]:
        if re.search(rf"\s({_COLLECTIVES})(-start)?\(", instruction):
            total += _size(instruction)
        if called := _CALLED.search(instruction):
            times = 1
            if " while(" in instruction:
                trips = _TRIPS.search(instruction)
                assert trips, f"a loop of unknown length: {instruction[:200]}"
                times = int(trips[1])
            if not re.search(rf"\s({_COLLECTIVES})(-start)?\(", instruction):
                for inner in (called[1] or called[2]).split(", "):
                    total += times * _bytes_of(inner.lstrip("%"), computations)
    return total


def _size(instruction: str) -> int:
    """The bytes of a collective's result or operands, whichever are more."""
    result, _, rest = re.split(rf"\s({_COLLECTIVES})(?:-start)?", instruction, maxsplit=1)
    operands = rest.split(")")[0]
    return max(_bytes_in(result), _bytes_in(operands))


def _bytes_in(text: str) -> int:
    return sum(
        _BYTES[kind] * math.prod(int(n) for n in sizes.split(",") if n)
        for kind, sizes in _SHAPE.findall(text)
    )
