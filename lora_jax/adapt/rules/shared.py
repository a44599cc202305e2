"""One product xA for all weights that multiply the very same x: q, k and v; gate and up."""

import math
from collections.abc import Hashable, Sequence

import jax
import jax.numpy as jnp
from jax import lax

from lora_jax.adapt.interpreter import Use
from lora_jax.core.extend import varies_over
from lora_jax.core.factored import Factored
from lora_jax.core.few_rows import Dims
from lora_jax.core.names import FACTORS
from lora_jax.core.product import ProductCall, is_dropped, is_sharded, scaled_product


def shared_product(
    use: Use, side: int, x: jax.Array, weight: Factored, contract: Dims
) -> jax.Array | None:
    """Returns s·xA of a weight, cut out of one product for all weights that x meets in a jaxpr.

    That product reads x once, and so does its derivative, which sums the cotangents of x as well.
    But the A's are copied for it: it pays where x has many rows.

    Args:
      use: the product of x and the weight.
      side: side of x.
      x: the activation as A is to read it.
      weight: the weight.
      contract: axes of x and of the weight.

    Returns:
      s·xA, see `scaled_product`; None where the weight has to have a product of its own.
    """
    products = use.inputs.products
    if id(use.eqn) in products:
        return products.pop(id(use.eqn))
    form = _form(weight, contract[1])
    if form is None or is_sharded(x):
        return None
    group = {id(use.eqn): weight}
    for eqn, place in use.inputs.others(use.eqn, side):
        other = use.inputs.ahead(eqn.invars[1 - place])
        if isinstance(other, Factored):
            other = other.seen_by("product")
        if eqn.params["precision"] != use.params["precision"] or not isinstance(other, Factored):
            continue
        if _form(other, eqn.params["dimension_numbers"][0][1 - place]) == form:
            group[id(eqn)] = other
    ranks = [each.rank for each in group.values()]
    how = ProductCall(contract, params={"precision": use.params["precision"]})
    rows = math.prod(x.shape[axis] for axis in how.x_free(x))
    if (len(ranks) - 1) * rows <= 2 * sum(ranks):  # rows not read again; rows written and read
        return None
    with jax.named_scope(FACTORS):
        a = jnp.concatenate([each.a.astype(x.dtype) for each in group.values()])
        scales = [jnp.broadcast_to(each.scales, (each.rank,)) for each in group.values()]
        ones = jnp.ones((), scales[0].dtype)
        joint = weight.replace(a=a, scale=ones, lambda_d=jnp.concatenate(scales))
        z = scaled_product(x, joint, how, of=len(ranks))
        products.update(zip(group, lax.split(z, ranks, axis=z.ndim - 1), strict=True))
    return products.pop(id(use.eqn))


def _form(weight: Factored, contract: Sequence[int]) -> Hashable | None:
    """Returns a key that is equal for weights that can share a product; None where one cannot.

    It cannot where x is dropped out for it, where examples have adapters of their own, where A
    belongs to a stack or follows from other arrays, and in the mirror image.
    """
    if not weight.parts or weight.is_compact or is_dropped(weight) or weight.rows is not None:
        return None
    ins, a = weight.axes("in"), weight.parts["a"]
    if weight.axes("batch") or set(contract) != set(ins) or is_sharded(a):
        return None
    if not jnp.issubdtype(weight.base.dtype, jnp.floating):
        return None
    order = tuple(ins.index(axis) for axis in contract)
    return order, weight.sizes("in"), varies_over(a)
