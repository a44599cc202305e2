"""The product of two adapted weights, which is a weight itself.

    (W1 + s1·A1B1)(W2 + s2·A2B2) = W1W2 + s1·A1(B1W2') + s2·(W1A2)B2        W2' = W2 + s2·A2B2

so only W1W2, which the function asks for, is formed at that size. The factors of the result are
[s1·A1 | s2·W1A2] and [B1W2'; B2]: its rank is the sum of the two ranks.
"""

import dataclasses
import functools
import string
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from lora_jax.adapt import eqns
from lora_jax.adapt.interpreter import Interpreter, Rule, Use
from lora_jax.adapt.rules.arithmetic import has_more, mirrored, scale_in_a
from lora_jax.adapt.rules.products import contracted_role, dot_general, match_unit_roles
from lora_jax.core.axes import Label
from lora_jax.core.base import as_array
from lora_jax.core.factored import Factored
from lora_jax.core.magnitude import wide
from lora_jax.core.parts import RANK
from lora_jax.core.product import is_dropped, is_sharded
from lora_jax.core.types import Outcome

_SIDES: tuple[Label, Label] = ("out", "in")  # what a product contracts of the left, of the right

Lettered = tuple[jax.Array, list[str]]  # an array, with a letter for each of its axes


def _dot_general(interpreter: Interpreter, use: Use) -> Outcome:
    """Multiplies two weights to a weight; where that has no form, merges one of the two."""
    if not all(isinstance(value, Factored) for value in use.values):
        return dot_general(interpreter, use)
    pairs = zip(*use.params["dimension_numbers"], strict=True)
    seen = [_facing(*each) for each in zip(use.values, pairs, _SIDES, strict=True)]
    left, right = seen
    if left is not None and right is not None and _has_form(use, left, right):
        return [_chained(use, left, right)]
    order = sorted((0, 1), key=lambda place: _may_merge(use.values[place]))
    kept = next((place for place in order if seen[place] is not None), None)
    if kept is None:
        return None
    values = list(use.values)
    values[1 - kept] = interpreter.merged(values[1 - kept], use.name, use.eqn)
    return dot_general(interpreter, dataclasses.replace(use, values=values))


def _may_merge(weight: Factored) -> bool:
    """Returns True if a weight may be merged; one that may not is the one to keep."""
    return weight.uses == "all" and weight.shift is None and not is_dropped(weight)


def _has_form(use: Use, left: Factored, right: Factored) -> bool:
    """Returns True if the product of two weights has factors."""
    both, dtype = (left, right), eqns.type_of(use.eqn.outvars[0]).dtype
    bases = [as_array(weight.base) for weight in both]
    return (
        not any(has_more(weight) or is_dropped(weight) for weight in both)
        and all(jnp.issubdtype(kind, jnp.floating) for kind in (dtype, *(b.dtype for b in bases)))
        and not any(map(is_sharded, bases))
    )


def _facing(weight: Factored, dims: Sequence[Sequence[int]], role: Label) -> Factored | None:
    """Returns the weight read so that a product contracts its axes of a role, and all of them.

    Args:
      weight: an operand.
      dims: the axes of it that are contracted, and those that are batched.
      role: "in" or "out".

    Returns:
      The weight; None where the product mixes its roles, or batches more than its stack.
    """
    contract, batch = map(tuple, dims)
    side = contracted_role(weight, contract) if weight.parts else None
    if side is None:
        return None
    weight = match_unit_roles(weight, side, contract, batch)
    is_whole = set(contract) == set(weight.axes(side)) and set(batch) <= set(weight.axes("batch"))
    if not is_whole:
        return None
    return weight if side == role else mirrored(weight)


def _part(weight: Factored, name: str, held: Sequence[str], rank: str) -> Lettered:
    """Returns a factor with the letters of its axes, given those of the weight's and its rank's."""
    places = weight.layout(name)
    return weight.parts[name], [rank if axis == RANK else held[axis] for axis in places]


def _chained(use: Use, left: Factored, right: Factored) -> Factored:
    """Returns the product; its axes are the shared stack's, then the left's, then the right's."""
    contract, batch = use.params["dimension_numbers"]
    letters = iter(string.ascii_letters)
    y, z = next(letters), next(letters)  # the ranks
    of_left, of_right = ([next(letters) for _ in weight.labels] for weight in (left, right))
    for ours, theirs in (contract, batch):
        for i, j in zip(ours, theirs, strict=True):
            of_right[j] = of_left[i]
    shared = [(of_left[axis], "batch") for axis in batch[0]]
    free = [
        (letter, label)
        for weight, names, axes in ((left, of_left, 0), (right, of_right, 1))
        for axis, (letter, label) in enumerate(zip(names, weight.labels, strict=True))
        if axis not in (*contract[axes], *batch[axes])
    ]
    names, labels = zip(*shared, *free, strict=True)
    (base,) = use.bind(use.bases)
    size = dict(zip(names, base.shape, strict=True))
    stack = [name for name, label in zip(names, labels, strict=True) if label == "batch"]
    rows, columns = (
        [name for name, label in zip(names, labels, strict=True) if label == role]
        for role in ("in", "out")
    )

    def times(one: Lettered, two: Lettered, out: Sequence[str], dtype: DTypeLike) -> Lettered:
        """Returns the product of two arrays, each with the letters of its axes, cast to a dtype."""
        spec = f"{''.join(one[1])},{''.join(two[1])}->{''.join(out)}"
        precision = use.params["precision"]
        arrays = (array.astype(dtype) for array, _ in (one, two))
        how = {"precision": precision, "preferred_element_type": wide(dtype)}
        return jnp.einsum(spec, *arrays, **how), [*out]

    def all_over(array: jax.Array, held: Sequence[str], out: Sequence[str]) -> jax.Array:
        """Returns an array as [stack…, rank, …], repeated along the stack's axes that it lacks."""
        order = [name for name in out if name in held]
        array = lax.transpose(array, [held.index(name) for name in order])
        array = lax.expand_dims(array, [i for i, name in enumerate(out) if name not in held])
        shape = [size.get(name, n) for name, n in zip(out, array.shape, strict=True)]
        return jnp.broadcast_to(array, shape).astype(kind)

    left, right = scale_in_a(left), scale_in_a(right)
    kind = functools.reduce(jnp.promote_types, [w.a.dtype for w in (left, right)], wide(base.dtype))
    a1, b1 = _part(left, "a", of_left, y), _part(left, "b", of_left, y)
    a2, b2 = _part(right, "a", of_right, z), _part(right, "b", of_right, z)
    w1, w2 = (as_array(left.base), of_left), (as_array(right.base), of_right)
    inner = times(b1, a2, [*stack, y, z], kind)
    b1w2 = times(b1, w2, [*stack, y, *columns], w2[0].dtype)[0].astype(kind)
    b1w2 += times(inner, b2, [*stack, y, *columns], kind)[0]
    w1a2 = times(w1, a2, [*stack, z, *rows], w1[0].dtype)[0].astype(kind)
    wide_a1, wide_b2 = all_over(*a1, [*stack, y, *rows]), all_over(*b2, [*stack, z, *columns])
    parts = {
        "a": jnp.concatenate([wide_a1, w1a2], axis=len(stack)),
        "b": jnp.concatenate([b1w2, wide_b2], axis=len(stack)),
        "scale": jnp.ones([size[name] for name in stack], jnp.float32),
    }
    return Factored(base, parts, labels, path=f"{left.path} @ {right.path}")


CHAIN_RULES: dict[str, Rule] = {"dot_general": _dot_general}
