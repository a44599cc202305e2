"""The contract of a loss: its sums, their reduction, and their use in a step and a run."""

import functools
import io
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P
from rich.console import Console

import lora_jax as lj
from lora_jax.training.layout import Layout
from lora_jax.training.loop import Hooks, PeriodicMeasure
from lora_jax.training.loop import train as loop
from lora_jax.training.losses import (
    CROSS_ENTROPY,
    HELD_OUT,
    Loss,
    Sums,
    classification_loss,
    summed_loss,
)
from lora_jax.training.run.stop import Stop
from lora_jax.training.setup import Setup
from lora_jax.training.step import State, init_state, make_evaluation, make_step
from tests.support import assert_close, lorafied, with_random_factors
from tests.train.run.test_log import events, reporting
from tests.training.test_losses import BATCH, M, bag, batch, lora, on_merged
from train.options.common import RunConfig
from train.processes.mesh import make_mesh
from train.reporters.tensorboard import TensorBoard
from train.run.log import RunLog, read_metrics

# What is small and whole is summed in fp32 without rounding, in whatever order.
RNG = np.random.default_rng(0)
KERNEL = RNG.integers(-3, 4, (5, 4)).astype(np.float32)
X = RNG.integers(-2, 3, (8, 5)).astype(np.float32)
FACTORS = np.array([1, 0, 0, 0, -2, 3, 1, -1], np.float32)  # of each row's loss: 5 rows count
LARGE = 500


def linear(variables, x):
    return x @ variables["params"]["up"]["kernel"]


LINEAR = lj.adapt(linear)


def squares(forward, params, batch, dropout_key):
    """A user's loss: it knows no weights, and counts by itself."""
    each = jnp.sum(forward({"params": params}, batch["x"]) ** 2, axis=-1)
    large = jnp.where(batch["factors"] != 0, each > LARGE, False)
    total = jnp.sum(each * batch["factors"])
    return Sums(total, jnp.sum(batch["factors"] != 0), {"large": jnp.sum(large)})


@functools.cache
def adapted():
    """The tree with whole numbers in its factors, and s = 2."""
    rules = [lj.LoraRule(targets=["up"], rank=2, alpha=4)]
    adapter, base = lj.split(lj.lorafy({"up": {"kernel": jnp.asarray(KERNEL)}}, rules))
    rng = np.random.default_rng(1)
    draw = lambda x: jnp.asarray(rng.integers(-2, 3, x.shape), jnp.float32)  # noqa: E731
    return jax.tree.map(draw, adapter), base


def rows(shape, factors=FACTORS):
    return {"x": X.reshape(*shape, 5), "factors": np.asarray(factors, np.float32).reshape(shape)}


@functools.cache
def step_of(loss, forward):
    """The jitted step of gradient descent, one for each loss."""
    rate = optax.constant_schedule(1.0)
    return jax.jit(make_step(forward, optax.sgd(1.0), rate, dropout=False, loss=loss))


def stepped(loss, data, forward=LINEAR, halves=None):
    """(metrics, the gradient that the optimiser saw, the state) of one step."""
    adapter, base = halves or adapted()
    state = init_state(adapter, optax.sgd(1.0), jax.random.key(0))
    after, metrics = step_of(loss, forward)(state, base, data)
    seen = jax.tree.map(lambda a, b: np.asarray(a) - np.asarray(b), adapter, after.adapter)
    return metrics, seen, after


def by_hand():
    """(the total, its gradient, what each row gives) of all rows, from W + s·AᵀB."""
    factors = {name: np.asarray(x, np.float64) for name, x in adapted()[0]["up/kernel"].items()}
    y = X @ (KERNEL + 2 * factors["a"].T @ factors["b"])
    to_kernel = X.T @ (2 * y * FACTORS[:, None])
    gradient = {"a": 2 * factors["b"] @ to_kernel.T, "b": 2 * factors["a"] @ to_kernel}
    return np.sum((y**2).sum(-1) * FACTORS), {"up/kernel": gradient}, (y**2).sum(-1)


