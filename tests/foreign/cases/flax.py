"""Flax's own modules, whole: Linen by `apply`, NNX by ``merge(graphdef, …)``.

(Its layers one by one are in tests/adapt/test_flax_modules.py, which the tests run.)
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx

from tests.foreign.case import Case, Made, rule
from tests.foreign.nnx_modules import Wrap, both
from tests.support import LinenModel, array, draw

X = draw(9, (2, 13, 6))
IMAGES = draw(9, (2, 7, 5, 6))


def _linen(module: nn.Module, x: jax.Array) -> Made:
    params = module.init(jax.random.key(1), x)["params"]
    return Made(lambda p, x: module.apply({"params": p}, x), params, (x,), rule(".*kernel"))


class _Convolutional(nnx.Module):
    """Convolution, normalisation, a head."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.conv = nnx.Conv(6, 10, (3, 2), rngs=rngs)
        self.norm = nnx.BatchNorm(10, use_running_average=False, rngs=rngs)
        self.out = nnx.Linear(10, 7, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.out(jax.nn.gelu(self.norm(self.conv(x))))


def _nnx(module: nnx.Module, x: jax.Array, wrap: Wrap) -> Made:
    graphdef, params, rest = nnx.split(module, nnx.Param, ...)
    called = wrap(lambda module, x: module(x))

    def fn(params, rest, x):  # type: ignore[no-untyped-def]
        module = nnx.merge(graphdef, params, rest)
        return called(module, x), nnx.state(module, nnx.BatchStat)

    return Made(fn, params, (rest, x))


def _attention(wrap: Wrap) -> Made:
    module = nnx.MultiHeadAttention(3, 6, qkv_features=15, decode=False, rngs=nnx.Rngs(1))
    return _nnx(module, X, wrap)


def _tied(wrap: Wrap) -> Made:
    module = nnx.Embed(11, 5, rngs=nnx.Rngs(1))
    graphdef, params = nnx.split(module)
    called = wrap(lambda embed, ids: embed.attend(jnp.tanh(embed(ids))))

    def fn(params, ids):  # type: ignore[no-untyped-def]
        return called(nnx.merge(graphdef, params), ids)

    return Made(fn, params, (array([[3, 0, 9], [10, 3, 1]]),), rule(["embedding"]))


CASES = (
    Case(
        "flax",
        "Linen: two blocks under nn.scan and nn.remat, a head",
        "apply",
        3,
        lambda: _linen(LinenModel(), draw(9, (3, 5))),
        by_hand=True,
    ),
    Case(
        "flax",
        "Linen: RNN of OptimizedLSTMCell",
        "apply",
        8,
        lambda: _linen(nn.RNN(nn.OptimizedLSTMCell(7)), X),
        by_hand=True,
    ),
    *both(
        "flax",
        "NNX: Conv, BatchNorm, Linear",
        "merge; outputs and new statistics",
        2,
        lambda wrap: _nnx(_Convolutional(nnx.Rngs(1)), IMAGES, wrap),
    ),
    *both("flax", "NNX: MultiHeadAttention", "merge", 4, _attention, by_hand=True),
    *both("flax", "NNX: Embed, looked up and tied", "merge", 1, _tied),
)
