"""Solvers with derivatives of their own: Diffrax, Optimistix, `jax.experimental.ode`.

Around such a solver, `adapt` merges what the solver is given. Inside it, in the field, weights
stay factored.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

import lora_jax as lj
from tests.foreign.case import Case, Made
from tests.support import draw

Y0 = draw(9, (5, 3))
BOUNDARY = "the solver has a derivative of its own, which is kept"
Field = Callable[[Any, jax.Array], jax.Array]
Solve = Callable[[Field, Any, jax.Array], jax.Array]


def _params() -> Any:
    return {"up": {"kernel": draw(1, (3, 7))}, "down": {"kernel": draw(2, (7, 3))}}


def _field(params: Any, y: jax.Array) -> jax.Array:
    return jnp.tanh(y @ params["up"]["kernel"]) @ params["down"]["kernel"]


def _diffrax(adjoint: str) -> Solve:
    def solve(field: Field, params: Any, y0: jax.Array) -> jax.Array:
        import diffrax

        term = diffrax.ODETerm(lambda t, y, args: field(args, y))
        how = getattr(diffrax, adjoint)()
        tsit5 = diffrax.Tsit5()
        return diffrax.diffeqsolve(term, tsit5, 0.0, 1.0, 0.125, y0, args=params, adjoint=how).ys

    return solve


def _odeint(field: Field, params: Any, y0: jax.Array) -> jax.Array:
    from jax.experimental.ode import odeint

    times = jnp.linspace(0.0, 1.0, 3)
    return odeint(lambda y, t, params: field(params, y), y0, times, params)


def _fixed_point(field: Field, params: Any, x: jax.Array) -> jax.Array:
    import optimistix

    solver = optimistix.Newton(rtol=1e-6, atol=1e-6)
    equation = lambda y, args: 0.3 * field(args[0], y) + args[1]  # noqa: E731
    return optimistix.fixed_point(equation, solver, x, (params, x)).value


def _around(solve: Solve) -> Callable[[], Made]:
    return lambda: Made(lambda params, y: solve(_field, params, y), _params(), (Y0,))


def _inside(solve: Solve) -> Callable[[], Made]:
    """The field is adapted, not the solver."""

    def make() -> Made:
        inside = lambda tree, y: solve(lj.adapt(_field), tree, y)  # noqa: E731
        return _around(solve)()._replace(adapted=inside)

    return make


_DEFAULT, _DIRECT = _diffrax("RecursiveCheckpointAdjoint"), _diffrax("DirectAdjoint")
_BACKWARDS = _diffrax("BacksolveAdjoint")
AROUND, INSIDE = "adapt around", "adapt inside, tree as args"
CASES = (
    Case(
        "diffrax",
        "neural ODE",
        AROUND,
        2,
        _around(_DEFAULT),
        merges=4,
        why=BOUNDARY,
        by_hand=True,  # tests/adapt/test_guide.py runs its like
    ),
    Case("diffrax", "neural ODE, DirectAdjoint", AROUND, 2, _around(_DIRECT), by_hand=True),
    Case("diffrax", "neural ODE", INSIDE, 2, _inside(_DEFAULT)),
    Case("diffrax", "neural ODE, BacksolveAdjoint", INSIDE, 2, _inside(_BACKWARDS), by_hand=True),
    Case("jax", "neural ODE, odeint", AROUND, 2, _around(_odeint), 2, BOUNDARY, by_hand=True),
    Case("jax", "neural ODE, odeint", INSIDE, 2, _inside(_odeint)),
    Case("optimistix", "fixed point, Newton", AROUND, 2, _around(_fixed_point), 2, BOUNDARY),
    Case("optimistix", "fixed point, Newton", INSIDE, 2, _inside(_fixed_point)),
)