@pytest.mark.parametrize(
    ("reduction", "divisor"), [("mean", 5), pytest.param("sum", 1, marks=pytest.mark.slow)]
)
def test_accumulation_is_the_large_batch_exactly(reduction, divisor):
    total, gradient, each = by_hand()
    assert abs(total) > 100 and abs(gradient["up/kernel"]["b"]).max() > 100
    loss = Loss(squares, reduction=reduction, unit="row")
    found = [stepped(loss, rows(shape)) for shape in ((1, 8), (2, 4), (4, 2), (8, 1))]
    for metrics, seen, _ in found:
        assert float(metrics["loss"]) == pytest.approx(float(total) / divisor, rel=1e-6)
        assert float(metrics["count"]) == 5 and float(metrics["skipped"]) == 0
        assert_close(seen, jax.tree.map(lambda g: g / divisor, gradient), 1e-5)
        # The same bits: one division, of sums that are exact.
        jax.tree.map(np.testing.assert_array_equal, (metrics, seen), found[0][:2])
    n_large = np.sum((each > LARGE) & (FACTORS != 0))
    assert 0 < n_large < 5
    assert float(found[0][0]["large"]) == pytest.approx(n_large / 5)


def test_nothing_that_counts_is_a_step_without_a_change():
    for shape in ((1, 8), (2, 4)):
        metrics, gradient, state = stepped(Loss(squares, unit="row"), rows(shape, np.zeros(8)))
        assert all(np.isfinite(value) for value in metrics.values())
        names = ("loss", "count", "large", "grad_norm")
        assert [float(metrics[n]) for n in names] == [0, 0, 0, 0]
        assert float(metrics["skipped"]) == 1
        assert not np.any(gradient["up/kernel"]["b"]) and int(state.step) == 1


def test_an_evaluation_gives_sums_that_add_up():
    evaluate = jax.jit(make_evaluation(LINEAR, Loss(squares)))
    data = rows((2, 4))
    parts = [evaluate(*adapted(), {k: v[i] for k, v in data.items()}) for i in range(2)]
    whole = evaluate(*adapted(), {k: v.reshape(8, *v.shape[2:]) for k, v in data.items()})
    assert isinstance(whole, Sums) and float(whole.total) == float(by_hand()[0])
    assert whole.count.dtype == whole.logs["large"].dtype == jnp.float32
    jax.tree.map(np.testing.assert_array_equal, whole, jax.tree.map(np.add, *parts))


@pytest.mark.slow
def test_a_mesh_has_the_sums_of_one_device():
    mesh = make_mesh("data=2,fsdp=2", 4, devices=jax.devices())
    layout = Layout(mesh, [("up/kernel", P("fsdp", None))])
    params = layout.placed(lj.join(*adapted()))
    adapter, base = lj.split(params)
    before = jax.tree.map(np.asarray, adapter)
    setup = Setup.make(layout, params, optax.sgd(1.0), optax.constant_schedule(1.0))
    for reduction in ("mean", "sum"):
        loss = Loss(squares, reduction=reduction, unit="row")
        state = setup.state(adapter, jax.random.key(0))
        data = layout.batch(rows((2, 4)), parts=True)
        assert {shard.data.shape for shard in data["x"].addressable_shards} == {(2, 1, 5)}
        step = setup.compile(LINEAR, loss, state, base, data)
        after, metrics = step(state, base, data)
        seen = jax.tree.map(lambda a, b: a - np.asarray(b), before, after.adapter)
        expected = stepped(loss, rows((1, 8)))
        assert_close((metrics, seen), tuple(expected[:2]), 1e-6)


def signed(seed):
    """Weights of both signs that sum to zero, a third of them zero."""
    weights = np.resize(np.array([1.5, -0.5, 0, -1.0, 0, 0.75, -0.75, 0.25, -0.25, 0]), (BATCH, M))
    return np.random.default_rng(seed).permuted(weights, axis=1).astype(np.float32)


