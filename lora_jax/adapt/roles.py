"""Axis roles by looking: what a function does with each axis of each weight.

The function is traced to a jaxpr; every weight is followed through what re-arranges it to the
products that use it. Axes that are contracted with the activation are in axes, axes that come out
are out axes; what is indexed, sliced off, scanned over or batched is a batch axis.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from jax.extend.core import JaxprEqn

from lora_jax.adapt import eqns
from lora_jax.adapt.axis_maps import axis_map
from lora_jax.axes import AxisRoles
from lora_jax.base import is_abstract, is_base, stand_in

Axes = frozenset[int]
NONE: Axes = frozenset()


@dataclasses.dataclass(frozen=True)
class Weight:
    """An array that comes from one leaf: for each of its axes, the leaf's axes that it holds."""

    path: str
    axes: tuple[Axes, ...]


Seen = tuple[Weight, ...]  # an array may hold several weights, joined or added


@dataclasses.dataclass(frozen=True)
class Contraction:
    """One product with a weight: what it contracts, what comes out, and where."""

    contracted: Axes
    free: Axes
    primitive: str
    place: str
    is_lookup: bool = False

    def __str__(self) -> str:
        verb = "looks up along" if self.is_lookup else "contracts"
        return f"{self.primitive} {verb} {sorted(self.contracted)} at {self.place}"


def infer_roles(
    fn: Callable[..., Any], args: Sequence[Any], paths: Mapping[int, str]
) -> dict[str, AxisRoles | str]:
    """The roles of the leaves of `args` whose identities are the keys of `paths`.

    Args:
      fn: called with `args`; traced, not run.
      args: as `fn` is called; arrays may be `jax.ShapeDtypeStruct`\\ s.
      paths: ``{id(leaf): path}``.

    Returns:
      By path, the roles of each leaf that `fn` multiplies by, or a sentence that says why there
      are none.
    """
    treedef: Any
    leaves, treedef = jax.tree.flatten(tuple(args), is_leaf=is_base)
    arrays = [i for i, leaf in enumerate(leaves) if id(leaf) in paths or is_abstract(leaf)]

    def traced(*values: Any) -> list[Any]:
        given = dict(zip(arrays, values, strict=True))
        every = [given.get(place, leaf) for place, leaf in enumerate(leaves)]
        out = jax.tree.leaves(fn(*treedef.unflatten(every)))
        return [leaf for leaf in out if isinstance(leaf, jax.core.Tracer)]

    jaxpr = jax.make_jaxpr(traced)(*(stand_in(leaves[place]) for place in arrays))
    seen: list[Seen] = []
    for place in arrays:
        path = paths.get(id(leaves[place]))
        own = tuple(frozenset({axis}) for axis in range(len(leaves[place].shape)))
        seen.append(() if path is None else (Weight(path, own),))
    look = _Look({})
    look.walk(jaxpr, seen)
    ranks = {paths[id(leaf)]: len(leaf.shape) for leaf in leaves if id(leaf) in paths}
    return {path: _agreed(look.found.get(path, []), ndim) for path, ndim in ranks.items()}


def _agreed(uses: list[Contraction], ndim: int) -> AxisRoles | str:
    """The roles that all uses agree on: each contracts the in axes, or all the out axes."""
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


