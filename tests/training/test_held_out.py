"""The held-out loss of a tree whose weights are formed: once a measurement, to the same value."""

from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lora_jax as lj
from lora_jax import subspace
from lora_jax.training.data.batches import Examples
from lora_jax.training.held_out import FormedTree, average_sums, held_out_loss
from lora_jax.training.layout import Layout
from lora_jax.training.losses import Loss, Sums
from lora_jax.training.run.stop import Stop
from lora_jax.training.step import init_state
from tests.support import assert_close, draw
from train.processes.mesh import make_mesh


class Rows(Examples):
    def by_name(self):
        x = np.asarray(draw(1, (10, 5)))
        return {"x": x, "y": np.asarray(draw(2, (10, 3)))}


@Loss
def squares(forward, params, batch, dropout_key):
    error = jnp.sum((forward(params, batch["x"]) - batch["y"]) ** 2)
    return Sums(error, jnp.float32(len(batch["x"])), {"rows": jnp.float32(len(batch["x"]))})


def test_a_loss_of_which_nothing_counts_is_not_measured():
    assert average_sums(squares, Sums(0.0, 0.0, {"rows": 0.0})) == {}
    assert average_sums(squares, Sums(3.0, 2.0, {"rows": 2.0})) == {"loss": 1.5, "rows": 1.0}


@pytest.mark.slow
def test_weights_are_formed_once_and_measured_as_in_each_batch():
    params = {"kernel": draw(0, (5, 3))}
    space = subspace.make(params, dimension=4, kind="did")
    tree = subspace.tree_of(space, params, {"theta": 2 * draw(3, (4,))})
    adapter, base = lj.split(tree)
    ready: Any = SimpleNamespace(
        setup=SimpleNamespace(layout=Layout(make_mesh(None, 4), [])),
        feed=SimpleNamespace(batch_size=4),
        measured=None,
        base=base,
    )
    state = init_state(adapter, optax.sgd(1.0), jax.random.key(0))
    formed = []

    def form(tree):
        formed.append(tree)
        return subspace.merge(space, tree)

    def measured(forward, formed=None):
        measure = held_out_loss(
            ready, lj.adapt(forward), squares, Rows(), every=1, stop=Stop(), formed=formed
        )
        return measure.take(state)

    each = measured(lambda tree, x: x @ subspace.merge(space, tree)["kernel"])

    def plain(params, x):
        return x @ params["kernel"]

    once = measured(None, FormedTree(form, plain))
    assert len(formed) == 1, "in three batches"
    assert_close(once, each, 1e-6)
    base_loss = measured(None, FormedTree(lambda tree: subspace.base_of(tree), plain))
    assert abs(once["loss"] - base_loss["loss"]) > 0.05 * base_loss["loss"], "theta counts"
