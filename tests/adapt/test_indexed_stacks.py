"""Stacks whose members a scan takes by index, against the same layers written out."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import lora_jax as lj
from lora_jax.adapt import eqns
from tests.support import assert_close, draw, equations, with_random_factors

LAYERS, D = 5, 7
X = draw(1, (3, D))
FIELDS = {"plain": {}, "dora": {"dora": True}, "a bias on B": {"bias_on_b": True}}


def adapted(**fields):
    rule = lj.LoraRule(targets=["w"], rank=2, alpha=3.0, **fields)
    return with_random_factors(lj.lorafy({"w": {"kernel": draw(2, (LAYERS, D, D))}}, [rule]))


def scanned(indices, *, again=False):
    """Returns a function whose scan takes the members at some indices, in a checkpoint."""

    def run(p, x):
        stack = p["w"]["kernel"]

        @jax.checkpoint
        def layer(x, i):
            w = lax.dynamic_index_in_dim(stack, i, keepdims=False, allow_negative_indices=False)
            x = jnp.tanh(x @ w)
            return x @ stack[0] if again else x

        return lax.scan(lambda x, i: (layer(x, i), None), x, indices)[0]

    return run


def written_out(indices, *, again=False):
    def run(p, x):
        for i in indices:
            x = jnp.tanh(x @ p["w"]["kernel"][min(int(i), LAYERS - 1)])
            x = x @ p["w"]["kernel"][0] if again else x
        return x

    return run


def gradients(function, tree):
    trained, base = lj.split(tree)
    forward = lj.adapt(function, strict=True)
    loss = jax.value_and_grad(lambda trained: jnp.sum(forward(lj.join(trained, base), X) ** 2))
    return jax.jit(loss), trained


INDICES = {
    "all": range(5),
    "some": range(1, 4),
    "backwards": range(4, -1, -1),
    "every other": range(0, 5, 2),
    "one": [3],
    "past the end": range(3, 7),
}


@pytest.mark.parametrize("name", INDICES)
@pytest.mark.parametrize("again", [False, True])
def test_values_and_gradients_are_those_of_layers_written_out(name, again):
    indices = np.asarray(INDICES[name], np.int32)
    tree = adapted()
    results = []
    for function in (scanned, written_out):
        step, trained = gradients(function(indices, again=again), tree)
        results.append(step(trained))
    assert_close(*results, 1e-5)


@pytest.mark.parametrize("name", FIELDS)
def test_a_variant_is_scanned_alike(name):
    indices = np.arange(1, 4, dtype=np.int32)
    tree = adapted(**FIELDS[name])
    step, trained = gradients(scanned(indices), tree)
    expected, _ = gradients(written_out(indices), tree)
    assert_close(step(trained), expected(trained), 1e-5)


def sums_of_stacks(step, trained):
    """The carries of scans that have the shape of a stack of A."""
    found = []
    for eqn in equations(step.trace(trained).jaxpr):
        if eqn.primitive.name == "scan":
            _, carries, _ = eqns.read_scan(eqn).split(eqn.invars)
            found += [v for v in carries if v.aval.shape == (LAYERS, 2, D)]
    return found


def test_factors_of_known_layers_are_scanned():
    """So no gradient of a stack is summed; where the stack has another use, it is."""
    known = np.arange(1, 4, dtype=np.int32)
    assert not sums_of_stacks(*gradients(scanned(known), adapted()))
    for function in (scanned(known, again=True), scanned(known[::-1])):
        assert sums_of_stacks(*gradients(function, adapted())), "the control"

    def of_traced_indices(p, x):
        return scanned(jnp.arange(3) + jnp.int32(x[0, 0] * 0))(p, x)

    assert sums_of_stacks(*gradients(of_traced_indices, adapted())), "the control"


def test_each_member_has_dropout_of_its_own():
    """Also if it is the first one that a scan takes."""
    tree = adapted(dropout=0.5)
    alike = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf[:1], leaf.shape), tree)

    def out(first, **key):
        return lj.adapt(scanned(np.arange(first, first + 2, dtype=np.int32)))(alike, X, **key)

    assert_close(out(0), out(3), 1e-6)
    key = {"dropout_key": jax.random.key(3)}
    assert not np.allclose(out(0, **key), out(3, **key))
