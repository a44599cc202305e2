"""NNX modules that are passed to an adapted function keep what it changes in them."""

import functools
import warnings

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx

import lora_jax as lj
from lora_jax.bank import Bank, mixed
from lora_jax.core.weight import Trained
from tests.support import (
    NnxModel,
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
    """Makes what `adapted` puts together once."""
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


@pytest.mark.slow
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


@pytest.mark.slow
def test_modules_inside_other_arguments():
    tree, merged = adapted()
    run = lj.adapt(lambda pair, x: pair["model"](x))
    assert_close(run({"model": tree}, X), nnx.jit(call)(merged, X), 1e-5)
    assert_close(state_of(tree), state_of(merged), 1e-5)


class Block(nnx.Module):
    def __init__(self, rngs):
        self.up = nnx.Linear(5, 11, rngs=rngs)
        self.norm = nnx.BatchNorm(11, rngs=rngs)
        self.down = nnx.Linear(11, 5, rngs=rngs)

    def __call__(self, x):
        return x + self.down(jnp.tanh(self.norm(self.up(x))))


class Stack(nnx.Module):
    """Three blocks, stacked along `axis`, that `over` runs through."""

    def __init__(self, over, axis):
        self.over, self.axes = over, nnx.StateAxes({nnx.Param: axis, ...: 0})
        make = nnx.vmap(Block, in_axes=0, out_axes=self.axes)
        self.blocks = nnx.split_rngs(splits=3)(make)(nnx.Rngs(0))

    def __call__(self, x):
        return self.over(x, self.blocks, self.axes)


def scanned(body):
    def run(x, blocks, axes):
        step = body(lambda x, block: block(x))
        return nnx.scan(step, in_axes=(nnx.Carry, axes), out_axes=nnx.Carry)(x, blocks)

    return run


def mapped(body):
    def run(x, blocks, axes):
        return nnx.vmap(body(call), in_axes=(axes, None))(blocks, x).sum(0)

    return run


def one(fn):
    return lambda: Block(nnx.Rngs(0)), fn


def remat(module, x):
    return nnx.remat(call)(module, x)


def jit(module, x):
    return nnx.jit(call)(module, x)


def steps(module, x):
    return nnx.fori_loop(0, 3, lambda _, both: (both[0], remat(*both)), (module, x))[1]


def while_loop(module, x):
    def step(state):
        return state[0], jit(state[0], state[1]), state[2] + 1

    return nnx.while_loop(lambda state: state[2] < 3, step, (module, x, 0))[1]


# By name: makes a module, and a function of it and of x.
TRANSFORMED = {
    "jit": one(jit),
    "remat": one(remat),
    "jit of both": one(lambda m, x: nnx.jit(lambda m, x: jit(m, remat(m, x)))(m, x)),
    "cond": one(lambda m, x: nnx.cond(x.sum() > 0, remat, lambda m, x: -jit(m, x), m, x)),
    "fori_loop": one(steps),
    "while_loop": one(while_loop),
    "value_and_grad": one(
        lambda m, x: nnx.value_and_grad(lambda m, x: remat(m, x).sum(), argnums=1)(m, x)
    ),
    "scan": (lambda: Stack(scanned(nnx.remat), 0), call),
    "scan along axis 1": (lambda: Stack(scanned(nnx.remat), 1), call),
    "vmap": (lambda: Stack(mapped(nnx.remat), 0), call),
    "vmap along axis 1": (lambda: Stack(mapped(lambda fn: nnx.jit(nnx.remat(fn))), 1), call),
}


@over("name", TRANSFORMED, often=["jit of both"])
def test_what_a_transform_writes_back_as_it_was_is_no_assignment(name):
    make, fn = TRANSFORMED[name]
    module = make()
    layers = -3 if name.endswith("1") else -2
    rule = lj.LoraRule(targets=".*kernel", rank=2, alpha=3.0, in_axes=[layers], out_axes=[-1])
    tree = with_random_factors(lj.lorafy(module, [rule]))
    merged = lj.merge(tree)
    y = nnx.jit(lj.adapt(fn, strict=True))(tree, X)  # nnx.jit: what it writes is seen
    assert_close(y, nnx.jit(fn)(merged, X), 1e-5)
    assert len(lj.split(tree)[0]) == 2, "both weights are adapted as before"
    assert_close(plain(nnx.state(tree, nnx.BatchStat)), state_of(merged), 1e-5)


def test_eager_calls_leave_the_very_weights_that_were_passed():
    """In a state, too, whose Variables `nnx.merge` makes those of the module."""
    graph, state = nnx.split(with_random_factors(lj.lorafy(Block(nnx.Rngs(0)), RULES)))
    fn = lambda state, x: remat(nnx.merge(graph, state), x)  # noqa: E731
    kernel, mean = state["up"]["kernel"], state["norm"]["mean"]
    node, before = kernel.get_raw_value(), mean.get_raw_value()
    expected = fn(lj.merge(state), X)
    run = lj.adapt(fn, strict=True)
    assert_close(run(state, X), expected, 1e-5)
    assert kernel.get_raw_value() is node
    assert mean.get_raw_value() is not before
    run(state, X)  # by the trace of the first call
    assert kernel.get_raw_value() is node


def test_a_weight_that_is_returned_as_it_was_keeps_its_adapter():
    tree, _ = adapted()

    def fn(module, x):
        y = jit(module, x)
        return y, module.up.kernel.get_value()

    _, kernel = jax.jit(lj.adapt(fn, strict=True))(tree, X)
    assert_identical(kernel.a, tree.up.kernel.get_raw_value().a)


@pytest.mark.slow
def test_mixed_batches_run_at_once_through_remat():
    rule = lj.LoraRule(targets=["up", "down"], rank=2)
    module = NnxModel(nnx.Rngs(0))
    bank = Bank(module, [rule], slots=3)
    for n, name in enumerate(("one", "two")):
        bank.add(name, with_random_factors(lj.lorafy(module, [rule]), seed=n))
    tree = bank.choose(["one", "two", "base"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        y = jax.jit(mixed(remat, strict=True))(tree, X[:3])
    assert_close(y, jax.jit(mixed(call, strict=True))(tree, X[:3]), 1e-5)


def test_a_weight_that_is_assigned_is_merged_with_a_warning():
    make = lambda: nnx.WeightNorm(nnx.Linear(5, 7, rngs=nnx.Rngs(0)), rngs=nnx.Rngs(1))  # noqa: E731
    dropout = [lj.LoraRule(targets=".*kernel", rank=2, alpha=3.0, dropout=0.5)]
    tree = with_random_factors(lj.lorafy(make(), dropout))
    merged = lj.merge(tree)
    named = "assigns to 'layer_instance/kernel', which is adapted"
    with pytest.raises(lj.MergeError, match=f"{named}.*lora_jax.merge"):
        lj.adapt(jit, strict=True)(tree, X)
    with pytest.raises(lj.MergeError, match=f"{named}.*cannot have dropout"):
        lj.adapt(jit)(tree, X, dropout_key=jax.random.key(0))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        y = lj.adapt(jit)(tree, X)
    assert {w.filename for w in caught} == {__file__}
    said = [str(w.message) for w in caught]
    assert sum(named in text and "has no adapter afterwards" in text for text in said) == 1
    assert not any("is an output" in text for text in said)
    assert_close(y, jit(merged, X), 1e-5)
    kernels = [m.layer_instance.kernel.get_value() for m in (tree, merged)]
    assert_close(*kernels, 1e-5)


def test_what_trains_in_full_takes_what_is_assigned_to_it():
    rules = [*RULES, lj.TrainRule(targets=["norm"]), lj.TrainRule(targets=["down/bias"])]
    tree = with_random_factors(lj.lorafy(Block(nnx.Rngs(0)), rules))
    merged = lj.merge(tree)
    y = nnx.jit(lj.adapt(remat, strict=True))(tree, X)
    assert_close(y, nnx.jit(remat)(merged, X), 1e-5)
    assert isinstance(tree.norm.mean.get_raw_value(), Trained)
    assert_close(tree.norm.mean.get_raw_value().value, merged.norm.mean[...], 1e-5)
    assert sorted(lj.split(tree)[0]) == sorted(lj.split(lj.lorafy(Block(nnx.Rngs(0)), rules))[0])


def test_an_adapted_weight_that_is_assigned_is_an_error_under_strict():
    def fn(module, x):
        module.up.kernel.set_value(module.up.kernel.get_value() * 2)
        return module(x)

    tree, _ = adapted()
    with pytest.raises(lj.MergeError, match="assigns to 'up/kernel', which is adapted.*merge"):
        lj.adapt(fn, strict=True)(tree, X)
