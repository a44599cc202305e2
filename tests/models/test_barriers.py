"""Barriers around an activation change no number, and stand where a TPU needs them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lj
from lora_jax.models.decoder import blocks
from lora_jax.models.decoder.blocks import put_barrier, put_barrier_on_gradient
from lora_jax.models.families import read_config
from lora_jax.models.layers.placement import Placement
from tests.support import array, variables_of
from tests.train.plan.tiny_plans import FIELDS


class OnTpu(Placement):
    platform = "tpu"


class OnCpu(Placement):
    platform = "cpu"


@pytest.fixture(autouse=True)
def _few_tokens_are_many(monkeypatch):
    monkeypatch.setattr(blocks, "MIN_TOKENS_TO_ISOLATE_PRODUCT", 10)


X = array(np.linspace(-2.0, 3.0, 2 * 5 * 32, dtype=np.float32).reshape(2, 5, 32))


def loss_on(placement):
    """(the loss of an adapted MLP, its parameters)"""
    mlp = blocks.MLP(read_config(FIELDS), placement=placement)
    params = variables_of(mlp, X)["params"]
    tree = lj.lorafy(params, [lj.LoraRule(targets=".*", rank=2, alpha=3)])
    forward = lj.adapt(lambda params, x: mlp.apply({"params": params}, x))
    return lambda adapter, base, x: jnp.sum(jnp.tanh(forward(lj.join(adapter, base), x))), tree


def barriers(fn, *args):
    return str(jax.make_jaxpr(fn)(*args)).count("optimization_barrier")


def test_two_forward_and_two_backward():
    """And none on a CPU."""
    loss, tree = loss_on(OnTpu())
    halves = (*lj.split(tree), X)
    forward, both = barriers(loss, *halves), barriers(jax.grad(loss), *halves)
    assert (forward, both - forward) == (2, 2)
    assert barriers(jax.grad(loss_on(OnCpu())[0]), *halves) == 0


def test_fewer_tokens_have_one_in_both_passes(monkeypatch):
    monkeypatch.setattr(blocks, "MIN_TOKENS_TO_ISOLATE_PRODUCT", 11)
    loss, tree = loss_on(OnTpu())
    halves = (*lj.split(tree), X)
    assert (barriers(loss, *halves), barriers(jax.grad(loss), *halves)) == (1, 2)


@pytest.mark.slow
def test_they_change_no_number():
    results = []
    for placement in (OnTpu(), OnCpu()):
        loss, tree = loss_on(placement)
        adapter, base = lj.split(tree)
        args = (adapter, base, X)
        value, slope = jax.jit(jax.value_and_grad(loss, (0, 2)))(*args)
        _, moved = jax.jit(lambda a, b, x, run=loss: jax.jvp(lambda y: run(a, b, y), (x,), (x,)))(
            *args
        )
        each = jax.jit(jax.vmap(loss, (None, None, 0)))(adapter, base, X[:, None])
        results.append(jax.tree.leaves((value, slope, moved, each)))
    for one, other in zip(*results, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("barrier", [put_barrier, put_barrier_on_gradient])
def test_gradients_of_gradients(barrier):
    def cube(x):
        return jnp.sum(barrier(x) ** 3)

    hessian = jax.hessian(cube)(X[0, 0])
    np.testing.assert_allclose(hessian, jnp.diag(6 * X[0, 0]), rtol=1e-6)
