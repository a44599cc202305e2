"""The product with W alone, by a kernel for few rows of x, as in decoding, on TPUs.

A training step multiplies thousands of rows by W, and codes become W within the product. With few
rows the TPU's compiler would write W first, at every token. It forms W within the product again
where x and the result have two axes and stand between barriers. Its matrix units take no fewer than
eight rows: zeros fill them up.

Where W is a layer of a stack, codes may have a kernel that reads them there (`rows_kernel`): on one
device, whose program a kernel may stand in, up to the kernel's number of rows.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from lora_jax.core.base import is_base, product, stack_member
from lora_jax.core.rows_call import RowsCall, call_rows
from lora_jax.core.types import BaseLike, EqnParams

Dims = tuple[tuple[int, ...], tuple[int, ...]]  # axes of x, axes of the weight
FEW = 256  # rows
KERNEL_ROWS = 32  # the most that a kernel is given
_TILE = 8  # rows that a TPU holds side by side


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
