"""The mesh axes that each dimension of a traced value is sharded over, as the partitioner has them.

A jaxpr names the shardings of its arguments and of some values. For the others, the rules here
follow the partitioner's: what an equation reads decides, the largest operand first; an axis is
used once in a value.
"""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jax.sharding import NamedSharding

from lora_jax.adapt.eqns import type_of
from lora_jax.core.base import is_of_4_bits
from lora_jax.core.extend import JaxprEqn

# The mesh axes of each dimension of a value.
Axes = tuple[tuple[str, ...], ...]

# They keep a dimension's axes though its size changes.
_RESIZING = frozenset({"pad", "slice", "concatenate", "split", "dynamic_slice", "rev"})


def axes_of(sharding: Any, ndim: int) -> Axes:
    """Returns the axes of an array's sharding; of another kind than `NamedSharding`, none.

    Axes of one device split nothing.
    """
    if not isinstance(sharding, NamedSharding):
        return ((),) * ndim
    sizes, spec = sharding.mesh.shape, tuple(sharding.spec)
    entries = [(entry,) if isinstance(entry, str) else tuple(entry or ()) for entry in spec]
    named = [tuple(axis for axis in entry if sizes[axis] > 1) for entry in entries]
    return (*named, *((),) * (ndim - len(named)))


