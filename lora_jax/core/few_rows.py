"""The product with W alone, by a kernel for few rows of x, as in decoding, on TPUs.

A training step multiplies thousands of rows by W, and codes become W within the product. With few
rows the TPU's compiler would write W first, at every token. It forms W within the product again
where x and the result have two axes and stand between barriers. Its matrix units take no fewer than
eight rows: zeros fill them up.

Where W is a layer of a stack, codes may have a kernel that reads them there (`rows_kernel`): on one
device, whose program a kernel may stand in, up to the kernel's number of rows.

The kernel's call is a primitive that platforms lower each their way. A program for one TPU has the
kernel. XLA cannot partition a kernel, so a program for several has the form that XLA compiles for
TPUs, and other platforms have the plain product. Derivatives are those of the product, and so is a
mapped call, unless the rows alone are mapped.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from lora_jax.core.base import is_base, product, stack_member
from lora_jax.core.extend import Primitive, ad, batching, jaxpr_as_fun, mlir
from lora_jax.core.types import BaseLike, EqnParams

Dims = tuple[tuple[int, ...], tuple[int, ...]]  # axes of x, axes of the weight
FEW = 256  # rows
KERNEL_ROWS = 32  # the most that a kernel is given
_TILE = 8  # rows that a TPU holds side by side
Product = Callable[[BaseLike, jax.Array], jax.Array]


@dataclasses.dataclass(frozen=True, eq=False)
class RowsCall:
    """The forms of one product of W and x, each a function of both.

    Attributes:
      kernel: the form for one TPU.
      plain: the form for other platforms.
      flat: the form for several TPUs.
      differentiable: the form that is differentiated.
      mapped: the form where x has a further axis in front.
    """

    kernel: Product
    plain: Product
    flat: Product
    differentiable: Product
    mapped: Product


def call_rows(call: RowsCall, base: BaseLike, x: jax.Array) -> jax.Array:
    """Returns xW, in the form of the platform that the program is lowered for."""
    leaves, tree = jax.tree.flatten((base, x))
    jaxpr = jax.make_jaxpr(_leaf_product(tree, call.plain))(*leaves)
    out: jax.Array = _CALL.bind(*leaves, jaxpr=jaxpr, call=call, tree=tree)
    return out


_CALL = Primitive("few_rows")


def _leaf_product(tree: Any, product: Product) -> Callable[..., jax.Array]:
    return lambda *leaves: product(*jax.tree.unflatten(tree, leaves))


def _run_now(*leaves: jax.Array, **how: Any) -> Any:
    return jax.jit(lambda *leaves: _CALL.bind(*leaves, **how))(*leaves)


def _abstract(*_: Any, jaxpr: Any, **__: Any) -> Any:
    return jaxpr.out_avals[0]


def _lower(ctx: Any, *leaves: Any, jaxpr: Any, **_: Any) -> Any:
    return mlir.lower_fun(jaxpr_as_fun(jaxpr), multiple_results=True)(ctx, *leaves)


def _lower_for_tpu(ctx: Any, *leaves: Any, call: RowsCall, tree: Any, **_: Any) -> Any:
    # Inside shard_map there is a mesh rather than a number of devices.
    devices = getattr(ctx.module_context.axis_context, "num_devices", None)
    product = _leaf_product(tree, call.kernel if devices == 1 else call.flat)
    return mlir.lower_fun(product, multiple_results=False)(ctx, *leaves)


def _differentiate(
    primals: Sequence[Any], tangents: Sequence[Any], *, call: RowsCall, tree: Any, **_: Any
) -> Any:
    live = [at for at, tangent in enumerate(tangents) if type(tangent) is not ad.Zero]

    def product(*some: jax.Array) -> jax.Array:
        leaves = [*primals]
        for at, leaf in zip(live, some, strict=True):
            leaves[at] = leaf
        return _leaf_product(tree, call.differentiable)(*leaves)

    return jax.jvp(product, [primals[at] for at in live], [tangents[at] for at in live])


def _map(
    leaves: Sequence[Any], axes: Sequence[int | None], *, call: RowsCall, tree: Any, **_: Any
) -> tuple[Any, int]:
    *of_base, x_axis = axes
    if x_axis is None or any(axis is not None for axis in of_base):
        product = _leaf_product(tree, call.differentiable)
        return jax.vmap(product, tuple(axes))(*leaves), 0
    *base, x = leaves
    return _leaf_product(tree, call.mapped)(*base, jnp.moveaxis(x, x_axis, 0)), 0


_CALL.def_impl(_run_now)
_CALL.def_abstract_eval(_abstract)
mlir.register_lowering(_CALL, _lower)
mlir.register_lowering(_CALL, _lower_for_tpu, platform="tpu")
ad.primitive_jvps[_CALL] = _differentiate
batching.primitive_batchers[_CALL] = _map


class BaseDot(NamedTuple):
    """The way to multiply x by W; see `lora_jax.core.product.dot`."""

    contract: Dims
    batch: Dims = ((), ())
    weight_first: bool = False
    params: EqnParams = {}


def base_dot(x: jax.Array, base: BaseLike, how: BaseDot) -> jax.Array:
    """Returns xW, or Wᵀx where the weight comes first, as `lax.dot_general` does.

    Args:
      x: any array.
      base: W.
      how: the axes, their order, and the parameters of `lax.dot_general`.
    """
    if not _has_few_rows(x, base, how):
        return _plain_dot(how, base, x)
    if (call := _rows_call(x, base, how)) is not None:
        return call_rows(call, base, x)
    return _dot_by_platform(how, base, x)


def _dot_by_platform(how: BaseDot, base: BaseLike, x: jax.Array) -> jax.Array:
    usual, flat = (functools.partial(dot, how) for dot in (_plain_dot, flat_dot))
    chosen = functools.partial(lax.platform_dependent, tpu=flat, default=usual)
    # A choice would keep for the backward pass what its branches read: codes, layer by layer.
    out: jax.Array = jax.checkpoint(chosen, prevent_cse=False)(base, x)
    return out


def _rows_call(x: jax.Array, base: BaseLike, how: BaseDot) -> RowsCall | None:
    """Returns the call of the kernel of W's stack, if W is a layer of one that has a kernel."""
    member = stack_member(base)
    if member is None or how.contract != ((x.ndim - 1,), (0,)) or len(base.shape) != 2:
        return None
    rows = jax.ShapeDtypeStruct((math.prod(x.shape[:-1]), x.shape[-1]), x.dtype)
    kernel = member[0].stack.rows_kernel(rows, member[1], how.params)
    if kernel is None:
        return None

    def run_kernel(base: BaseLike, x: jax.Array) -> jax.Array:
        at, _ = stack_member(base) or member  # the same, of the leaves that the call is given
        out: jax.Array = kernel(at.stack, at.index, x.reshape(rows.shape))
        return out.reshape(*x.shape[:-1], -1)

    def map_rows(base: BaseLike, x: jax.Array) -> jax.Array:
        return base_dot(x, base, how._replace(contract=((x.ndim - 1,), (0,))))

    plain, flat, by_platform = (
        functools.partial(dot, how) for dot in (_plain_dot, flat_dot, _dot_by_platform)
    )
    return RowsCall(run_kernel, plain, flat, by_platform, map_rows)


