"""Eager calls from several threads, and of many shapes: each shape is traced once."""

import concurrent.futures
import gc
import threading
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lj
from lora_jax.adapt import traces
from lora_jax.adapt.traces import EagerTraces, FlatCall
from tests.adapted_trees import adapted, merged_by_numpy
from tests.support import assert_close, draw

TREE = adapted({"a": {"kernel": draw(1, (5, 7))}}, lj.LoraRule(targets=["a"], rank=2, alpha=3.0))
KERNEL = merged_by_numpy(TREE["a"]["kernel"], 1.5)


class Count:
    """Counts calls; that is no state of the function that makes them."""

    def __init__(self):
        self.n, self._lock = 0, threading.Lock()

    def __hash__(self):
        return id(self)

    def one_more(self):
        with self._lock:
            self.n += 1


def test_threads_share_one_trace_of_each_shape():
    count, together = Count(), threading.Barrier(8)

    def fn(params, x):
        count.one_more()
        return x @ params["a"]["kernel"]

    run = lj.adapt(fn, strict=True)
    inputs = [draw(rows, (rows, 5)) for rows in range(1, 13)]
    expected = [np.asarray(x) @ KERNEL for x in inputs]

    def work(thread):
        together.wait(60)
        order = np.random.default_rng(thread).permutation(np.repeat(np.arange(12), 5))
        return [(shape, run(TREE, inputs[shape])) for shape in order]

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        results = [each for found in pool.map(work, range(8)) for each in found]
    assert len(results) == 8 * 60
    for shape, y in results:
        assert_close(y, expected[shape], 1e-5)
    assert count.n == 12


def find(known, fn, *args):
    leaves, treedef = jax.tree.flatten((args, {}))
    return known.find(FlatCall(fn, leaves, treedef, {}))


def test_many_shapes_in_turn_are_traced_once_and_the_number_is_bounded(monkeypatch):
    count, known = Count(), EagerTraces()

    def fn(x):
        count.one_more()
        return x + 1

    shapes = [np.zeros(n) for n in range(1, 101)]
    for _ in range(2):
        assert all(find(known, fn, x) for x in shapes)
    assert count.n == 100
    monkeypatch.setattr(traces, "_MAX_TRACES", 5)
    for x in (np.zeros(101), *shapes[-4:]):
        find(known, fn, x)
    assert count.n == 101
    find(known, fn, shapes[-5])
    assert count.n == 102, "it was dropped"


@pytest.mark.slow
def test_arrays_that_each_call_closes_over_are_not_all_kept(monkeypatch):
    monkeypatch.setattr(traces, "_MAX_OLDER_BYTES", 3 * 400)

    def kept(big):
        known, alive = EagerTraces(), []
        for n in range(30):
            array = jnp.full(100, float(n))
            alive.append(weakref.ref(array))
            find(known, lambda x, array=array: x + array + big, jnp.zeros(100))
        del array
        gc.collect()
        return sum(each() is not None for each in alive)

    shared = jnp.zeros((100, 100))  # takes no further memory in each trace
    assert kept(0.0) == kept(shared) == traces._MAX_TRACES_OF_ANY_SIZE


def test_the_traces_of_another_adapted_function_are_no_state():
    count, inner = Count(), lj.adapt(lambda params, x: x @ params["a"]["kernel"])

    def fn(params, x):
        count.one_more()
        return jnp.tanh(inner(TREE, x) + x @ params["a"]["kernel"])

    run = lj.adapt(fn)
    for rows in (2, 3):
        run(TREE, draw(1, (2, 5)))
        inner(TREE, draw(1, (rows, 5)))
    assert count.n == 1
