"""The product with W alone, which has a form for few rows of x on TPUs: those of decoding.

A training step multiplies thousands of rows by W, and codes become W within the product. With few
rows the TPU's compiler would write W first, in fp32 and in its own dtype: ten times the bytes of
codes, at every token. It forms W within the product again where x and the result have two axes and
stand between barriers, and where scales come by whole tiles (`lora_jax.core.base.finer`). Its
matrix units take no fewer than eight rows: zeros fill them up.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from lora_jax.core.base import finer, is_base, product
from lora_jax.core.types import BaseLike, EqnParams

Dims = tuple[tuple[int, ...], tuple[int, ...]]  # axes of x, axes of the weight
FEW = 256  # rows
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
    usual = functools.partial(_plain_dot, how)
    if not _has_few_rows(x, base, how):
        return usual(base, x)
    chosen = functools.partial(
        lax.platform_dependent, tpu=functools.partial(flat_dot, how), default=usual
    )
    # A choice would keep for the backward pass what its branches read: codes, layer by layer.
    out: jax.Array = jax.checkpoint(chosen)(base, x)
    return out


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
    result: jax.Array = lax.optimization_barrier(product(dot, finer(base), x))
    return result[:rows].reshape(*lead, *result.shape[1:])


def _has_few_rows(x: jax.Array, base: BaseLike, how: BaseDot) -> bool:
    """Returns True if x has few rows, its last axes are contracted, and W is no array."""
    if not is_base(base) or how.weight_first or how.batch[0] or how.params.get("out_sharding"):
        return False
    first = x.ndim - len(how.contract[0])
    is_last = how.contract[0] == tuple(range(first, x.ndim))
    placed = any(part is not None for part in jax.typeof(x).sharding.spec)
    return is_last and not placed and math.prod(x.shape[:first]) <= FEW
