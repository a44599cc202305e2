"""Bytes that an instruction reads and writes."""

from train.plan.hlo.module import Computation, HloModule, Instruction, bytes_of_arrays, root_of

_READS_OF_SLICES = ("dynamic-slice", "slice", "gather")


def traffic_of(module: HloModule, op: Instruction, computation: Computation) -> int:
    """Returns the bytes of the operands and results of an instruction.

    Of an operand that a fusion reads a part of, the part counts; of an array that it writes into,
    what it writes.
    """
    if op.opcode == "dynamic-update-slice":
        return 2 * bytes_of_arrays(computation[op.operands[1]].shapes)
    if op.opcode in _READS_OF_SLICES:
        return 2 * bytes_of_arrays(op.shapes)
    operand_sizes = [bytes_of_arrays(computation[name].shapes) for name in op.operands]
    if op.opcode != "fusion":
        return sum(operand_sizes) + bytes_of_arrays(op.shapes)
    fused = module.computations[op.called[0]]
    parameter_names = _parameter_names(fused)
    read_bytes = 0
    for index, operand_size in enumerate(operand_sizes):
        read_bytes += min(operand_size, _read_bytes(module, fused, parameter_names[index]))
    return read_bytes + _written_bytes(fused, root_of(fused))


def _parameter_names(computation: Computation) -> dict[int, str]:
    """Returns the names of a computation's parameters, by number."""
    return {
        int(op.text[1 : op.text.index(")")]): op.name
        for op in computation.values()
        if op.opcode == "parameter"
    }


def _read_bytes(module: HloModule, computation: Computation, name: str) -> int:
    """Returns the bytes of an array that the instructions of a computation read."""
    users = [op for op in computation.values() if name in op.operands]
    array_size = bytes_of_arrays(computation[name].shapes)
    total = 0
    for user in users:
        is_sliced = user.operands[0] == name
        if user.opcode in _READS_OF_SLICES and is_sliced:
            total += bytes_of_arrays(user.shapes)
        elif user.opcode == "dynamic-update-slice" and is_sliced:
            continue  # written in place
        elif user.opcode == "bitcast":
            total += _read_bytes(module, computation, user.name)
        elif user.opcode == "fusion":
            fused = module.computations[user.called[0]]
            parameter = _parameter_names(fused).get(user.operands.index(name))
            total += array_size if parameter is None else _read_bytes(module, fused, parameter)
        else:
            return array_size
    return total


def _written_bytes(computation: Computation, result: Instruction) -> int:
    """Returns the bytes that a computation writes, without inputs that it returns unchanged."""
    if result.opcode == "tuple":
        return sum(_written_bytes(computation, computation[name]) for name in result.operands)
    if result.opcode == "bitcast":
        return _written_bytes(computation, computation[result.operands[0]])
    if result.opcode == "dynamic-update-slice":
        return bytes_of_arrays(computation[result.operands[1]].shapes)
    return 0 if result.opcode == "parameter" else bytes_of_arrays(result.shapes)
