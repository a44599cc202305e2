"""Optimisers over whole adapted trees."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lora_jax as lj
from tests.support import PROGRAMS, assert_identical


@pytest.fixture(autouse=True)
def standard_promotion(strict_promotion):
    """Optax multiplies by Python numbers of another kind."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def test_freeze_base_leaves_the_base_bitwise_and_without_slots():
    program = PROGRAMS[1]
    _, tree, x = program.inputs()
    optimizer = lj.optim.freeze_base(optax.adamw(1e-2, weight_decay=0.1))
    state = optimizer.init(tree)
    trained, _ = lj.count_params(tree)
    padding = sum(v.size for v in jax.tree.leaves(lj.split(tree)[0])) - trained
    slots = sum(leaf.size for leaf in jax.tree.leaves(state) if np.ndim(leaf))
    assert slots == 2 * (trained + padding), "two moments for each trained parameter, no more"

    @jax.jit
    def step(tree, state):
        def loss(tree):
            return jnp.sum(jnp.sin(lj.adapt(program.run)(tree, x)))

        updates, state = optimizer.update(jax.grad(loss)(tree), state, tree)
        return optax.apply_updates(tree, updates), state

    new = tree
    for _ in range(3):
        new, state = step(new, state)
    assert_identical(lj.split(new)[1], lj.split(tree)[1])
    before, after = lj.split(tree)[0], lj.split(new)[0]
    changed = jax.tree.map(lambda a, b: bool((a != b).any()), before, after)
    assert all(jax.tree.leaves(changed))


def test_trainable_mask_names_what_trains():
    tree = lj.lorafy(
        {"w": jnp.ones((5, 7)), "bias": jnp.ones(7), "norm": jnp.ones(5)},
        [lj.LoraRule(targets=["w"], rank=2), lj.TrainRule(targets=["bias"])],
    )
    mask = lj.trainable_mask(tree)
    assert jax.tree.structure(mask) == jax.tree.structure(tree)
    weight = mask["w"]
    assert (weight.base, weight.a, weight.b, weight.scale) == (False, True, True, False)
    assert (mask["bias"].value, mask["norm"]) == (True, False)
