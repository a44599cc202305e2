"""Packing, and the order of the data as a function of the seed and the step."""

import numpy as np
import pytest

from lora_jax.training.data.batches import pack, round_up
from lora_jax.training.data.mixture import draw_row_order
from lora_jax.training.data.order import Order
from lora_jax.training.data.sequences import TokenSequence


def sequence(ids, counts):
    return TokenSequence(np.array(ids, np.int32), np.array(counts, bool))


SEQUENCES = [
    sequence([1, 2, 3], [0, 1, 1]),
    sequence([4, 5, 6, 7, 8], [0, 0, 1, 0, 1]),
    sequence([9, 10], [0, 1]),
]


def test_rows_without_packing():
    packs = pack(SEQUENCES, 7, packing=False)
    assert packs.ids.tolist() == [
        [1, 2, 3, 0, 0, 0, 0],
        [4, 5, 6, 7, 8, 0, 0],
        [9, 10, 0, 0, 0, 0, 0],
    ]
    assert packs.segment_ids.tolist()[1] == [1, 1, 1, 1, 1, 0, 0]
    assert packs.positions.tolist()[1] == [0, 1, 2, 3, 4, 0, 0]
    assert packs.predict_at[1, :2].tolist() == [1, 3]  # tokens 6, 8
    assert packs.targets[1, :2].tolist() == [6, 8]
    assert packs.weights.sum(axis=1).tolist() == [2, 2, 1]


def test_packing_puts_sequences_side_by_side():
    packs = pack(SEQUENCES, 7, packing=True)
    assert packs.ids.tolist() == [[4, 5, 6, 7, 8, 9, 10], [1, 2, 3, 0, 0, 0, 0]]
    assert packs.segment_ids.tolist()[0] == [1, 1, 1, 1, 1, 2, 2]
    assert packs.positions.tolist()[0] == [0, 1, 2, 3, 4, 0, 1]
    assert packs.predict_at[0, :3].tolist() == [1, 3, 5]
    assert packs.targets[0, :3].tolist() == [6, 8, 10]
    assert packs.weights[0].sum() == 3


def test_the_first_token_of_a_sequence_is_never_predicted():
    packs = pack([sequence([1, 2], [1, 1]), sequence([3, 4], [1, 1])], 4, packing=True)
    assert packs.targets[packs.weights > 0].tolist() == [2, 4]


def test_rows_are_as_long_as_needed_and_no_longer_than_allowed():
    long = sequence(range(17), [0] + [1] * 16)
    assert pack([long], 64, packing=False).ids.shape == (1, 24)
    assert pack([long], 20, packing=False).ids.shape == (1, 20)
    assert [round_up(n, 4096) for n in (1017, 1024, 1025)] == [1024, 1024, 1152]


def test_an_epoch_has_every_row_once_and_the_next_another_order():
    batches = Order(seed=3, n_rows=10, batch_size=3)
    rows = np.concatenate([batches.rows(step).ravel() for step in range(10)])  # three epochs
    epochs = rows.reshape(3, 10)
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs.tolist())
    assert len({tuple(epoch) for epoch in epochs.tolist()}) == 3
    assert tuple(draw_row_order(3, 0, 10)) != tuple(draw_row_order(4, 0, 10))


def test_the_rows_of_a_step_depend_on_seed_and_step_only():
    one, other = (Order(seed=1, n_rows=7, batch_size=2, accumulate=2) for _ in range(2))
    ahead = [one.rows(step) for step in range(5)]
    for step in reversed(range(5)):
        np.testing.assert_array_equal(other.rows(step), ahead[step])
    assert ahead[0].shape == (2, 2)


def test_accumulation_sees_the_rows_of_the_large_batch():
    large, small = Order(0, 50, batch_size=8), Order(0, 50, batch_size=2, accumulate=4)
    for step in range(9):
        np.testing.assert_array_equal(large.rows(step).ravel(), small.rows(step).ravel())
        assert large.cursor(step) == small.cursor(step)
    assert large.cursor(7) == {"epoch": 1, "row": 6}


@pytest.mark.parametrize(("epochs", "steps"), [(1, 3), (2, 5), (0.1, 1), (1.2, 3), (3, 8)])
def test_the_steps_of_an_epoch(epochs, steps):
    assert Order(0, n_rows=10, batch_size=2, accumulate=2).steps(epochs) == steps


def test_parts_have_every_row_once_and_one_shape():
    packs = pack(SEQUENCES, 8, packing=False)
    parts = list(packs.parts(2))
    assert {part["ids"].shape for part in parts} == {(2, 8)}
    counted = np.concatenate([part["targets"][part["weights"] > 0] for part in parts])
    assert sorted(counted) == sorted(packs.targets[packs.weights > 0])


def test_the_digest_tells_data_apart():
    digest = pack(SEQUENCES, 8, packing=False).digest()
    assert digest == pack(SEQUENCES, 8, packing=False).digest()
    changed = [*SEQUENCES[:2], sequence([9, 11], [0, 1])]
    assert digest != pack(changed, 8, packing=False).digest()
    assert digest != pack(SEQUENCES, 8, packing=True).digest()
