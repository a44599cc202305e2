"""Eager calls: the trace of one call serves later ones, if nothing but arrays has changed."""

import abc
import gc
import random
import sys
import types
import weakref

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import lora_jax as lj
from lora_jax.adapt.fn_state import FunctionState, UnknownStateError
from lora_jax.core.opaque import wrap_opaque_leaves
from tests.adapted_trees import adapted, merged_by_numpy
from tests.support import (
    array,
    assert_close,
    assert_identical,
    draw,
    numpy_init,
    variables_of,
)

FACTOR = 1.0
TREE = adapted({"a": {"kernel": draw(1, (5, 7))}}, lj.LoraRule(targets=["a"], rank=2, alpha=3.0))
PLAIN = {"a": {"kernel": array(merged_by_numpy(TREE["a"]["kernel"], 1.5))}}
X, Y = draw(8, (3, 5)), draw(9, (3, 5))

_EVENTS: list[str] = []
jax.monitoring.register_event_duration_secs_listener(lambda name, *_, **__: _EVENTS.append(name))


def traced(call, *args, **kwargs):
    """Returns the result of a call, and whether JAX traced anything for it."""
    before = len(_EVENTS)
    result = call(*args, **kwargs)
    return result, any("trace" in name for name in _EVENTS[before:])


def check(run, fn, *args, again):
    """Holds one more call to the function of the merged tree; `again`: whether it is traced."""
    ours, was_traced = traced(run, TREE, *args)
    assert was_traced == again
    assert_close(ours, fn(PLAIN, *args), 1e-5)


def product(p, x, *rest):
    return jnp.tanh(x @ p["a"]["kernel"])


def test_other_arrays_use_the_same_trace():
    run = lj.adapt(product)
    check(run, product, X, again=True)
    check(run, product, Y, again=False)
    check(run, product, np.asarray(Y) + 1, again=False)
    other = lj.swap(TREE, jax.tree.map(lambda v: 2 * v, TREE))
    ours, was_traced = traced(run, other, X)
    assert not was_traced
    assert_close(ours, product(lj.merge(other), X), 1e-5)
    check(run, product, X[:2], again=True)
    check(run, product, Y, again=False)


def test_arguments_that_are_no_arrays_are_compared():
    def fn(p, x, flag, factor):
        return product(p, x) * factor if flag else product(p, x)

    run = lj.adapt(fn)
    check(run, fn, X, True, 2.0, again=True)
    check(run, fn, Y, True, 2.0, again=False)
    check(run, fn, X, False, 2.0, again=True)
    check(run, fn, X, True, 3.0, again=True)
    check(run, fn, X, True, 2.0, again=False)


class Scaled:
    factor = 1.0

    def __call__(self, p, x):
        return self.factor * product(p, x)


@pytest.mark.slow
def test_what_a_function_reads_beside_its_arguments_is_compared(monkeypatch):
    factor, table, settings, scaled = 1.0, np.ones(7, np.float32), {"on": True}, Scaled()
    module = types.ModuleType("of_the_user")
    module.shift = 0.0
    monkeypatch.setitem(sys.modules, "of_the_user", module)
    monkeypatch.setitem(globals(), "of_the_user", module)

    def inner(p, x):
        return factor * scaled(p, x) * FACTOR

    def fn(p, x):
        y = inner(p, x) * table + of_the_user.shift  # noqa: F821
        return y if settings["on"] else -y

    run = lj.adapt(fn)

    def changed(change):
        check(run, fn, X, again=False)
        change()
        check(run, fn, X, again=True)

    def closed_over():
        nonlocal factor
        factor = 2.0

    check(run, fn, X, again=True)
    changed(closed_over)
    changed(lambda: table.fill(3.0))
    changed(lambda: settings.update(on=False))
    changed(lambda: setattr(scaled, "factor", 5.0))
    changed(lambda: setattr(module, "shift", 7.0))
    changed(lambda: monkeypatch.setitem(globals(), "FACTOR", 4.0))


def test_a_closed_over_array_is_compared():
    shift = draw(5, (7,))

    def fn(p, x):
        return product(p, x) + shift

    run = lj.adapt(fn)
    check(run, fn, X, again=True)
    check(run, fn, Y, again=False)
    shift = draw(6, (7,))
    check(run, fn, Y, again=True)


def test_a_function_that_needs_the_elements_is_traced_each_time():
    def fn(p, x, flag):
        y = product(p, np.asarray(x))
        return y if flag else -y  # by the elements of an array

    run = lj.adapt(fn)
    for flag in (True, False, True):
        for x in (X, Y):
            check(run, fn, x, jnp.array(flag), again=True)


def test_randomness_is_drawn_anew():
    source, generator = random.Random(1), np.random.default_rng(1)

    def of_object(p, x):
        return product(p, x) * source.random()

    def of_module(p, x):
        return product(p, x) * random.random()

    def of_numpy(p, x):
        return product(p, x) * generator.normal()

    def of_numpy_itself(p, x):
        return product(p, x) * np.random.rand()

    for fn in (of_object, of_module, of_numpy, of_numpy_itself):
        run = lj.adapt(fn)
        assert len({float(run(TREE, X)[0, 0]) for _ in range(3)}) == 3


class Linen(nn.Module):
    n: int = 3

    @nn.compact
    def __call__(self, x):
        return nn.Dense(self.n)(x)


