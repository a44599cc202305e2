"""Weights that multiply the very same x share one product xA; policies of models keep it."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lj
from lora_jax.core.names import NARROW_PRODUCT
from tests.support import array, draw, equations, lorafied, with_random_factors

SIZES = {"q": 7, "k": 11, "v": 17}  # of 67 in features
RULES = [
    lj.LoraRule(targets=["q", "k"], rank=2, alpha=3),
    lj.LoraRule(targets=["v"], rank=1, alpha=5),
]
X = draw(9, (2, 13, 67))
FEW = array(np.asarray(X)[:1, :5])


def products_with_a(jaxpr: Any, features: int = 67) -> list[int]:
    """The columns of each product xA: of [.., features] and [r, features], over the features."""
    return sorted(
        right.aval.shape[0]
        for eqn in equations(jaxpr)
        if eqn.primitive.name == "dot_general"
        for right, contract in [(eqn.invars[1], eqn.params["dimension_numbers"][0][1])]
        if right.aval.ndim == 2 and right.aval.shape[1] == features and contract == (1,)
    )


def tree(rules: Any = RULES) -> Any:
    plain = {name: {"kernel": draw(n, (67, n))} for name, n in SIZES.items()}
    return with_random_factors(lorafied(plain, rules))


def projections(params: Any, x: jax.Array) -> list[jax.Array]:
    return [x @ params[name]["kernel"].astype(x.dtype) for name in SIZES]


def from_different_values(params: Any, x: jax.Array) -> list[jax.Array]:
    return [x * n @ params[name]["kernel"] for n, name in enumerate(SIZES, 1)]


@pytest.mark.parametrize(
    ("run", "rules", "x", "how", "columns"),
    [
        pytest.param(projections, RULES, X, {}, [5], id="one x"),
        pytest.param(projections, RULES[:1], X, {}, [4], id="one of three is not adapted"),
        pytest.param(from_different_values, RULES, X, {}, [1, 2, 2], id="different values"),
        pytest.param(projections, RULES, FEW, {}, [1, 2, 2], id="few rows"),
        pytest.param(
            projections,
            [dataclasses.replace(rule, dropout=0.5) for rule in RULES],
            X,
            {"dropout_key": 1},
            [1, 2, 2],
            id="dropout",
        ),
    ],
)
def test_weights_of_one_x_share_a_product(
    run: Any, rules: Any, x: Any, how: Any, columns: Any
) -> None:
    keys = {name: jax.random.key(seed) for name, seed in how.items()}
    jaxpr = jax.make_jaxpr(lambda params: lj.adapt(run)(params, x, **keys))(tree(rules))
    assert products_with_a(jaxpr) == columns


def test_the_cotangents_of_one_x_are_one_product() -> None:
    adapter, base = lj.split(tree())

    def backward(run: Any) -> int:
        def loss(adapter: Any, x: jax.Array) -> Any:
            return sum(jnp.sum(jnp.sin(y)) for y in lj.adapt(run)(lj.join(adapter, base), x))

        jaxpr = jax.make_jaxpr(jax.grad(loss, (0, 1)))(adapter, X)
        return sum(eqn.primitive.name == "dot_general" for eqn in equations(jaxpr))

    # Forward 3 xW, xA and 3 zB; backward 3 gW, 3 dz, 3 dB, dA and dz A.
    assert backward(projections) == 7 + 11
    assert backward(from_different_values) == 9 + 15


@pytest.mark.slow
def test_a_users_policy_keeps_what_it_says() -> None:
    adapter, base = lj.split(tree())

    def again(policy: Any) -> list[int]:
        run = jax.checkpoint(lambda p, x: projections(p, jnp.sin(x)), policy=policy)

        def loss(adapter: Any) -> Any:
            return sum(jnp.sum(y**2) for y in lj.adapt(run)(lj.join(adapter, base), X))

        return products_with_a(jax.make_jaxpr(jax.grad(loss))(adapter))

    assert again(None) == [5, 5]
    assert again(jax.checkpoint_policies.nothing_saveable) == [5, 5]
    assert again(jax.checkpoint_policies.save_only_these_names(NARROW_PRODUCT)) == [5]
