"""Infers axis roles from what a function does with each axis of each weight.

The function is run abstractly by the interpreter that `adapt` uses, with other rules: a weight
without factors is followed to the products that use it, each of its axes labelled by the axes of
the leaf that it holds. Axes that are contracted with the activation are in axes, axes that come
out are out axes; what is indexed, sliced off, scanned over or batched is a batch axis.

An array that is computed from leaves alone (their norms, say) is followed too, without labels: what
is added to a leaf is an activation only where it is computed from something else.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax.adapt import eqns
from lora_jax.adapt.contractions import (
    NOTHING,
    Contraction,
    Held,
    LeafAxis,
    composed,
    contractions,
    contracts,
    indexed,
    labelled,
    paths_of,
    union,
)
from lora_jax.adapt.interpreter import Interpreter, Rule, Use, WeightUse
from lora_jax.adapt.rules.axis_maps import axis_map
from lora_jax.adapt.rules.control import CONTROL_RULES, SOLVE_RULES
from lora_jax.adapt.user_code import place_of
from lora_jax.core.aliases import flatten, resolved
from lora_jax.core.axes import AxisRoles, ObservedRoles
from lora_jax.core.base import is_abstract, is_base, stand_in
from lora_jax.core.factored import Factored
from lora_jax.core.types import Forward, Leaf, Tree, Value


def traced_roles(
    trace: Sequence[object] | None, leaves: Iterable[tuple[str, Leaf]]
) -> dict[str, ObservedRoles | str] | None:
    """Returns the roles of a tree's leaves, by path, as a function uses them; see `infer_roles`.

    Args:
      trace: ``(fn, *args)``; see `lora_jax.lorafy`. None: nothing is known.
      leaves: leaves of the tree with their paths.

    Raises:
      TypeError: `trace` is no tuple of a function and its arguments.
    """
    if trace is None:
        return None
    if not isinstance(trace, Sequence) or not trace or not callable(trace[0]):
        raise TypeError(f"trace is a tuple of a function and its arguments, not {trace!r}")
    return infer_roles(trace[0], trace[1:], {id(leaf): path for path, leaf in leaves})


def infer_roles(
    fn: Forward, args: Sequence[Tree], paths: Mapping[int, str]
) -> dict[str, ObservedRoles | str]:
    """Returns the roles of the leaves of `args` whose identities are the keys of `paths`.

    Args:
      fn: called with `args`; traced, not run.
      args: as `fn` is called; arrays may be `jax.ShapeDtypeStruct`\\ s.
      paths: ``{id(leaf): path}``.

    Returns:
      By path, the roles of each leaf that `fn` multiplies by or reads rows of, or a sentence that
      says why there are none.
    """
    log = _Log()
    interpreter = Interpreter(log.rules(), record=log.merged, default=log.other)
    keyed, treedef = flatten(tuple(args), is_base)
    leaves = [leaf for _, leaf in keyed]
    places = [i for i, leaf in enumerate(leaves) if id(leaf) in paths or is_abstract(leaf)]

    def followed(place: int, array: jax.Array) -> Value:
        path = paths.get(id(leaves[place]))
        if path is None:
            return array
        return labelled(array, [frozenset({LeafAxis(path, axis)}) for axis in range(array.ndim)])

    def walk(arrays: list[Value]) -> None:
        traced = eqns.trace_with(lambda *args: fn(*resolved(args)), leaves, treedef, places)
        jaxpr = jax.make_jaxpr(traced)(*arrays)
        interpreter.evaluate(jaxpr, list(map(followed, places, arrays)))

    jax.eval_shape(walk, [stand_in(leaves[place]) for place in places])
    shapes = {paths[id(leaf)]: leaf.shape for leaf in leaves if id(leaf) in paths}
    return {
        path: _agreed(log.found.get(path, []), log.lost.get(path), shape)
        for path, shape in shapes.items()
    }


def _agreed(uses: list[Contraction], lost: str | None, shape: Sequence[int]) -> ObservedRoles | str:
    """Returns the roles that all uses agree on: each contracts the in axes, or all the out axes.

    Args:
      uses: uses of one leaf.
      lost: where its axes could no longer be followed, if anywhere.
      shape: its shape.
    """
    if not uses:
        unseen = "the function never multiplies by it"
        return unseen if lost is None else f"{unseen}, as far as it can be followed: {lost}"
    uses = [use for use in uses if not use.added] or uses
    first = min(uses, key=_rank)
    for use in uses:
        if both := use.contracted & use.free:
            return (
                f"its axes {sorted(both)} are one axis, or parts of one, where {use}. Keep them "
                "apart: a reshape to one axis (ravel, ravel_pytree) loses them"
            )
        if {use.contracted, use.free} != {first.contracted, first.free}:
            return f"the function uses it in ways that contradict each other: {first}, but {use}"
    if not first.contracted:
        return f"no axis of it is contracted in the product: {first}"
    if not first.free:
        return f"no axis of it comes out of the product: {first}"
    roles = AxisRoles.from_axes(sorted(first.contracted), sorted(first.free), len(shape))
    is_table = first.is_lookup or all(use.not_kernel_reason for use in uses)
    return ObservedRoles(roles, first.not_kernel_reason if is_table else "")


def _rank(use: Contraction) -> tuple[bool, ...]:
    """Returns a sort key: first come the uses that say most clearly which axes are the in axes.

    Products with vectors or with other leaves come last: they may be a norm's.
    """
    return not use.is_lookup, use.with_leaf, bool(use.not_kernel_reason), use.with_vector


class _Log:
    """The rules that follow leaves, and their notes.

    Attributes:
      found: the products with each leaf, by path.
      lost: for a leaf whose axes could no longer be followed somewhere, the first such place.
    """

    def __init__(self) -> None:
        self.found: dict[str, list[Contraction]] = {}
        self.lost: dict[str, str] = {}

    def rules(self) -> dict[str, Rule]:
        """Returns the rule for each primitive but those that `other` is for."""
        products = ("dot_general", "ragged_dot_general", "conv_general_dilated", "gather")
        moves = ("transpose", "squeeze", "broadcast_in_dim", "reshape", "stack")
        rules: dict[str, Rule] = {**CONTROL_RULES, **SOLVE_RULES}
        return rules | dict.fromkeys(products, self._product) | dict.fromkeys(moves, self._moved)

    def merged(self, record: WeightUse) -> None:
        """Notes that leaves leave a loop or a branch as plain arrays."""
        self._lose(record.path.splitlines(), record.primitive, record.place)

    def _lose(self, paths: Iterable[str], primitive: str, place: str) -> None:
        for path in paths:
            self.lost.setdefault(path, f"{primitive!r} at {place} loses its axes")

    def _kept(self, use: Use, outputs: list[Value]) -> list[Value]:
        """Returns the outputs; notes the leaves among the operands that none of them holds."""
        there = {
            path for v in use.values if isinstance(v, Factored) for path in v.path.splitlines()
        }
        here = (
            paths_of(v.labels, "", "scaled", "added") for v in outputs if isinstance(v, Factored)
        )
        if lost := there.difference(*here):
            self._lose(lost, use.name, str(place_of(use.eqn)))
        return outputs

    def _product(self, _: Interpreter, use: Use) -> list[Value]:
        name, pair = use.name, use.values[:2]
        is_leaf = [isinstance(v, Factored) and bool(paths_of(v.labels, "")) for v in pair]
        seen = []
        for side, weight in enumerate(pair):
            labels: Any = weight.labels if isinstance(weight, Factored) else ()
            axes = contracts(use, side, labels) if labels else None
            if axes is not None:
                uses = contractions(use, side, axes, with_leaf=is_leaf[1 - side])
                for path, path_uses in uses.items():
                    self.found.setdefault(path, []).append(path_uses)
                seen.append(uses)
        if name == "gather":
            outputs = _gathered(use)
            return outputs if isinstance(outputs[0], Factored) else self._kept(use, outputs)
        (out,) = use.bind(use.bases)
        if _mixing(use):
            return [out]
        is_whole = not any(path_uses.stretched for uses in seen for path_uses in uses.values())
        are_others = all(is_leaf) and not set.intersection(*map(set, seen))
        if name == "dot_general" and are_others and is_whole:
            return [labelled(out, composed(use))]
        return [labelled(out, [NOTHING] * out.ndim)]

    def _moved(self, _: Interpreter, use: Use) -> list[Value]:
        """Moves axes as the axis map says; one that is stretched is lost."""
        (out,), weights = use.bind(use.bases), [v for v in use.values if isinstance(v, Factored)]
        places = axis_map(use.eqn)
        if places is None:
            return self._kept(use, [out])
        if use.name == "broadcast_in_dim":
            (shape,) = (w.base.shape for w in weights)
            pairs = zip(places, out.shape, strict=True)
            places = tuple(tuple(a for a in axes if shape[a] == n) for axes, n in pairs)
        of_each: list[Any] = [weight.labels for weight in weights]
        moved = [[union(held[a] for a in axes) for axes in places] for held in of_each]
        return [labelled(out, _joined(moved, _mixing(use)))]

    def other(self, interpreter: Interpreter, use: Use) -> list[Value]:
        """Enters functions; keeps axes in place in element-wise operations, else drops them."""
        body = use.params.get("jaxpr", use.params.get("call_jaxpr"))
        if body is not None and len(eqns.opened(body)[0].invars) == len(use.values):
            return interpreter.function(body, use.live)(*use.values)
        name, outputs = use.name, use.bind(use.bases)
        mixed = _mixing(use)

        def stayed(place: int, value: Value, out: Value) -> list[Held] | None:
            if not isinstance(value, Factored) or len(value.labels) != out.ndim:
                return None
            if len(outputs) > 1 and name != "split" and place:
                return None
            labels: Any = value.labels
            if name in _SAME_RANK:
                return list(labels)
            sizes = tuple(zip(value.base.shape, out.shape, strict=True))
            if any(n not in (1, m) for n, m in sizes):
                return None
            stretched = [n != m for n, m in sizes]
            return [NOTHING if lost else held for held, lost in zip(labels, stretched, strict=True)]

        followed = []
        for place, out in enumerate(outputs):
            each = (stayed(i - place, v, out) for i, v in enumerate(use.values))
            kept = [labels for labels in each if labels is not None]
            if not kept and not mixed and out.ndim and jnp.issubdtype(out.dtype, jnp.floating):
                kept = [[NOTHING] * out.ndim]  # computed from leaves alone
            followed.append(labelled(out, _joined(kept, mixed)) if kept else out)
        return self._kept(use, followed)


_ADDS = ("add", "sub", "add_any", "concatenate", "stack")


def _mixing(use: Use) -> str:
    """Returns the way an equation mixes leaves with arrays that are computed from other things."""

    def is_pure(value: Value) -> bool:
        if not isinstance(value, Factored):
            return math.prod(jnp.shape(value)) == 1
        return not paths_of(value.labels, "scaled", "added")

    if all(map(is_pure, use.values)):
        return ""
    return "added" if use.name in _ADDS else "scaled"


def _joined(labels: Sequence[Sequence[Held]], mixed: str) -> list[Held]:
    """Returns the contents of each axis of several arrays, marked as mixed; "added" stays."""
    joined = [union(each) for each in zip(*labels, strict=True)]
    if not mixed:
        return joined
    return [
        frozenset(a if a.mixed == "added" else a._replace(mixed=mixed) for a in held)
        for held in joined
    ]


def _gathered(use: Use) -> list[Value]:
    """Returns the rest of a weight whose stack is indexed, or a looked-up row without labels."""
    weight, numbers = use.values[0], use.params["dimension_numbers"]
    (out,) = use.bind(use.bases)
    if not isinstance(weight, Factored):
        return [out]
    cut, labels = indexed(use, len(weight.labels)), list[Any](weight.labels)
    held = [NOTHING if a in cut else label for a, label in enumerate(labels)]
    kept = [label for a, label in enumerate(held) if a not in numbers.collapsed_slice_dims]
    if sum(map(bool, held)) < 2 or len(kept) != len(numbers.offset_dims):
        return [out]
    whole = dict(zip(numbers.offset_dims, kept, strict=True))
    return [labelled(out, [whole.get(axis, NOTHING) for axis in range(out.ndim)])]


_SAME_RANK = ("slice", "dynamic_slice", "split", "concatenate", "pad", "rev", "all_gather")
