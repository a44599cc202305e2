"""Steps without a finite loss or gradient: skipped, counted, and too many in a row end the run."""

import functools
import io

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from rich.console import Console

import lora_jax as lj
from lora_jax.training.data.batches import pack
from lora_jax.training.data.chats import tokenize
from lora_jax.training.data.order import Order
from lora_jax.training.errors import Diverged
from lora_jax.training.loop import Hooks
from lora_jax.training.loop import train as loop
from lora_jax.training.losses import CROSS_ENTROPY, Loss, summed_loss
from lora_jax.training.optimizer import adamw
from lora_jax.training.optimizers.schedules import warmed_up
from lora_jax.training.run.checkpoints import Checkpoints
from lora_jax.training.run.stop import Stop
from lora_jax.training.step import init_state, make_step
from tests.support import AS_FOR_USERS, assert_identical, with_random_factors
from tests.train.tiny import CONFIG, tokenizer
from tests.training.test_losses import bag
from train.console.errors import flag
from train.options.common import RunConfig
from train.run.log import RunLog, read_metrics

STEPS = 9
ROWS = [{"prompt": "p" * n, "completion": "abc" * n} for n in range(1, 9)]
PACKS = pack(tokenize(ROWS, tokenizer(None), "rows"), 64, packing=False)
MODEL, PARAMS = bag(vocab=CONFIG["vocab_size"])
FORWARD = lj.adapt(MODEL.apply)
ORDER = Order(seed=1, n_rows=len(PACKS), batch_size=2, accumulate=2)


def batch(number, poison=0.0, scale=1):
    """That step's batch; `poison` is added to a weight of its second part."""
    taken = PACKS.take(ORDER.rows(number))
    weights = scale * taken["weights"].astype(np.float32)
    weights[1, 0, 0] += poison
    return {**taken, "weights": weights}


@Loss
def flat_at_zero(forward, params, batch, dropout_key):
    """The loss, whose gradient alone is NaN where a weight is 5 or more."""
    poisoned = jnp.max(batch["weights"]) >= 5
    x = jnp.where(poisoned, 0.0, 1.0) + 0 * jnp.sum(params["lm_head"]["kernel"].b)
    sums = summed_loss(forward, params, batch, dropout_key)
    return sums._replace(total=sums.total + jnp.sqrt(x) - jax.lax.stop_gradient(x))


@Loss
def uncounted(forward, params, batch, dropout_key):
    """The loss, whose count alone is infinite where a weight is 5 or more."""
    sums = summed_loss(forward, params, batch, dropout_key)
    count = jnp.where(jnp.max(batch["weights"]) >= 5, jnp.inf, sums.count)
    return sums._replace(count=count)


@pytest.fixture(scope="module")
def halves():
    params = lj.lorafy(PARAMS, [lj.LoraRule(targets=["lm_head"], rank=3, alpha=5)])
    return lj.split(with_random_factors(params))


def optimiser():
    schedule = warmed_up(0.01, STEPS, kind="linear", warmup=2)
    return adamw(schedule, b2=0.99, weight_decay=0.1), schedule


@pytest.fixture(scope="module")
def steps():
    """The compiled steps by loss."""
    return {
        loss: jax.jit(
            make_step(FORWARD, *optimiser(), dropout=False, loss=loss),
            compiler_options=AS_FOR_USERS if loss is CROSS_ENTROPY else None,
        )
        for loss in (CROSS_ENTROPY, flat_at_zero, uncounted)
    }


def begin(adapter):
    return init_state(adapter, optimiser()[0], jax.random.key(0))


@functools.partial(jax.jit, compiler_options=AS_FOR_USERS)
def unguarded(state, base, batch):
    """The step by its definition, without a guard."""
    optimizer, _ = optimiser()

    def loss(adapter, part):
        return summed_loss(FORWARD, lj.join(adapter, base), part).total

    def add(total, part):
        return jax.tree.map(jnp.add, total, jax.grad(loss)(state.adapter, part)), None

    grads, _ = jax.lax.scan(add, jax.tree.map(jnp.zeros_like, state.adapter), batch)
    scale = 1 / jnp.sum(batch["weights"])
    grads = jax.tree.map(lambda g: g * scale, grads)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.adapter)
    adapter = optax.apply_updates(state.adapter, updates)
    return state._replace(adapter=adapter, opt_state=opt_state, step=state.step + 1)


