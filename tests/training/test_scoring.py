"""The scorer against NumPy's log-probabilities, in whatever pieces it takes the tokens."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lj
from lora_jax.models import sample
from lora_jax.training import make_scorer
from lora_jax.training.layout import Layout
from lora_jax.training.losses import ONLINE, rollout_loss, token_values
from tests.models import tiny
from tests.support import assert_close, lorafied, with_random_factors
from tests.training.test_losses import BATCH, SEQ, arrays_of_size, bag, batch, lora
from train.processes.mesh import make_mesh

TEMPERATURE = 0.7


@pytest.fixture(scope="module")
def adapted():
    """A model, adapted parameters, and a batch whose rows have different numbers of predictions."""
    model, plain = bag()
    data, places = batch(), np.zeros((BATCH, 7), np.int32)
    counts = np.array([7, 2, 5])
    for row, n in enumerate(counts):
        places[row, :n] = np.sort(np.random.default_rng(row).permutation(SEQ - 1)[:n])
    weights = (np.arange(7) < counts[:, None]).astype(np.int32)
    data |= {"predict_at": places, "targets": data["targets"][:, :7], "weights": weights}
    return model, with_random_factors(lorafied(plain, [lora("lm_head", dropout=0.5)])), data


def judged(model, params, data, temperature=TEMPERATURE):
    """NumPy's log-probabilities and entropies, in double precision, of the merged model."""
    logits = model.apply({"params": lj.merge(params)}, data["ids"], logits_at=data["predict_at"])
    logits = np.asarray(logits, np.float64) / temperature
    probs = np.exp(logits - logits.max(axis=-1, keepdims=True))
    probs /= probs.sum(axis=-1, keepdims=True)
    mine = np.take_along_axis(probs, data["targets"][..., None], axis=-1)[..., 0]
    return np.log(mine), -(probs * np.log(probs)).sum(axis=-1)


@pytest.mark.parametrize(("chunk", "parts"), [(0, 1), (1, 1), (9, 1), (0, 2), (9, 3)])
def test_scores_are_numpys(adapted, chunk, parts):
    model, params, data = adapted
    scorer = make_scorer(lj.adapt(model.apply), temperature=TEMPERATURE, chunk=chunk, parts=parts)
    counted = data["weights"] != 0
    found = jax.tree.map(lambda x: np.where(counted, x, 0), tuple(scorer(params, data)))
    want, cold = (
        tuple(np.where(counted, x, 0) for x in judged(model, params, data, temperature))
        for temperature in (TEMPERATURE, 1.0)
    )
    assert_close(found, want, 1e-5)
    assert all(np.abs(a - b).max() > 0.1 for a, b in zip(found, cold, strict=True))


@pytest.mark.parametrize(
    ("chunk", "parts"),
    [
        (0, 1),
        pytest.param(9, 1, marks=pytest.mark.slow),
        pytest.param(9, 3, marks=pytest.mark.slow),
    ],
)
def test_a_loss_of_rollouts_logs_the_entropy_of_the_policy_that_it_updates(adapted, chunk, parts):
    """It costs no further product, and changes no gradient."""
    model, params, data = adapted
    data = data | {"old": np.full(data["weights"].shape, -2.0, np.float32)}
    data["advantages"] = np.array([1.0, -2.0, 0.5], np.float32)
    counted, factors = data["weights"] != 0, lj.split(params)

    def gradient(options, entropy):
        loss = rollout_loss(
            options, temperature=TEMPERATURE, entropy=entropy, chunk=chunk, parts=parts
        )

        def total(adapter):
            sums = loss(lj.adapt(model.apply), lj.join(adapter, factors[1]), data)
            return sums.total, sums

        compute = jax.value_and_grad(total, has_aux=True)
        traced = jax.jit(compute).trace(factors[0])
        products = str(traced.jaxpr).count("dot_general[")
        (_, sums), grads = traced.lower().compile()(factors[0])
        assert loss.label == "loss per sequence", "by which a plot names its axis"
        return sums, grads, products

    want = judged(model, params, data)[1][counted].mean()
    for options in (ONLINE["grpo"], None):
        sums, grads, products = gradient(options, entropy=True)
        plain, expected, n = gradient(options, entropy=False)
        assert_close(sums.logs["entropy"] / sums.count, want, 1e-5)
        assert_close(grads, expected, 1e-6)
        assert "entropy" not in plain.logs and products == n


