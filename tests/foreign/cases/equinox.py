"""Equinox: kernels lie [out, in]; a module is a pytree, of which the arrays are the tree."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from tests.foreign.case import ALL_LINEAR, Case, Made, rule
from tests.support import array, draw

X = draw(9, (13, 6))
IMAGES = draw(9, (2, 6, 7, 5))
IDS = array([3, 0, 9, 3])


def _made(layer: Any, run: Callable[[Any], Callable[..., Any]], x: Any, rules: Any) -> Made:
    import equinox as eqx

    params, static = eqx.partition(layer, eqx.is_inexact_array)
    return Made(lambda params, x: run(eqx.combine(params, static))(x), params, (x,), rules)


def _over_time(cell: Any) -> Callable[..., Any]:
    def run(x: jax.Array) -> jax.Array:
        def step(state: Any, x: jax.Array) -> Any:
            state = cell(x, state)
            return state, state[0]

        return jax.lax.scan(step, (jnp.zeros(7), jnp.zeros(7)), x)[1]

    return run


def _case(model: str, run: str, weights: int, layer: Any, how: Any, x: Any, rules: Any) -> Case:
    def make() -> Made:
        import equinox as eqx

        return _made(layer(eqx.nn, jax.random.key(1)), how, x, rules)

    return Case("equinox", model, run, weights, make)


CASES = (
    _case("Linear", "vmap", 1, lambda nn, key: nn.Linear(6, 7, key=key), jax.vmap, X, ALL_LINEAR),
    _case(
        "Conv2d",
        "vmap",
        1,
        lambda nn, key: nn.Conv2d(6, 10, 3, key=key),
        jax.vmap,
        IMAGES,
        ALL_LINEAR,
    ),
    _case(
        "Conv2d, two groups",
        "vmap",
        1,
        lambda nn, key: nn.Conv2d(6, 10, (3, 2), groups=2, padding=1, key=key),
        jax.vmap,
        IMAGES,
        ALL_LINEAR,
    ),
    _case(
        "MultiheadAttention",
        "self-attention",
        4,
        lambda nn, key: nn.MultiheadAttention(3, 6, key=key),
        lambda layer: lambda x: layer(x, x, x),
        X,
        ALL_LINEAR,
    ),
    _case(
        "LSTMCell",
        "lax.scan over time",
        2,
        lambda nn, key: nn.LSTMCell(6, 7, key=key),
        _over_time,
        X,
        ALL_LINEAR,
    ),
    _case(
        "Embedding",
        "vmap",
        1,
        lambda nn, key: nn.Embedding(11, 5, key=key),
        jax.vmap,
        IDS,
        rule(["weight"]),
    ),
    _case("MLP", "vmap", 3, lambda nn, key: nn.MLP(6, 7, 11, 2, key=key), jax.vmap, X, ALL_LINEAR),
)
