"""The laws on random programs, and on random functions of a batch with an adapter for each example.

See tests/adapt/random_programs.py and tests/adapt/random_functions.py for their steps.
"""

import functools

import jax
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import lora_jax as lj
from lora_jax.adapt.per_example.axes import ExampleAxes
from lora_jax.core.factored import ExamplesError
from tests.adapt import random_programs
from tests.adapt.examples import at_once, bank, slots
from tests.adapt.random_functions import functions
from tests.adapt.random_programs import WAYS, check, programs
from tests.support import THOROUGH, assert_close, draw, numpy_init, with_random_factors

# Some use a kernel only mirrored, on purpose.
pytestmark = pytest.mark.filterwarnings("ignore::lora_jax.RoleWarning")

SLOTS = [2, 0, 2, 1]  # of the examples of a batch
COMMON = {
    "deadline": None,
    "derandomize": True,
    "database": None,
    "suppress_health_check": list(HealthCheck),
}
ways = st.sampled_from(list(WAYS))


@pytest.mark.slow
@settings(max_examples=2, **COMMON)
@given(programs(), ways)
def test_random_programs_keep_the_laws(program, way):
    with jax.enable_x64(True):
        check(program, way)


@pytest.mark.slow
@settings(max_examples=100 if THOROUGH else 12, **COMMON)
@given(programs(), ways)
def test_many_random_programs_keep_the_laws(program, way):
    with jax.enable_x64(True):
        check(program, way)


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["xs", "vera"])
def test_many_random_programs_of_tiny_adapters(variant, monkeypatch):
    """Random programs move LoRA-XS's R and VeRA's vectors along with the factors."""
    monkeypatch.setitem(random_programs.VARIANT, variant, True)

    @settings(max_examples=30 if THOROUGH else 5, **COMMON)
    @given(programs(), ways)
    def holds(program, way):
        with jax.enable_x64(True):
            check(program, way)

    holds()


@settings(max_examples=4, **COMMON)
@given(functions(), st.integers(0, 2))
def test_random_functions_are_declined_or_equal(function, in_axis):
    _function_is_declined_or_equal(function[0], in_axis)


@pytest.mark.slow
@settings(max_examples=200 if THOROUGH else 30, **COMMON)
@given(functions(), st.integers(0, 2))
def test_many_random_functions_are_declined_or_equal(function, in_axis):
    _function_is_declined_or_equal(function[0], in_axis)


@pytest.mark.slow
@settings(max_examples=200 if THOROUGH else 40, **COMMON)
@given(programs())
def test_random_programs_are_declined_or_equal(program):
    """Runs programs that do more with weights; the functions above do more with x."""
    with jax.enable_x64(True):
        _, fresh, x = program.inputs()
        ids = [2, 0, 1]
        slots_of = [with_random_factors(fresh, seed=i) for i in range(3)]
        tree, axes = bank(slots_of, ids), ExampleAxes((None, 0), 0)
        try:
            ours = jax.jit(functools.partial(at_once, program.run, axes))(tree, x)
        except ExamplesError:
            return
        single = jax.jit(lj.adapt(program.run))
        theirs = np.stack([np.asarray(single(slots_of[slot], x))[i] for i, slot in enumerate(ids)])
        assert_close(ours, theirs, 1e-9)


def _function_is_declined_or_equal(fn, in_axis):
    """No axis is told by its size: all have that of the batch, or divide it."""
    sizes = {"one": (4, 4), "table": (5, 4)}
    rules = [
        lj.LoraRule(targets=[name], rank=2, alpha=3.0, in_axes=[0], out_axes=[1], init=numpy_init)
        for name in sizes
    ]
    slots_of = slots({name: draw(i, size) for i, (name, size) in enumerate(sizes.items())}, rules)
    x, tree = draw(3, (4, 4, 4)) * 2, bank(slots_of, SLOTS)
    for axis in (None, *range(4)):  # all that a result may have
        axes = ExampleAxes((None, in_axis), axis)
        try:
            jax.eval_shape(functools.partial(at_once, fn, axes), tree, x)
            break
        except ExamplesError:
            continue
    else:
        return
    single = jax.jit(lj.adapt(fn))
    each = [single(one, x) for one in slots_of]
    if axis is None:
        assert_close(each[1:], [each[0]] * 2, 1e-5)
        return
    rows = [np.take(each[slot], [i], axis) for i, slot in enumerate(SLOTS)]
    ours = jax.jit(functools.partial(at_once, fn, axes))(tree, x)
    assert_close(ours, np.concatenate(rows, axis), 1e-5)
    others = np.array(x)
    others[(slice(None),) * in_axis + (1,)] *= 1.5
    kept = [np.take(single(slots_of[0], y), [0, 2, 3], axis) for y in (x, others)]
    assert_close(kept[1], kept[0], 1e-5)
