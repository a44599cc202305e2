"""Finds the products of two activations in optimised HLO, such as those of queries and keys.

A *kernel* is an argument of the program that was at most moved, cast or decoded, in loops and in
fusions too. An *activation* is what a product, a reduction or a kernel of the compiler returned.
"""

import functools
import math
import re
from typing import NamedTuple

from train.plan.hlo.module import (
    PARSE_ERRORS,
    Computation,
    HloModule,
    Instruction,
    NotUnderstood,
    is_scalar,
    root_of,
)
from train.plan.hlo.products import is_product

_RETURN_ACTIVATIONS = {"reduce", "reduce-window", "sort", "rng", "custom-call", "map", "fft"}
_RETURN_ACTIVATIONS |= {"all-reduce", "all-reduce-start", "reduce-scatter", "scatter", "recv"}
_RETURN_ACTIVATIONS |= {"rng-bit-generator", "triangular-solve", "cholesky", "conditional"}
_WITHOUT_OPERANDS = {"constant", "iota", "partition-id", "replica-id"}
_COPIES = {"copy", "bitcast", "convert", "copy-start", "copy-done", "opt-barrier"}
# The call by which a TPU's compiler joins an array whose pieces it moved to fast memory.
_JOIN_OF_PIECES = "ConcatBitcast"
# The wrappers that JAX writes around the scopes of a function: jvp(…), transpose(…), and remat's.
_TRANSFORMS = re.compile(r"\b(?:jvp|transpose|vmap)\(|\)|(?:checkpoint|rematted_computation)/")
_PARAMETER = re.compile(r"^\((\d+)\)")
_INDEX = re.compile(r"\bindex=(\d+)")


class _Result(NamedTuple):
    """A result of an instruction, or one element of the tuple that it returns."""

    computation: str
    name: str
    element: int | None = None