def test_the_guard_changes_no_bit_of_a_sound_run(halves, steps):
    adapter, base = halves
    guarded = expected = begin(adapter)
    for number in range(STEPS):
        guarded, metrics = steps[CROSS_ENTROPY](guarded, base, batch(number))
        expected = unguarded(expected, base, batch(number))
        assert float(metrics["skipped"]) == 0
    assert_identical(guarded._replace(key=0), expected._replace(key=0))
    assert not np.array_equal(*(jax.tree.leaves(t)[1] for t in (guarded.adapter, adapter)))


@pytest.mark.parametrize(
    ("loss", "poison", "finite"),
    [
        (CROSS_ENTROPY, np.nan, []),
        (CROSS_ENTROPY, np.inf, []),
        pytest.param(flat_at_zero, 4.0, ["loss"], marks=pytest.mark.slow),
        (uncounted, 4.0, ["loss", "grad_norm"]),
    ],
)
def test_a_step_that_is_not_finite_changes_nothing_but_the_step(
    halves, steps, loss, poison, finite
):
    adapter, base = halves
    before, first = steps[loss](begin(adapter), base, batch(0))
    after, metrics = steps[loss](before, base, batch(1, poison))
    assert (float(first["skipped"]), float(metrics["skipped"])) == (0, 1)
    assert [n for n in ("loss", "grad_norm") if np.isfinite(metrics[n])] == finite
    assert (int(before.step), int(after.step)) == (1, 2)
    assert_identical(after._replace(step=0, key=0), before._replace(step=0, key=0))
    # The control: without a guard the adapter is lost.
    if loss is CROSS_ENTROPY:
        lost = unguarded(before, base, batch(1, poison))
        assert not all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(lost.adapter))
    _, then = steps[loss](after, base, batch(2))
    assert float(then["lr"]) == pytest.approx(float(optimiser()[1](1)))  # that of the second update


@pytest.mark.slow
def test_a_batch_without_a_counted_token_moves_neither_weights_nor_momentum(halves, steps):
    adapter, base = halves
    before, _ = steps[CROSS_ENTROPY](begin(adapter), base, batch(0))
    after, metrics = steps[CROSS_ENTROPY](before, base, batch(1, scale=0))
    assert [float(metrics[name]) for name in ("skipped", "count", "loss")] == [1, 0, 0]
    assert_identical(after._replace(step=0, key=0), before._replace(step=0, key=0))
    # The control: momentum and weight decay move the adapter without a gradient.
    zeros = jax.tree.map(jnp.zeros_like, adapter)
    updates, _ = optimiser()[0].update(zeros, before.opt_state, before.adapter)
    assert all(np.abs(leaf).max() > 1e-4 for leaf in jax.tree.leaves(updates))


def run(folder, halves, step, poisoned, empty=(), **options):
    """The loop over batches of which some are poisoned: (state, what it printed, checkpoints).

    Those of the steps in `empty` have no token that counts.
    """
    adapter, base = halves
    folder.mkdir(exist_ok=True)
    checkpoints = Checkpoints(folder / "checkpoints", keep=STEPS)
    hooks = Hooks(
        batch=lambda number, _: batch(
            number, np.nan if number + 1 in poisoned else 0.0, number + 1 not in empty
        ),
        placed=lambda batch: batch,
        tokens=lambda batch: batch["ids"].size,
        save=lambda state, owed: checkpoints.save(state, {}),
        rows=lambda number: f"rows {ORDER.rows(number).ravel().tolist()}",
        resume_hint="",
    )
    console = Console(file=io.StringIO(), force_terminal=False, width=1000)
    settings = RunConfig(output=str(folder), **options)
    state = error = None
    try:
        with RunLog(folder, console, first=0, last=STEPS) as log:
            state, _ = loop(step, begin(adapter), base, STEPS, settings, hooks, log, Stop())
    except Diverged as raised:
        error = raised.said(flag)
    saved = checkpoints.steps()
    checkpoints.close()
    return state, error, console.file.getvalue(), saved


