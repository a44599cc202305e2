"""Haiku: `transform`ed functions, without a key."""

from collections.abc import Callable
from typing import Any

import jax

from tests.foreign.case import ALL_LINEAR, Case, Made, rule
from tests.support import array, draw

X = draw(9, (13, 6))
IMAGES = draw(9, (2, 7, 5, 6))
IDS = array([3, 0, 9, 3])
TABLE = rule(["embeddings"])


def _attention(hk: Any, x: jax.Array) -> jax.Array:
    w_init = hk.initializers.VarianceScaling()
    return hk.MultiHeadAttention(3, 5, w_init=w_init, model_size=7)(x, x, x)


def _lstm(hk: Any, x: jax.Array) -> jax.Array:
    core = hk.LSTM(7)
    return hk.dynamic_unroll(core, x, core.initial_state(None))[0]


def _case(
    model: str,
    weights: int,
    module: Callable[..., Any],
    x: Any,
    rules: Any = ALL_LINEAR,
    run: str = "apply",
) -> Case:
    def make() -> Made:
        import haiku as hk

        transformed = hk.without_apply_rng(hk.transform(lambda x: module(hk, x)))
        return Made(transformed.apply, transformed.init(jax.random.key(1), x), (x,), rules)

    return Case("dm-haiku", model, run, weights, make)


CASES = (
    _case("Linear", 1, lambda hk, x: hk.Linear(7)(x), X),
    _case("Conv2D", 1, lambda hk, x: hk.Conv2D(10, (3, 2))(x), IMAGES),
    _case(
        "Conv2D, two groups",
        1,
        lambda hk, x: hk.Conv2D(10, 3, feature_group_count=2, data_format="NHWC")(x),
        IMAGES,
    ),
    _case("MultiHeadAttention", 4, _attention, X),
    _case("LSTM", 1, _lstm, X, run="dynamic_unroll"),
    _case("Embed", 1, lambda hk, x: hk.Embed(11, 5)(x), IDS, TABLE),
    _case(
        "Embed, one-hot", 1, lambda hk, x: hk.Embed(11, 5, lookup_style="ONE_HOT")(x), IDS, TABLE
    ),
)
