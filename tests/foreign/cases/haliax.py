"""Haliax: named axes; a module is a pytree of Equinox, stacked layers are folded."""

from typing import Any

import jax

from tests.foreign.case import Case, Made, rule
from tests.support import draw


def _haliax(build: Any) -> Made:
    import equinox as eqx
    import haliax as hax

    layer, axes, rules = build(hax)
    params, static = eqx.partition(layer, eqx.is_inexact_array)

    def fn(params: Any, x: jax.Array) -> Any:
        return eqx.combine(params, static)(hax.named(x, axes)).array

    return Made(fn, params, (draw(9, [axis.size for axis in axes]),), rules)


def _linear(hax: Any) -> Any:
    time, features = hax.Axis("time", 13), hax.Axis("features", 6)
    heads, size = hax.Axis("heads", 3), hax.Axis("size", 5)
    layer = hax.nn.Linear.init(features, (heads, size), key=jax.random.key(1))
    return layer, (time, features), rule(r".*weight/0")


def _stacked(hax: Any) -> Any:
    import equinox as eqx

    time, features, layers = hax.Axis("time", 13), hax.Axis("features", 6), hax.Axis("layers", 3)
    hidden = hax.Axis("hidden", 11)

    class Block(eqx.Module):
        up: Any
        down: Any

        @staticmethod
        def init(*, key: Any) -> Any:
            up, down = jax.random.split(key)
            return Block(
                hax.nn.Linear.init(features, hidden, key=up),
                hax.nn.Linear.init(hidden, features, key=down),
            )

        def __call__(self, x: Any) -> Any:
            return x + self.down(hax.tanh(self.up(x)))

    keys = jax.random.split(jax.random.key(1), 3)
    stack = hax.nn.Stacked.init(layers, Block, gradient_checkpointing=True)(key=keys)

    class Model(eqx.Module):
        stack: Any

        def __call__(self, x: Any) -> Any:
            return self.stack.fold(x)

    return Model(stack), (time, features), rule(r".*weight/0")


CASES = (
    Case("haliax", "Linear into two named axes", "on a NamedArray", 1, lambda: _haliax(_linear)),
    Case(
        "haliax",
        "Stacked: three blocks, checkpointed",
        "fold (a scan)",
        2,
        lambda: _haliax(_stacked),
    ),
)
