"""Adapters that train side by side on models: dense, a mixture, an encoder; on six meshes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lj
from lora_jax import training
from lora_jax.bank import Tenant, Together
from lora_jax.training.layout import Layout, make_mesh
from lora_jax.training.losses import CROSS_ENTROPY
from tests.models import tiny, tiny_encoders
from tests.support import assert_close, lorafied, thorough, with_random_factors

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("standard_promotion")]
ROWS, SEQ = 4, 8


def classes(forward, params, batch, dropout_key):
    logits = forward({"params": params}, batch["ids"])
    chosen = jax.nn.one_hot(batch["labels"], logits.shape[-1])
    return training.Sums(-jnp.sum(jax.nn.log_softmax(logits) * chosen), jnp.float32(ROWS), {})


def decoder_batch(rng):
    """Rows of two sequences, some padding, and predictions that do not count."""
    segments = np.array([1] * 4 + [2] * 3 + [0], np.int32)
    batch = {
        "ids": rng.integers(0, 61, (1, ROWS, SEQ)),
        "segment_ids": np.broadcast_to(segments, (1, ROWS, SEQ)),
        "positions": np.broadcast_to(np.array([0, 1, 2, 3, 0, 1, 2, 0]), (1, ROWS, SEQ)),
        "predict_at": np.broadcast_to(np.array([0, 1, 2, 4, 5, 0]), (1, ROWS, 6)),
        "targets": rng.integers(0, 61, (1, ROWS, 6)),
        "weights": np.broadcast_to(np.array([1, 1, 1, 1, 1, 0]), (1, ROWS, 6)),
    }
    return {name: np.array(array, np.int32) for name, array in batch.items()}


def encoder_batch(rng):
    ids, labels = rng.integers(1, 61, (1, ROWS, SEQ)), rng.integers(0, 3, (1, ROWS))
    return {"ids": ids.astype(np.int32), "labels": labels.astype(np.int32)}


def case_of(kind):
    """Returns a model, its parameters, the targets of two sets of rules, loss and batches."""
    if kind == "encoder":
        model, params = tiny_encoders.model("bert", "classification")
        head = [lj.TrainRule(targets=["classifier"])]
        return model, params, (["query", "value"], ["dense"]), head, encoder_batch
    model, params = tiny.decoder({"dense": "qwen3", "mixture": "mixtral"}[kind])
    more = ["down_proj"] if kind == "dense" else ["experts"]
    return model, params, (["q_proj", "v_proj"], ["o_proj", *more]), [], decoder_batch


@pytest.mark.parametrize(
    ("kind", "mesh"),
    [
        pytest.param("dense", "", marks=thorough),
        pytest.param("mixture", "", marks=thorough),
        pytest.param("encoder", "", marks=thorough),
        pytest.param("dense", "data=4", marks=thorough),
        pytest.param("encoder", "fsdp=4", marks=thorough),
        pytest.param("dense", "fsdp=2,tensor=2", marks=thorough),
        pytest.param("dense", "sequence=2,data=2", marks=thorough),
        ("mixture", "expert=2,fsdp=2"),
        pytest.param("mixture", "fsdp=2,tensor=2", marks=thorough),
    ],
)
def test_eight_adapters(kind, mesh):
    """Trains adapters of several ranks, targets, rates and lengths; each ends as it does alone.

    Two join late, one leaves early.
    """
    model, params, targets, more, make_batch = case_of(kind)
    loss = training.Loss(classes, unit="text") if kind == "encoder" else CROSS_ENTROPY
    sizes = {k: int(v) for k, v in (part.split("=") for part in mesh.split(",") if part)}
    layout = Layout.of(make_mesh(jax.devices()[: 4 if mesh else 1], **sizes), model.config)
    base = layout.placed(params)
    forward = lj.adapt(layout.constrained(model).apply)
    tenants, ends = {}, {}
    for n in range(8):
        rule = lj.LoraRule(targets=targets[n % 2], rank=2 + n % 2, alpha=3.0 + n)
        tree = with_random_factors(lorafied(params, [*more, rule]), seed=n)
        steps = 20 - 5 * (n % 3)
        rate = training.warmed_up(1e-3 * (1 + n / 4), steps, warmup=2)
        tree = layout.placed(tree)
        # Adam divides a gradient by its size. With an eps well above the rounding of gradients, an
        # element that is zero but for rounding stays where it is.
        how = {"weight_decay": 0.01 * n, "options": {"eps": 1e-4}}
        tenants[f"{n}"] = Tenant(params=tree, schedule=rate, steps=steps, loss=loss, **how)

    def batch(name, step):
        return make_batch(np.random.default_rng([int(name), step]))

    with jax.set_mesh(layout.mesh):
        together = Together(forward, base)
        together.add({name: tenants[name] for name in "012345"})
        for step in range(26):
            if step == 6:
                together.add({name: tenants[name] for name in "67"})
            if step == 9:
                ends["0"] = (9, lj.split(together.remove("0"))[0])
            names = together.unfinished
            if not names:
                break
            together.step({name: batch(name, together.done(name)) for name in names})
        for name in together.names:
            ends[name] = (tenants[name].steps, together.state(name).adapter)
    assert sorted(ends) == list("01234567")
    for name in "034567" if not mesh else "07":  # one left early, one joined late
        steps, found = ends[name]
        one = tenants[name]
        adapter, half = lj.split(jax.device_get(one.params))
        how = {"weight_decay": one.weight_decay, "options": one.options}
        optimizer = training.make_optimizer("adamw", one.schedule, one.params, **how)
        alone = jax.jit(
            training.make_step(
                lj.adapt(model.apply), optimizer, one.schedule, dropout=False, loss=one.loss
            )
        )
        state = training.init_state(adapter, optimizer, one.key)
        for number in range(steps):
            state, _ = alone(state, half, batch(name, number))
        assert_close(jax.device_get(found), state.adapter, 1e-5)
        after = jax.device_get(state.adapter)
        moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), after, adapter)
        assert max(jax.tree.leaves(moved)) > 4e-3