@dataclasses.dataclass(frozen=True)
class _Look:
    found: dict[str, list[Contraction]]

    def walk(self, jaxpr: eqns.AnyJaxpr, args: Sequence[Seen]) -> list[Seen]:
        """Follows weights through a jaxpr; which of them its outputs hold."""
        inner, _ = eqns.opened(jaxpr)
        seen: dict[Any, Seen] = dict(zip(inner.invars, args, strict=True))

        def read(atom: Any) -> Seen:
            return () if eqns.is_literal(atom) else seen.get(atom, ())

        for eqn in inner.eqns:
            operands = [read(atom) for atom in eqn.invars]
            if any(operands):
                seen |= zip(eqn.outvars, self.equation(eqn, operands), strict=True)
        return [read(atom) for atom in inner.outvars]

    def equation(self, eqn: JaxprEqn, operands: list[Seen]) -> list[Seen]:
        name = eqn.primitive.name
        if name in _PRODUCTS:
            for side, weights in enumerate(operands[:2]):
                for weight in weights:
                    for use in _PRODUCTS[name](eqn, side, weight):
                        self.found.setdefault(weight.path, []).append(use)
            if name != "gather":
                return [()] * len(eqn.outvars)
        if name == "scan":
            return self.scan(eqn, operands)
        if name == "while":
            return self.loop(eqn, operands)
        if name == "cond":
            for branch in eqn.params["branches"]:
                self.walk(branch, operands[1:])
            return [()] * len(eqn.outvars)
        body = eqn.params.get("jaxpr", eqn.params.get("call_jaxpr"))
        if body is not None and len(eqns.opened(body)[0].invars) == len(operands):
            return self.walk(body, operands)
        move = _MOVES.get(name, _same_shape)
        shapes = [atom.aval.shape for atom in eqn.invars]  # type: ignore[attr-defined]
        results: list[Seen] = []
        for place, out in enumerate(eqn.outvars):
            moved = [
                Weight(weight.path, axes)
                for operand, (weights, shape) in enumerate(zip(operands, shapes, strict=True))
                for weight in weights
                if len(eqn.outvars) == 1 or name == "split" or operand == place
                if (axes := move(eqn, weight.axes, shape, out.aval.shape)) is not None  # type: ignore[attr-defined]
            ]
            results.append(tuple(moved))
        return results

    def scan(self, eqn: JaxprEqn, operands: list[Seen]) -> list[Seen]:
        scan = eqns.scan_of(eqn)
        n_fixed = scan.n_consts + scan.n_carry
        slices = [
            tuple(Weight(weight.path, weight.axes[1:]) for weight in weights)
            for weights in operands[n_fixed:]
        ]
        outputs = self.walk(scan.body, [*operands[:n_fixed], *slices])
        return outputs[: scan.n_carry] + [()] * (len(outputs) - scan.n_carry)

    def loop(self, eqn: JaxprEqn, operands: list[Seen]) -> list[Seen]:
        loop = eqns.while_of(eqn)
        n_condition, n_body = loop.n_condition_consts, loop.n_body_consts
        carried = operands[n_condition + n_body :]
        self.walk(loop.condition, [*operands[:n_condition], *carried])
        return self.walk(loop.body, [*operands[n_condition : n_condition + n_body], *carried])


def _union(axes: Sequence[Axes], places: Sequence[int]) -> Axes:
    return NONE.union(*(axes[place] for place in places))


def _place(eqn: JaxprEqn) -> str:
    file, line = eqns.user_line(eqn)
    return f"{file}:{line}"


def _dot_general(eqn: JaxprEqn, side: int, weight: Weight) -> list[Contraction]:
    contract, batch = eqn.params["dimension_numbers"]
    free = [a for a in range(len(weight.axes)) if a not in (*contract[side], *batch[side])]
    contracted = _union(weight.axes, contract[side])
    return [Contraction(contracted, _union(weight.axes, free), "dot_general", _place(eqn))]


def _ragged_dot(eqn: JaxprEqn, side: int, weight: Weight) -> list[Contraction]:
    if side == 0:
        return []
    numbers = eqn.params["ragged_dot_dimension_numbers"]
    contract, batch = numbers.dot_dimension_numbers
    gone = (*contract[1], *batch[1], *numbers.rhs_group_dimensions)
    free = [a for a in range(len(weight.axes)) if a not in gone]
    contracted = _union(weight.axes, contract[1])
    return [Contraction(contracted, _union(weight.axes, free), "ragged_dot", _place(eqn))]


