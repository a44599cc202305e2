"""Products of two adapted weights, whose result is an adapted weight as well.

    (W1 + s1·A1B1)(W2 + s2·A2B2) = W1W2 + s1·A1(B1W2') + s2·(W1A2)B2        W2' = W2 + s2·A2B2

so only W1W2, which the function asks for, is formed at that size. The factors of the result are
[s1·A1 | s2·W1A2] and [B1W2'; B2]: its rank is the sum of the two ranks.

The factors are computed by einsums, in which each axis of the two weights has a **letter**. Axes
that the product contracts or batches together have the same letter.
"""

import dataclasses
import string
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from lora_jax.adapt import eqns
from lora_jax.adapt.interpreter import Interpreter, Rule, Use
from lora_jax.adapt.rules.arithmetic import has_gain_or_shift, mirror_weight, move_scale_into_a
from lora_jax.adapt.rules.products import contracted_role, dot_general, match_unit_roles
from lora_jax.core.axes import Label
from lora_jax.core.base import as_array
from lora_jax.core.factored import Factored
from lora_jax.core.magnitude import accumulation_dtype
from lora_jax.core.parts import RANK
from lora_jax.core.product import has_dropout, has_explicit_sharding
from lora_jax.core.types import Outcome

_CONTRACTED_ROLES: tuple[Label, Label] = ("out", "in")  # of the left weight, of the right weight
_LEFT_RANK, _RIGHT_RANK, *_AXIS_LETTERS = list(string.ascii_letters)


class _LetteredArray(NamedTuple):
    """An array with an einsum letter for each of its axes."""

    array: jax.Array
    letters: Sequence[str]


def _dot_general(interpreter: Interpreter, use: Use) -> Outcome:
    """Multiplies two weights to a weight, or merges one of them if that has no factored form."""
    if not all(isinstance(value, Factored) for value in use.values):
        return dot_general(interpreter, use)
    contract, batch = use.params["dimension_numbers"]
    facing_weights: list[Factored | None] = []
    for side, role in enumerate(_CONTRACTED_ROLES):
        facing_weights.append(
            _assign_contracted_role(use.values[side], contract[side], batch[side], role)
        )
    left, right = facing_weights
    if left is not None and right is not None and _has_factored_product(use, left, right):
        return [_product_of_weights(use, left, right)]
    factored_sides = [side for side in (0, 1) if facing_weights[side] is not None]
    if not factored_sides:
        return None
    factored_side = min(factored_sides, key=lambda side: _may_merge(use.values[side]))
    merged_side = 1 - factored_side
    values = list(use.values)
    values[merged_side] = interpreter.merge_weight(values[merged_side], use.name, use.eqn)
    return dot_general(interpreter, dataclasses.replace(use, values=values))


def _may_merge(weight: Factored) -> bool:
    """Returns True if a weight may be merged instead of staying factored."""
    return weight.uses == "all" and weight.shift is None and not has_dropout(weight)


def _has_factored_product(use: Use, left: Factored, right: Factored) -> bool:
    """Returns True if the product of two weights has factors."""
    weights = (left, right)
    if any(has_gain_or_shift(weight) or has_dropout(weight) for weight in weights):
        return False
    bases = [as_array(weight.base) for weight in weights]
    result_dtype = eqns.type_of(use.eqn.outvars[0]).dtype
    dtypes = [result_dtype, *(base.dtype for base in bases)]
    are_real = all(jnp.issubdtype(dtype, jnp.floating) for dtype in dtypes)
    return are_real and not any(map(has_explicit_sharding, bases))


def _assign_contracted_role(
    weight: Factored, contract: Sequence[int], batch: Sequence[int], role: Label
) -> Factored | None:
    """Returns the weight with roles such that a product contracts all axes of `role`.

    Args:
      weight: an operand.
      contract, batch: the axes of it that are contracted, and those that are batched.
      role: "in" or "out".

    Returns:
      The weight; None where the product mixes its roles, or batches more than its stack.
    """
    contract = tuple(contract)
    recorded_role = contracted_role(weight, contract) if weight.parts else None
    if recorded_role is None:
        return None
    weight = match_unit_roles(weight, recorded_role, contract, tuple(batch))
    contracts_whole_role = set(contract) == set(weight.axes(recorded_role))
    if not contracts_whole_role or not set(batch) <= set(weight.axes("batch")):
        return None
    return weight if recorded_role == role else mirror_weight(weight)


