"""Batches of texts by length: what they hold, and that padding changes no result."""

import jax
import numpy as np
import pytest

from lora_jax import training
from lora_jax.training.data import labelled
from lora_jax.training.data.labelled import Labelled
from lora_jax.training.data.order import Order
from lora_jax.training.losses import classification_loss
from tests.models import tiny_encoders

LENGTHS = [5, 20, 11]  # in batches of 8, 24 and 16 tokens
N = 200  # of each: enough for a length of their own


def drawn(sizes, pad=4, seq=24, seed=0):
    """Texts of random tokens, padded on the right."""
    rng = np.random.default_rng(seed)
    mask = (np.arange(seq) < np.reshape(sizes, (-1, 1))).astype(np.int32)
    return Labelled(
        ids=np.where(mask, rng.integers(8, 61, mask.shape), pad).astype(np.int32),
        attention_mask=mask,
        token_type_ids=(mask * rng.integers(0, 2, mask.shape)).astype(np.int32),
        labels=rng.integers(0, 3, len(mask)).astype(np.int32),
        weights=rng.integers(1, 4, len(mask)).astype(np.int32),
    )


def test_a_batch_is_cut_to_what_its_texts_need():
    texts = drawn(LENGTHS * N)
    assert texts.lengths == (8, 16, 24)
    assert texts.filled == pytest.approx(sum(LENGTHS) / (8 + 16 + 24))
    for rows, length in (([0, 3], 8), ([3, 5], 16), ([[0, 1], [2, 5]], 24)):
        whole = {name: array[np.array(rows)] for name, array in texts.by_name().items()}
        batch = texts.take(np.array(rows))
        assert batch["ids"].shape == (*np.shape(rows), length)
        for name, array in batch.items():
            of_tokens = array.ndim > np.ndim(rows)
            expected = whole[name][..., :length] if of_tokens else whole[name]
            np.testing.assert_array_equal(array, expected)
        assert batch["attention_mask"].sum() == whole["attention_mask"].sum()
    many = drawn([5, 13, 20, 28, 37] * N, seq=40)
    assert len(many.lengths) == 4 and many.lengths[-1] == 40, "a step is compiled for each"
    few = drawn(LENGTHS * 9)
    assert few.lengths == (24,), "too few texts to compile a step for each length"
    to_the_left = Labelled(
        **{name: x[:, ::-1] if x.ndim > 1 else x for name, x in texts.by_name().items()}
    )
    assert to_the_left.lengths == (24,), "tokens at the end are no padding"


def test_steps_have_texts_of_one_length():
    texts = drawn(LENGTHS * N)
    order = Order.of(texts, 7, batch_size=8)
    shapes = [texts.take(order.rows(step))["ids"].shape[-1] for step in range(75)]
    assert shapes[0] == 24, "what does not fit fails at once"
    assert sorted(set(shapes)) == [8, 16, 24] and shapes != sorted(shapes, reverse=True)
    assert sum(shapes) < 1.05 * 25 * (8 + 16 + 24)


def test_other_lengths_are_other_data(monkeypatch):
    before, alike = drawn(LENGTHS * N).digest(), drawn([5] * N).digest()
    assert drawn(LENGTHS * N).digest() == before
    monkeypatch.setattr(labelled, "_MOST_LENGTHS", 2)
    assert drawn(LENGTHS * N).digest() != before, "they change which texts share a batch"
    assert drawn([5] * N).digest() == alike


@pytest.mark.slow
def test_probabilities_and_loss_are_those_of_texts_alone():
    model, params = tiny_encoders.model("roberta with other options", "classification")
    lengths = [5, 20]
    texts = drawn(lengths * N)
    assert texts.lengths == (8, 24)
    found = training.predict(model, params, texts, 64)

    @jax.jit
    def alone(ids, token_type_ids):
        return jax.nn.softmax(model.apply({"params": params}, ids, token_type_ids=token_type_ids))

    for row in (0, 1, 201, 398):
        n = lengths[row % 2]
        expected = alone(texts.ids[[row], :n], texts.token_type_ids[[row], :n])
        np.testing.assert_allclose(found[row], expected[0], atol=2e-6)
    loss = jax.jit(lambda batch: classification_loss(model.apply, params, batch))
    parts = [loss(part) for part in texts.parts(64)]
    by_hand = -np.log(found[np.arange(len(texts)), texts.labels]) * texts.weights
    assert float(sum(part.total for part in parts)) == pytest.approx(by_hand.sum(), rel=1e-5)
    assert float(sum(part.count for part in parts)) == np.count_nonzero(texts.weights)