def _conv(eqn: JaxprEqn, side: int, weight: Weight) -> list[Contraction]:
    if side == 0:
        return []
    out, *rest = eqn.params["dimension_numbers"].rhs_spec
    contracted = _union(weight.axes, rest)
    return [Contraction(contracted, weight.axes[out], "conv_general_dilated", _place(eqn))]


def _gather(eqn: JaxprEqn, side: int, weight: Weight) -> list[Contraction]:
    """A look-up where a row comes out; where a matrix does, an index into a stack."""
    indexed = _indexed(eqn)
    rest = [axis for axis in range(len(weight.axes)) if axis not in indexed]
    if side == 1 or len(indexed) != 1 or len([a for a in rest if weight.axes[a]]) != 1:
        return []
    contracted, free = _union(weight.axes, indexed), _union(weight.axes, rest)
    return [Contraction(contracted, free, "gather", _place(eqn), is_lookup=True)]


_PRODUCTS: dict[str, Callable[[JaxprEqn, int, Weight], list[Contraction]]] = {
    "dot_general": _dot_general,
    "ragged_dot_general": _ragged_dot,
    "conv_general_dilated": _conv,
    "gather": _gather,
}

Shape = tuple[int, ...]
Move = Callable[[JaxprEqn, tuple[Axes, ...], Shape, Shape], tuple[Axes, ...] | None]


def _same_shape(_: JaxprEqn, axes: tuple[Axes, ...], shape: Shape, out: Shape) -> Any:
    """An operation element by element keeps axes where they are; of others nothing is known."""
    return (
        axes
        if len(shape) == len(out) and all(n in (1, m) for n, m in zip(shape, out, strict=True))
        else None
    )


def _same_rank(_: JaxprEqn, axes: tuple[Axes, ...], shape: Shape, out: Shape) -> Any:
    return axes if len(shape) == len(out) else None


def _rearranged(eqn: JaxprEqn, axes: tuple[Axes, ...], *_: Shape) -> tuple[Axes, ...] | None:
    places = axis_map(eqn)
    return None if places is None else tuple(_union(axes, held) for held in places)


def _stack(eqn: JaxprEqn, axes: tuple[Axes, ...], *_: Shape) -> tuple[Axes, ...]:
    at = eqn.params["axis"]
    return (*axes[:at], NONE, *axes[at:])


def _gathered(eqn: JaxprEqn, axes: tuple[Axes, ...], _: Shape, out: Shape) -> Any:
    """The rest of a weight whose stack is indexed; nothing of a row that is looked up."""
    numbers, indexed = eqn.params["dimension_numbers"], _indexed(eqn)
    rest = [held for axis, held in enumerate(axes) if axis not in indexed]
    kept = [
        NONE if axis in indexed else held
        for axis, held in enumerate(axes)
        if axis not in numbers.collapsed_slice_dims
    ]
    if len([held for held in rest if held]) < 2 or len(kept) != len(numbers.offset_dims):
        return None
    whole = dict(zip(numbers.offset_dims, kept, strict=True))
    return tuple(whole.get(axis, NONE) for axis in range(len(out)))


def _indexed(eqn: JaxprEqn) -> list[int]:
    """The operand's axes that a gather indexes, whether they go or stay with one element."""
    numbers, sizes = eqn.params["dimension_numbers"], eqn.params["slice_sizes"]
    shape = eqn.invars[0].aval.shape  # type: ignore[attr-defined]
    return [
        axis
        for axis, (size, n) in enumerate(zip(sizes, shape, strict=True))
        if axis in numbers.collapsed_slice_dims or size == 1 < n
    ]


_MOVES: dict[str, Move] = {
    "stack": _stack,
    "gather": _gathered,
    **dict.fromkeys(("transpose", "squeeze", "broadcast_in_dim", "reshape"), _rearranged),
    **dict.fromkeys(
        ("slice", "dynamic_slice", "split", "concatenate", "pad", "rev", "all_gather"), _same_rank
    ),
}
