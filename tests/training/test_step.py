"""The step: its loss, accumulation, packing, dropout, decay and schedule."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lora_jax as lj
from lora_jax.training.data.batches import pack
from lora_jax.training.data.chats import tokenize
from lora_jax.training.losses import summed_loss
from lora_jax.training.optimizer import adamw, decays
from lora_jax.training.optimizers.schedules import warmed_up
from lora_jax.training.step import State, init_state, make_step
from tests.support import lorafied, with_random_factors
from tests.train.tiny import CONFIG, decoder, tokenizer
from tests.training.test_losses import bag

ROWS = [{"prompt": "p" * n, "completion": "abc" * n} for n in range(1, 9)]


@pytest.fixture(scope="module")
def model():
    return bag(vocab=CONFIG["vocab_size"])


@pytest.fixture(scope="module")
def halves(model):
    """An adapter with a random B, and its base."""
    rules = [
        lj.LoraRule(targets=["lm_head"], rank=3, alpha=5, dropout=0.3, train_bias=True),
        lj.TrainRule(targets=["embed_tokens"]),
    ]
    return lj.split(with_random_factors(lorafied(model[1], rules)))


sums_of = jax.jit(summed_loss, static_argnums=0)


def packs(*, packing=False, seq_len=64):
    return pack(tokenize(ROWS, tokenizer(None), "rows"), seq_len, packing=packing)


def step_of(model, **options):
    schedule = warmed_up(0.1, 10, kind="constant", warmup=0)
    optimizer = adamw(schedule, b2=0.99)
    return optimizer, jax.jit(make_step(lj.adapt(model[0].apply), optimizer, schedule, **options))


def test_the_loss_is_the_cross_entropy_of_the_tokens_that_count(model):
    (tokens,) = tokenize(ROWS[3:4], tokenizer(None), "rows")
    module, params = model
    logits = jax.jit(module.apply)({"params": params}, tokens.ids[None])[0]
    logits = np.asarray(logits, np.float64)
    log_probs = logits - np.log(np.sum(np.exp(logits), axis=-1, keepdims=True))
    by_hand = -sum(log_probs[at - 1, tokens.ids[at]] for at in np.flatnonzero(tokens.counts))
    batch = pack([tokens], 32, packing=False).take(np.array([0]))
    assert float(sums_of(module.apply, params, batch).total) == pytest.approx(by_hand, rel=1e-5)


@pytest.mark.slow
def test_packing_changes_no_loss():
    model, plain = decoder()
    forward = lj.adapt(model.apply)
    rules = [lj.LoraRule(targets=["q_proj", "v_proj", "down_proj"], rank=3, alpha=5)]
    params = with_random_factors(lorafied(plain, rules))
    losses = []
    for packing in (False, True):
        rows = packs(packing=packing)
        # As many rows, so that one program does for both: what is repeated does not count.
        batch = rows.take(np.resize(np.arange(len(rows)), len(ROWS)))
        batch["weights"] = batch["weights"] * (np.arange(len(ROWS)) < len(rows))[:, None]
        losses.append(float(sums_of(forward, params, batch).total))
    assert len(packs(packing=True)) < len(ROWS)
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_accumulation_equals_the_large_batch_whatever_the_lengths(model, halves):
    adapter, base = halves
    rows = packs()
    optimizer, step = step_of(model, dropout=False)
    results = []
    for shape in ((1, 8), (4, 2)):
        batch = rows.take(np.arange(8).reshape(shape))
        assert len(set(batch["weights"].sum(axis=(1, 2)).tolist())) == shape[0]  # uneven parts
        state, metrics = step(init_state(adapter, optimizer, jax.random.key(0)), base, batch)
        results.append((metrics, state.opt_state[1][0].mu))  # Adam's first moment: the gradient
        # And a step changes all of the adapter, and counts.
        assert isinstance(state, State) and int(state.step) == 1
        assert float(metrics["lr"]) == pytest.approx(0.1)
        for path, parts in state.adapter.items():
            for name, value in parts.items():
                assert not np.array_equal(value, adapter[path][name])
    (large, gradient), (parts, accumulated) = results
    assert float(large["count"]) == float(parts["count"]) == rows.by_name()["weights"].sum()
    for name in large:
        assert float(large[name]) == pytest.approx(float(parts[name]), rel=1e-5)
    for a, b in zip(jax.tree.leaves(gradient), jax.tree.leaves(accumulated), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)


def test_dropout_depends_on_the_step_and_the_part(model, halves):
    adapter, base = halves
    optimizer, step = step_of(model, dropout=True)
    state = init_state(adapter, optimizer, jax.random.key(0))
    twice = packs().take(np.array([[0, 1], [0, 1]]))

    def loss(number, counts):
        """Returns the parts that count; both ways have the same ones."""
        weights = twice["weights"] * np.array(counts)[:, None, None]
        batch = {**twice, "weights": weights.astype(twice["weights"].dtype)}
        return float(step(state._replace(step=jnp.int32(number)), base, batch)[1]["loss"])

    assert loss(0, (1, 1)) == loss(0, (1, 1)) != loss(1, (1, 1))
    assert loss(0, (1, 0)) != loss(0, (0, 1))


def test_weight_decay_spares_norms_and_biases():
    adapter = {
        "layers/q_proj/kernel": {"a": 0, "b": 0},
        "embed/embedding": {"value": 0},
        "layers/k_proj/kernel": {"value": 0},
        "layers/k_proj/bias": {"value": 0},
        "norm/scale": {"value": 0},
    }
    decaying = {path: set(parts.values()) for path, parts in decays(adapter).items()}
    assert [path for path, value in decaying.items() if value == {False}] == [
        "layers/k_proj/bias",
        "norm/scale",
    ]


@pytest.mark.parametrize(
    ("schedule", "warmup", "expected"),
    [
        ("constant", 0, [8, 8, 8, 8, 8, 8]),
        ("constant", 2, [4, 8, 8, 8, 8, 8]),
        ("linear", 2, [4, 8, 8, 6, 4, 2]),
        ("linear", 1, [8, 8, 6.4, 4.8, 3.2, 1.6]),
        ("cosine", 2, [4, 8, 8, 4 + 4 * 2**-0.5, 4, 4 - 4 * 2**-0.5]),
        ("linear", 99, [1.6, 3.2, 4.8, 6.4, 8, 8]),  # a warmup leaves at least one step
    ],
)
def test_the_learning_rate_over_six_steps(schedule, warmup, expected):
    rate = warmed_up(8.0, 6, kind=schedule, warmup=warmup)
    np.testing.assert_allclose([rate(step) for step in range(6)], expected, rtol=1e-6)


def test_the_gradient_is_clipped_to_a_norm(model, halves):
    adapter, _ = halves
    gradient = jax.tree.map(lambda x: np.ones(x.shape, x.dtype), adapter)
    for clip, expected in ((0.5, 0.5), (0.0, norm(gradient))):
        optimizer = adamw(optax.constant_schedule(1.0), b2=0.99, grad_clip=clip)
        _, state = jax.jit(optimizer.update)(gradient, optimizer.init(adapter), adapter)
        mu = next(s.mu for s in jax.tree.leaves(state, is_leaf=is_adam) if is_adam(s))
        assert norm(mu) / 0.1 == pytest.approx(expected, rel=1e-5)


def norm(tree):
    return np.sqrt(sum(np.sum(np.square(x, dtype=np.float64)) for x in jax.tree.leaves(tree)))


def is_adam(state):
    return isinstance(state, optax.ScaleByAdamState)
