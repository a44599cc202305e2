"""Activations that the factors of several weights read, in one evaluation of a jaxpr."""

from collections.abc import Callable
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp

from lora_jax.adapt import eqns
from lora_jax.adapt.needed import SameOperand
from lora_jax.core.extend import JaxprEqn
from lora_jax.core.product import is_on_mesh
from lora_jax.core.types import Value


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
