"""Finds, without running a jaxpr, which inputs it returns and which outputs may be weights."""

import itertools
from collections.abc import Mapping, Sequence
from typing import TypeVar

from lora_jax.adapt import eqns
from lora_jax.core.extend import JaxprEqn

Sources = tuple[int | None, ...]
# The place of an operand, and the order in which its axes come out.
_Moved = tuple[int, tuple[int, ...]]
_CALLS = frozenset({"jit", "pjit", "closed_call", "remat2", "checkpoint"})
_Agreed = TypeVar("_Agreed")


def sources(jaxpr: eqns.AnyJaxpr) -> Sources:
    """Returns, for each output that is an input, that input's place; None for other outputs.

    It looks into functions, loops and branches, and follows axes that are moved away and back.
    """
    return tuple(map(_unmoved, _input_sources(jaxpr)))


def sources_among(jaxpr: eqns.AnyJaxpr, places: Mapping[eqns.Atom, int]) -> Sources:
    """Like `sources`, for outputs that are one of some variables, by these variables' places."""
    return tuple(map(_unmoved, _origins(jaxpr, places)))


def agreed_sources(branches: Sequence[eqns.AnyJaxpr]) -> Sources:
    """Returns, for each output, the input that every branch returns; None where they differ."""
    return tuple(_agreed(places) for places in zip(*map(sources, branches), strict=True))


def _unmoved(moved: _Moved | None) -> int | None:
    """Returns the place of an operand that comes out as it went in."""
    if moved is None or moved[1] != tuple(range(len(moved[1]))):
        return None
    return moved[0]


def _agreed(each: Sequence[_Agreed]) -> _Agreed | None:
    return each[0] if len(set(each)) == 1 else None


def _origins(jaxpr: eqns.AnyJaxpr, known: Mapping[eqns.Atom, int]) -> list[_Moved | None]:
    """Returns, for each output, which of the known variables it is."""
    inner, _ = eqns.opened(jaxpr)
    made_by = {out: (eqn, n) for eqn in inner.eqns for n, out in enumerate(eqn.outvars)}
    entered: dict[int, Sequence[_Moved | None]] = {}  # by the identity of an equation

    def origin(atom: eqns.Atom) -> _Moved | None:
        order = tuple(range(getattr(eqns.type_of(atom), "ndim", 0)))
        while not eqns.is_literal(atom) and atom not in known:
            if atom not in made_by:
                return None
            eqn, n = made_by[atom]
            if id(eqn) not in entered:
                entered[id(eqn)] = _equation_sources(eqn)
            moved = entered[id(eqn)][n]
            if moved is None:
                return None
            atom, order = eqn.invars[moved[0]], tuple(moved[1][axis] for axis in order)
        return None if eqns.is_literal(atom) else (known[atom], order)

    return list(map(origin, inner.outvars))


def _input_sources(jaxpr: eqns.AnyJaxpr) -> list[_Moved | None]:
    inner, _ = eqns.opened(jaxpr)
    return _origins(jaxpr, {var: place for place, var in enumerate(inner.invars)})


def _equation_sources(eqn: JaxprEqn) -> Sequence[_Moved | None]:
    """Returns, for each output of an equation, the operand that it is."""
    name = eqn.primitive.name
    if name == "transpose":
        return [(0, tuple(eqn.params["permutation"]))]
    if name in _CALLS:
        return _input_sources(_called(eqn))
    if name == "cond":
        each = zip(*map(_input_sources, eqn.params["branches"]), strict=True)
        return [_shift(_agreed(one), 1) for one in each]
    if name == "scan":
        scan = eqns.scan_of(eqn)
        of_body = _input_sources(scan.body)
        n_fixed = scan.n_consts + scan.n_carry
        ys = [_stacked(one) if one and one[0] >= n_fixed else None for one in of_body]
        return [*_carried(of_body[: scan.n_carry], scan.n_consts, 0), *ys[scan.n_carry :]]
    if name == "while":
        loop = eqns.while_of(eqn)
        return _carried(_input_sources(loop.body), loop.n_body_consts, loop.n_condition_consts)
    return [None] * len(eqn.outvars)


def _shift(moved: _Moved | None, before: int) -> _Moved | None:
    """Returns an operand's place where `before` others come first."""
    return None if moved is None else (before + moved[0], moved[1])


def _stacked(moved: _Moved) -> _Moved:
    """Returns the source of a stack of slices of an operand, whose axes may be moved."""
    place, order = moved
    return place, (0, *(axis + 1 for axis in order))


def _carried(carries: Sequence[_Moved | None], first: int, before: int) -> list[_Moved | None]:
    """Returns the operands of a loop that it carries unchanged.

    Args:
      carries: for each carry that the body returns, the argument of the body that it is.
      first: the place of the first carry among the body's arguments.
      before: the number of the loop's operands that the body does not take, which come first.
    """
    same = (_unmoved(moved) == first + place for place, moved in enumerate(carries))
    return [_shift(m, before) if kept else None for m, kept in zip(carries, same, strict=True)]


def may_be_weights(jaxpr: eqns.AnyJaxpr, given: Sequence[bool]) -> tuple[bool, ...]:
    """Returns a flag for each output: True if it may be a weight, without a product after one.

    Args:
      jaxpr: jaxpr of a function or a branch.
      given: which of its inputs are adapted weights.
    """
    inner, _ = eqns.opened(jaxpr)
    held = set(itertools.compress(inner.invars, given))

    def is_held(atom: eqns.Atom) -> bool:
        return not eqns.is_literal(atom) and atom in held

    for eqn in inner.eqns:
        operands = list(map(is_held, eqn.invars))
        if any(operands):
            held |= set(itertools.compress(eqn.outvars, _passed_on(eqn, operands)))
    return tuple(map(is_held, inner.outvars))


def _passed_on(eqn: JaxprEqn, operands: list[bool]) -> Sequence[bool]:
    """Returns a flag for each output of an equation: True if it may be a weight."""
    name, n_outputs = eqn.primitive.name, len(eqn.outvars)
    if name in _CALLS:
        return may_be_weights(_called(eqn), operands)
    if name == "cond":
        each = (may_be_weights(branch, operands[1:]) for branch in eqn.params["branches"])
        return [all(outputs) for outputs in zip(*each, strict=True)]
    if name in ("scan", "while"):
        return [moved is not None and operands[moved[0]] for moved in _equation_sources(eqn)]
    if name == "dot_general":
        return [all(operands)]
    return [name not in _ENDS] * n_outputs


_ENDS = frozenset({"conv_general_dilated", "ragged_dot_general", "shard_map"})
_ENDS |= {"custom_linear_solve"}
_ENDS |= {"custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr"}


def _called(eqn: JaxprEqn) -> eqns.AnyJaxpr:
    names = ("jaxpr", "call_jaxpr")
    called: eqns.AnyJaxpr = next(eqn.params[name] for name in names if name in eqn.params)
    return called