def bytes_of_part(aval: Any, axes: Axes, mesh: Mapping[str, int]) -> int:
    """Returns the bytes that one device has of a value; none of one in its host's memory."""
    if not hasattr(aval, "shape"):
        return 0
    sizes = [
        -(-size // math.prod(mesh.get(axis, 1) for axis in named))
        for size, named in zip(aval.shape, axes, strict=True)
    ]
    if "Host" in str(getattr(aval, "memory_space", "")):
        return 0
    n: int = math.prod(sizes)
    return -(-n // 2) if is_of_4_bits(aval) else n * int(aval.dtype.itemsize)


def merged(shape: Sequence[int], operands: Sequence[Axes]) -> Axes:
    """Returns the axes of a value of `shape`, of operands laid out as it is, in their order."""
    used: set[str] = set()
    dims: list[tuple[str, ...]] = [()] * len(shape)
    for axes in operands:
        for at, named in enumerate(axes):
            new = tuple(axis for axis in named if axis not in used)
            if shape[at] > 1 and new:
                dims[at] += new
                used |= set(new)
    return tuple(dims)


def output_axes(eqn: JaxprEqn, operands: Sequence[Axes]) -> list[Axes]:
    """Returns the axes of an equation's outputs, of those of its operands."""
    if rule := _RULES.get(eqn.primitive.name):
        return [rule(eqn, operands)]
    return [_alike(eqn, operands, type_of(out).shape) for out in eqn.outvars]


def _alike(eqn: JaxprEqn, operands: Sequence[Axes], shape: tuple[int, ...]) -> Axes:
    """Returns the axes of a value whose dimensions are those of the operands of its rank."""
    resizes = eqn.primitive.name in _RESIZING
    shapes = [getattr(type_of(atom), "shape", ()) for atom in eqn.invars]
    by_size = sorted(
        (at for at in range(len(shapes)) if len(shapes[at]) == len(shape)),
        key=lambda at: -math.prod(shapes[at]),
    )
    taken = [
        tuple(
            named if resizes or size == own else ()
            for named, size, own in zip(operands[at], shapes[at], shape, strict=True)
        )
        for at in by_size
    ]
    return merged(shape, taken)


def _transposed(eqn: JaxprEqn, operands: Sequence[Axes]) -> Axes:
    return tuple(operands[0][at] for at in eqn.params["permutation"])


def _broadcast(eqn: JaxprEqn, operands: Sequence[Axes]) -> Axes:
    shape, given = type_of(eqn.outvars[0]).shape, type_of(eqn.invars[0]).shape
    dims: list[tuple[str, ...]] = [()] * len(shape)
    for at, to in enumerate(eqn.params["broadcast_dimensions"]):
        if given[at] == shape[to]:
            dims[to] = operands[0][at]
    return tuple(dims)


def _reduced(eqn: JaxprEqn, operands: Sequence[Axes]) -> Axes:
    gone = eqn.params["axes"]
    return tuple(named for at, named in enumerate(operands[0]) if at not in gone)


def _squeezed(eqn: JaxprEqn, operands: Sequence[Axes]) -> Axes:
    gone = eqn.params["dimensions"]
    return tuple(named for at, named in enumerate(operands[0]) if at not in gone)


def _constrained(eqn: JaxprEqn, operands: Sequence[Axes]) -> Axes:
    return axes_of(eqn.params["sharding"], type_of(eqn.outvars[0]).ndim)


def _reshaped(eqn: JaxprEqn, operands: Sequence[Axes]) -> Axes:
    """Reshapes: merged dimensions pass their axes on together, a split one to its first part."""
    given, shape = type_of(eqn.invars[0]).shape, type_of(eqn.outvars[0]).shape
    dims: list[tuple[str, ...]] = [()] * len(shape)
    if 0 in given:
        return tuple(dims)
    at = to = 0
    while at < len(given) and to < len(shape):
        first, before, after = to, given[at], shape[to]
        named = operands[0][at]
        while before != after:
            if before < after:
                at += 1
                before, named = before * given[at], named + operands[0][at]
            else:
                to += 1
                after *= shape[to]
        wide = next((n for n in range(first, to + 1) if shape[n] > 1), first)
        dims[wide] = named
        at, to = at + 1, to + 1
        while at < len(given) and given[at] == 1 and (to == len(shape) or shape[to] != 1):
            at += 1
        while to < len(shape) and shape[to] == 1 and (at == len(given) or given[at] != 1):
            to += 1
    return tuple(dims)


def _product(eqn: JaxprEqn, operands: Sequence[Axes]) -> Axes:
    """Takes the free axes of the operand with most free elements first: those of activations."""
    contract, batch = eqn.params["dimension_numbers"]
    shapes = [type_of(atom).shape for atom in eqn.invars]
    free = [
        [d for d in range(len(shapes[side])) if d not in (*contract[side], *batch[side])]
        for side in (0, 1)
    ]
    places = [*batch[0], *free[0]], [*batch[1], *free[1]]
    out = type_of(eqn.outvars[0]).shape
    n, n_left = len(batch[0]), len(free[0])
    blank: Axes = ((),) * len(out)

    def put(side: int) -> Axes:
        named = [operands[side][d] for d in places[side]]
        start = n if side == 0 else n + n_left
        return (*named[:n], *blank[n:start], *named[n:], *blank[start + len(named) - n :])

    sides = sorted((0, 1), key=lambda side: -math.prod(shapes[side][d] for d in free[side]))
    return merged(out, [put(side) for side in sides])


def _ragged(eqn: JaxprEqn, operands: Sequence[Axes]) -> Axes:
    out = type_of(eqn.outvars[0])
    if out.ndim != 2:
        return ((),) * int(out.ndim)
    return merged(out.shape, [(operands[0][0], ()), ((), operands[1][-1])])


def _gathered(eqn: JaxprEqn, operands: Sequence[Axes]) -> Axes:
    """Gathers: dimensions from the indices have the indices' axes, the others the table's."""
    numbers, sizes = eqn.params["dimension_numbers"], eqn.params["slice_sizes"]
    out, table = type_of(eqn.outvars[0]).shape, type_of(eqn.invars[0]).shape
    gone = {*numbers.collapsed_slice_dims, *getattr(numbers, "operand_batching_dims", ())}
    kept = [at for at in range(len(table)) if at not in gone]
    of_table = dict(zip(numbers.offset_dims, kept, strict=True))
    indices = iter(operands[1][:-1])
    blank: Axes = ((),) * len(out)
    chosen, brought = [*blank], [*blank]
    for at in range(len(out)):
        if at not in of_table:
            chosen[at] = next(indices, ())
        elif sizes[of_table[at]] == table[of_table[at]]:
            brought[at] = operands[0][of_table[at]]
    return merged(out, [tuple(chosen), tuple(brought)])


_RULES: dict[str, Callable[[JaxprEqn, Sequence[Axes]], Axes]] = {
    "transpose": _transposed,
    "broadcast_in_dim": _broadcast,
    "squeeze": _squeezed,
    "reshape": _reshaped,
    "sharding_constraint": _constrained,
    "dot_general": _product,
    "ragged_dot_general": _ragged,
    "gather": _gathered,
    **dict.fromkeys(
        (f"reduce_{name}" for name in ("sum", "max", "min", "and", "or", "prod")), _reduced
    ),
    **dict.fromkeys(("argmax", "argmin"), _reduced),
}


def gathered_operands(eqn: JaxprEqn, operands: Sequence[Axes], out: Axes) -> list[Axes | None]:
    """Returns, for each operand of a product, the axes that are left once it is gathered.

    An axis that the result has from the other operand, this one is gathered over. None of an
    operand that stays as it is.
    """
    if eqn.primitive.name == "ragged_dot_general":
        used = {*itertools.chain(*out)} - {*operands[1][-1]}
        return [None, _without(operands[1], used)]
    contract, batch = eqn.params["dimension_numbers"]
    n = len(batch[0])
    left: list[Axes | None] = []
    start = n
    for side in (0, 1):
        axes = operands[side]
        free = [d for d in range(len(axes)) if d not in (*contract[side], *batch[side])]
        own = {d: out[start + at] for at, d in enumerate(free)}
        own |= {d: out[at] for at, d in enumerate(batch[side])}
        start += len(free)
        used = {*itertools.chain(*out)}
        kept = tuple(
            tuple(a for a in named if a in own.get(d, ()) or a not in used)
            for d, named in enumerate(axes)
        )
        left.append(None if kept == axes else kept)
    return left


def _without(axes: Axes, used: set[str]) -> Axes | None:
    kept = tuple(tuple(axis for axis in named if axis not in used) for named in axes)
    return None if kept == axes else kept
