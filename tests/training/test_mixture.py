"""Several data sets in proportions: what an epoch draws, and in which order."""

import numpy as np
import pytest

from lora_jax.training.data.batches import pack, pack_mixture
from lora_jax.training.data.mixture import Shares
from lora_jax.training.data.order import Order
from lora_jax.training.data.sequences import Sequences, TokenSequence
from lora_jax.training.errors import TrainingError


def sequences(lengths):
    """Makes a row of each length; its tokens are its number."""
    return [
        TokenSequence(np.full(n, row, np.int32), np.arange(n) > 0, row)
        for row, n in enumerate(lengths, start=1)
    ]


def test_each_data_set_is_gone_through_in_passes_in_its_proportion():
    mixture = Shares(ends=(7, 30), drawn=(21, 9))
    order = Order(seed=3, n_rows=30, batch_size=5, mixture=mixture)
    epochs = np.array([order.rows(step).ravel() for step in range(5 * 6)]).reshape(5, 30)
    assert (epochs < 7).sum(axis=1).tolist() == [21] * 5
    for n in range(1, 6):
        often = np.bincount(epochs[:n].ravel(), minlength=30)
        assert often[:7].tolist() == [3 * n] * 7
        assert set(often[7:]) <= {9 * n // 23, 9 * n // 23 + 1} and often[7:].sum() == 9 * n
    assert not np.array_equal(epochs[0], epochs[1])
    again = Order(seed=3, n_rows=30, batch_size=5, mixture=mixture)
    assert again.rows(29).tolist() == order.rows(29).tolist()  # found at once, as on a resume
    other = Order(seed=4, n_rows=30, batch_size=5, mixture=mixture)
    assert other.rows(0).tolist() != order.rows(0).tolist()


@pytest.mark.parametrize("packing", [False, True])
def test_weights_are_about_rows_also_where_they_are_packed(packing):
    rng = np.random.default_rng(0)
    parts = {"a": sequences(rng.integers(3, 9, 300)), "b": sequences(rng.integers(20, 33, 100))}
    packs = pack_mixture(parts, [3, 1], 32, packing=packing)
    order = Order.of(packs, 1, batch_size=4)
    units = np.concatenate([order.rows(step).ravel() for step in range(order.n_rows)])
    slices = [slice(packs.firsts[u], packs.firsts[u + 1]) for u in units]
    rows = np.concatenate([packs.table.origins[here] for here in slices])
    assert np.bincount(rows) / len(rows) == pytest.approx([0.75, 0.25], abs=0.01)
    assert 300 <= len(rows) / 4 <= 500  # of an epoch: as many rows as there are
    of_units = np.split(packs.table.origins, packs.firsts[1:-1])
    assert {len({*origins}) for origins in of_units} == {1}  # a sequence has rows of one data set
    last = len(packs) - 1
    assert packs.name(last).split(", ")[0].endswith(" of b")
    even = pack_mixture(parts, [1, 1], 32, packing=packing)
    unweighted = pack_mixture(parts, None, 32, packing=packing)
    assert len({made.digest() for made in (packs, even, unweighted)}) == 3


@pytest.mark.parametrize("packing", [False, True])
def test_without_weights_an_epoch_has_each_row_once(packing):
    parts = [sequences([3, 5, 9]), sequences([4, 4])]
    packs = pack_mixture({"a": parts[0], "b": parts[1]}, None, 16, packing=packing)
    joined = pack([*parts[0], *parts[1]], 16, packing=packing)
    assert packs.digest() == joined.digest() and packs.mixture is None
    assert {packs.name(row) for row in range(len(packs))} != {joined.name(0)}


def test_a_share_of_no_row_is_refused():
    with pytest.raises(
        TrainingError, match=r"^b: its weight 0.001 of 9.001 is less than one row in"
    ):
        pack_mixture({"a": sequences([3] * 50), "b": sequences([3])}, [9, 0.001], 8, packing=False)


def test_a_table_of_sequences_is_a_list_of_them():
    made = sequences([2, 5, 1, 3])
    table = Sequences.from_list(made)
    assert [(t.ids.tolist(), t.counts.tolist(), t.row) for t in table] == [
        (t.ids.tolist(), t.counts.tolist(), t.row) for t in made
    ]
    assert table[-1].row == 4 and [t.row for t in table[1:3]] == [2, 3]
    with pytest.raises(IndexError):
        table[4]
    assert table.predicted.tolist() == [1, 4, 0, 2]
    assert [t.ids.tolist() for t in table.cut(2)] == [[1, 1], [2, 2], [3], [4, 4]]
    rest, taken = table.split(np.array([2, 4]))
    assert rest.rows.tolist() == [1, 3] and [t.ids.tolist() for t in taken] == [[2] * 5, [4] * 3]
    both = Sequences.join([table, taken])
    assert both.origins.tolist() == [0] * 4 + [1] * 2 and both[4].ids.tolist() == [2] * 5