class OfNnx(nnx.Module):
    def __init__(self):
        self.linear = nnx.Linear(3, 5, rngs=nnx.Rngs(0))


class Abstract(abc.ABC):
    def __init__(self, factor):
        self.factor = factor

    @abc.abstractmethod
    def scaled(self, x): ...


class Concrete(Abstract):
    def scaled(self, x):
        return self.factor * x


def test_states(monkeypatch):
    def make(value):
        return lambda: value

    with monkeypatch.context() as patch:  # a setting that a class has for all its objects
        before = FunctionState(make(Concrete(1)))
        patch.setattr(Concrete, "shift", 2.0, raising=False)
        assert FunctionState(make(Concrete(1))) != before
    one, module = jnp.ones(3), OfNnx()
    for a, b, same in (
        (make(1), make(1), True),
        (make(1), make(1.0), False),
        (make([1, (2,)]), make([1, (2,)]), True),
        (make({"a": 1}), make({"a": 2}), False),
        (make(one), make(one), True),
        (make(one), make(jnp.ones(3)), False),
        (make(np.ones(3)), make(np.ones(3)), True),
        (make(nn.Dense(3)), make(nn.Dense(3)), True),
        (make(nn.Dense(3)), make(nn.Dense(4)), False),
        (make(jnp.tanh), make(jnp.sin), False),
        (Linen().apply, Linen().apply, True),
        (Linen().apply, Linen(4).apply, False),
        (make(module), make(module), True),
        (make(module), make(OfNnx()), False),
        (make(Concrete(1)), make(Concrete(1)), True),
        (make(Concrete(1)), make(Concrete(2)), False),
    ):
        assert (FunctionState(a) == FunctionState(b)) == same
    itself = []
    itself.append(itself)
    assert FunctionState(make(itself)) == FunctionState(make(itself))
    for unknown in (iter([1]), random.Random(0), np.ones(10**5), random.Random(0).random):
        with pytest.raises(UnknownStateError):
            FunctionState(make(unknown))


def test_settings_of_jax_are_compared():
    run = lj.adapt(lambda p, x: x @ p["a"]["kernel"] + jnp.ones(7, jnp.int32))
    with jax.numpy_dtype_promotion("standard"):
        run(TREE, X)
        assert not traced(run, TREE, X)[1]
    with pytest.raises(Exception, match="promotion"):
        run(TREE, X)


def test_eager_gradients_and_other_transforms_use_the_trace():
    run = lj.adapt(product, strict=True)
    adapter, base = lj.split(TREE)

    def loss(run, adapter, x):
        return jnp.sum(jnp.sin(run(lj.join(adapter, base), x)))

    grad = jax.grad(loss, (1, 2))
    expected = jax.jit(
        lambda adapter, x: grad(lambda tree, x: product(lj.merge(tree), x), adapter, x)
    )(adapter, X)
    assert_close(grad(run, adapter, X), expected, 1e-5)
    assert_close(grad(run, adapter, X), expected, 1e-5)
    rows = jax.vmap(lambda x: run(TREE, x))(X)
    assert_close(rows, product(PLAIN, X), 1e-5)
    assert_close(jax.jit(run)(TREE, X), product(PLAIN, X), 1e-5)
    _, tangent = jax.jvp(lambda x: run(TREE, x), (X,), (Y,))
    expected = jax.jit(lambda x, y: jax.jvp(lambda x: product(PLAIN, x), (x,), (y,))[1])(X, Y)
    assert_close(tangent, expected, 1e-5)


@pytest.mark.slow
def test_an_eager_call_with_factors_of_zero_is_the_plain_call_to_the_bit():
    model = nn.Sequential([nn.Dense(11), nn.LayerNorm(), jnp.tanh, nn.Dense(7), nn.softmax])
    params = variables_of(model, X)
    tree = lj.lorafy(params, [lj.LoraRule(targets="all-linear", rank=2, init=numpy_init)])
    run = lj.adapt(model.apply)
    for x in (X, Y):
        assert_identical(run(tree, x), model.apply(params, x))


def test_outputs_that_are_no_arrays_come_back_each_time():
    def fn(p, x, name):
        return {"y": product(p, x), "name": name, "x": x, "tree": p}

    run = lj.adapt(fn)
    for x in (X, Y):
        out = run(TREE, x, "text")
        assert out["name"] == "text" and out["x"] is x
        assert out["tree"]["a"]["kernel"] is TREE["a"]["kernel"]


@pytest.mark.slow
def test_what_is_kept_for_later_calls_holds_no_array_of_this_one():
    run = lj.adapt(lambda p, x: jnp.tanh(x @ p["a"]["kernel"] @ p["a"]["kernel"].T) * x)
    x = X + 1
    gone = weakref.ref(x)
    run(TREE, x)
    del x
    gc.collect()
    assert gone() is None


class ArrayLike:
    """A value with a hash whose == gives an array, as NumPy's has."""

    def __hash__(self):
        return 1

    def __eq__(self, other):
        return np.array([True, False])


def test_leaves_whose_equality_is_an_array_are_compared_by_identity():
    leaf, calls = ArrayLike(), []

    @jax.jit
    def program(tree):
        calls.append(1)
        return tree["w"]

    for value in (leaf, leaf, ArrayLike()):
        program(wrap_opaque_leaves({"w": jnp.ones(3), "label": value}))
    assert len(calls) == 2
