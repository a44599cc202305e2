"""NNX modules that are passed to an adapted function keep what it changes in them."""

import functools

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx

import lora_jax as lj
from tests.support import (
    assert_close,
    assert_identical,
    draw,
    numpy_init,
    over,
    with_random_factors,
)

RULES = [lj.LoraRule(targets="all-linear", rank=2, alpha=3.0, init=numpy_init)]
X = draw(9, (13, 5))


class Net(nnx.Module):
    def __init__(self, rngs):
        self.up = nnx.Linear(5, 11, rngs=rngs)
        self.norm = nnx.BatchNorm(11, rngs=rngs)
        self.dropout = nnx.Dropout(0.3, rngs=rngs)
        self.down = nnx.Linear(11, 7, rngs=rngs)
        self.calls = 0

    def __call__(self, x):
        self.calls += 1
        h = jnp.tanh(self.norm(self.up(x)))
        self.hidden = nnx.Cache(h.mean())
        return self.down(self.dropout(h))


def call(module, x):
    return module(x)


@functools.cache
def halves():
    """What `adapted` puts together, made once."""
    tree = with_random_factors(lj.lorafy(Net(nnx.Rngs(1)), RULES))
    return nnx.split(tree), nnx.split(lj.merge(tree))


def adapted():
    """A module with random factors; the merged one, which is another object."""
    return tuple(nnx.merge(*of) for of in halves())


def state_of(module):
    """The state beside the weights."""
    return plain(nnx.state(module, (nnx.BatchStat, nnx.RngState, nnx.Cache)))


def plain(state):
    """A state as arrays, keys as their data."""

    def data(array):
        is_key = jnp.issubdtype(array.dtype, jax.dtypes.prng_key)
        return jax.random.key_data(array) if is_key else array

    return jax.tree.map(data, nnx.to_pure_dict(state))


WRAPS = {"eagerly": lambda fn: fn, "nnx.jit": nnx.jit}


@over("wrap", WRAPS, often=["nnx.jit"])
def test_state_is_written_back(wrap):
    tree, merged = adapted()
    before = state_of(tree)
    ours, theirs = (WRAPS[wrap](fn) for fn in (lj.adapt(call, strict=True), call))
    for n in range(1, 4):
        assert_close(ours(tree, X + n), theirs(merged, X + n), 5e-5)  # the norm magnifies rounding
        assert_close(state_of(tree), state_of(merged), 1e-5)
        assert tree.calls == merged.calls == n
    assert jnp.abs(before["norm"]["mean"] - state_of(tree)["norm"]["mean"]).max() > 1e-3
    assert lj.is_node(tree.up.kernel.get_raw_value()), "the adapter is where it was"


def test_ten_steps_of_training_equal_those_through_merge():
    """BatchNorm and Dropout, the state carried from step to step."""
    optimiser = optax.sgd(0.1, momentum=0.9)

    def trained(run):
        adapter, base = lj.split(adapted()[0])
        moments, losses = optimiser.init(adapter), []

        def loss(adapter, base, x):
            model = lj.join(adapter, base)
            y = run(model, x)
            return jnp.mean((y - 1.0) ** 2), nnx.state(model, (nnx.BatchStat, nnx.RngState))

        @jax.jit
        def step(adapter, base, moments, x):
            (value, state), grad = jax.value_and_grad(loss, has_aux=True)(adapter, base, x)
            updates, moments = optimiser.update(grad, moments, adapter)
            return optax.apply_updates(adapter, updates), moments, state, value

        for n in range(10):  # batches that differ
            adapter, moments, state, value = step(adapter, base, moments, draw(n, (13, 5)))
            nnx.update(base, state)
            losses.append(value)
        return adapter, losses, plain(state)

    def through_merge(model, x):
        merged = lj.merge(model)
        y = merged(x)
        nnx.update(model, nnx.state(merged, (nnx.BatchStat, nnx.RngState)))
        return y

    ours, theirs = trained(lj.adapt(call, strict=True)), trained(through_merge)
    assert_close(ours, theirs, 1e-5)
    assert theirs[1][-1] < theirs[1][0]


def test_new_and_deleted_attributes_and_lists():
    class Notes(nnx.Module):
        def __init__(self, rngs):
            self.linear = nnx.Linear(5, 7, rngs=rngs)
            self.seen = nnx.List([])
            self.old = nnx.Variable(jnp.zeros(3))
            self.plain = nnx.data(jnp.zeros(2))

        def __call__(self, x):
            y = self.linear(x)
            self.seen.append(nnx.Variable(y.sum()))
            self.new = nnx.Cache(y)
            self.plain = self.plain + 1
            self.status = "deleted"
            if hasattr(self, "old"):
                del self.old
            return y

    tree = with_random_factors(lj.lorafy(Notes(nnx.Rngs(1)), RULES))
    merged, run = lj.merge(tree), lj.adapt(call)
    for n in range(1, 4):
        y = run(tree, X)
        merged(X)
        assert len(tree.seen) == n and not hasattr(tree, "old") and tree.status == "deleted"
        assert_close([v[...] for v in tree.seen], [v[...] for v in merged.seen], 1e-5)
        assert_identical((tree.new[...], tree.plain), (y, merged.plain))


def test_modules_inside_other_arguments():
    tree, merged = adapted()
    run = lj.adapt(lambda pair, x: pair["model"](x))
    assert_close(run({"model": tree}, X), nnx.jit(call)(merged, X), 1e-5)
    assert_close(state_of(tree), state_of(merged), 1e-5)


def test_an_adapted_weight_that_is_assigned_is_an_error():
    def fn(module, x):
        module.up.kernel.set_value(module.up.kernel.get_value() * 2)
        return module(x)

    tree, _ = adapted()
    with pytest.raises(ValueError, match="assigns to 'up/kernel', which is adapted.*merge"):
        lj.adapt(fn)(tree, X)
