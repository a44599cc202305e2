"""Data that are read while training: a chunk at a time, from any place, and always the same."""

import threading

import numpy as np
import pytest

from lora_jax.training.data.batches import pack
from lora_jax.training.data.sequences import Sequences, TokenSequence
from lora_jax.training.data.stream import BlockSource, Chunks, StepSize, Stream
from lora_jax.training.errors import TrainingError

SEQ = 32
RNG = np.random.default_rng(5)
# Blocks of rows; a row's first token is its number. Some blocks are empty, some hold one row.
COUNTS = [7, 0, 12, 1, 9, 4, 0, 15, 3, 8, 11, 6]
STARTS = np.cumsum([0, *COUNTS])
LENGTHS = RNG.integers(3, SEQ + 1, STARTS[-1])


def rows_of(block):
    return [
        TokenSequence(np.full(LENGTHS[row], row, np.int32), np.arange(LENGTHS[row]) > 1, row)
        for row in range(STARTS[block], STARTS[block + 1])
    ]


def stream(packing, *, seen=None, counts=COUNTS, room=20, batch_size=3, accumulate=2, steps=60):
    def load(blocks):
        if seen is not None:
            seen.append(blocks.tolist())
        found = [tokens for block in blocks.tolist() for tokens in rows_of(block)]
        return Sequences.from_list(found)

    longest = TokenSequence(np.ones(SEQ, np.int32), np.ones(SEQ, bool))
    like = pack([*rows_of(0), longest], SEQ, packing=packing)
    chunks = Chunks(seed=2, sizes=np.array(counts), room=room)
    source = BlockSource(load, chunks, "the data", lambda origin, number: f"{origin}:{number}")
    return Stream(source, like, StepSize(batch_size, accumulate, steps), packing=packing)


def numbers(batch):
    """The rows in a batch, each once."""
    ids, segments = (np.concatenate(batch[name]) for name in ("ids", "segment_ids"))
    return [
        int(line[of][0])
        for line, segment in zip(ids, segments, strict=True)
        for of in (segment == n for n in range(1, segment.max() + 1))
    ]


@pytest.mark.parametrize("packing", [False, True])
def test_an_epoch_has_each_row_once_in_another_order(packing):
    made = stream(packing)
    seen = [n for step in range(60) for n in numbers(made.batch(step))]
    n = len(LENGTHS)
    first, second = seen[:n], seen[n : 2 * n]
    if not packing:
        assert sorted(first) == sorted(second) == list(range(n)) and first != second
    assert sorted(seen[:n]) == list(range(n))
    assert first != sorted(first)


@pytest.mark.parametrize("packing", [False, True])
def test_a_stream_goes_on_from_any_step_as_if_it_had_never_stopped(packing):
    whole = stream(packing)
    batches, cursors = [], []
    for step in range(30):
        cursors.append(whole.cursor(step))
        batches.append(whole.batch(step))
    assert len({cursor["chunk"] for cursor in cursors}) > 2 and cursors[-1]["epoch"] > 0
    for step in range(0, 30, 5):
        seen = []
        again = stream(packing, seen=seen)
        assert again.seek(cursors[step], step)
        again.first()
        for later in range(step, min(step + 3, 30)):
            batch = again.batch(later)
            assert batch.keys() == batches[later].keys()
            for name, array in batch.items():
                np.testing.assert_array_equal(array, batches[later][name])
            assert again.named(later) == whole.named(later)
        order = Chunks(2, np.array(COUNTS), 20).blocks_of_epoch(cursors[step]["epoch"])
        assert seen[0] == order[cursors[step]["chunk"]].tolist()  # nothing before it is read
    assert not stream(packing).seek({"epoch": 0, "row": 3}, 1)  # of data in memory
    assert not stream(packing).seek({"epoch": 0, "chunk": 99, "first": 0}, 1)
    assert not stream(packing).seek({"epoch": 0, "chunk": 0, "first": 999}, 1)


def test_rows_of_one_length_share_a_step(monkeypatch):
    monkeypatch.setattr("lora_jax.training.data.sequences._ROWS_A_LENGTH", 1)
    made = stream(False, room=80)
    lengths = [made.batch(step)["ids"].shape[-1] for step in range(12)]
    assert len({*lengths}) > 1 and set(lengths) <= {8, 16, 24, 32}
    assert made.first()["ids"].shape == (2, 3, 32) and not made.first()["weights"].any()


def test_little_is_in_memory_and_nothing_after_the_last_step_is_read():
    seen = []
    made = stream(False, seen=seen, steps=4)
    held = []
    for step in range(4):
        made.batch(step)
        held.append(sum(len(chunk.rows) for chunk in made._loaded_chunks))
    for thread in threading.enumerate():
        if thread.name == "reading ahead":
            thread.join()
    read = sum(sum(COUNTS[block] for block in blocks) for blocks in seen)
    assert max(held) <= 2 * (20 + max(COUNTS)) and 24 <= read <= 24 + 20 + max(COUNTS)


def test_a_batch_with_more_answers_than_the_sample_had_is_padded_to_its_length():
    def load(blocks):
        return Sequences.from_list(
            [TokenSequence(np.arange(16, dtype=np.int32), np.ones(16, bool), 1)] * 4
        )

    like = pack(
        [TokenSequence(np.arange(16, dtype=np.int32), np.arange(16) > 12)], 16, packing=False
    )
    chunks = Chunks(0, np.array([1, 1]), 1)
    source = BlockSource(load, chunks, "", lambda *_: "")
    made = Stream(source, like, StepSize(2, 1, 1), packing=False)
    assert made.first()["targets"].shape == (1, 2, 8)
    batch = made.batch(0)
    assert batch["targets"].shape == (1, 2, 16) and batch["weights"].sum() == 30


@pytest.mark.parametrize("ahead", [False, True])
def test_errors_of_reading_reach_the_run(ahead):
    def load(blocks):
        raise TrainingError("line 3 is bad")

    made = stream(False)
    made._source = made._source._replace(load=load)
    if not ahead:
        made._reader = None
    made.first()
    with pytest.raises(TrainingError, match="line 3 is bad"):
        made.batch(0)
    made = stream(False)
    made._source = made._source._replace(load=lambda blocks: Sequences.from_list([]))
    with pytest.raises(TrainingError, match="no row with a token that the loss counts"):
        made.batch(0)
