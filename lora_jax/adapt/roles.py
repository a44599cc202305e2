"""Infers axis roles from what a function does with each axis of each weight.

The function is run abstractly by the interpreter that `adapt` uses, with other rules: a weight
without factors is followed to the products that use it, each of its axes labelled by the axes of
the leaf that it holds. Axes that are contracted with the activation are in axes, axes that come
out are out axes; what is indexed, sliced off, scanned over or batched is a batch axis.

An array that is only computed from leaves (their norms, say) is followed too, without labels: what
is added to a leaf is an activation only where it is computed from something else.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lora_jax.adapt import eqns
from lora_jax.adapt.axis_maps import axis_map
from lora_jax.adapt.control import CONTROL_RULES
from lora_jax.adapt.interpreter import Interpreter, Record, Rule, Use
from lora_jax.axes import AxisRoles, Seen
from lora_jax.base import as_array, is_abstract, is_base, stand_in
from lora_jax.factored import Factored


class Axis(NamedTuple):
    """One axis of a leaf, as an axis of a later array holds it.

    Attributes:
      path, axis: of the leaf.
      mixed: "added" or "scaled" where an array that is computed from other things than leaves was
        added to the leaf, or multiplied by it element by element.
      inner: the axes of the leaf that a product with another leaf contracted.
    """

    path: str
    axis: int
    mixed: str = ""
    inner: frozenset[int] = frozenset()


# What an axis holds: axes of leaves, several where they are joined or added.
Held = frozenset[Axis]
NOTHING: Held = frozenset()


@dataclasses.dataclass(frozen=True)
class Contraction:
    """One product with a weight: the axes that it contracts, those that come out, and where.

    Attributes:
      contracted, free: the axes of the leaf.
      primitive: of the product.
      place: "file:line".
      is_lookup: whether rows of the leaf are read.
      added: whether an activation was added to the leaf before: the product is the activation's.
      stretched: whether the leaf is the same all along an axis of the product, as a gain is.
      unlike: why the leaf is no kernel here; empty where it is one.
      with_leaf: whether the other operand is a leaf, too.
      with_vector: whether the other operand is one vector only.
    """

    contracted: frozenset[int]
    free: frozenset[int]
    primitive: str
    place: str
    is_lookup: bool = False
    added: bool = False
    stretched: bool = False
    unlike: str = ""
    with_leaf: bool = False
    with_vector: bool = False

    def __str__(self) -> str:
        verb = "looks up along" if self.is_lookup else "contracts"
        return f"{self.primitive} {verb} {sorted(self.contracted)} at {self.place}"


def infer_roles(
    fn: Callable[..., Any], args: Sequence[Any], paths: Mapping[int, str]
) -> dict[str, Seen | str]:
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
    leaves, treedef = jax.tree.flatten(tuple(args), is_leaf=is_base)
    places = [i for i, leaf in enumerate(leaves) if id(leaf) in paths or is_abstract(leaf)]

    def followed(place: int, array: jax.Array) -> Any:
        path = paths.get(id(leaves[place]))
        if path is None:
            return array
        return _labelled(array, [frozenset({Axis(path, axis)}) for axis in range(array.ndim)])

    def walk(arrays: list[Any]) -> None:
        traced = eqns.trace_with(lambda *args: fn(*args), leaves, treedef, places)
        jaxpr = jax.make_jaxpr(traced)(*arrays)
        interpreter.evaluate(jaxpr, list(map(followed, places, arrays)))

    jax.eval_shape(walk, [stand_in(leaves[place]) for place in places])
    shapes = {paths[id(leaf)]: leaf.shape for leaf in leaves if id(leaf) in paths}
    return {
        path: _agreed(log.found.get(path, []), log.lost.get(path), shape)
        for path, shape in shapes.items()
    }


def _agreed(uses: list[Contraction], lost: str | None, shape: Sequence[int]) -> Seen | str:
    """Returns the roles that all uses agree on: each contracts the in axes, or all the out axes.

    Args:
      uses: of one leaf.
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
    roles = AxisRoles.of(sorted(first.contracted), sorted(first.free), len(shape))
    return Seen(roles, _unlike(uses, first, shape))


