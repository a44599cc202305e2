"""The FLOPs of a function's products, counted in its jaxpr, to compare with those of its HLO.

A jaxpr is the function as traced, before compilation: its shapes are global, and it has no work
added by the partitioner.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from lora_jax.adapt.eqns import (
    AnyJaxpr,
    kernel_of,
    opened,
    scan_of,
    scope_of,
    shard_map_of,
)
from lora_jax.adapt.needed import needed_equations
from lora_jax.core.extend import ClosedJaxpr, Jaxpr, JaxprEqn
from lora_jax.models.decoder.dispatch import UNEVEN
from train.plan.hlo.kernels import KernelCall, kernel_flops
from train.plan.hlo.kernels import kernel_of as listed
from train.plan.hlo.products import pairs_along

_RUN_ONCE = {"jit", "closed_call", "core_call", "remat2", "checkpoint"}
_RUN_ONCE |= {"custom_jvp_call", "custom_vjp_call", "few_rows"}


class Count(NamedTuple):
    """The work of one call.

    Attributes:
      flops: FLOPs of matrix products and convolutions, on all devices together.
      exact: False if the jaxpr does not say how often a part runs (a `while`, a kernel that
        `train.plan.hlo.kernels` does not list); such a part counts once.
    """

    flops: int
    exact: bool = True


def count_flops(jaxpr: AnyJaxpr, scope: str = "") -> Count:
    """Counts two FLOPs for each multiplication of a product or a convolution.

    The body of a scan counts once per iteration, a conditional as its costliest branch (but for an
    uneven choice of experts not at all), and the body of a `shard_map` once per device of its
    manual axes. Each row of a ragged product counts once, with its own group.

    Args:
      jaxpr: the result of ``jax.make_jaxpr(f)(*args)`` or ``jax.jit(f).trace(*args).jaxpr``.
      scope: the names of the scopes that the jaxpr stands in.

    Returns:
      The count over the whole mesh.
    """
    inner, _ = opened(jaxpr)
    # Compilers leave out equations that no output depends on.
    needed = needed_equations(inner, (True,) * len(inner.outvars))
    return _sum(_equation_count(eqn, scope) for eqn, _, _ in needed.equations)


def _equation_count(eqn: JaxprEqn, scope: str) -> Count:
    name = eqn.primitive.name
    scope = f"{scope}/{scope_of(eqn)}"
    if name in _PRODUCTS:
        return Count(_PRODUCTS[name](eqn))
    if name == "scan":
        scan = scan_of(eqn)
        return _times(scan.length, count_flops(scan.body, scope))
    if name == "shard_map":
        shard = shard_map_of(eqn)
        devices = math.prod(shard.mesh.shape[axis] for axis in shard.manual_axes)
        return _times(devices, count_flops(shard.body, scope))
    if (kernel := kernel_of(eqn)) and listed(call := _call(kernel.name, scope, eqn)):
        return Count(kernel_flops(call))
    parts = [count_flops(inner, scope) for inner in _jaxprs(eqn)]
    if name == "cond" and UNEVEN in scope:
        return Count(0)
    if name == "cond":
        return Count(max(part.flops for part in parts), all(part.exact for part in parts))
    total = _sum(parts)
    return Count(total.flops, total.exact and (name in _RUN_ONCE or total.flops == 0))


def _call(name: str, scope: str, eqn: JaxprEqn) -> KernelCall:
    """Returns a kernel's call as its table takes it."""
    arrays: list[Any] = [atom.aval for atom in eqn.invars]
    return KernelCall(name, scope, tuple((_hlo_dtype(x.dtype.name), x.shape) for x in arrays))


def _hlo_dtype(dtype: str) -> str:
    """Returns a dtype's name as HLO has it: "bf16", "f32", "s8"."""
    for long, short in (("bool", "pred"), ("float", "f"), ("uint", "u"), ("int", "s")):
        dtype = dtype.replace(long, short)
    return dtype


def _jaxprs(eqn: JaxprEqn) -> Iterator[AnyJaxpr]:
    """Yields the jaxprs among an equation's parameters, whatever their names."""
    for value in eqn.params.values():
        for one in value if isinstance(value, tuple | list) else (value,):
            if isinstance(one, ClosedJaxpr | Jaxpr):
                yield one


def _sum(parts: Sequence[Count] | Iterator[Count]) -> Count:
    flops, exact = 0, True
    for part in parts:
        flops, exact = flops + part.flops, exact and part.exact
    return Count(flops, exact)


def _times(n: int, part: Count) -> Count:
    return Count(n * part.flops, part.exact)


def _dot(eqn: JaxprEqn) -> int:
    (_, contracted), (_, batch) = eqn.params["dimension_numbers"]
    return _product(eqn, (*contracted, *batch))


def _ragged_dot(eqn: JaxprEqn) -> int:
    numbers = eqn.params["ragged_dot_dimension_numbers"]
    (_, contracted), (_, batch) = numbers.dot_dimension_numbers
    return _product(eqn, (*contracted, *batch, *numbers.rhs_group_dimensions))


def _product(eqn: JaxprEqn, shared: Sequence[int]) -> int:
    """Counts a product's FLOPs: the left operand's size times the right one's unshared axes."""
    left, right = (_shape(operand) for operand in eqn.invars[:2])
    return 2 * math.prod(left) * math.prod(n for i, n in enumerate(right) if i not in shared)


def _convolution(eqn: JaxprEqn) -> int:
    """Counts two FLOPs for each pair of a kernel element and an input that it multiplies."""
    of_left, of_right, of_result = eqn.params["dimension_numbers"]
    left, right = (_shape(operand) for operand in eqn.invars)
    result = _shape(eqn.outvars[0])
    total = result[of_result[0]] * result[of_result[1]] * right[of_right[1]]
    windows = zip(
        *(eqn.params[name] for name in ("window_strides", "lhs_dilation", "rhs_dilation")),
        (before for before, _ in eqn.params["padding"]),
        strict=True,
    )
    for axis, (stride, hole, spread, before) in enumerate(windows, start=2):
        total *= pairs_along(
            left[of_left[axis]],
            right[of_right[axis]],
            result[of_result[axis]],
            stride=stride,
            hole=hole,
            spread=spread,
            before=before,
        )
    return 2 * total


def _shape(atom: Any) -> tuple[int, ...]:
    return atom.aval.shape


_PRODUCTS: dict[str, Callable[[JaxprEqn], int]] = {
    "dot_general": _dot,
    "ragged_dot_general": _ragged_dot,
    "conv_general_dilated": _convolution,
}