def test_padding_is_finite_and_needs_no_weights(adapted):
    model, params, data = adapted
    forward, no_weights = lj.adapt(model.apply), {k: v for k, v in data.items() if k != "weights"}
    assert_close(
        tuple(make_scorer(forward)(params, no_weights)), judged(model, params, data, 1.0), 1e-5
    )
    split = make_scorer(forward, parts=2)(params, data)
    assert all(np.isfinite(x).all() and x.shape == data["weights"].shape for x in split)


@pytest.mark.slow
@pytest.mark.parametrize("sizes", ["fsdp=2,tensor=2", "data=2,sequence=2"])
def test_a_mesh_scores_as_one_device_does(sizes):
    model, plain = tiny.decoder("llama3")
    params = with_random_factors(lorafied(plain, [lora("q_proj", "down_proj")]))
    data = {name: np.tile(x[:2], (2, 1)) for name, x in batch().items()}
    places = np.arange(3, 3 + data["targets"].shape[1], dtype=np.int32)
    data = {k: v[:, :16] if v.shape[1] == SEQ else v for k, v in data.items()}
    data["predict_at"] = np.broadcast_to(places, data["targets"].shape)
    want = make_scorer(lj.adapt(model.apply))(params, data)

    layout = Layout.of(make_mesh(sizes, 4), model.config)
    scorer = make_scorer(
        lj.adapt(layout.constrained(model).apply),
        layout=layout,
        chunk=8,
        parts=layout.sequence_parts,
    )
    found = scorer(layout.placed(params), layout.batch(data, parts=False))
    assert all(x.sharding.is_fully_replicated for x in found)
    counted = data["weights"] != 0
    assert counted.sum() > 10
    of_counted = [tuple(np.asarray(x)[counted] for x in scores) for scores in (found, want)]
    assert_close(*of_counted, 1e-5)


@pytest.mark.slow
def test_no_chunk_holds_all_logits():
    """Nor does the gradient of values that stay apart."""
    model, plain = bag()
    data = batch()
    m, vocab = data["targets"].shape[1], plain["lm_head"]["bias"].size

    def each(logits, targets):
        return jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], -1)[..., 0]

    def loss(params, chunk):
        return jnp.sum(token_values(each, model.apply, params, data, chunk=chunk) ** 2)

    def found(chunk):
        compiled = jax.jit(jax.grad(loss), static_argnums=1).lower(plain, chunk).compile()
        return bool(arrays_of_size(compiled.as_text(), BATCH * m * vocab)), compiled(plain)

    (holds, whole), (lean, chunked) = found(0), found(6)
    assert holds and not lean
    assert_close(chunked, whole, 1e-5)


def test_the_temperature_divides(adapted):
    with pytest.raises(ValueError, match="temperature is 0, but it divides the logits"):
        make_scorer(adapted[0].apply, temperature=0)


@pytest.mark.slow
def test_the_scorer_agrees_with_the_sampler():
    """On answers behind prompts of two lengths, padded on the left there and on the right here."""
    model, plain = tiny.decoder("llama3")
    params = with_random_factors(lorafied(plain, [lora("q_proj", "down_proj")]))
    apply, prompts, lengths, new = lj.adapt(model.apply), tiny.tokens(3, 2, 5), [5, 3], 6
    mask = (np.arange(5) >= 5 - np.array(lengths)[:, None]).astype(np.int32)
    options = {"n": 3, "max_new_tokens": new, "temperature": TEMPERATURE, "apply": apply}
    options |= {"key": jax.random.key(5), "eos_token_id": [29, 35, 47]}
    drawn = sample(model, params, prompts, mask, **options)

    ids, rows = np.zeros((6, 11), np.int32), np.repeat(lengths, 3)
    for row, n in enumerate(rows):
        ids[row, : n + new] = np.concatenate([prompts[row // 3, 5 - n :], drawn.tokens[row]])
    places = np.broadcast_to(np.arange(11, dtype=np.int32), ids.shape)
    counts = np.arange(new) < np.asarray(drawn.lengths)[:, None]
    data = {"ids": ids, "positions": places, "segment_ids": np.ones_like(ids)}
    data["predict_at"] = (rows[:, None] - 1 + np.arange(new)).astype(np.int32)
    data |= {"targets": np.asarray(drawn.tokens), "weights": counts.astype(np.int32)}
    scored = make_scorer(apply, temperature=TEMPERATURE, chunk=12)(params, data)
    found, cold = (
        np.where(counts, logps, 0)
        for logps in (scored.logps, make_scorer(apply)(params, data).logps)
    )
    assert counts.sum() > 12 and not counts.all()
    assert_close(found, drawn.logps, 1e-5)
    assert np.abs(cold - drawn.logps).max() > 0.1