def _rank(use: Contraction) -> tuple[bool, ...]:
    """Returns how little a use tells of which axes are in axes: a norm uses vectors and leaves."""
    return not use.is_lookup, use.with_leaf, bool(use.unlike), use.with_vector


def _unlike(uses: list[Contraction], first: Contraction, shape: Sequence[int]) -> str:
    """Returns why a leaf is no kernel; empty where it is one."""
    if first.is_lookup or all(use.unlike for use in uses):
        return first.unlike
    if 1 in (math.prod(shape[a] for a in axes) for axes in (first.contracted, first.free)):
        return f"it has one input or one output only: {first}"
    return ""


def _contracts(
    use: Use, side: int, labels: Sequence[Held]
) -> tuple[Sequence[int], set[int]] | None:
    """Returns the axes that a product contracts of one operand, and those that do not come out."""
    name, params = use.eqn.primitive.name, use.params
    if name == "dot_general":
        contract, batch = params["dimension_numbers"]
        return contract[side], {*contract[side], *batch[side]}
    if name == "gather":  # where a row comes out; where a matrix does, an index into a stack
        indexed = _indexed(use, len(labels))
        rest = [axis for axis in range(len(labels)) if axis not in indexed and labels[axis]]
        row = side == 0 and len(indexed) == len(rest) == 1
        return (indexed, set(indexed)) if row else None
    if side == 0:
        return None
    if name == "ragged_dot_general":
        numbers = params["ragged_dot_dimension_numbers"]
        (_, contract), (_, batch) = numbers.dot_dimension_numbers
        return contract, {*contract, *batch, *numbers.rhs_group_dimensions}
    _, *contract = params["dimension_numbers"].rhs_spec  # a convolution
    return contract, set(contract)