def _plain_dot(how: BaseDot, base: BaseLike, x: jax.Array) -> jax.Array:
    def dot(w: jax.Array, x: jax.Array) -> jax.Array:
        if how.weight_first:
            return lax.dot_general(w, x, (how.contract[::-1], how.batch[::-1]), **how.params)
        return lax.dot_general(x, w, (how.contract, how.batch), **how.params)

    return product(dot, base, x)


def flat_dot(how: BaseDot, base: BaseLike, x: jax.Array) -> jax.Array:
    """Returns xW in the form for TPUs: at least eight rows of x, between barriers."""
    first = x.ndim - len(how.contract[0])
    lead, rows = x.shape[:first], math.prod(x.shape[:first])
    x = x.reshape(rows, *x.shape[first:])
    x = jnp.pad(x, [(0, max(0, _TILE - rows)), *[(0, 0)] * (x.ndim - 1)])

    def dot(w: jax.Array, x: jax.Array) -> jax.Array:
        dims = ((tuple(range(1, x.ndim)), how.contract[1]), ((), ()))
        return lax.dot_general(x, w, dims, **how.params)

    x = lax.optimization_barrier(x)
    result: jax.Array = lax.optimization_barrier(product(dot, base, x))
    return result[:rows].reshape(*lead, *result.shape[1:])


def _has_few_rows(x: jax.Array, base: BaseLike, how: BaseDot) -> bool:
    """Returns True if x has few rows, its last axes are contracted, and W is no array."""
    if not is_base(base) or how.weight_first or how.batch[0] or how.params.get("out_sharding"):
        return False
    first = x.ndim - len(how.contract[0])
    is_last = how.contract[0] == tuple(range(first, x.ndim))
    placed = any(part is not None for part in jax.typeof(x).sharding.spec)
    return is_last and not placed and math.prod(x.shape[:first]) <= FEW