@pytest.mark.slow
def test_weights_of_both_signs():
    model, plain = bag()
    params = with_random_factors(lorafied(plain, [lora("lm_head", train_bias=True)]))
    adapter, base = lj.split(params)
    data = {**batch(), "weights": signed(0)}
    assert data["weights"].sum() == 0 and (data["weights"] < 0).any()
    judge = jax.jit(
        jax.value_and_grad(lambda adapter: on_merged(model, lj.join(adapter, base), data))
    )
    total, gradient = judge(adapter)
    assert abs(total) > 0.1
    n, forward = BATCH * 7, lj.adapt(model.apply)
    assert np.count_nonzero(data["weights"]) == n
    batches = {name: array[None] for name, array in data.items()}
    turned = {**batches, "weights": -batches["weights"]}
    for chunk in (0, 9):
        loss = Loss(functools.partial(summed_loss, chunk=chunk))
        metrics, seen, _ = stepped(loss, batches, forward, (adapter, base))
        assert float(metrics["count"]) == n
        assert float(metrics["loss"]) == pytest.approx(float(total) / n, rel=1e-4)
        assert_close(jax.tree.map(lambda g: n * g, seen), gradient, 1e-4)
        _, opposite, _ = stepped(loss, turned, forward, (adapter, base))
        assert_close(jax.tree.map(np.negative, opposite), seen, 1e-5)


def classifier(variables, ids, attention_mask, token_type_ids):
    return jnp.asarray(X)[ids] @ variables["params"]["up"]["kernel"]


def test_texts_of_both_signs_and_their_accuracy():
    labels = np.array([0, 1, 2, 3, 0, 1, 2, 3])
    params = {"up": {"kernel": jnp.asarray(KERNEL)}}
    data = dict.fromkeys(("attention_mask", "token_type_ids"), np.zeros(8))
    data |= {"ids": np.arange(8), "labels": labels, "weights": FACTORS}

    def both(params):
        sums = classification_loss(classifier, params, data)
        return sums.total, sums

    (_, sums), gradient = jax.jit(jax.value_and_grad(both, has_aux=True))(params)
    logits = X @ KERNEL
    probabilities = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    losses = -np.log(probabilities[np.arange(8), labels])
    assert float(sums.total) == pytest.approx(np.sum(losses * FACTORS), rel=1e-5)
    d_logits = (probabilities - np.eye(4)[labels]) * FACTORS[:, None]
    np.testing.assert_allclose(gradient["up"]["kernel"], X.T @ d_logits, rtol=1e-4, atol=1e-5)
    assert float(sums.count) == 5
    right = (logits.argmax(-1) == labels) & (FACTORS != 0)
    assert 0 < right.sum() < 5 and right.sum() < (logits.argmax(-1) == labels).sum()
    assert float(sums.logs["accuracy"]) == right.sum()


def test_the_loss_of_tokens_has_no_logs():
    model, plain = bag()
    sums = jax.jit(functools.partial(CROSS_ENTROPY, model.apply))(plain, batch())
    assert sums.logs == {} and float(sums.count) == np.sum(batch()["weights"])


@pytest.mark.parametrize(
    ("returned", "error", "message"),
    [
        (lambda one: one, TypeError, r"the loss returned .* Return Sums\(total, count, logs\)"),
        (lambda one: Sums(one, one, {"lr": one}), ValueError, "'lr' has the name of another"),
        (lambda one: Sums(one, one, {"eval_hits": one}), ValueError, "'eval_hits' has the name"),
        (lambda one: Sums(one, one, {"hits": one[None]}), ValueError, r"'hits' has the shape \(1,"),
        (lambda one: Sums(one[None], one, {}), ValueError, "'total' has the shape"),
        (lambda one: Sums(one, one[None], {}), ValueError, "'count' has the shape"),
    ],
)
def test_losses_that_are_none(returned, error, message):
    with pytest.raises(error, match=message):
        stepped(Loss(lambda *_: returned(jnp.float32(1))), rows((1, 8)))


def test_a_reduction_that_is_none():
    with pytest.raises(ValueError, match="reduction is 'max'"):
        Loss(squares, reduction="max")


