"""An adapter beside others draws what it draws alone, whatever the others' batches are like."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lj
from lora_jax import training
from lora_jax.bank import BankError, Tenant, Together
from lora_jax.models.layers.blocks import add_noise
from lora_jax.training.neftune import neftune
from tests.support import assert_close, draw, lorafied, with_random_factors

pytestmark = pytest.mark.usefixtures("standard_promotion")
PARAMS = {"table": draw(1, (13, 5)), "up": {"kernel": draw(2, (5, 7))}, "out": draw(3, (7, 3))}
NOISE = 8.0


def apply(variables, ids, attention_mask=None, embedding_noise=None):
    """[batch, seq] tokens -> [batch, seq, 3]; each token by itself."""
    params = variables["params"]
    x = add_noise(jnp.take(params["table"], ids, axis=0), embedding_noise)
    return jnp.tanh(x @ params["up"]["kernel"]) @ params["out"]


FORWARD = lj.adapt(apply)


def squares(forward, params, batch, dropout_key):
    more = {} if dropout_key is None else {"dropout_key": dropout_key}
    y = forward({"params": params}, batch["ids"], attention_mask=batch["weights"], **more)
    errors = jnp.sum((y - batch["y"]) ** 2, axis=-1) * batch["weights"]
    return training.Sums(jnp.sum(errors), jnp.sum(batch["weights"]), {})


LOSS = training.Loss(squares)


def tenant(seed, dropout=0.4, noise=NOISE):
    rule = lj.LoraRule(targets=["up"], rank=2, alpha=3.0, dropout=dropout)
    return Tenant(
        params=with_random_factors(lorafied(PARAMS, [rule]), seed=seed),
        schedule=lambda count: jnp.asarray(0.05, jnp.float32),
        steps=9,
        loss=LOSS,
        optimizer="sgd",
        key=jax.random.key(seed),
        noise=noise,
    )


def batch(name, step, rows, seq, filled=0):
    """One part; `filled` more tokens a row, which do not count."""
    rng = np.random.default_rng([ord(name[0]), step])
    found = {
        "ids": rng.integers(0, 13, (1, rows, seq)).astype(np.int32),
        "y": rng.standard_normal((1, rows, seq, 3)).astype(np.float32),
        "weights": np.ones((1, rows, seq), np.float32),
    }
    wider = {name: [(0, 0)] * x.ndim for name, x in found.items()}
    for widths in wider.values():
        widths[2] = (0, filled)
    return {name: np.pad(x, wider[name]) for name, x in found.items()}


def runs_alone(like):
    """Returns a function that trains an adapter like this one alone."""
    noisy = neftune(FORWARD, like.noise) if like.noise else FORWARD
    optimizer = training.make_optimizer(like.optimizer, like.schedule, like.params)
    step = jax.jit(
        training.make_step(noisy, optimizer, like.schedule, dropout=True, loss=like.loss)
    )
    return functools.partial(alone, optimizer, step)


def alone(optimizer, step, one, batches):
    adapter, base = lj.split(one.params)
    state = training.init_state(adapter, optimizer, one.key)
    for given in batches:
        state, metrics = step(state, base, given)
    return state.adapter, metrics["loss"]


# The lengths of one's rows and of the other's, step by step.
LENGTHS = [(6, 9), (6, 6), (9, 6), (6, 6), (6, 9)]


@pytest.mark.slow
@pytest.mark.parametrize("how", ["both", "dropout", "noise"])
def test_dropout_and_noise_beside_longer_rows(how):
    draws = {"dropout": 0.0 if how == "noise" else 0.4, "noise": 0.0 if how == "dropout" else NOISE}
    tenants = {name: tenant(seed, **draws) for seed, name in enumerate(("mine", "theirs"))}
    together = Together(FORWARD, PARAMS)
    together.add(tenants)
    given = {
        name: [batch(name, n, 4, both[i]) for n, both in enumerate(LENGTHS)]
        for i, name in enumerate(tenants)
    }
    for n in range(len(LENGTHS)):
        metrics = together.step({name: given[name][n] for name in tenants})
    train = runs_alone(tenants["mine"])
    for name, one in tenants.items():
        expected, loss = train(one, given[name])
        assert_close(together.state(name).adapter, expected, 1e-6)
        assert_close(metrics[name]["loss"], loss, 1e-6)
    # The control: what a batch draws as its neighbour's fills it up.
    filled = [batch("mine", n, 4, a, max(a, b) - a) for n, (a, b) in enumerate(LENGTHS)]
    other, _ = train(tenants["mine"], filled)
    mine = together.state("mine").adapter
    differ = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), other, mine)
    assert max(jax.tree.leaves(differ)) > 0.01
    (stack,) = together._stacks.values()
    # One program a shape, and one for all where they agree.
    assert (stack._steps.step_one._cache_size(), stack._steps.step_all._cache_size()) == (2, 1)


def test_without_draws_batches_share_a_call():
    """The control: where nothing is drawn, filling up is right, and one call is enough."""
    together = Together(FORWARD, PARAMS)
    tenants = {name: tenant(seed, dropout=0.0, noise=0.0) for seed, name in enumerate("ab")}
    together.add(tenants)
    together.step({"a": batch("a", 0, 4, 6), "b": batch("b", 0, 3, 9)})
    (stack,) = together._stacks.values()
    assert (stack._steps.step_one._cache_size(), stack._steps.step_all._cache_size()) == (0, 1)


def test_shapes_that_are_refused_leave_all_adapters_as_they_were():
    """Also those of stacks that come before."""
    together = Together(FORWARD, PARAMS)
    quiet = {"dropout": 0.0, "noise": 0.0}
    together.add({"first": tenant(1), "a": tenant(2, **quiet), "b": tenant(3, **quiet)})
    given = {name: batch(name, 0, 2, n) for n, name in enumerate(("first", "a", "b"), start=4)}
    del given["a"]["weights"], given["b"]["weights"]
    before = together.state("first")
    with pytest.raises(BankError, match="train in one stack, but their batches have"):
        together.step(given)
    assert together.done("first") == 0
    assert_close(together.state("first").adapter, before.adapter, 0)
