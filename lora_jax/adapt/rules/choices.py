"""Chooses between weights, by a branch or row by row: all are brought into one form."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from lora_jax.adapt.interpreter import Interpreter, Rule, Use
from lora_jax.adapt.rules.arithmetic import has_more, mirrored
from lora_jax.core.axes import Label
from lora_jax.core.base import as_array
from lora_jax.core.factored import Factored
from lora_jax.core.parts import AXES, NEUTRAL, filled, rank_axis, sizes
from lora_jax.core.types import Outcome


class CommonForm(NamedTuple):
    """Form that weights share: the roles of their axes, and their parts' dtypes and rank."""

    labels: tuple[Label, ...]
    dtypes: Mapping[str, DTypeLike]
    rank: int


def common_form(weights: Sequence[Factored]) -> CommonForm | None:
    """Returns a form that weights of one shape can all be brought into; None if there is none.

    Args:
      weights: their arrays may be `jax.ShapeDtypeStruct`\\ s.
    """
    weights = [jax.eval_shape(Factored.formed, w) if w.is_compact else w for w in weights]
    first = weights[0]

    def fits(weight: Factored) -> bool:
        turned = weight.labels != first.labels
        return (
            bool(weight.parts)
            and (mirrored(weight).labels if turned else weight.labels) == first.labels
            and not (turned and (has_more(weight) or has_more(first)))
            and (weight.dropout, weight.uses, weight.split)
            == (first.dropout, first.uses, first.split)
            and (weight.key is None) == (first.key is None)
            # No weight tells the shape of a mask that it lacks.
            and (weight.rows is None) == (first.rows is None)
            and (weight.active is None) == (first.active is None)
        )

    if not all(map(fits, weights)):
        return None
    dtypes_of: dict[str, list[DTypeLike]] = {}
    for weight in weights:
        for name, array in weight.parts.items():
            dtypes_of.setdefault(name, []).append(array.dtype)
    dtypes = {name: functools.reduce(_wider, each) for name, each in dtypes_of.items()}
    return CommonForm(first.labels, dtypes, max(weight.rank for weight in weights))


def _wider(a: DTypeLike, b: DTypeLike) -> DTypeLike:
    return a if a == b else jnp.promote_types(a, b)


def convert(weight: Factored, form: CommonForm) -> Factored:
    """Returns the weight in a form: ranks are filled up with zeros, parts that it lacks too.

    Its base is an array then, since bases of several weights need not be stored alike.
    """
    weight = weight.formed()
    if weight.labels != form.labels:
        weight = mirrored(weight)

    def part(name: str, dtype: DTypeLike) -> jax.Array:
        if name not in weight.parts:
            shape = sizes(AXES[name], weight.base.shape, form.labels, form.rank)
            return jnp.full(shape, NEUTRAL.get(name, 0), dtype)
        array, axis = weight.parts[name], rank_axis(AXES[name], form.labels)
        return filled(array if array.dtype == dtype else array.astype(dtype), axis, form.rank)

    parts = {name: part(name, dtype) for name, dtype in form.dtypes.items()}
    return dataclasses.replace(weight, base=as_array(weight.base), parts=parts)


def _select_n(_: Interpreter, use: Use) -> Outcome:
    """Chooses between whole weights, or for each index of their stack; the parts follow alike."""
    which, *cases = use.values
    if isinstance(which, Factored) or not all(isinstance(case, Factored) for case in cases):
        return None
    if all(_is_same(case, cases[0]) for case in cases):
        return [cases[0]]
    form = common_form(cases)
    if form is None or {form.labels[axis] for axis in use.varying_axes(0)} - {"batch"}:
        return None
    cases = [convert(case, form) for case in cases]
    (base,) = use.bind([which, *(case.base for case in cases)])
    whole = [axis for axis, label in enumerate(form.labels) if label != "batch"]
    narrow = which[tuple(0 if axis in whole else slice(None) for axis in range(which.ndim))]

    def chosen(name: str) -> jax.Array:
        arrays = [case.parts[name] for case in cases]
        if not narrow.ndim:
            return lax.select_n(narrow, *arrays)
        last = range(narrow.ndim, arrays[0].ndim)  # batch axes come first in every part
        return lax.select_n(
            jnp.broadcast_to(lax.expand_dims(narrow, last), arrays[0].shape), *arrays
        )

    parts = {name: chosen(name) for name in form.dtypes}
    return [dataclasses.replace(cases[0], base=base, parts=parts)]


def _is_same(a: Factored, b: Factored) -> bool:
    """Returns True if two weights are the same but for dropout keys, of which each use has one."""
    names = a.parts.keys() | b.parts.keys()
    same = all(a.parts.get(name) is b.parts.get(name) for name in names - {"key"})
    return same and a.base is b.base and a.labels == b.labels


CHOICE_RULES: dict[str, Rule] = {"select_n": _select_n}