@pytest.mark.parametrize("log_every", [1, 4, 100])
def test_a_poisoned_batch_is_skipped_and_the_run_goes_on(halves, steps, tmp_path, log_every):
    step = steps[CROSS_ENTROPY]
    options = {"log_every": log_every, "save_every": 2}
    state, error, shown, saved = run(tmp_path, halves, step, {4, 6, 7}, **options)
    assert error is None
    expected = begin(halves[0])
    for number in (0, 1, 2, 4, 7, 8):
        expected, _ = step(expected._replace(step=jnp.int32(number)), halves[1], batch(number))
    assert_identical(state._replace(key=0), expected._replace(key=0))
    assert [n for n in range(1, STEPS + 1) if f"step {n} skipped: its loss is nan" in shown] == [
        *(4, 6, 7)
    ]
    lines = read_metrics(tmp_path)
    assert [line["step"] for line in lines if "skipped" in line] == [4, 6, 7]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert np.isfinite(losses).all()
    assert (len(losses) == 6) == (log_every == 1)
    assert "NaN" not in (tmp_path / "metrics.jsonl").read_text()
    assert saved == [2, 8, 9]  # not 4 and 6: those steps were skipped


def test_batches_without_a_counted_token_are_recorded_and_end_no_run(halves, steps, tmp_path):
    """They neither count towards --max-skipped nor keep a checkpoint from being written."""
    step, empty = steps[CROSS_ENTROPY], (2, 3, 5, 6)
    options = {"save_every": 2, "max_skipped": 2}
    state, error, shown, saved = run(tmp_path / "run", halves, step, {}, empty, **options)
    assert error is None and saved == [2, 4, 6, 8, 9]
    expected = begin(halves[0])
    for number in (0, 3, 6, 7, 8):
        expected, _ = step(expected._replace(step=jnp.int32(number)), halves[1], batch(number))
    assert_identical(state._replace(key=0), expected._replace(key=0))
    why = "no token of its batch counts"
    assert [n for n in range(1, STEPS + 1) if f"step {n} skipped: {why}\n" in shown] == [*empty]
    lines = [line for line in read_metrics(tmp_path / "run") if "skipped" in line]
    assert [(line["step"], line["skipped"], line["reason"]) for line in lines] == [
        (n, 1, why) for n in empty
    ]
    # Between steps that are not finite, they end no row of these.
    poisoned = run(tmp_path / "poisoned", halves, step, {3, 5}, {4}, save_every=1, max_skipped=2)
    assert "The last is step 5" in poisoned[1] and poisoned[3] == [1, 2]


def test_three_in_a_row_end_the_run(halves, steps, tmp_path):
    step, options = steps[CROSS_ENTROPY], {"save_every": 2}
    _, error, shown, saved = run(tmp_path, halves, step, {3, 5, 6, 7}, **options)
    for words in (
        *("--max-skipped 3", "step 7", "loss is nan", "--lr", "--warmup", "--resume"),
        f"its batch rows {ORDER.rows(6).ravel().tolist()}",
    ):
        assert words in error
    assert saved == [2, 4]
    assert "step 8" not in shown and "step 4/" in shown
    kept = Checkpoints(tmp_path / "checkpoints", keep=STEPS)
    state, _ = kept.restore(begin(halves[0]))
    kept.close()
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state.adapter))
    # A fourth is allowed where that is what is asked for.
    more = run(tmp_path / "more", halves, step, {3, 5, 6, 7}, max_skipped=4)
    assert more[1] is None and int(more[0].step) == STEPS
    first = run(tmp_path / "first", halves, step, {3, 5}, max_skipped=1)
    assert "The last is step 3:" in first[1]
