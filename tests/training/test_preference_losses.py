"""Losses of preferences and rollouts: published values, invariances, gradients at the edges."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax.training import losses
from lora_jax.training.losses import Completions, Online, PreferenceOptions, preference_loss
from tests.support import array, assert_close, draw, over

# One pair: sums of 4 and 5 tokens, and the reference's.
CHOSEN = Completions(array([-12.0]), array([4.0]), array([-13.0]))
REJECTED = Completions(array([-15.0]), array([5.0]), array([-14.5]))
# Loss -> options, its value where policy and reference are equal, and of the pair above.
VALUES = {
    "sigmoid": ({}, 0.693147, 0.620957),
    "hinge": ({}, 1, 0.85),
    "ipo": ({}, 25, 21.6225),
    "robust": ({"smoothing": 0.1}, 0.693147, 0.602207),
    "exo_pair": ({"smoothing": 1e-3}, 2.761231, 2.505517),
    "nca_pair": ({}, 1.386294, 1.350825),
    "bco_pair": ({}, 1.386294, 1.312856),
    "sppo_hard": ({}, 50, 36.25),
    "apo_zero": ({}, 1, 0.962523),
    "apo_down": ({}, 1, 0.987549),
    "discopop": ({}, 0.846574, 0.849338),
    "sigmoid_norm": ({}, 0.693147, 0.6758),
}


def value(terms, chosen, rejected, **options):
    sums = preference_loss(terms, chosen, rejected, PreferenceOptions(**options))
    return float(sums.total / sums.count)


@pytest.mark.parametrize("name", VALUES)
def test_the_published_values(name):
    options, at_first, example = VALUES[name]
    same = [x._replace(policy=x.reference) for x in (CHOSEN, REJECTED)]
    assert value(name, *same, **options) == pytest.approx(at_first, abs=1e-5)
    assert value(name, CHOSEN, REJECTED, **options) == pytest.approx(example, abs=1e-5)


def test_losses_of_a_whole_batch():
    more = Completions(array([-9.0]), array([3.0]), array([-9.5]))
    less = Completions(array([-8.0]), array([2.0]), array([-8.25]))
    pairs = [
        jax.tree.map(lambda *x: jnp.concatenate(x), *both)
        for both in ((CHOSEN, more), (REJECTED, less))
    ]
    assert value("aot", *pairs) == pytest.approx(0.650841, abs=1e-6)
    assert value("aot_unpaired", *pairs) == pytest.approx(0.650373, abs=1e-6)
    assert {name for name, loss in losses.PREFERENCES.items() if loss.coupled} == {
        "aot",
        "aot_unpaired",
    }


def test_losses_without_a_reference():
    chosen = Completions(array([-2.0]), array([4.0]))  # -0.5 a token
    rejected = Completions(array([-4.5]), array([5.0]))  # -0.9
    assert value("orpo", chosen, rejected) == pytest.approx(0.036773, abs=1e-6)
    assert value("simpo", chosen, rejected, beta=2.0, margin=1.0) == pytest.approx(
        0.798139, abs=1e-6
    )
    assert value("cpo", chosen, rejected) == pytest.approx(math.log(1 + math.exp(-0.25)), abs=1e-6)
    mixed = value({"cpo": 1.0, "sft": 0.5}, chosen, rejected)
    assert mixed == pytest.approx(value("cpo", chosen, rejected) + 0.5 * 0.5, abs=1e-6)


def test_kto():
    rows = Completions(jnp.array([1.0, -0.5]), jnp.ones(2), jnp.zeros(2))
    kl = losses.mismatched_kl(Completions(jnp.array([0.3, 0.1]), jnp.ones(2), jnp.zeros(2)))
    each = [
        losses.kto_loss(jax.tree.map(lambda x, i=i: x[i : i + 1], rows), jnp.array([i == 0]), kl)
        for i in range(2)
    ]
    assert_close([x.total for x in each], [0.480011, 0.482507], 1e-6)
    whole = losses.kto_loss(rows, jnp.array([True, False]), kl)
    assert whole.total == pytest.approx(0.480011 + 0.482507, abs=1e-6) and whole.count == 2
    assert whole.log_counts == {"chosen": 1, "rejected": 1}
    assert (whole.logs["chosen"], whole.logs["rejected"]) == pytest.approx((0.1, -0.05))
    assert (each[0].log_counts["rejected"], each[0].logs["chosen"]) == pytest.approx((0, 0.1))


def test_rewards_are_logged_and_differentiated_nowhere():
    sums = preference_loss("sigmoid", CHOSEN, REJECTED)
    assert_close([sums.logs[x] for x in ("chosen", "rejected", "margin")], [0.1, -0.05, 0.15], 1e-6)
    assert sums.logs["accuracy"] == 1
    reference = jax.grad(
        lambda x: preference_loss("sigmoid", CHOSEN._replace(reference=x), REJECTED).total
    )
    assert not reference(CHOSEN.reference).any()


@over(
    "name",
    sorted(set(losses.PREFERENCES) - {"aot", "aot_unpaired"}),
    often=("sigmoid", "orpo", "ipo"),
)
def test_parts_of_a_batch_add_up(name):
    """Sums and gradients of 8 pairs at once, and of 2 × 4: the count divides once."""
    policy, reference = (-np.abs(draw(key, (2, 8))) * 9 - 1 for key in (1, 2))
    tokens = np.arange(1, 17, dtype=np.float32).reshape(2, 8)
    options = PreferenceOptions(smoothing=0.1 if losses.PREFERENCES[name].smooths else 0.0)

    def total(policy, at):
        pair = [Completions(policy[i, at], tokens[i, at], reference[i, at]) for i in (0, 1)]
        return preference_loss(name, *pair, options).total

    @jax.jit
    def compute(policy):
        return [jax.value_and_grad(total)(policy, at) for at in (np.s_[:], np.s_[:4], np.s_[4:])]

    whole, *parts = compute(policy)
    assert_close(jax.tree.map(lambda *x: sum(x), *parts), whole, 1e-6)
    assert np.abs(whole[1]).max() > 1e-3


def test_tokens_of_packed_rows_are_those_of_rows_of_their_own():
    logps, mask = draw(3, (2, 7)), np.array([[0, 1, 1, 0, 1, 1, 1], [1, 1, 0, 1, 0, 0, 0]])
    segments = array([[0, 0, 0, 1, 1, 1, 2], [0, 0, 0, 1, 1, 1, 1]])
    packed = losses.completions(logps, mask, 2 * logps, segments, 3)
    want = [[logps[0, 1:3].sum(), logps[0, 4:6].sum(), logps[0, 6]]]
    want += [[logps[1, :2].sum(), logps[1, 3], 0]]
    assert_close(packed.policy, np.ravel(want), 1e-6)
    assert_close(packed.reference, 2 * np.ravel(want), 1e-6)
    assert packed.tokens.tolist() == [2, 2, 1, 2, 1, 1]


BAD = {
    "dpo": ({}, "loss 'dpo' is unknown. .*: sft, sigmoid"),
    "hinge": ({"smoothing": 0.1}, "'hinge' has no label smoothing"),
    "exo_pair": ({}, "For exo_pair it must be above 0"),
    "robust": ({"smoothing": 0.5}, "below 0.5"),
    "ipo": ({}, "compares the model with a reference"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    options, said = BAD[name]
    chosen = CHOSEN._replace(reference=None) if name == "ipo" else CHOSEN
    with pytest.raises(ValueError, match=said):
        value(name, chosen, REJECTED, **options)


# Rollouts of two and of three tokens.
LOGPS = array([[-1.0, -0.5, -2.0], [-0.2, -1.5, -7.0]])
OLD = array([[-1.3, -0.5, -1.6], [-0.1, -1.0, 9.0]])
REFERENCE = array([[-1.1, -0.7, -1.9], [-0.3, -1.4, 5.0]])
MASK = array([[1, 1, 1], [1, 1, 0]], bool)
GAINS = array([1.0, -1.0])
ROLLOUTS = {
    "grpo": (losses.ONLINE["grpo"], -0.052177),
    "dapo": (losses.ONLINE["dapo"], -0.233097),
    "dr_grpo": (losses.dr_grpo(4), -0.145685),
    "dapo, clipped higher": (Online(high=0.28), -0.249097),
    "grpo with a divergence": (Online(over="sequences", beta=0.04), -0.051911),
    "dapo with a divergence": (Online(beta=0.04), -0.232807),
    "grpo with k3": (Online(over="sequences", beta=0.04, divergence="k3"), -0.051886),
    "dapo with k3": (Online(beta=0.04, divergence="k3"), -0.232787),
    "gspo": (Online(over="sequences", level="sequence"), -0.083608),
    "cispo": (losses.ONLINE["cispo"], 0.419947),
}


@pytest.mark.parametrize("name", ROLLOUTS)
def test_the_published_values_of_rollouts(name):
    """And what is masked, whatever it holds, changes nothing."""
    options, want = ROLLOUTS[name]
    reference = REFERENCE if options.beta else None

    def loss(logps):
        sums = losses.online_loss(options, logps, MASK, GAINS, OLD, reference)
        return sums.total / sums.count

    value, gradient = jax.jit(jax.value_and_grad(loss))(LOGPS)
    assert value == pytest.approx(want, abs=1e-6)
    assert np.isfinite(gradient).all() and gradient[1, 2] == 0 and np.abs(gradient).max() > 1e-3


def test_rloo_and_advantages():
    sums = jax.jit(losses.rloo_loss)(LOGPS, MASK, GAINS, OLD)
    assert sums.total / sums.count == pytest.approx(-0.052419, abs=1e-6)
    one_of_eight = array([1.0] + [0.0] * 7)
    leave_one_out = jax.jit(losses.leave_one_out, static_argnums=1)
    advantages_of = jax.jit(losses.advantages_of, static_argnums=(1, 2))
    assert_close(leave_one_out(one_of_eight, 8)[:2], np.array([1, -0.142857]), 1e-6)
    assert_close(advantages_of(one_of_eight, 8)[:2], np.array([2.474174, -0.353453]), 1e-6)
    some = array([1.0, np.nan, 0.0, 4.0, np.nan, np.nan, 5.0, np.nan], np.float32)
    assert leave_one_out(some, 4).tolist() == [-1.0, 0.0, -2.5, 3.5, 0.0, 0.0, 0.0, 0.0]
    rewards = array([1.0, 2.0, np.nan, np.nan, 3.0, 3.0], np.float32)
    assert_close(advantages_of(rewards, 2, "none"), np.array([-0.5, 0.5, 0, 0, 0, 0]), 1e-6)
    batch = advantages_of(rewards, 2, "batch")
    assert batch[1] == pytest.approx(0.5 / (np.std([1, 2, 3, 3], ddof=1) + 1e-4), abs=1e-6)


@pytest.mark.slow
def test_rows_that_fill_up_a_batch_are_no_completions():
    """Those that are all masked count as such; these do not."""
    filled = [np.pad(x, [(0, 3), *[(0, 0)] * (x.ndim - 1)]) for x in (LOGPS, MASK, GAINS, OLD)]
    there = np.arange(len(filled[0])) < len(LOGPS)
    for name, loss in {
        "grpo": losses.online_loss,
        "dr_grpo": losses.online_loss,
        "dapo": losses.online_loss,
        "rloo": losses.rloo_loss,
    }.items():
        known = {"dr_grpo": losses.dr_grpo(4)} | losses.ONLINE
        options = () if name == "rloo" else (known[name],)
        compute = jax.jit(functools.partial(loss, *options))
        whole, more = compute(LOGPS, MASK, GAINS, OLD), compute(*filled, there=there)
        assert_close((more.total, more.count), (whole.total, whole.count), 1e-6)
        assert more.tokens == whole.tokens == np.sum(MASK)
        assert compute(LOGPS, np.zeros_like(MASK), GAINS, OLD).tokens == 0


def test_ratios_are_clipped_where_the_gain_pulls_further():
    """A log would call tokens clipped that have no gradient anyway: those of gain 0.

    TRL compares with < and >: a ratio at a bound, as of the first update with bounds of 0, is not
    clipped.
    """
    gains, mask, old = array([1.0, 0.0, -1.0]), jnp.ones((3, 1), bool), jnp.zeros((3, 1))
    options = Online(low=0.1, high=0.2), Online(weighted=True, high=1.2), Online(low=0.0)

    @jax.jit
    def shares(logps):
        sums = [losses.online_loss(how, logps, mask, gains, old) for how in options]
        return [(x.logs["clip_low"] / x.count, x.logs["clip_high"] / x.count) for x in sums]

    assert np.allclose(shares(jnp.ones((3, 1))), [(0, 1 / 3)] * 3)
    assert np.allclose(shares(-jnp.ones((3, 1))), [(1 / 3, 0), (0, 0), (1 / 3, 0)])
    assert np.allclose(shares(jnp.zeros((3, 1))), 0)


def test_each_token_has_its_own_advantage():
    """A distillation's tokens would else be judged by those of other rows. By NumPy."""
    gains = np.array([[1.0, -2.0, 0.5], [3.0, -1.0, 9.0]], np.float32)
    ratio = np.exp(np.asarray(LOGPS - OLD, np.float64))
    terms = np.minimum(ratio * gains, np.clip(ratio, 0.8, 1.2) * gains)
    sums = jax.jit(functools.partial(losses.online_loss, Online()))(LOGPS, MASK, gains, OLD)
    assert float(sums.total) == pytest.approx(-terms[np.asarray(MASK)].sum(), rel=1e-6)


