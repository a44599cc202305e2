"""Schedules against transformers' own, and the learning rate that is logged."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lora_jax as lj
from lora_jax.training import Loss, Sums, init_state, make_optimizer, make_step, warmed_up
from train.options.optim import warmup_steps

STEPS, WARMUP = 40, 5


@pytest.mark.parity
@pytest.mark.parametrize(
    ("options", "theirs", "more"),
    [
        ({"kind": "constant"}, "get_constant_schedule_with_warmup", {}),
        ({"kind": "linear"}, "get_linear_schedule_with_warmup", {"num_training_steps": STEPS}),
        ({"kind": "cosine"}, "get_cosine_schedule_with_warmup", {"num_training_steps": STEPS}),
        (
            {"kind": "cosine", "floor": 0.1},
            "get_cosine_with_min_lr_schedule_with_warmup",
            {"num_training_steps": STEPS, "min_lr_rate": 0.1},
        ),
        (
            {"kind": "wsd", "floor": 0.2, "decay": 0.3},
            "get_wsd_schedule",
            {
                "num_training_steps": STEPS,
                "num_decay_steps": 12,
                "min_lr_ratio": 0.2,
                "decay_type": "linear",
            },
        ),
        ({"kind": "inverse-sqrt"}, "get_inverse_sqrt_schedule", {}),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_a_schedule_is_that_of_transformers(options, theirs, more):
    """But that their warmup's first step has a rate of zero, and ours the one of its second."""
    import torch
    import transformers

    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], lr=0.5)
    scheduler = getattr(transformers.optimization, theirs)(
        optimizer, num_warmup_steps=WARMUP, **more
    )
    expected = []
    for _ in range(STEPS + 1):
        expected.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    ours = warmed_up(0.5, STEPS, warmup=WARMUP, **options)
    got = [float(ours(step)) for step in range(STEPS + 1)]
    if "min_lr_ratio" not in more:  # theirs rises from the last rate then, ours from zero
        np.testing.assert_allclose(got[:WARMUP], expected[1 : WARMUP + 1], rtol=1e-6)
    np.testing.assert_allclose(got[WARMUP:], expected[WARMUP:], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"kind": "wsd", "warmup": 2, "decay": 0.5}, [4, 8, 8, 8, 8, 8, 6, 4, 2, 0]),
        ({"kind": "wsd", "warmup": 1, "decay": 1.0, "floor": 0.5}, [8, *np.linspace(8, 4, 9)]),
        ({"kind": "linear", "warmup": 0, "floor": 0.5}, list(np.linspace(8, 4, 10))),
        ({"kind": "inverse-sqrt", "warmup": 4}, [2, 4, 6, 8, 8, 8 * 0.8**0.5]),
    ],
)
def test_the_learning_rate_over_nine_steps(options, expected):
    rate = warmed_up(8.0, 9, **options)
    np.testing.assert_allclose([rate(step) for step in range(len(expected))], expected, rtol=1e-5)


def test_a_warmup_in_steps_or_as_a_share():
    def of(warmup, ratio, steps):
        optim = types.SimpleNamespace(warmup=warmup, warmup_ratio=ratio)
        return warmup_steps(optim, steps)

    assert [of(3, None, 100), of(3, 0.05, 100), of(3, 0.05, 101), of(3, 0.0, 10)] == [3, 5, 6, 0]


@pytest.mark.parametrize("name", ["sgd", "lion", "schedule-free"])
def test_the_learning_rate_that_is_logged_is_the_one_that_is_applied(name):
    """Also after a step that was skipped, which is none of the schedule's."""
    params = lj.lorafy({"kernel": jnp.ones((3, 5))}, [lj.TrainRule(targets=".*")])
    adapter, base = lj.split(params)

    def sums(forward, params, batch, dropout_key):
        return Sums(jnp.sum(forward(params) * batch["x"]), jnp.float32(1), {})

    rate = warmed_up(0.5, 9, kind="wsd", warmup=2, decay=0.4)
    momentum = {"momentum": 0.0} if name == "sgd" else {}
    optimizer = make_optimizer(name, rate, params, grad_clip=0.0, options=momentum)
    step = jax.jit(
        make_step(
            lj.adapt(lambda params: params["kernel"]),
            optimizer,
            rate,
            dropout=False,
            loss=Loss(sums),
        )
    )
    state = init_state(adapter, optimizer, jax.random.key(0))

    def place(state):
        """Returns the parameters that steps start from: of an average, its other end."""
        free = [s for s in jax.tree.leaves(state.opt_state, is_leaf=is_free) if is_free(s)]
        return (free[0].z if free else state.adapter)["kernel"]["value"]

    logged, applied = [], []
    for number in range(9):
        x = jnp.full((1, 3, 5), jnp.nan if number == 3 else 1.0)
        before = place(state)
        state, metrics = step(state, base, {"x": x})
        if number != 3:
            logged.append(float(metrics["lr"]))
            applied.append(float(jnp.mean(before - place(state))))
        else:
            assert metrics["skipped"] == 1
    np.testing.assert_allclose(applied, logged, rtol=1e-4)
    assert logged == pytest.approx([float(rate(n)) for n in range(8)])


def is_free(state):
    return isinstance(state, optax.contrib.ScheduleFreeState)


@pytest.mark.parity
def test_adafactor_is_that_of_transformers():
    """As Trainer has it, but that ours decays after the learning rate's own scale."""
    import torch
    from transformers import Adafactor

    rng = np.random.default_rng(0)
    kernel, scale = rng.standard_normal((130, 140)), rng.standard_normal(7)
    params = lj.lorafy(
        {"kernel": jnp.asarray(kernel, jnp.float32), "scale": jnp.asarray(scale, jnp.float32)},
        [lj.TrainRule(targets=".*")],
    )
    adapter, _ = lj.split(params)
    ours = make_optimizer("adafactor", optax.constant_schedule(0.01), params, grad_clip=0.0)
    state = ours.init(adapter)
    weights = [torch.nn.Parameter(torch.tensor(x, dtype=torch.float32)) for x in (kernel, scale)]
    theirs = Adafactor(weights, lr=0.01, scale_parameter=False, relative_step=False)
    for _ in range(4):
        gradients = [3 * rng.standard_normal(x.shape).astype(np.float32) for x in (kernel, scale)]
        for weight, gradient in zip(weights, gradients, strict=True):
            weight.grad = torch.tensor(gradient)
        theirs.step()
        tree = {p: {"value": jnp.asarray(g)} for p, g in zip(adapter, gradients, strict=True)}
        updates, state = ours.update(tree, state, adapter)
        adapter = optax.apply_updates(adapter, updates)
    for parts, weight in zip(adapter.values(), weights, strict=True):
        np.testing.assert_allclose(parts["value"], weight.detach().numpy(), atol=2e-5)
