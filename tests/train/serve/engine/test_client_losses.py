"""The losses that clients ask for, against their formulas in NumPy."""

import jax
import numpy as np
import pytest

from train.serve.engine.losses import FUNCTIONS, ORDER, sum_loss

# Three targets of one sequence, and padding. The ratios are above, below and within [0.8, 1.2].
P = np.array([-1.0, -0.9, -0.2, -7.0])
Q = np.array([-1.5, -0.3, -0.3, 4.0])
ADVANTAGES = np.array([2.0, -1.0, 0.5, 0.0])
WEIGHTS = np.array([0.5, 2.0, -1.0, 0.0])
IS_THERE = np.array([1.0, 1.0, 1.0, 0.0])
BETA = 0.3


def clipped(ratio):
    bounded = np.clip(ratio, 0.8, 1.2)
    return -np.minimum(ratio * ADVANTAGES, bounded * ADVANTAGES)


# By Tinker's documentation; `ratio` is that of each token.
FORMULAS = {
    "cross_entropy": lambda ratio: -WEIGHTS * P,
    "importance_sampling": lambda ratio: -ratio * ADVANTAGES,
    "ppo": clipped,
    "cispo": lambda ratio: -np.clip(ratio, 0.8, 1.2) * ADVANTAGES * P,
    "dro": lambda ratio: -(P * ADVANTAGES - BETA / 2 * (P - Q) ** 2),
    "gspo": lambda ratio: clipped(np.exp(np.mean((P - Q)[:3]))),
}


@pytest.fixture(scope="module")
def sums():
    """The sum of each loss, by name, from one program."""
    given = {"weights": WEIGHTS, "logprobs": Q, "advantages": ADVANTAGES}
    given |= {"target_mask": IS_THERE, "sequence_ratio_mask": np.ones(4)}
    given |= {"clip_low_threshold": np.full(4, 0.8), "clip_high_threshold": np.full(4, 1.2)}
    given = {name: x[None, :, None].astype(np.float32) for name, x in given.items()}
    given["beta"] = np.float32(BETA)
    program = jax.jit(lambda p: [sum_loss(i, p, given) for i in range(len(ORDER))])
    found = program(P[None, :, None].astype(np.float32))
    return dict(zip(ORDER, map(float, found), strict=True))


@pytest.mark.parametrize("loss", FUNCTIONS)
def test_a_loss_is_what_its_formula_says(loss, sums):
    """An adapter would else learn what its client did not ask for."""
    terms = FORMULAS[loss](np.exp(P - Q))
    assert sums[loss] == pytest.approx(terms[:3].sum(), rel=1e-6)