def test_completions_of_one_token_count():
    """Completions of one token count, such as "yes" and "no". Padding does not."""
    mask = array([[0, 1, 0], [0, 0, 0]])
    chosen = losses.completions(array([[-9.0, -1.0, -9.0]] * 2), mask, jnp.full((2, 3), -2.0))
    rejected = losses.completions(array([[-9.0, -3.0, -9.0]] * 2), mask, jnp.full((2, 3), -2.5))
    # By hand: the log-ratios are 1 and -1/2, of one pair.
    want = math.log1p(math.exp(-0.1 * (1.0 + 0.5)))
    sums = preference_loss("sigmoid", chosen, rejected, PreferenceOptions(beta=0.1))
    assert float(sums.count) == 1 and float(sums.total) == pytest.approx(want, rel=1e-6)


def test_prompts_that_are_predicted_are_no_part_of_completions():
    """ORPO predicts prompts, too; its odds are those of completions alone."""
    logits, targets = draw(4, (1, 4, 5)), np.array([[1, 2, 3, 4]])
    batch = {"ids": targets, "predict_at": np.arange(4)[None], "targets": targets}
    batch |= {"weights": np.ones((1, 4)), "counts": np.ones((1, 2), int)}
    batch |= {"sequences": np.array([[0, 0, 1, 1]]), "completion": np.array([[0, 1, 0, 1]])}
    found = losses.sequence_logps(lambda variables, ids, **_: logits, {}, batch)
    exact = np.exp(np.asarray(logits[0], np.float64))
    logps = np.log(exact / exact.sum(axis=-1, keepdims=True))
    assert_close(found.policy, np.array([logps[1, 2], logps[3, 4]]), 1e-6)
    assert found.tokens.tolist() == [1, 1]


