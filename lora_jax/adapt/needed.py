"""The equations of a jaxpr that its wanted outputs need, and what several of them read."""

import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

import jax
import jax.numpy as jnp

from lora_jax.adapt import eqns
from lora_jax.core.extend import Jaxpr, JaxprEqn
from lora_jax.core.product import is_on_mesh
from lora_jax.core.types import Value

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


@dataclass(frozen=True)
class FactorInputs:
    """The activations that factors read, and what was computed from them for several weights.

    Attributes:
      groups: the products of each operand; empty where products are not to be shared.
      ahead: returns the value of an operand before its turn; None if that takes a computation.
      products: s·xA of products that are to come, by the identity of their equations.
    """

    groups: SameOperand = field(default_factory=dict)
    ahead: Callable[[eqns.Atom], Value] = lambda atom: None
    products: dict[int, jax.Array] = field(default_factory=dict)
    # By id: an array, and that array for factors.
    _copies: dict[int, tuple[Value, Value]] = field(default_factory=dict)

    def copied(self, x: jax.Array) -> Value:
        """Returns the x that factors multiply: on a mesh, in traced functions, a copy.

        Where W's out axes are sharded, x's cotangent from each product with W is an all-reduce. XLA
        makes one all-reduce of several whose results are added directly. The copy lets it: the
        cotangents from W are added to each other, and those from A at the end.
        """
        if not is_on_mesh() or not isinstance(x, jax.core.Tracer):
            return x
        if id(x) not in self._copies:
            self._copies[id(x)] = (x, jnp.copy(x))
        return self._copies[id(x)][1]

    def others(self, eqn: JaxprEqn, side: int) -> list[tuple[JaxprEqn, int]]:
        """Returns the products that contract the same axes of the operand on one side of `eqn`.

        Each with the side on which it has the operand; `eqn` itself is left out.
        """
        contract, _ = eqn.params["dimension_numbers"]
        atom = eqn.invars[side]
        if eqns.is_literal(atom):
            return []
        group = self.groups.get((atom, tuple(contract[side])), [])
        return [(other, place) for other, place in group if other is not eqn]