class KernelOrigins:
    """Finds the products of a module that have no kernel as an operand."""

    def __init__(self, module: HloModule) -> None:
        """Collects the callers of each computation, and the sizes of kernels by scope."""
        self.module = module
        self.names = {id(body): name for name, body in module.computations.items()}
        self.callers: dict[str, tuple[str, Instruction]] = {}
        for name, computation in module.computations.items():
            for op in computation.values():
                self.callers |= {called: (name, op) for called in op.called}
        self.is_kernel = functools.cache(self._is_kernel)

    @functools.cached_property
    def _kernel_sizes(self) -> dict[str, set[int]]:
        """The elements of the kernels that products of a scope have as operands."""
        sizes: dict[str, set[int]] = {}
        for computation in self.module.computations.values():
            for op in computation.values():
                if is_product(op):
                    try:
                        kernels = self._kernels(op, computation)
                    except (NotUnderstood, *PARSE_ERRORS):
                        continue
                    sizes.setdefault(_plain_scope(op), set()).update(kernels)
        return sizes

    def multiplies_activations(self, op: Instruction, computation: Computation) -> bool:
        """Returns True if neither operand of a product is a kernel.

        A gradient of a kernel has two activations as operands too, but does not count. A result of
        the backward pass with as many elements as a kernel of its scope is such a gradient.
        """
        try:
            if self._kernels(op, computation):
                return False
        except (NotUnderstood, *PARSE_ERRORS):  # an unknown form of HLO
            return False
        is_backward = "transpose(" in op.op_name
        n_elements = math.prod(op.shapes[0][1])
        return not (is_backward and n_elements in self._kernel_sizes.get(_plain_scope(op), ()))

    def _kernels(self, op: Instruction, computation: Computation) -> list[int]:
        """Returns the elements of each operand of a product that is a kernel."""
        name = self.names[id(computation)]
        return [
            math.prod(computation[operand].shapes[0][1])
            for operand in op.operands[:2]
            if self.is_kernel(_Result(name, operand))
        ]

    def _is_kernel(self, result: _Result) -> bool:
        """Returns True if a value is an argument of the program, or made from arguments alone."""
        computation = self.module.computations[result.computation]
        op = computation[result.name]
        if op.opcode == "parameter":
            return self._is_kernel_parameter(result, op)
        if op.opcode == "get-tuple-element":
            index = _number(_INDEX, op)
            return self.is_kernel(_Result(result.computation, op.operands[0], index))
        if op.opcode == "tuple":
            if result.element is None:
                raise NotUnderstood(f"{result.name} is read as a whole")
            return self.is_kernel(_Result(result.computation, op.operands[result.element]))
        if op.opcode in _COPIES:
            return self.is_kernel(_Result(result.computation, op.operands[0], result.element))
        if op.opcode == "while":
            return self._is_kernel_of_loop(result, op)
        if op.opcode in ("fusion", "call", "async-start"):
            called = op.called[0]
            root = root_of(self.module.computations[called])
            return self.is_kernel(_Result(called, root.name, result.element))
        if op.target == _JOIN_OF_PIECES:
            return self._are_kernels(result.computation, op)
        if op.opcode in _RETURN_ACTIVATIONS or is_product(op):
            return False
        return self._are_kernels(result.computation, op)

    def _are_kernels(self, computation_name: str, op: Instruction) -> bool:
        """Returns True if the operands of an instruction are kernels, apart from constants."""
        computation = self.module.computations[computation_name]
        operands = [
            name
            for name in op.operands
            if not is_scalar(computation[name]) and not self._is_constant(computation, name)
        ]
        return bool(operands) and all(
            self.is_kernel(_Result(computation_name, name)) for name in operands
        )

    def _is_constant(self, computation: Computation, name: str) -> bool:
        """Returns True if a value in a computation is made from constants and scalars alone."""
        op = computation[name]
        if op.opcode in _WITHOUT_OPERANDS or is_scalar(op):
            return True
        is_elementwise = op.opcode not in _RETURN_ACTIVATIONS and not is_product(op)
        return (
            is_elementwise
            and op.opcode not in ("parameter", "get-tuple-element", "fusion", "call", "while")
            and all(self._is_constant(computation, operand) for operand in op.operands)
        )

    def _is_kernel_parameter(self, result: _Result, op: Instruction) -> bool:
        """Returns True if a computation is called with a kernel as a parameter."""
        if result.computation == self.module.entry:
            return True
        if result.computation not in self.callers:
            return False
        caller_name, caller = self.callers[result.computation]
        if caller.opcode == "while":
            if result.element is None or not self._is_invariant(caller, result.element):
                return False
            return self.is_kernel(_Result(caller_name, caller.operands[0], result.element))
        if caller.opcode not in ("fusion", "call", "async-start"):
            return False
        operand = caller.operands[_number(_PARAMETER, op)]
        return self.is_kernel(_Result(caller_name, operand, result.element))

    def _is_kernel_of_loop(self, result: _Result, loop: Instruction) -> bool:
        """Returns True if a loop leaves an element, a kernel, as it is."""
        if result.element is None or not self._is_invariant(loop, result.element):
            return False
        return self.is_kernel(_Result(result.computation, loop.operands[0], result.element))

    def _is_invariant(self, loop: Instruction, element: int) -> bool:
        """Returns True if each pass of a loop returns an element as it got it."""
        body = self.module.computations[loop.called[0]]
        op = body[root_of(body).operands[element]]
        while op.opcode in _COPIES:
            op = body[op.operands[0]]
        is_element = op.opcode == "get-tuple-element" and _number(_INDEX, op) == element
        return is_element and body[op.operands[0]].opcode == "parameter"


def _plain_scope(op: Instruction) -> str:
    """Returns the scope of an instruction, without the names that derivatives and remat add."""
    scope, _, _ = op.op_name.rpartition("/")  # without the primitive, which the compiler may change
    return _TRANSFORMS.sub("", scope)


def _number(pattern: re.Pattern[str], op: Instruction) -> int:
    """Returns the number that a pattern finds in an instruction."""
    match = pattern.search(op.text)
    if match is None:
        raise NotUnderstood(f"no number in {op.text[:100]}")
    return int(match[1])