def test_on_policy_the_ratio_is_one():
    """Without old log-probabilities the value is minus the mean advantage, with a gradient."""
    value, gradient = jax.jit(
        jax.value_and_grad(
            lambda x: losses.online_loss(losses.ONLINE["grpo"], x, MASK, GAINS).total
        )
    )(LOGPS)
    assert value == 0 and np.abs(gradient).max() > 0.1
    compute = jax.jit(functools.partial(losses.online_loss, losses.ONLINE["dapo"]))
    nothing = compute(LOGPS, np.zeros_like(MASK), GAINS)
    assert nothing.total == 0 and nothing.count == 0
    with pytest.raises(ValueError, match="both beta and a reference"):
        losses.online_loss(Online(beta=0.1), LOGPS, MASK, GAINS)


def test_distillation():
    student, teacher = (
        np.log(np.array([[probabilities]], np.float32))
        for probabilities in ([0.7, 0.2, 0.1], [0.5, 0.3, 0.2])
    )
    values = {0.0: 0.092033, 1.0: 0.085123, 0.1: 0.008185, 0.5: 0.021901, 0.9: 0.007695}
    mask = np.ones((1, 1), bool)
    compute = jax.jit(losses.distillation_loss, static_argnames="beta")
    for beta, want in values.items():
        sums = compute(student, teacher, mask, beta=beta)
        assert sums.total == pytest.approx(want, abs=1e-6) and sums.count == 1
