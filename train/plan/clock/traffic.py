"""Bytes that an instruction reads and writes."""

from typing import NamedTuple

from train.plan.hlo.module import Computation, HloModule, Instruction, bytes_of_arrays, root_of

_READS_OF_SLICES = ("dynamic-slice", "slice", "gather")
_MOVES_BETWEEN_MEMORIES = ("copy-start", "slice-start")


class Traffic(NamedTuple):
    """Bytes that are read and written.

    Attributes:
      all: bytes in any memory.
      memory: the bytes of arrays in the device's main memory.
    """

    all: int = 0
    memory: int = 0

    def minus(self, traffic: "Traffic") -> "Traffic":
        """Returns this traffic without a part of it, at least 0."""
        return Traffic(max(0, self.all - traffic.all), max(0, self.memory - traffic.memory))


def traffic_of(module: HloModule, op: Instruction, computation: Computation) -> Traffic:
    """Returns the traffic of the operands and results of an instruction.

    Of an operand that a fusion reads a part of, the part counts; of an array that it writes into,
    what it writes.
    """
    operands = [computation[name] for name in op.operands]
    if op.opcode == "dynamic-update-slice":
        part_bytes = bytes_of_arrays(operands[1].shapes)
        return _sum([(part_bytes, _is_in_memory(operands[1])), (part_bytes, _is_in_memory(op))])
    if op.opcode in _READS_OF_SLICES:
        part_bytes = bytes_of_arrays(op.shapes)
        return _sum([(part_bytes, _is_in_memory(operands[0])), (part_bytes, _is_in_memory(op))])
    if op.opcode != "fusion":
        arrays = [
            (bytes_of_arrays([array]), is_in_memory)
            for source in (*operands, op)
            for array, is_in_memory in zip(source.shapes, source.in_memory, strict=True)
        ]
        return _sum(arrays)
    fused = module.computations[op.called[0]]
    parameter_names = _parameter_names(fused)
    moved: list[tuple[int, bool]] = []
    for index, operand in enumerate(operands):
        read_bytes = _read_bytes(module, fused, parameter_names[index])
        moved.append((min(bytes_of_arrays(operand.shapes), read_bytes), _is_in_memory(operand)))
    result = root_of(fused)
    results = [result]
    if result.opcode == "tuple":
        results = [fused[name] for name in result.operands]
    has_one_array_each = len(results) == len(op.in_memory)
    for index, fused_result in enumerate(results):
        is_in_memory = op.in_memory[index] if has_one_array_each else True
        moved.append((_written_bytes(fused, fused_result), is_in_memory))
    return _sum(moved)


def moved_between_memories(op: Instruction) -> Traffic:
    """Returns the traffic of the start of an asynchronous copy between memories; else nothing."""
    if op.opcode not in _MOVES_BETWEEN_MEMORIES:
        return Traffic()
    # The first two arrays of the result are the copy and the source, of which a part may be read.
    part_bytes = min((bytes_of_arrays([array]) for array in op.shapes[:2]), default=0)
    return _sum([(part_bytes, is_in_memory) for is_in_memory in op.in_memory[:2]])


def _sum(moved: list[tuple[int, bool]]) -> Traffic:
    """Returns the sum of bytes, each with whether they are in the device's main memory."""
    return Traffic(
        sum(n_bytes for n_bytes, _ in moved),
        sum(n_bytes for n_bytes, is_in_memory in moved if is_in_memory),
    )


def _is_in_memory(op: Instruction) -> bool:
    """Returns True if an array of a result is in the device's main memory."""
    return any(op.in_memory)


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
