"""Packing, and batches by length: their fill, order, and number of compiled shapes."""

import time

import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lj
from lora_jax import training
from lora_jax.training.data import sequences as packing
from lora_jax.training.data.batches import pack
from lora_jax.training.data.order import Order
from lora_jax.training.data.sequences import TokenSequence, few_lengths, first_fit
from tests.support import array

RNG = np.random.default_rng(5)


def drawn(n, room=512):
    """Lengths as chats have them: many short ones, few long ones."""
    return np.clip(RNG.lognormal(4.2, 0.7, n), 2, room).astype(int)


def sequences(lengths):
    """Sequences of random tokens; the loss counts their second half."""
    ids = [RNG.integers(1, 50, n).astype(np.int32) for n in lengths]
    return [
        TokenSequence(x, np.arange(len(x)) >= len(x) // 2, i) for i, x in enumerate(ids, start=1)
    ]


def first_fit_by_looking_at_every_row(lengths, room):
    rows, free = [], []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        row = next((i for i, left in enumerate(free) if left >= lengths[index]), len(rows))
        if row == len(rows):
            rows.append([])
            free.append(room)
        rows[row].append(index)
        free[row] -= lengths[index]
    return rows


@pytest.mark.parametrize("n", [1, 2, 3, 64, 700])
def test_the_tree_finds_the_row_that_a_search_finds(n):
    lengths = drawn(n).tolist()
    assert first_fit(lengths, 512) == first_fit_by_looking_at_every_row(lengths, 512)


def test_many_rows_are_packed_in_a_moment():
    lengths = drawn(40_000).tolist()
    began = time.process_time()
    rows = first_fit(lengths, 512)
    assert time.process_time() - began < 5  # half a minute, where every row is looked at
    assert sum(lengths) / (512 * len(rows)) > 0.99
    assert sorted(index for row in rows for index in row) == list(range(len(lengths)))


def test_few_lengths_hold_all_rows_and_leave_little_padding():
    lengths = -(-drawn(20_000) // 8) * 8
    found = few_lengths(lengths)
    assert len(found) <= packing.MOST_LENGTHS and found[-1] == lengths.max()
    padded = np.asarray(found)[np.searchsorted(found, lengths)]
    assert lengths.sum() / padded.sum() > 0.8 > 0.2 > lengths.mean() / lengths.max()
    best = min(  # no other two lengths leave less
        (first * (lengths <= first) + found[-1] * (lengths > first)).sum()
        for first in range(8, 512, 8)
    )
    one, two = few_lengths(lengths, 2)
    assert (one * (lengths <= one) + two * (lengths > one)).sum() == best
    assert few_lengths(lengths[:100]) == (lengths[:100].max(),)  # too few rows


def test_a_step_has_rows_of_one_length():
    packs = pack(sequences(drawn(2_000, 256)), 256, packing=False)
    order = Order.of(packs, 3, batch_size=4, accumulate=2)
    steps = [order.rows(step) for step in range(600)]  # two epochs and a bit
    epochs = np.concatenate(steps).ravel()[:4_000].reshape(2, -1)
    assert [sorted(epoch) for epoch in epochs.tolist()] == [list(range(2_000))] * 2
    assert (epochs[0] != epochs[1]).any()
    mixed = [len({*packs.groups[rows.ravel()].tolist()}) > 1 for rows in steps[:500]]
    n = len(packs.lengths)
    assert n > 2 and sum(mixed) < 2 * n
    assert packs.groups[steps[0]].max() == n - 1  # what does not fit fails at once
    shapes = {packs.take(rows)["ids"].shape for rows in steps}
    assert shapes == {(4 // 2, 4, length) for length in packs.lengths}
    assert packs.filled > 0.8
    # Known from seed and step alone, whatever came before.
    again = Order.of(packs, 3, batch_size=4, accumulate=2)
    for step in (431, 0, 250, 599):
        np.testing.assert_array_equal(again.rows(step), steps[step])
    assert order.cursor(600) == {"epoch": 2, "row": 800}
    whole = Order.of(packs, 3, batch_size=8)
    np.testing.assert_array_equal(whole.rows(77).ravel(), steps[77].ravel())


def test_padding_changes_nothing_in_a_batch():
    packs = pack(sequences([5, 40, 23] * 200), 64, packing=False)
    assert packs.lengths == (8, 24, 40)
    rows = np.array([0, 3, 6])
    short, whole = packs.take(rows), {k: v[rows] for k, v in packs.by_name().items()}
    assert short["ids"].shape == (3, 8) and whole["ids"].shape == (3, 40)
    for name, values in short.items():
        np.testing.assert_array_equal(values, whole[name][:, : values.shape[1]])
        assert not whole[name][:, values.shape[1] :].any()
    parts = [part for part in packs.parts(7)]
    assert {part["ids"].shape for part in parts} == {(7, 8), (7, 24), (7, 40)}
    assert sum(part["weights"].sum() for part in parts) == packs.by_name()["weights"].sum()


@pytest.mark.slow
def test_a_run_compiles_each_length_once_and_resumes_bitwise(tmp_path, monkeypatch):
    monkeypatch.setattr(packing, "_ROWS_A_LENGTH", 8)
    packs = pack(sequences([5, 23, 40] * 8), 64, packing=False)
    shapes = []

    def bigrams(forward, params, batch, dropout_key):
        shapes.append(batch["ids"].shape)
        logits = forward(params, jnp.take_along_axis(batch["ids"], batch["predict_at"], 1))
        right = jnp.take_along_axis(logits, batch["targets"][..., None], -1)[..., 0]
        weights = batch["weights"].astype(jnp.float32)
        return training.Sums(-(right * weights).sum(), weights.sum(), {})

    def model(params, ids):
        hot = (ids[..., None] == jnp.arange(50)).astype(jnp.float32)
        return jnp.tanh(hot @ params["kernel"])

    def trained(steps, **options):
        params = {"kernel": array(np.random.default_rng(0).normal(size=(50, 50)) / 7, "f4")}
        rules = [lj.LoraRule(targets=["kernel"], rank=2)]
        how = {"lr": 1e-2, "loss": bigrams, "batch_size": 2, "schedule": "constant", "log": None}
        return training.finetune(model, params, packs, rules, steps=steps, **how, **options)[0]

    whole = trained(17)
    assert {shape for shape in shapes} == {(2, 8), (2, 24), (2, 40)}
    assert len(shapes) == 3 and shapes[0] == (2, 40)
    trained(7, folder=tmp_path)
    resumed = trained(17, folder=tmp_path, resume=True)
    for name in ("a", "b"):
        np.testing.assert_array_equal(
            *(lj.split(tree)[0]["kernel"][name] for tree in (whole, resumed))
        )
