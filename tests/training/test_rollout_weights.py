"""Weights of importance sampling, and losses that they weigh, by TRL's formulas in NumPy."""

import functools

import jax
import numpy as np
import pytest

from lora_jax.training.losses.online import Online, importance_weights, online_loss
from tests.support import array, assert_close

LN2 = np.log(2.0)
# Ratios of tokens: 2, 1/4, 8 (which does not count); 1/2, 4, 1/2.
LOGPS = np.array([[LN2, -2 * LN2, 3 * LN2], [-LN2, 2 * LN2, -LN2]], np.float32) - 3
SAMPLED = np.full((2, 3), -3.0, np.float32)
MASK = np.array([[True, True, False], [True, True, True]])


@pytest.mark.parametrize(
    ("level", "bounds", "expected"),
    [
        ("token", {"cap": 3.0}, [[2, 0.25, 1], [0.5, 3, 0.5]]),
        ("token", {"cap": 3.0, "floor": 0.375}, [[2, 0.375, 1], [0.5, 3, 0.5]]),
        ("token", {"cap": 3.0, "masked": True}, [[2, 0.25, 1], [0.5, 0, 0.5]]),
        ("token", {"cap": 3.0, "floor": 0.375, "masked": True}, [[2, 0, 1], [0.5, 0, 0.5]]),
        # The product over the tokens that count: 1/2 and 1.
        ("sequence", {"cap": 3.0}, [[0.5] * 3, [1.0] * 3]),
        ("sequence", {"cap": 0.75}, [[0.5] * 3, [0.75] * 3]),
        ("sequence", {"cap": 0.75, "masked": True}, [[0.5] * 3, [0.0] * 3]),
        ("sequence", {"cap": 3.0, "floor": 0.75, "masked": True}, [[0.0] * 3, [1.0] * 3]),
    ],
)
def test_weights_of_importance(level, bounds, expected):
    """TRL's ``vllm_importance_sampling_mode``: the ratio π/π_sampler, cut off or left out."""
    with jax.disable_jit():  # a few numbers: nothing is compiled
        weights = importance_weights(array(LOGPS), array(SAMPLED), array(MASK), level, **bounds)
    np.testing.assert_allclose(weights, expected, rtol=1e-6)


def test_a_ratio_at_a_bound_weighs_as_it_is():
    """Only a ratio beyond a bound is left out: exp(0) is 1 exactly."""
    arrays = (array(SAMPLED), array(SAMPLED), array(MASK))
    for bounds in ({"cap": 1.0}, {"cap": 2.0, "floor": 1.0}):
        weights = importance_weights(*arrays, "token", masked=True, **bounds)
        np.testing.assert_array_equal(weights, np.ones((2, 3)))


def test_importance_weighs_the_loss_and_not_the_divergence():
    """PPO's clipped loss times the weight, plus β·k3 without it, over the tokens that count."""
    rng = np.random.default_rng(3)
    logps, old, reference = (rng.normal(-1, 0.4, (2, 3)).astype("f4") for _ in range(3))
    importance = np.array([[0.5, 2.0, 9.0], [0.25, 0.0, 3.0]], np.float32)
    advantages = np.array([1.5, -0.5], np.float32)
    options = Online(low=0.1, high=0.3, beta=0.7, divergence="k3")
    run = jax.jit(functools.partial(online_loss, options))
    names = {"old": old, "reference": reference, "importance": importance}
    sums = run(logps, MASK, advantages, **{name: array(value) for name, value in names.items()})

    ratio, gain = np.exp(logps - old), advantages[:, None]
    clipped = np.clip(ratio, 0.9, 1.3)
    away = reference - logps
    losses = -np.minimum(ratio * gain, clipped * gain) * importance
    divergence = np.exp(away) - away - 1
    assert (np.abs(clipped - ratio)[MASK] > 0).any()
    assert_close(sums.total, ((losses + 0.7 * divergence) * MASK).sum(), 1e-5)
    assert_close(sums.count, 5.0, 0)
    assert_close(sums.logs["kl"], (divergence * MASK).sum(), 1e-5)
    low, high = (ratio < 0.9) & (gain < 0), (ratio > 1.3) & (gain > 0)
    assert_close(sums.logs["clip_low"], float((low & MASK).sum()), 1e-6)
    assert_close(sums.logs["clip_high"], float((high & MASK).sum()), 1e-6)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"over": "length"}, "length and over='length' belong"),
        ({"length": 5}, "length and over='length' belong"),
        ({"weighted": True}, "weighted needs high"),
    ],
)
def test_options_that_contradict_each_other(fields, message):
    with pytest.raises(ValueError, match=message):
        Online(**fields)
