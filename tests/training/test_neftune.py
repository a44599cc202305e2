"""Noise on embeddings: its bounds, the tokens that get none, and that nothing else changes."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType

import lora_jax as lj
from lora_jax import models
from lora_jax.models.layers.blocks import add_noise
from lora_jax.models.specs import AXES
from lora_jax.training.layout import Layout
from lora_jax.training.losses import summed_loss
from lora_jax.training.neftune import _lengths_of_sequences, neftune
from lora_jax.training.setup import Setup
from tests.models import tiny, tiny_encoders
from tests.support import array, over

ALPHA = 7.0
# Two packed rows: segments of 3, 5 and 2 tokens, then padding; one of 9, then padding.
SEGMENTS = np.array([[1] * 3 + [2] * 5 + [3] * 2 + [0] * 2, [1] * 9 + [0] * 3])
LENGTHS = np.array([[3] * 3 + [5] * 5 + [2] * 2 + [0] * 2, [9] * 9 + [0] * 3])
IDS = tiny.tokens(0, *SEGMENTS.shape)


def of_family(family):
    """A model, its parameters, and the sides of its call."""
    if family == "bert":
        return *tiny_encoders.model("bert", "masked_lm"), {"attention_mask": SEGMENTS > 0}
    make = tiny_encoders.model if family == "gpt2" else tiny.decoder
    return *make(family), {"segment_ids": SEGMENTS}


def test_the_length_is_that_of_the_own_sequence():
    lengths = jax.jit(_lengths_of_sequences)
    np.testing.assert_array_equal(lengths(IDS, None, SEGMENTS), LENGTHS)
    np.testing.assert_array_equal(lengths(IDS, SEGMENTS > 0, None)[0], [10] * 10 + [0] * 2)
    np.testing.assert_array_equal(lengths(IDS, None, None), np.full(IDS.shape, 12))


@over("family", ["gemma2", "gpt2", "bert"], often=["gpt2"])
def test_noise_is_there_in_training_alone_and_comes_from_the_key(family):
    model, params, sides = of_family(family)
    rules = [lj.LoraRule(targets="all-linear", rank=2, alpha=3)]
    params = lj.lorafy(params, rules, kinds=models.kinds(model.config))
    forward = neftune(lj.adapt(model.apply), ALPHA)

    def run(params, key):
        return forward({"params": params}, IDS, dropout_key=key, **sides)

    drawn = jax.jit(run, compiler_options=tiny.FAST_COMPILE)
    one, again, other = (drawn(params, jax.random.key(seed)) for seed in (3, 3, 4))
    np.testing.assert_array_equal(one, again)
    assert np.abs(one - other)[SEGMENTS > 0].max() > 1e-3
    draws = [
        str(drawn.trace(params, key).jaxpr).count("random_bits")
        for key in (None, jax.random.key(3))
    ]
    assert draws == [0, 1]  # in evaluation, and in training


def test_noise_has_the_papers_bounds_and_spares_padding():
    """Draws as the paper's code does: at most alpha / sqrt(L d), a number for each element."""
    width, drawn = 64, []

    def forward(variables, ids, *, dropout_key=None, embedding_noise=None, segment_ids=None):
        return add_noise(jnp.zeros((*ids.shape, width)), embedding_noise)

    noisy = jax.jit(functools.partial(neftune(forward, ALPHA), {}, IDS, segment_ids=SEGMENTS))
    for seed in range(20):
        drawn.append(noisy(dropout_key=jax.random.key(seed)))
    noise = np.stack(drawn)  # [draws, batch, seq, width]
    assert not noise[:, LENGTHS == 0].any()
    for length in (2, 3, 5, 9):
        bound = ALPHA / np.sqrt(length * width)
        values = noise[:, LENGTHS == length].ravel() / bound
        assert np.abs(values).max() <= 1.0 and np.abs(values).max() > 0.99
        assert abs(values.mean()) < 0.05
        assert values.std() == pytest.approx(3**-0.5, rel=0.03)  # a uniform distribution's
    assert len(np.unique(noise[:, LENGTHS > 0])) > 0.9 * noise[:, LENGTHS > 0].size


@pytest.mark.slow
def test_packed_long_rows_on_a_mesh_get_the_noise_of_one_device():
    """Rows split over devices, chunks of the loss, and rematerialisation beside it."""
    model, params = tiny.decoder("llama3", remat=True)
    rules = [lj.LoraRule(targets=["q_proj", "down_proj"], rank=2, alpha=3, dropout=0.2)]
    params = lj.lorafy(params, rules)
    batch = {
        "ids": array(np.tile(IDS, (2, 1))),
        "segment_ids": array(np.tile(SEGMENTS, (2, 1))),
        "positions": jnp.tile(jnp.arange(12), (4, 1)),
        "predict_at": jnp.tile(jnp.arange(12), (4, 1)),
        "targets": array(np.tile(IDS[:, ::-1], (2, 1))),
        "weights": array(np.tile(SEGMENTS > 0, (2, 1)), jnp.float32),
    }
    totals = []
    for sizes, noise in (({}, 0.0), ({}, ALPHA), ({"sequence": 2, "fsdp": 2}, ALPHA)):
        shape = [sizes.get(name, 1) for name in AXES]
        devices = jax.devices()[: int(np.prod(shape))]
        mesh = jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * 5, devices=devices)
        layout = Layout.of(mesh, model.config)
        placed = layout.placed(params)
        setup = Setup.make(layout, placed, optax.identity(), lambda _: 0.0, noise=noise)
        loss = functools.partial(
            summed_loss, setup.forward(model), chunk=8, parts=layout.sequence_parts
        )
        with jax.set_mesh(mesh):
            total = jax.jit(lambda p, b, loss=loss: loss(p, b, jax.random.key(5)).total)
            totals.append(float(total(placed, batch)))
    calm, noisy, apart = totals
    assert apart == pytest.approx(noisy, rel=1e-4)
    assert abs(noisy / calm - 1) > 1e-3


def test_a_size_that_is_none_is_refused():
    for alpha in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="a positive number"):
            neftune(types.SimpleNamespace, alpha)
