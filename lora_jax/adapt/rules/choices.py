"""Selects between weights, by a branch or element-wise, after converting them to a common form."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from lora_jax.adapt.interpreter import Interpreter, Rule, Use
from lora_jax.adapt.rules.arithmetic import has_gain_or_shift, mirror_weight
from lora_jax.core.axes import Label
from lora_jax.core.base import as_array
from lora_jax.core.factored import Factored
from lora_jax.core.parts import AXES, NEUTRAL, pad_rank, rank_axis, shape_of_axes
from lora_jax.core.types import Outcome


class CommonForm(NamedTuple):
    """A form that several weights can take: axis roles, and the dtypes and rank of their parts."""

    labels: tuple[Label, ...]
    dtypes: Mapping[str, DTypeLike]
    rank: int


def common_form(weights: Sequence[Factored]) -> CommonForm | None:
    """Returns a form that all of these weights of one shape can take, or None.

    Args:
      weights: their arrays may be `jax.ShapeDtypeStruct`\\ s.
    """
    formed_weights = [
        jax.eval_shape(Factored.formed, weight) if weight.is_compact else weight
        for weight in weights
    ]
    model = formed_weights[0]
    if not all(_can_take_form(weight, model) for weight in formed_weights):
        return None
    dtypes: dict[str, DTypeLike] = {}
    for weight in formed_weights:
        for name, array in weight.parts.items():
            dtypes[name] = _wider_dtype(dtypes.get(name, array.dtype), array.dtype)
    rank = max(weight.rank for weight in formed_weights)
    return CommonForm(model.labels, dtypes, rank)


def _can_take_form(weight: Factored, model: Factored) -> bool:
    """Returns True if a weight can be converted to the form of another weight."""
    if not weight.parts:
        return False
    if weight.labels != model.labels:
        has_vectors = has_gain_or_shift(weight) or has_gain_or_shift(model)
        if has_vectors or mirror_weight(weight).labels != model.labels:
            return False
    return (
        (weight.dropout, weight.uses, weight.split) == (model.dropout, model.uses, model.split)
        and (weight.key is None) == (model.key is None)
        # No weight tells the shape of a mask that it lacks.
        and (weight.rows is None) == (model.rows is None)
        and (weight.active is None) == (model.active is None)
    )


def _wider_dtype(a: DTypeLike, b: DTypeLike) -> DTypeLike:
    return a if a == b else jnp.promote_types(a, b)  # keys have a dtype that is not promoted


def convert_to_form(weight: Factored, form: CommonForm) -> Factored:
    """Returns the weight in a form: its ranks and missing parts are filled with zeros.

    Its base is an array then, since bases of several weights need not be stored alike.
    """
    weight = weight.formed()
    if weight.labels != form.labels:
        weight = mirror_weight(weight)
    parts: dict[str, jax.Array] = {}
    for name, dtype in form.dtypes.items():
        if name in weight.parts:
            part = weight.parts[name]
            if part.dtype != dtype:
                part = part.astype(dtype)
            parts[name] = pad_rank(part, rank_axis(AXES[name], form.labels), form.rank)
        else:
            shape = shape_of_axes(AXES[name], weight.base.shape, form.labels, form.rank)
            parts[name] = jnp.full(shape, NEUTRAL.get(name, 0), dtype)
    return dataclasses.replace(weight, base=as_array(weight.base), parts=parts)


def _select_n(_: Interpreter, use: Use) -> Outcome:
    """Selects between complete weights, or for each member of a stack, with all their parts."""
    which, *cases = use.values
    if isinstance(which, Factored) or not all(isinstance(case, Factored) for case in cases):
        return None
    if all(_differs_only_in_key(case, cases[0]) for case in cases):
        return [cases[0]]
    form = common_form(cases)
    if form is None:
        return None
    varies_within_member = any(form.labels[axis] != "batch" for axis in use.varying_axes(0))
    if varies_within_member:
        return None
    cases = [convert_to_form(case, form) for case in cases]
    bases = [case.base for case in cases]
    (base,) = use.bind([which, *bases])
    which_labels = form.labels[: which.ndim]  # it has the axes of the weights, or is one number
    indices = [slice(None) if label == "batch" else 0 for label in which_labels]
    which_of_member = which[tuple(indices)]
    parts: dict[str, jax.Array] = {}
    for name in form.dtypes:
        parts[name] = _select_part(which_of_member, [case.parts[name] for case in cases])
    return [dataclasses.replace(cases[0], base=base, parts=parts)]


def _select_part(which_of_member: jax.Array, parts: Sequence[jax.Array]) -> jax.Array:
    """Returns a part selected for each member of a stack, whose axes come first in it."""
    if which_of_member.ndim:
        other_axes = range(which_of_member.ndim, parts[0].ndim)
        which_of_member = lax.expand_dims(which_of_member, other_axes)
        which_of_member = jnp.broadcast_to(which_of_member, parts[0].shape)
    return lax.select_n(which_of_member, *parts)


def _differs_only_in_key(a: Factored, b: Factored) -> bool:
    """Returns True if two weights differ only in their dropout keys."""
    names = (a.parts.keys() | b.parts.keys()) - {"key"}
    are_parts_same = all(a.parts.get(name) is b.parts.get(name) for name in names)
    return are_parts_same and a.base is b.base and a.labels == b.labels


CHOICE_RULES: dict[str, Rule] = {"select_n": _select_n}
