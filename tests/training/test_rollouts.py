"""Batches that depend on the state: a policy learns from its own rollouts."""

import io

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from rich.console import Console

import lora_jax as lj
from lora_jax.training.loop import Hooks
from lora_jax.training.loop import train as loop
from lora_jax.training.losses import Loss, Sums
from lora_jax.training.run.stop import Stop
from lora_jax.training.step import init_state, make_step
from train.options.common import RunConfig
from train.run.log import RunLog, read_metrics

CONTEXTS, ACTIONS = 3, 4  # the good action in a context is the one of its number
PARTS, SIZE = 2, 32
STEPS = 60
LEARNING_RATE = 0.05


def policy(variables, contexts):
    return jax.nn.one_hot(contexts, CONTEXTS) @ variables["params"]["policy"]["kernel"]


forward = lj.adapt(policy)


@Loss
def reinforce(forward, params, batch, dropout_key):
    """The log-probability of what was done, each times its advantage, by REINFORCE."""
    log_probs = jax.nn.log_softmax(forward({"params": params}, batch["contexts"]))
    done = jnp.take_along_axis(log_probs, batch["actions"][:, None], axis=-1)[:, 0]
    total = -jnp.sum(done * batch["weights"])
    return Sums(total, jnp.float32(done.size), {"reward": jnp.sum(batch["rewards"])})


@jax.jit
def rollouts(adapter, base, key):
    """Actions that an adapter takes, with their rewards and advantages: [PARTS, SIZE] each."""
    contexts = jnp.resize(jnp.arange(CONTEXTS), (PARTS, SIZE))
    logits = forward({"params": lj.join(adapter, base)}, contexts)
    actions = jax.random.categorical(key, logits)
    rewards = (actions == contexts).astype(jnp.float32)
    weights = rewards - jnp.mean(rewards)
    return {"contexts": contexts, "actions": actions, "rewards": rewards, "weights": weights}


@jax.jit
def good(adapter, base):
    """The probability of the good action in each context."""
    logits = forward({"params": lj.join(adapter, base)}, jnp.arange(CONTEXTS))
    return jnp.diagonal(jax.nn.softmax(logits))


def halves():
    kernel = 0.1 * np.random.default_rng(1).standard_normal((CONTEXTS, ACTIONS), np.float32)
    params = {"policy": {"kernel": kernel}}
    return lj.split(lj.lorafy(params, [lj.LoraRule(targets=["policy"], rank=3, alpha=6)]))


def trained(folder, *, frozen):
    """A run whose batches come from its state or, if frozen, from a copy of the first."""
    adapter, base = halves()
    schedule = optax.constant_schedule(LEARNING_RATE)
    optimizer = optax.adam(schedule)
    step = make_step(forward, optimizer, schedule, dropout=False, loss=reinforce)
    state = init_state(adapter, optimizer, jax.random.key(0))
    copy = jax.tree.map(jnp.copy, adapter)
    seen = []

    def batch(number, state):
        assert int(state.step) == number
        key = jax.random.fold_in(state.key, number)
        made = rollouts(copy if frozen else state.adapter, base, key)
        seen.append(jax.tree.map(np.asarray, made))
        return made

    hooks = Hooks(
        batch=batch,
        placed=lambda batch: batch,
        tokens=lambda batch: PARTS * SIZE,
        save=lambda state, owed: None,
        rows=str,
        resume_hint="",
    )
    folder.mkdir()
    console = Console(file=io.StringIO(), force_terminal=False)
    with RunLog(folder, console, first=0, last=STEPS) as log:
        state, _ = loop(
            jax.jit(step, donate_argnums=0),
            state,
            base,
            STEPS,
            RunConfig(output=str(folder), log_every=1),
            hooks,
            log,
            Stop(),
        )
    return state, base, seen, read_metrics(folder)


def test_a_policy_learns_from_its_own_rollouts(tmp_path):
    before = good(*halves())
    assert float(before.max()) < 0.4  # chance is a quarter
    state, base, seen, lines = trained(tmp_path / "run", frozen=False)
    assert float(good(state.adapter, base).min()) > 0.8
    early = [batch["weights"] for batch in seen[:20]]
    assert all((weights > 0).any() and (weights < 0).any() for weights in early)
    # What it earns is logged, and is what it sampled.
    rewards = [line["reward"] for line in lines]
    assert rewards == pytest.approx([batch["rewards"].mean() for batch in seen])
    assert np.mean(rewards[:3]) < 0.45 and np.mean(rewards[-3:]) > 0.8


def test_rollouts_come_from_the_state_that_trains(tmp_path):
    _, _, seen, _ = trained(tmp_path / "run", frozen=False)
    _, _, control, _ = trained(tmp_path / "control", frozen=True)
    same = [np.array_equal(a["actions"], b["actions"]) for a, b in zip(seen, control, strict=True)]
    assert same[0] and not any(same[5:])
    earned = [np.mean([batch["rewards"] for batch in run[-10:]]) for run in (seen, control)]
    assert earned[0] > 0.8 and earned[1] < 0.4
