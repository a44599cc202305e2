"""The losses of tokens that have names: values and gradients against formulas in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import lora_jax as lj
from lora_jax.training.losses import DEFAULT, TOKEN_LOSSES, token_loss
from lora_jax.training.step import init_state, make_step
from tests.support import assert_close, lorafied, over, with_random_factors
from tests.training.test_losses import BATCH, M, bag, batch, lora


def cross_entropy(p, own):
    """(the loss of each target, its gradient), from probabilities and which of them is its own."""
    return -np.log(p[own]), p - own


def dft(p, own):
    return -p[own] * np.log(p[own]), p[own][:, None] * (p - own)


FORMULAS = {"cross-entropy": cross_entropy, "dft": dft}


def expected(name, logits, targets, weights):
    """(the sum, its gradient in the logits), in float64."""
    logits = np.asarray(logits, np.float64)
    raised = np.exp(logits - logits.max(-1, keepdims=True)).reshape(-1, logits.shape[-1])
    own = np.eye(logits.shape[-1], dtype=bool)[targets.reshape(-1)]
    each, gradient = FORMULAS[name](raised / raised.sum(-1, keepdims=True), own)
    weights = weights.reshape(-1)
    return np.sum(weights * each), (weights[:, None] * gradient).reshape(logits.shape)


def test_each_loss_has_a_formula():
    assert FORMULAS.keys() == TOKEN_LOSSES.keys()


@pytest.mark.parametrize("name", TOKEN_LOSSES)
@pytest.mark.parametrize("spread", [0.0, 3.0, 60.0])
def test_values_and_gradients_are_those_of_the_formula(name, spread):
    rng = np.random.default_rng(1)
    logits = (spread * rng.standard_normal((4, 5, 23))).astype(np.float32)
    targets, weights = rng.integers(0, 23, (4, 5)), rng.standard_normal((4, 5)).astype(np.float32)

    def total(logits):
        return jnp.sum(TOKEN_LOSSES[name].each(logits, targets) * weights)

    assert_close(jax.value_and_grad(total)(logits), expected(name, logits, targets, weights), 1e-5)


VOCAB = 64  # no axis beside it has this size
# The predictions a chunk, and the parts that rows are split into.
WAYS = [(0, 1), (7, 1), (9, 3)]


@over(("chunk", "parts"), WAYS, often=["(9, 3)"], called=str)
@pytest.mark.parametrize("name", {*TOKEN_LOSSES} - {DEFAULT})
def test_an_adapter_gets_the_gradient_of_the_formula(name, chunk, parts):
    """Weights are negative, too; rows are in chunks and parts, and the vocabulary over devices."""
    model, plain = bag(vocab=VOCAB)
    params = with_random_factors(lorafied(plain, [lora("lm_head")]))
    adapter, base = lj.split(params)
    data, forward = batch(), lj.adapt(model.apply)
    data["predict_at"] = np.arange(3, 3 + M, dtype=np.int32)[None].repeat(BATCH, axis=0)
    data["weights"] = data["weights"] * np.array([1, -0.5, 2], np.float32)[:, None]
    loss = token_loss(name, chunk=chunk, parts=parts)

    def logits_of(adapter):
        where = {"logits_at": data["predict_at"]}
        return forward({"params": lj.join(adapter, base)}, data["ids"], **where)

    logits, pull = jax.vjp(logits_of, adapter)
    total, gradient = expected(name, logits, data["targets"], data["weights"])
    (judge,) = pull(jnp.asarray(gradient, jnp.float32))

    def summed(adapter, base):
        sums = loss(forward, lj.join(adapter, base), data)
        return sums.total, sums.count

    (found, count), grads = jax.jit(jax.value_and_grad(summed, has_aux=True))(adapter, base)
    assert count == np.count_nonzero(data["weights"])
    assert_close((found, grads), (total, judge), 1e-4)
    plain_total, _ = expected(DEFAULT, logits, data["targets"], data["weights"])
    assert abs(total / plain_total - 1) > 1e-2, "another loss"

    mesh = jax.make_mesh((4,), ("tensor",), axis_types=(jax.sharding.AxisType.Auto,))

    def split(x):
        axes = ["tensor" if size == VOCAB else None for size in x.shape]
        return jax.device_put(x, NamedSharding(mesh, P(*axes)))

    over_devices = jax.jit(jax.value_and_grad(summed, has_aux=True))(
        *jax.tree.map(split, (adapter, base))
    )
    assert_close(over_devices, ((found, count), grads), 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", {*TOKEN_LOSSES} - {DEFAULT})
def test_accumulation_is_the_large_batch(name):
    model, plain = bag()
    adapter, base = lj.split(with_random_factors(lorafied(plain, [lora("lm_head")])))
    parts = [batch(seed) for seed in range(2)]
    optimizer = optax.sgd(1.0)
    rate, loss = optax.constant_schedule(1.0), token_loss(name)
    step = make_step(lj.adapt(model.apply), optimizer, rate, dropout=False, loss=loss)
    state = init_state(adapter, optimizer, jax.random.key(0))
    found = [
        jax.jit(step)(state, base, data)
        for data in (
            {key: np.stack([part[key] for part in parts]) for key in parts[0]},
            {key: np.concatenate([part[key] for part in parts])[None] for key in parts[0]},
        )
    ]
    assert_close(*([new.adapter, metrics] for new, metrics in found), 1e-5)


@pytest.mark.parametrize("name", TOKEN_LOSSES)
def test_equal_losses_are_one_and_held_out_data_have_the_cross_entropy(name):
    loss = token_loss(name, chunk=3, parts=2)
    assert loss is token_loss(name, chunk=3, parts=2) is not token_loss(name)
    assert loss.held_out is token_loss(chunk=3, parts=2)
