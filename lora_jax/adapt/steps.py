"""Compiles the equations of a jaxpr one by one, for eager calls to run again and again.

Each is a program of its own, as in JAX's own eager mode, so that results are the same to the bit; a
product with a weight and its factors is one program.
"""

from collections.abc import Hashable

import jax

from lora_jax.adapt import eqns
from lora_jax.core.extend import JaxprEqn
from lora_jax.core.types import Forward, Value

_MOVED = ("device_put",)  # where an array lies is no part of a program


class EagerSteps:
    """Compiled equations of one jaxpr. Equations that do the same share a program."""

    def __init__(self) -> None:
        self._of_equation: dict[tuple[int, Hashable], Forward] = {}
        self._shared: dict[Hashable, Forward] = {}

    def bind(self, eqn: JaxprEqn, values: list[Value]) -> list[Value]:
        """Applies an equation to plain arrays."""
        is_traced = any(isinstance(value, jax.core.Tracer) for value in values)
        if is_traced or eqn.effects or eqn.primitive.name in _MOVED:
            return eqns.bind(eqn, values)
        outputs: list[Value] = self.compiled(eqn, None, lambda values: eqns.bind(eqn, values))(
            values
        )
        return outputs

    def compiled(self, eqn: JaxprEqn, how: Hashable, call: Forward) -> Forward:
        """Returns `call`, compiled, which applies the equation; `how` tells its variants apart."""
        known = self._of_equation.get((id(eqn), how))
        if known is None:
            known = self._shared.setdefault((*eqns.identity(eqn), how), jax.jit(call))
            self._of_equation[id(eqn), how] = known
        return known