def looped(folder, reduction, log_every, batch_metrics=lambda number: {}):
    """Returns the record of four steps with known metrics, and the printed lines."""

    def step(state, base, data):
        n = data["number"]
        metrics = {"loss": 2.0 + n, "count": 10.0 * (n + 1), "hits": 0.25 * n, "lr": 0.1}
        metrics |= {"grad_norm": 1.0, "skipped": float(n == 2)} | ({"few": 0.7} if n == 1 else {})
        return state._replace(step=state.step + 1), metrics

    measured = {"loss": 7.0, "hits": 0.5}
    measure = PeriodicMeasure(every=4, prefix=HELD_OUT, take=lambda state: measured)
    hooks = Hooks(
        batch=lambda number, state: {"number": number},
        placed=lambda batch: batch,
        tokens=lambda batch: 1,
        save=lambda state, owed: None,
        metrics=batch_metrics,
        measures=[measure],
        rows=str,
        resume_hint="",
        reduction=reduction,
    )
    folder.mkdir()
    console = Console(file=io.StringIO(), force_terminal=False, width=1000)
    settings = RunConfig(output=str(folder), log_every=log_every)
    with (
        reporting(folder, {"tensorboard": TensorBoard}) as reports,
        RunLog(folder, console, first=0, last=4, reporting=reports) as log,
    ):
        loop(step, State({}, (), 0, None), {}, 4, settings, hooks, log, Stop())
    return read_metrics(folder), console.file.getvalue()


def test_windows_have_the_means_over_their_units(tmp_path):
    lines, text = looped(tmp_path / "mean", "mean", 4)
    (line,) = (line for line in lines if "loss" in line)
    assert line["count"] == 70  # of the steps 1, 2 and 4: the third was skipped
    assert line["loss"] == pytest.approx((10 * 2 + 20 * 3 + 40 * 5) / 70)
    assert line["hits"] == pytest.approx((20 * 0.25 + 40 * 0.75) / 70)
    assert line["few"] == pytest.approx(20 * 0.7 / 70)  # one step has it, and it is 0 in others
    assert "step 4/4  loss 4.0000  hits 0.5  few 0.2  grad_norm 1  lr" in text
    assert "step 4: held-out loss 7.0000  hits 0.5\n" in text
    assert (lines[-1]["eval_loss"], lines[-1]["eval_hits"]) == (7.0, 0.5)
    tags = {tag for tag, _ in events(tmp_path / "mean")}
    assert {"loss", "hits", "eval_loss", "eval_hits"} <= tags
    # A loss that is a sum: the mean over steps, so that windows of any length compare.
    lines, _ = looped(tmp_path / "sum", "sum", 4)
    (line,) = (line for line in lines if "loss" in line)
    assert line["loss"] == pytest.approx((2 + 3 + 5) / 3)
    assert line["hits"] == pytest.approx((20 * 0.25 + 40 * 0.75) / 70)


def test_metrics_of_batches_are_means_over_steps_and_a_maximum_is_the_largest(tmp_path):
    """Steps count 10, 20 and 40 tokens, but draw as many completions each; the third is skipped."""
    drawn = {
        "reward": [1.0, None, 9.0, 0.5],
        "length": [2.0, 4.0, 9.0, 12.0],
        "mismatch_max": [0.25, 0.5, 9.0, 0.125],
        "rare": [None, None, 9.0, None],
    }

    def batch_metrics(number):
        known = {name: values[number] for name, values in drawn.items()}
        return known | ({"share_refused": 0.75} if number == 1 else {})

    lines, text = looped(tmp_path / "run", "mean", 4, batch_metrics)
    (line,) = (line for line in lines if "loss" in line)
    assert line["reward"] == pytest.approx((1 + 0.5) / 2)
    assert line["length"] == pytest.approx((2 + 4 + 12) / 3)
    assert line["share_refused"] == pytest.approx(0.75 / 3)  # it is 0 in the other steps
    assert line["mismatch_max"] == 0.5
    assert "rare" not in line and not any(name.endswith("_units") for name in line)
    assert line["hits"] == pytest.approx((20 * 0.25 + 40 * 0.75) / 70)  # of the loss


def test_the_record_of_one_step_is_its_metrics(tmp_path):
    for reduction in ("mean", "sum"):
        lines, _ = looped(tmp_path / reduction, reduction, 1)
        found = [(line["loss"], line["count"], line["hits"]) for line in lines if "loss" in line]
        assert found == [(2.0, 10, 0.0), (3.0, 20, 0.25), (5.0, 40, 0.75)]
        text = (tmp_path / reduction / "metrics.jsonl").read_text()
        assert all("time" in json.loads(line) for line in text.splitlines())
