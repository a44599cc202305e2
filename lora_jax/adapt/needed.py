"""Finds the equations that a jaxpr's used outputs need, and operands that several of them share.

The **side** of an operand is its index, 0 or 1, in a product of two operands.
"""

import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

import jax
import jax.numpy as jnp

from lora_jax.adapt import eqns
from lora_jax.core.extend import Jaxpr, JaxprEqn
from lora_jax.core.product import is_mesh_set
from lora_jax.core.types import Value

UsedOutputs = tuple[bool, ...]  # for each output, True if something reads it
# By an operand and its contracted axes, in products without batch axes: each product, and the side
# on which it has the operand.
ProductsOfOperand = dict[tuple[eqns.Atom, tuple[int, ...]], list[tuple[JaxprEqn, int]]]
# Equations that cast or move their one operand.
_MOVES = frozenset({"convert_element_type", "transpose", "reshape", "squeeze", "copy", "copy_p"})
_MOVES |= {"name", "sharding_constraint"}


class NeededEquation(NamedTuple):
    """An equation that some outputs of its jaxpr need.

    Attributes:
      eqn: the equation.
      used_outputs: which of its outputs are needed.
      unread_variables: the variables that nothing after it reads: dropping them frees memory where
        the function runs eagerly.
    """

    eqn: JaxprEqn
    used_outputs: UsedOutputs
    unread_variables: list[eqns.Atom]


class NeededEquations(NamedTuple):
    """The equations that some outputs of a jaxpr need, and the operands that they share.

    Attributes:
      equations: in order.
      products_of_operand: see `_products_of_operand`.
      moves: see `_equation_of_moved_value`.
    """

    equations: list[NeededEquation]
    products_of_operand: ProductsOfOperand
    moves: dict[eqns.Atom, JaxprEqn]


_NEEDED: weakref.WeakKeyDictionary[Jaxpr, dict[UsedOutputs, NeededEquations]] = (
    weakref.WeakKeyDictionary()
)


def needed_equations(jaxpr: Jaxpr, used_outputs: UsedOutputs) -> NeededEquations:
    """Returns the equations that the used outputs or effects need."""
    needed_of_jaxpr = _NEEDED.setdefault(jaxpr, {})
    if used_outputs not in needed_of_jaxpr:
        needed_of_jaxpr[used_outputs] = _find_needed(jaxpr, used_outputs)
    return needed_of_jaxpr[used_outputs]


def _find_needed(jaxpr: Jaxpr, used_outputs: UsedOutputs) -> NeededEquations:
    """Walks a jaxpr backwards and keeps the equations whose outputs are read later."""
    variables_read: set[eqns.Atom] = set()
    for atom, is_used in zip(jaxpr.outvars, used_outputs, strict=True):
        if is_used and not eqns.is_literal(atom):
            variables_read.add(atom)
    needed_eqns: list[NeededEquation] = []
    for eqn in reversed(jaxpr.eqns):
        is_read = tuple(out in variables_read for out in eqn.outvars)
        if not any(is_read) and not eqn.effects:
            continue
        operands = {atom for atom in eqn.invars if not eqns.is_literal(atom)}
        last_read_here = operands - variables_read
        never_read = {out for out in eqn.outvars if out not in variables_read}
        needed_eqns.append(NeededEquation(eqn, is_read, [*(last_read_here | never_read)]))
        variables_read |= operands
    needed_eqns.reverse()
    equations = [needed.eqn for needed in needed_eqns]
    return NeededEquations(
        needed_eqns, _products_of_operand(equations), _equation_of_moved_value(equations)
    )


def _products_of_operand(equations: Iterable[JaxprEqn]) -> ProductsOfOperand:
    """Finds the operands that several products contract over the same axes."""
    products: ProductsOfOperand = {}
    for eqn in equations:
        if eqn.primitive.name != "dot_general":
            continue
        contract, batch = eqn.params["dimension_numbers"]
        if any(batch):
            continue
        for side, axes in enumerate(contract):
            operand = eqn.invars[side]
            if not eqns.is_literal(operand):
                products.setdefault((operand, tuple(axes)), []).append((eqn, side))
    return {key: group for key, group in products.items() if len(group) > 1}


def _equation_of_moved_value(equations: Iterable[JaxprEqn]) -> dict[eqns.Atom, JaxprEqn]:
    """Returns the equation of each value that is only a cast or moved operand."""
    return {
        eqn.outvars[0]: eqn
        for eqn in equations
        if eqn.primitive.name in _MOVES and len(eqn.invars) == 1
    }


def _return_unknown(_: eqns.Atom) -> None:
    """Returns None: no operand's value is known before its equation runs."""


@dataclass(frozen=True)
class FactorInputs:
    """The activations that the factors multiply, and products shared by several weights.

    Attributes:
      products_of_operand: the products of each operand; empty where products are not to be shared.
      value_ahead: returns the value of an operand before its turn, or None if that takes a
        computation.
      known_products: s·xA of products that are to come, by the identity of their equations.
    """

    products_of_operand: ProductsOfOperand = field(default_factory=dict)
    value_ahead: Callable[[eqns.Atom], Value] = _return_unknown
    known_products: dict[int, jax.Array] = field(default_factory=dict)
    # By id: an array, and that array for factors.
    _copies: dict[int, tuple[Value, Value]] = field(default_factory=dict)

    def copy_for_factors(self, x: jax.Array) -> Value:
        """Returns the x that the factors multiply: a copy if traced under a mesh.

        Where W's out axes are sharded, x's cotangent from each product with W is an all-reduce. XLA
        makes one all-reduce of several whose results are added directly. The copy lets it: the
        cotangents from W are added to each other, and those from A at the end.
        """
        if not is_mesh_set() or not isinstance(x, jax.core.Tracer):
            return x
        if id(x) not in self._copies:
            self._copies[id(x)] = (x, jnp.copy(x))
        _, copy = self._copies[id(x)]
        return copy

    def other_products(self, eqn: JaxprEqn, side: int) -> list[tuple[JaxprEqn, int]]:
        """Returns the other products that contract the same axes of the same operand.

        Each comes with the side on which it has the operand.
        """
        contract, _ = eqn.params["dimension_numbers"]
        operand = eqn.invars[side]
        if eqns.is_literal(operand):
            return []
        products = self.products_of_operand.get((operand, tuple(contract[side])), [])
        return [(product, its_side) for product, its_side in products if product is not eqn]
