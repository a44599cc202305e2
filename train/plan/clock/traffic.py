"""Bytes that an instruction reads and writes."""

from train.plan.hlo.module import Computation, HloModule, Instruction, root_of, size_of

_PARTS = ("dynamic-slice", "slice", "gather")


def traffic_of(module: HloModule, op: Instruction, computation: Computation) -> int:
    """Returns the bytes of the operands and results of an instruction.

    Of an operand that a fusion reads a part of, the part counts; of an array that it writes into,
    what it writes.
    """
    if op.opcode == "dynamic-update-slice":
        return 2 * size_of(computation[op.operands[1]].shapes)
    if op.opcode in _PARTS:
        return 2 * size_of(op.shapes)
    given = [size_of(computation[name].shapes) for name in op.operands]
    if op.opcode != "fusion":
        return sum(given) + size_of(op.shapes)
    inner = module.computations[op.called[0]]
    names = _parameters(inner)
    read = sum(min(size, _read(module, inner, names[i])) for i, size in enumerate(given))
    return read + _written(inner, root_of(inner))


def _parameters(computation: Computation) -> dict[int, str]:
    """Returns the names of a computation's parameters, by number."""
    return {
        int(op.text[1 : op.text.index(")")]): op.name
        for op in computation.values()
        if op.opcode == "parameter"
    }


def _read(module: HloModule, computation: Computation, name: str) -> int:
    """Returns the bytes of an array that the instructions of a computation read."""
    users = [op for op in computation.values() if name in op.operands]
    whole = size_of(computation[name].shapes)
    total = 0
    for user in users:
        if user.opcode in _PARTS and user.operands[0] == name:
            total += size_of(user.shapes)
        elif user.opcode == "dynamic-update-slice" and user.operands[0] == name:
            continue  # written in place
        elif user.opcode == "bitcast":
            total += _read(module, computation, user.name)
        elif user.opcode == "fusion":
            inner = module.computations[user.called[0]]
            at = f"({user.operands.index(name)})"
            inside = [
                p for p in inner.values() if p.opcode == "parameter" and p.text[: len(at)] == at
            ]
            total += _read(module, inner, inside[0].name) if inside else whole
        else:
            return whole
    return total


def _written(computation: Computation, result: Instruction) -> int:
    if result.opcode == "tuple":
        return sum(_written(computation, computation[name]) for name in result.operands)
    if result.opcode == "bitcast":
        return _written(computation, computation[result.operands[0]])
    if result.opcode == "dynamic-update-slice":
        return size_of(computation[result.operands[1]].shapes)
    return 0 if result.opcode == "parameter" else size_of(result.shapes)
