"""The equations of a jaxpr that its wanted outputs need, and what they have in common."""

import weakref
from collections.abc import Iterable
from typing import NamedTuple

from lora_jax.adapt import eqns
from lora_jax.core.extend import Jaxpr, JaxprEqn

Live = tuple[bool, ...]  # which outputs are wanted
# By an operand and its contracted axes, in products without batch axes: each product, and the side
# on which it has the operand.
SameOperand = dict[tuple[eqns.Atom, tuple[int, ...]], list[tuple[JaxprEqn, int]]]
# Equations that cast or move their one operand.
_MOVES = frozenset({"convert_element_type", "transpose", "reshape", "squeeze", "copy", "copy_p"})
_MOVES |= {"name", "sharding_constraint"}


class Needed(NamedTuple):
    """The equations of a jaxpr that are needed for some of its outputs, and what they share.

    Attributes:
      equations: in order, each with which of its outputs are wanted, and the variables that nothing
        after it reads: dropping them frees memory where the function runs eagerly.
      same_operand, moves: see `_products_of_same_operand` and `_moves_of`.
    """

    equations: list[tuple[JaxprEqn, Live, list[eqns.Atom]]]
    same_operand: SameOperand
    moves: dict[eqns.Atom, JaxprEqn]


_NEEDED: weakref.WeakKeyDictionary[Jaxpr, dict[Live, Needed]] = weakref.WeakKeyDictionary()


def needed_equations(jaxpr: Jaxpr, live: Live) -> Needed:
    """Returns the equations that the wanted outputs or an effect need."""
    known = _NEEDED.setdefault(jaxpr, {})
    if live not in known:
        known[live] = _find_needed(jaxpr, live)
    return known[live]


def _find_needed(jaxpr: Jaxpr, live: Live) -> Needed:
    needed = {
        atom
        for atom, wanted in zip(jaxpr.outvars, live, strict=True)
        if wanted and not eqns.is_literal(atom)
    }
    equations: list[tuple[JaxprEqn, Live, list[eqns.Atom]]] = []
    for eqn in reversed(jaxpr.eqns):
        wanted = tuple(out in needed for out in eqn.outvars)
        if not any(wanted) and not eqn.effects:
            continue
        reads = {atom for atom in eqn.invars if not eqns.is_literal(atom)}
        unread = {out for out, used in zip(eqn.outvars, wanted, strict=True) if not used}
        equations.append((eqn, wanted, [*((reads - needed) | unread)]))
        needed |= reads
    equations.reverse()
    alone = [eqn for eqn, _, _ in equations]
    return Needed(equations, _products_of_same_operand(alone), _moves_of(alone))


def _products_of_same_operand(equations: Iterable[JaxprEqn]) -> SameOperand:
    """Finds the operands that several products contract over the same axes."""
    groups: SameOperand = {}
    for eqn in equations:
        if eqn.primitive.name != "dot_general" or any(eqn.params["dimension_numbers"][1]):
            continue
        for side, contract in enumerate(eqn.params["dimension_numbers"][0]):
            if not eqns.is_literal(eqn.invars[side]):
                groups.setdefault((eqn.invars[side], tuple(contract)), []).append((eqn, side))
    return {key: group for key, group in groups.items() if len(group) > 1}


def _moves_of(equations: Iterable[JaxprEqn]) -> dict[eqns.Atom, JaxprEqn]:
    """Finds the values that are another one, cast or moved: each with its equation."""
    return {
        eqn.outvars[0]: eqn
        for eqn in equations
        if eqn.primitive.name in _MOVES and len(eqn.invars) == 1
    }
