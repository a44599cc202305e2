"""Counts the FLOPs of a function's products in its jaxpr, as a check of those in its HLO.

A jaxpr is the function as traced, before compilation: its shapes are global, and it has no work
added by the partitioner.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from lora_jax.adapt.eqns import (
    AnyJaxpr,
    jaxpr_and_consts,
    read_kernel,
    read_scan,
    read_shard_map,
    scope_of,
)
from lora_jax.adapt.needed import needed_equations
from lora_jax.core.extend import ClosedJaxpr, Jaxpr, JaxprEqn
from lora_jax.core.names import RAGGED_CALL
from lora_jax.core.turns import TURNS
from lora_jax.models.decoder.dispatch import UNEVEN
from train.plan.hlo.kernels import KernelCall, grouped_share, kernel_flops
from train.plan.hlo.kernels import kernel_of as listed_kernel
from train.plan.hlo.products import pairs_along

_RUN_ONCE = {"jit", "closed_call", "core_call", "remat2", "checkpoint"}
_RUN_ONCE |= {"custom_jvp_call", "custom_vjp_call", "few_rows", RAGGED_CALL}


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

    The body of a scan counts once per iteration, a conditional as its costliest branch, and the
    body of a `shard_map` once per device of its manual axes. Each row of a ragged product counts
    once, with its own group. For an uneven choice of experts, a conditional counts as its cheapest
    branch, and a `while` not at all.

    Args:
      jaxpr: the result of ``jax.make_jaxpr(f)(*args)`` or ``jax.jit(f).trace(*args).jaxpr``.
      scope: the names of the scopes that the jaxpr stands in.

    Returns:
      The count over the whole mesh.
    """
    inner, _ = jaxpr_and_consts(jaxpr)
    # Compilers leave out equations that no output depends on.
    needed = needed_equations(inner, (True,) * len(inner.outvars))
    return _sum_counts([_equation_count(eqn, scope) for eqn, _, _ in needed.equations])


def _equation_count(eqn: JaxprEqn, scope: str) -> Count:
    """Counts the FLOPs of an equation and of its inner jaxprs; see `count_flops`."""
    name = eqn.primitive.name
    scope = f"{scope}/{scope_of(eqn)}"
    if name in _FLOPS_OF_PRIMITIVE:
        share = grouped_share(scope) if name == "ragged_dot_general" else 1
        return Count(round(_FLOPS_OF_PRIMITIVE[name](eqn) * share))
    if name == "scan":
        scan = read_scan(eqn)
        return _multiply_count(scan.length, count_flops(scan.body, scope))
    if name == "shard_map":
        shard = read_shard_map(eqn)
        n_devices = math.prod(shard.mesh.shape[axis] for axis in shard.manual_axes)
        return _multiply_count(n_devices, count_flops(shard.body, scope))
    kernel = read_kernel(eqn)
    if kernel:
        call = _kernel_call(kernel.name, scope, eqn)
        if listed_kernel(call):
            return Count(kernel_flops(call))
    inner_counts = [count_flops(inner, scope) for inner in inner_jaxprs(eqn)]
    if name == "cond" and UNEVEN in scope:  # an even choice of experts takes the cheapest branch
        return min(inner_counts, key=lambda count: count.flops)
    if name == "cond":
        costliest_flops = max(count.flops for count in inner_counts)
        return Count(costliest_flops, exact=all(count.exact for count in inner_counts))
    if name in ("while", TURNS) and UNEVEN in scope:  # it has no turns then
        return Count(0)
    total = _sum_counts(inner_counts)
    runs_known_times = name in _RUN_ONCE or total.flops == 0
    return Count(total.flops, exact=total.exact and runs_known_times)


def _kernel_call(name: str, scope: str, eqn: JaxprEqn) -> KernelCall:
    """Returns the record of a kernel's call for the table of kernels."""
    avals: list[Any] = [atom.aval for atom in eqn.invars]
    operands = tuple((_hlo_dtype(aval.dtype.name), aval.shape) for aval in avals)
    return KernelCall(name, scope, operands)


def _hlo_dtype(dtype: str) -> str:
    """Returns a dtype's name as HLO has it: "bf16", "f32", "s8"."""
    hlo_names = {"bool": "pred", "float": "f", "uint": "u", "int": "s"}
    for numpy_name, hlo_name in hlo_names.items():
        dtype = dtype.replace(numpy_name, hlo_name)
    return dtype


def inner_jaxprs(eqn: JaxprEqn) -> Iterator[AnyJaxpr]:
    """Yields the jaxprs among an equation's parameters, whatever their names."""
    for value in eqn.params.values():
        items = value if isinstance(value, tuple | list) else (value,)
        for item in items:
            if isinstance(item, ClosedJaxpr | Jaxpr):
                yield item


def _sum_counts(counts: Sequence[Count]) -> Count:
    flops = sum(count.flops for count in counts)
    return Count(flops, exact=all(count.exact for count in counts))


def _multiply_count(n: int, count: Count) -> Count:
    return Count(n * count.flops, count.exact)


def _dot_flops(eqn: JaxprEqn) -> int:
    (_, contracted), (_, batch) = eqn.params["dimension_numbers"]
    return _product_flops(eqn, (*contracted, *batch))


def _ragged_dot_flops(eqn: JaxprEqn) -> int:
    dimension_numbers = eqn.params["ragged_dot_dimension_numbers"]
    (_, contracted), (_, batch) = dimension_numbers.dot_dimension_numbers
    return _product_flops(eqn, (*contracted, *batch, *dimension_numbers.rhs_group_dimensions))


def _product_flops(eqn: JaxprEqn, shared_axes: Sequence[int]) -> int:
    """Counts a product's FLOPs: 2 × the left operand's size × the right operand's free axes."""
    left_shape, right_shape = (_shape_of(operand) for operand in eqn.invars[:2])
    result_sizes = [size for axis, size in enumerate(right_shape) if axis not in shared_axes]
    return 2 * math.prod(left_shape) * math.prod(result_sizes)


def _convolution_flops(eqn: JaxprEqn) -> int:
    """Counts two FLOPs for each pair of a kernel element and an input that it multiplies."""
    # The axes of each array: batch and features (of a kernel out and in), and the spatial axes.
    input_axes, kernel_axes, result_axes = eqn.params["dimension_numbers"]
    input_shape, kernel_shape = (_shape_of(operand) for operand in eqn.invars)
    result_shape = _shape_of(eqn.outvars[0])
    n_pairs = result_shape[result_axes[0]] * result_shape[result_axes[1]]
    n_pairs *= kernel_shape[kernel_axes[1]]
    for spatial_axis, stride in enumerate(eqn.params["window_strides"]):
        axis = 2 + spatial_axis
        first_padding, _ = eqn.params["padding"][spatial_axis]
        n_pairs *= pairs_along(
            input_shape[input_axes[axis]],
            kernel_shape[kernel_axes[axis]],
            result_shape[result_axes[axis]],
            stride=stride,
            input_dilation=eqn.params["lhs_dilation"][spatial_axis],
            kernel_dilation=eqn.params["rhs_dilation"][spatial_axis],
            padding=first_padding,
        )
    return 2 * n_pairs


def _shape_of(atom: Any) -> tuple[int, ...]:
    return atom.aval.shape


_FLOPS_OF_PRIMITIVE: dict[str, Callable[[JaxprEqn], int]] = {
    "dot_general": _dot_flops,
    "ragged_dot_general": _ragged_dot_flops,
    "conv_general_dilated": _convolution_flops,
}
