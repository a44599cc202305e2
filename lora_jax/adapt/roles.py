"""Infers axis roles from what a function does with each axis of each weight.

The function is run abstractly by the interpreter that `adapt` uses, with other rules: a weight
without factors is followed to the products that use it, each of its axes labelled by the axes of
the leaf that it holds. Axes that are contracted with the activation are in axes, axes that come
out are out axes; what is indexed, sliced off, scanned over or batched is a batch axis.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from lora_jax.adapt import eqns
from lora_jax.adapt.axis_maps import axis_map
from lora_jax.adapt.control import CONTROL_RULES
from lora_jax.adapt.interpreter import Interpreter, Rule, Use
from lora_jax.adapt.user_code import place_of
from lora_jax.axes import AxisRoles
from lora_jax.base import as_array, is_abstract, is_base, stand_in
from lora_jax.factored import Factored

# What an axis holds: (path of a leaf, axis of it); an array may hold several, joined or added.
Held = frozenset[tuple[str, int]]
NOTHING: Held = frozenset()


@dataclasses.dataclass(frozen=True)
class Contraction:
    """One product with a weight: the axes that it contracts, those that come out, and where."""

    contracted: frozenset[int]
    free: frozenset[int]
    primitive: str
    place: str
    is_lookup: bool

    def __str__(self) -> str:
        verb = "looks up along" if self.is_lookup else "contracts"
        return f"{self.primitive} {verb} {sorted(self.contracted)} at {self.place}"


def infer_roles(
    fn: Callable[..., Any], args: Sequence[Any], paths: Mapping[int, str]
) -> dict[str, AxisRoles | str]:
    """Returns the roles of the leaves of `args` whose identities are the keys of `paths`.

    Args:
      fn: called with `args`; traced, not run.
      args: as `fn` is called; arrays may be `jax.ShapeDtypeStruct`\\ s.
      paths: ``{id(leaf): path}``.

    Returns:
      By path, the roles of each leaf that `fn` multiplies by, or a sentence that says why there
      are none.
    """
    found: dict[str, list[Contraction]] = {}
    rules, default = _rules(found)
    interpreter = Interpreter(rules, record=lambda _: None, default=default)
    leaves, treedef = jax.tree.flatten(tuple(args), is_leaf=is_base)
    places = [i for i, leaf in enumerate(leaves) if id(leaf) in paths or is_abstract(leaf)]

    def followed(place: int, array: jax.Array) -> Any:
        path = paths.get(id(leaves[place]))
        labels: Any = [frozenset({(path, axis)}) for axis in range(array.ndim)]
        return array if path is None else Factored(array, {}, tuple(labels))

    def walk(arrays: list[Any]) -> None:
        traced = eqns.trace_with(lambda *args: fn(*args), leaves, treedef, places)
        jaxpr = jax.make_jaxpr(traced)(*arrays)
        interpreter.evaluate(jaxpr, list(map(followed, places, arrays)))

    jax.eval_shape(walk, [stand_in(leaves[place]) for place in places])
    ranks = {paths[id(leaf)]: len(leaf.shape) for leaf in leaves if id(leaf) in paths}
    return {path: _agreed(found.get(path, []), ndim) for path, ndim in ranks.items()}


def _agreed(uses: list[Contraction], ndim: int) -> AxisRoles | str:
    """Returns the roles that all uses agree on: each contracts the in axes, or all the out axes."""
    if not uses:
        return "the function never multiplies by it"
    first = next((use for use in uses if use.is_lookup), uses[0])
    pair = (first.contracted, first.free)
    for use in uses:
        if (use.contracted, use.free) not in (pair, pair[::-1]):
            return f"the function uses it in ways that contradict each other: {first}, but {use}"
    if not first.free or not first.contracted:
        return f"no axis of it comes out of the product: {first}"
    return AxisRoles.of(sorted(first.contracted), sorted(first.free), ndim)


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


def _rules(found: dict[str, list[Contraction]]) -> tuple[dict[str, Rule], Rule]:
    """Returns the rules that follow weights and note their products in `found`, and the default."""

    def product(interpreter: Interpreter, use: Use) -> list[Any]:
        name, place = use.eqn.primitive.name, str(place_of(use.eqn))
        for side, weight in enumerate(use.values[:2]):
            labels: Any = weight.labels if isinstance(weight, Factored) else ()
            axes = _contracts(use, side, labels) if labels else None
            if axes is None:
                continue
            contracted = _union(labels[axis] for axis in axes[0])
            free = _union(held for axis, held in enumerate(labels) if axis not in axes[1])
            for path in sorted({path for path, _ in contracted | free}):
                a, b = (frozenset(a for p, a in held if p == path) for held in (contracted, free))
                one = Contraction(a, b, name, place, name == "gather")
                found.setdefault(path, []).append(one)
        return _gathered(use) if name == "gather" else use.bind(_plain(use))

    products = ("dot_general", "ragged_dot_general", "conv_general_dilated", "gather")
    moves = ("transpose", "squeeze", "broadcast_in_dim", "reshape", "stack")
    rules: dict[str, Rule] = {**CONTROL_RULES, **dict.fromkeys(products, product)}
    return rules | dict.fromkeys(moves, _moved), _other


def _union(held: Any) -> Held:
    return NOTHING.union(*held)


def _plain(use: Use) -> list[Any]:
    return [as_array(v.base) if isinstance(v, Factored) else v for v in use.values]


def _moved(_: Interpreter, use: Use) -> list[Any]:
    """Axes go where the axis map says."""
    (out,), weights = use.bind(_plain(use)), [v for v in use.values if isinstance(v, Factored)]
    places = axis_map(use.eqn)
    if places is None:
        return [out]
    labels: Any = [_union(w.labels[axis] for w in weights for axis in held) for held in places]
    return [Factored(out, {}, tuple(labels))]


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
    held = [NOTHING if a in indexed else label for a, label in enumerate(weight.labels)]
    kept = [label for a, label in enumerate(held) if a not in numbers.collapsed_slice_dims]
    if sum(map(bool, held)) < 2 or len(kept) != len(numbers.offset_dims):
        return [out]
    whole = dict(zip(numbers.offset_dims, kept, strict=True))
    labels: Any = [whole.get(axis, NOTHING) for axis in range(out.ndim)]
    return [Factored(out, {}, tuple(labels))]


_SAME_RANK = ("slice", "dynamic_slice", "split", "concatenate", "pad", "rev", "all_gather")


def _other(interpreter: Interpreter, use: Use) -> list[Any]:
    """Functions are entered; element by element, axes stay in place; else nothing is known."""
    body = use.params.get("jaxpr", use.params.get("call_jaxpr"))
    if body is not None and len(eqns.opened(body)[0].invars) == len(use.values):
        return interpreter.function(body, use.live)(*use.values)
    name, outputs = use.eqn.primitive.name, use.bind(_plain(use))

    def stays(place: int, value: Any, out: Any) -> bool:
        if not isinstance(value, Factored) or len(value.labels) != out.ndim:
            return False
        if len(outputs) > 1 and name != "split" and place:
            return False
        same = all(n in (1, m) for n, m in zip(value.base.shape, out.shape, strict=True))
        return name in _SAME_RANK or same

    followed = []
    for place, out in enumerate(outputs):
        kept = [v for i, v in enumerate(use.values) if stays(i - place, v, out)]
        labels: Any = [_union(each) for each in zip(*(v.labels for v in kept), strict=True)]
        followed.append(Factored(out, {}, tuple(labels)) if kept else out)
    return followed