class _Log:
    """The rules that follow leaves, and what they note of them.

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
        rules: dict[str, Rule] = {**CONTROL_RULES, **dict.fromkeys(products, self._product)}
        return rules | dict.fromkeys(moves, self._moved)

    def merged(self, record: Record) -> None:
        """Notes that leaves leave a loop or a branch as plain arrays."""
        self._lose(record.path.splitlines(), record.primitive, record.place)

    def _lose(self, paths: Iterable[str], primitive: str, place: str) -> None:
        for path in paths:
            self.lost.setdefault(path, f"{primitive!r} at {place} loses its axes")

    def _kept(self, use: Use, outputs: list[Any]) -> list[Any]:
        """Returns the outputs; notes the leaves among the operands that none of them holds."""
        there = {
            path for v in use.values if isinstance(v, Factored) for path in v.path.splitlines()
        }
        here = (_paths(v.labels, "", "scaled", "added") for v in outputs if isinstance(v, Factored))
        if lost := there.difference(*here):
            self._lose(lost, use.eqn.primitive.name, _place(use))
        return outputs

    def _product(self, _: Interpreter, use: Use) -> list[Any]:
        name, pair = use.eqn.primitive.name, use.values[:2]
        is_leaf = [isinstance(v, Factored) and bool(_paths(v.labels, "")) for v in pair]
        seen = []
        for side, weight in enumerate(pair):
            labels: Any = weight.labels if isinstance(weight, Factored) else ()
            axes = _contracts(use, side, labels) if labels else None
            if axes is not None:
                uses = _contractions(use, side, axes, with_leaf=is_leaf[1 - side])
                for path, one in uses.items():
                    self.found.setdefault(path, []).append(one)
                seen.append(uses)
        if name == "gather":
            outputs = _gathered(use)
            return outputs if isinstance(outputs[0], Factored) else self._kept(use, outputs)
        (out,) = use.bind(_plain(use))
        if name != "dot_general" or not all(is_leaf) or set.intersection(*map(set, seen)):
            return [out]
        if any(one.added or one.stretched for uses in seen for one in uses.values()):
            return [out]
        return [_labelled(out, _composed(use))]

    def _moved(self, _: Interpreter, use: Use) -> list[Any]:
        """Axes go where the axis map says; one that is stretched is lost."""
        (out,), weights = use.bind(_plain(use)), [v for v in use.values if isinstance(v, Factored)]
        places = axis_map(use.eqn)
        if places is None:
            return self._kept(use, [out])
        if use.eqn.primitive.name == "broadcast_in_dim":
            (shape,) = (w.base.shape for w in weights)
            pairs = zip(places, out.shape, strict=True)
            places = tuple(tuple(a for a in axes if shape[a] == n) for axes, n in pairs)
        of_each: list[Any] = [weight.labels for weight in weights]
        moved = [[_union(held[a] for a in axes) for axes in places] for held in of_each]
        return [_labelled(out, _joined(moved, _mixing(use)))]

    def other(self, interpreter: Interpreter, use: Use) -> list[Any]:
        """Functions are entered; element by element, axes stay in place; else nothing is known."""
        body = use.params.get("jaxpr", use.params.get("call_jaxpr"))
        if body is not None and len(eqns.opened(body)[0].invars) == len(use.values):
            return interpreter.function(body, use.live)(*use.values)
        name, outputs = use.eqn.primitive.name, use.bind(_plain(use))
        mixed = _mixing(use)

        def stayed(place: int, value: Any, out: Any) -> list[Held] | None:
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
            followed.append(_labelled(out, _joined(kept, mixed)) if kept else out)
        return self._kept(use, followed)


def _labelled(array: Any, labels: Sequence[Held]) -> Factored:
    """Returns an array with what its axes hold."""
    held: Any = tuple(labels)
    return Factored(array, {}, held, path="\n".join(sorted(_paths(held, "", "scaled"))))


def _paths(labels: Any, *mixed: str) -> set[str]:
    """Returns the leaves that labels hold, mixed in one of these ways."""
    return {axis.path for held in labels for axis in held if axis.mixed in mixed}


def _of(path: str, held: Held) -> frozenset[int]:
    return frozenset(axis.axis for axis in held if axis.path == path)


def _contractions(
    use: Use, side: int, axes: tuple[Sequence[int], set[int]], with_leaf: bool
) -> dict[str, Contraction]:
    """Returns what a product does with each leaf in one of its operands, by path.

    Args:
      use: the product.
      side: of the operand.
      axes: see `_contracts`.
      with_leaf: whether the other operand is a leaf, too.
    """
    name, weight = use.eqn.primitive.name, use.values[side]
    contracted = _union(weight.labels[axis] for axis in axes[0])
    free = _union(held for axis, held in enumerate(weight.labels) if axis not in axes[1])
    batch = axes[1].difference(axes[0])
    long = {axis for axis, n in enumerate(weight.base.shape) if n > 1 and axis not in batch}
    other = math.prod(use.eqn.invars[1 - side].aval.shape)  # type: ignore[attr-defined]
    one_vector = other == math.prod(weight.base.shape[axis] for axis in axes[0])
    uses = {}
    for path in sorted({axis.path for axis in contracted | free}):
        mine = [axis for axis in contracted | free if axis.path == path]
        mixed, inner = {axis.mixed for axis in mine}, _union(axis.inner for axis in mine)
        a, b = (_of(path, held) for held in (contracted, free))
        a, b = (a, b | inner) if a else (inner, b)
        one = Contraction(
            a,
            b,
            name,
            _place(use),
            is_lookup=name == "gather",
            with_leaf=with_leaf,
            with_vector=one_vector,
        )
        added = "added" in mixed
        held = all(_of(path, weight.labels[axis]) for axis in long)
        stretched = not (held or inner or one.is_lookup)
        if one.is_lookup:
            unlike = "it is looked up"
        elif added:
            unlike = "it is added to an activation or a constant, and the sum is multiplied"
        elif stretched:
            unlike = "it is stretched along an axis of the product, as a gain is"
        elif with_leaf and (side == 0 or "scaled" in mixed):
            unlike = "it stands in the place of an activation"
        else:
            unlike = ""
        unlike = unlike and f"{unlike}: {one}"
        one = dataclasses.replace(one, added=added, stretched=stretched, unlike=unlike)
        uses[path] = one
    return uses


def _composed(use: Use) -> list[Held]:
    """Returns what the axes of a product of leaves hold: of each leaf those that come out."""
    contract, batch = use.params["dimension_numbers"]
    batched: list[list[Held]] = []
    free: list[Held] = []
    for side, weight in enumerate(use.values):
        gone = _union(weight.labels[axis] for axis in contract[side])

        def through(held: Held, gone: Held = gone) -> Held:
            return frozenset(a._replace(inner=a.inner | _of(a.path, gone)) for a in held)

        labels = [through(held) for held in weight.labels]
        batched.append([labels[axis] for axis in batch[side]])
        both = {*contract[side], *batch[side]}
        free += [held for axis, held in enumerate(labels) if axis not in both]
    return [*map(_union, zip(*batched, strict=True)), *free]


def _union(held: Iterable[frozenset[Any]]) -> frozenset[Any]:
    return frozenset().union(*held)


def _place(use: Use) -> str:
    file, line = eqns.user_line(use.eqn)
    return f"{file}:{line}"


def _plain(use: Use) -> list[Any]:
    return [as_array(v.base) if isinstance(v, Factored) else v for v in use.values]


_ADDS = ("add", "sub", "add_any", "concatenate", "stack")


def _mixing(use: Use) -> str:
    """Returns how an equation mixes leaves with arrays that are computed from other things."""
    if all(isinstance(v, Factored) or math.prod(jnp.shape(v)) == 1 for v in use.values):
        return ""
    return "added" if use.eqn.primitive.name in _ADDS else "scaled"


def _joined(labels: Sequence[Sequence[Held]], mixed: str) -> list[Held]:
    """Returns what each axis holds of several arrays, marked as mixed; "added" stays."""
    joined = [_union(each) for each in zip(*labels, strict=True)]
    if not mixed:
        return joined
    return [
        frozenset(a if a.mixed == "added" else a._replace(mixed=mixed) for a in held)
        for held in joined
    ]


def _indexed(use: Use, ndim: int) -> list[int]:
    """Returns the axes that a gather indexes, whether they go or stay with one element."""
    gone, sizes = use.params["dimension_numbers"].collapsed_slice_dims, use.params["slice_sizes"]
    shape = use.eqn.invars[0].aval.shape  # type: ignore[attr-defined]
    return [axis for axis in range(ndim) if axis in gone or sizes[axis] == 1 < shape[axis]]


def _gathered(use: Use) -> list[Any]:
    """The rest of a weight whose stack is indexed; nothing of a row that is looked up."""
    weight, numbers = use.values[0], use.params["dimension_numbers"]
    (out,) = use.bind(_plain(use))
    if not isinstance(weight, Factored):
        return [out]
    indexed = _indexed(use, len(weight.labels))
    labels: Any = weight.labels
    held = [NOTHING if a in indexed else label for a, label in enumerate(labels)]
    kept = [label for a, label in enumerate(held) if a not in numbers.collapsed_slice_dims]
    if sum(map(bool, held)) < 2 or len(kept) != len(numbers.offset_dims):
        return [out]
    whole = dict(zip(numbers.offset_dims, kept, strict=True))
    return [_labelled(out, [whole.get(axis, NOTHING) for axis in range(out.ndim)])]


_SAME_RANK = ("slice", "dynamic_slice", "split", "concatenate", "pad", "rev", "all_gather")