def _product_of_weights(use: Use, left: Factored, right: Factored) -> Factored:
    """Returns the product, with axes in the order stack, left's axes, right's axes."""
    left_letters, right_letters = _operand_letters(use, left, right)
    role_of_letter = _result_roles(use, (left, right), (left_letters, right_letters))
    (base,) = use.bind(use.bases)
    size_of_letter = dict(zip(role_of_letter, base.shape, strict=True))
    stack = _letters_with_role(role_of_letter, "batch")
    rows = _letters_with_role(role_of_letter, "in")
    columns = _letters_with_role(role_of_letter, "out")
    left = move_scale_into_a(left)
    right = move_scale_into_a(right)
    factor_dtype = jnp.promote_types(accumulation_dtype(base.dtype), left.a.dtype)
    factor_dtype = jnp.promote_types(factor_dtype, right.a.dtype)
    a1 = _lettered_part(left, "a", left_letters, _LEFT_RANK)
    b1 = _lettered_part(left, "b", left_letters, _LEFT_RANK)
    a2 = _lettered_part(right, "a", right_letters, _RIGHT_RANK)
    b2 = _lettered_part(right, "b", right_letters, _RIGHT_RANK)
    w1 = _LetteredArray(as_array(left.base), left_letters)
    w2 = _LetteredArray(as_array(right.base), right_letters)

    left_rank_columns = [*stack, _LEFT_RANK, *columns]
    right_rank_rows = [*stack, _RIGHT_RANK, *rows]
    b1_a2 = _einsum(use, b1, a2, [*stack, _LEFT_RANK, _RIGHT_RANK], factor_dtype)
    b1_w2 = _einsum(use, b1, w2, left_rank_columns, w2.array.dtype).array.astype(factor_dtype)
    b1_w2 += _einsum(use, b1_a2, b2, left_rank_columns, factor_dtype).array
    w1_a2 = _einsum(use, w1, a2, right_rank_rows, w1.array.dtype).array.astype(factor_dtype)
    wide_a1 = _repeat_along_stack(a1, [*stack, _LEFT_RANK, *rows], size_of_letter).astype(
        factor_dtype
    )
    wide_b2 = _repeat_along_stack(b2, [*stack, _RIGHT_RANK, *columns], size_of_letter).astype(
        factor_dtype
    )
    rank_axis = len(stack)
    parts = {
        "a": jnp.concatenate([wide_a1, w1_a2], axis=rank_axis),
        "b": jnp.concatenate([b1_w2, wide_b2], axis=rank_axis),
        "scale": jnp.ones([size_of_letter[letter] for letter in stack], jnp.float32),
    }
    labels = tuple(role_of_letter.values())
    return Factored(base, parts, labels, path=f"{left.path} @ {right.path}")


def _operand_letters(use: Use, left: Factored, right: Factored) -> tuple[list[str], list[str]]:
    """Returns the einsum letters of the axes of both weights."""
    n_left = len(left.labels)
    left_letters = _AXIS_LETTERS[:n_left]
    right_letters = _AXIS_LETTERS[n_left : n_left + len(right.labels)]
    contract, batch = use.params["dimension_numbers"]
    for left_axes, right_axes in (contract, batch):
        for left_axis, right_axis in zip(left_axes, right_axes, strict=True):
            right_letters[right_axis] = left_letters[left_axis]
    return left_letters, right_letters


def _result_roles(
    use: Use, weights: Sequence[Factored], letters_of_side: Sequence[Sequence[str]]
) -> dict[str, Label]:
    """Returns the role of each axis of the product, by the letter of the axis, in order."""
    contract, batch = use.params["dimension_numbers"]
    role_of_letter: dict[str, Label] = {}
    for axis in batch[0]:
        role_of_letter[letters_of_side[0][axis]] = "batch"
    for side, weight in enumerate(weights):
        for axis, role in enumerate(weight.labels):
            is_free = axis not in contract[side] and axis not in batch[side]
            if is_free:
                role_of_letter[letters_of_side[side][axis]] = role
    return role_of_letter


def _letters_with_role(role_of_letter: dict[str, Label], role: Label) -> list[str]:
    return [letter for letter, letter_role in role_of_letter.items() if letter_role == role]


def _lettered_part(
    weight: Factored, name: str, weight_letters: Sequence[str], rank_letter: str
) -> _LetteredArray:
    """Returns a factor with the einsum letters of its axes."""
    layout = weight.layout(name)
    letters = [rank_letter if axis == RANK else weight_letters[axis] for axis in layout]
    return _LetteredArray(weight.parts[name], letters)


def _einsum(
    use: Use,
    left: _LetteredArray,
    right: _LetteredArray,
    result_letters: Sequence[str],
    dtype: DTypeLike,
) -> _LetteredArray:
    """Returns the product of two arrays that are cast to a dtype, accumulated in fp32 or wider."""
    spec = f"{''.join(left.letters)},{''.join(right.letters)}->{''.join(result_letters)}"
    product = jnp.einsum(
        spec,
        left.array.astype(dtype),
        right.array.astype(dtype),
        precision=use.params["precision"],
        preferred_element_type=accumulation_dtype(dtype),
    )
    return _LetteredArray(product, result_letters)


def _repeat_along_stack(
    factor: _LetteredArray, result_letters: Sequence[str], size_of_letter: dict[str, int]
) -> jax.Array:
    """Returns a factor as [stack…, rank, …], broadcast along stack axes that it lacks."""
    order = [letter for letter in result_letters if letter in factor.letters]
    array = lax.transpose(factor.array, [factor.letters.index(letter) for letter in order])
    missing_axes = [
        axis for axis, letter in enumerate(result_letters) if letter not in factor.letters
    ]
    array = lax.expand_dims(array, missing_axes)
    shape = [
        size_of_letter.get(letter, size)
        for letter, size in zip(result_letters, array.shape, strict=True)
    ]
    return jnp.broadcast_to(array, shape)


CHAIN_RULES: dict[str, Rule] = {"dot_general": _dot_general}
