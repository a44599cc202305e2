"""Batches of data larger than memory: read in chunks, from any position in the data.

The data are cut into blocks that can be read on their own. An epoch draws their order; a chunk is
as many of them as fit into a buffer, and its rows are shuffled, packed or grouped by length there.
So the rows of a step depend on nothing but the seed and where its chunk begins, and a resumed run
reads one chunk again.

A row is a row of a batch, which holds several sequences where they are packed. The position of a
chunk says which rows it has among those of all chunks; a loaded chunk is one in memory.
"""

import dataclasses
import functools
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np

from lora_jax.training.data.batches import HostBatch, Packs, pack
from lora_jax.training.data.mixture import draw_row_order
from lora_jax.training.data.order import list_rows, sort_by_group
from lora_jax.training.data.sequences import Sequences
from lora_jax.training.errors import TrainingError

_CHUNK_STREAM = 3  # the stream of draws within a chunk
_NAMED_STEPS = 512  # steps whose rows can be named


class Position(NamedTuple):
    """The position of a chunk in the data.

    Attributes:
      epoch: its epoch, from 0.
      chunk: its number in that epoch, from 0.
      first: the number of rows of batches in all chunks before it, over all epochs.
    """

    epoch: int
    chunk: int
    first: int


@dataclasses.dataclass(frozen=True)
class Chunks:
    """The division of an epoch's blocks into chunks.

    Attributes:
      seed: seed of the draw.
      sizes: [blocks], in any unit.
      room: the size of a chunk, in that unit; a larger block is a chunk of its own.
    """

    seed: int
    sizes: np.ndarray
    room: int

    def blocks_of_epoch(self, epoch: int) -> list[np.ndarray]:
        """Returns the blocks of each chunk, in random order."""
        blocks = draw_row_order(self.seed, epoch, len(self.sizes))
        sizes = self.sizes[blocks]
        starts = np.cumsum(sizes) - sizes
        chunk_of_block = starts // self.room
        first_blocks = np.flatnonzero(np.diff(chunk_of_block)) + 1  # of all chunks but the first
        return np.split(blocks, first_blocks)


@dataclasses.dataclass(frozen=True)
class _LoadedChunk:
    """A chunk in memory: its packed rows, and the order in which steps take them."""

    position: Position
    packs: Packs
    rows: np.ndarray

    @property
    def start(self) -> int:
        return self.position.first

    @property
    def end(self) -> int:
        return self.start + len(self.rows)


class BlockSource(NamedTuple):
    """Data that can be read block by block.

    Attributes:
      load: reads blocks, [n], as sequences.
      chunks: says which blocks are read together.
      digest: a fingerprint of the data.
      named: returns the name of a row, from its origin and its number.
    """

    load: Callable[[np.ndarray], Sequences]
    chunks: Chunks
    digest: str
    named: Callable[[int, int], str]


class StepSize(NamedTuple):
    """The number of rows in a step.

    Attributes:
      batch_size: rows in memory at once.
      accumulate: batches of a step.
      steps: the number of the last step: chunks after it are not read.
    """

    batch_size: int
    accumulate: int
    steps: int


class Stream:
    """Batches of data that are read during training; see `Batches`.

    Steps have to be asked for one after the other. The next chunk is read in the background.
    """

    n_examples = None

    def __init__(
        self, source: BlockSource, like: Packs, size: StepSize, *, packing: bool, ahead: bool = True
    ) -> None:
        """Starts at the first row of the first epoch.

        Args:
          source: the data.
          like: examples whose lengths batches have: no sequence is longer than their longest.
          size: the rows of a step, and the last step.
          packing: puts several sequences into one row.
          ahead: reads the next chunk in a thread of its own.
        """
        self._source = source
        self._like = like
        self._packing = packing
        self._batch_size = size.batch_size
        self._accumulate = size.accumulate
        # One thread for all chunks: each new one would get a part of the heap of its own.
        self._reader = ThreadPoolExecutor(1, "reading ahead") if ahead else None
        self._last_row = size.steps * self.rows_a_step  # no chunk after it is read
        self._blocks_of_epoch = functools.lru_cache(maxsize=2)(source.chunks.blocks_of_epoch)
        # The origins of the rows of the last steps, with the steps' numbers.
        self._step_origins: deque[tuple[int, list[tuple[int, int]]]] = deque(maxlen=_NAMED_STEPS)
        self.begin(Position(epoch=0, chunk=0, first=0))

    def begin(self, position: Position) -> None:
        """Continues with the chunk at a position. Call it before any call of `batch`."""
        self._positions = deque([position], maxlen=2)  # of the last chunks with rows
        self._loaded_chunks: list[_LoadedChunk] = []
        self._next_position = position
        self._next_sequences: Future[Sequences] | None = None
        self._n_empty_chunks = 0  # in a row

    @property
    def batch_size(self) -> int:
        """Returns the number of rows in memory at once."""
        return self._batch_size

    @property
    def rows_a_step(self) -> int:
        """Returns the number of rows in one optimiser step."""
        return self._batch_size * self._accumulate

    def digest(self) -> str:
        """Returns a fingerprint of the data."""
        return self._source.digest

    def tokens(self, batch: HostBatch) -> int:
        """Returns the number of tokens in a batch, without padding."""
        return self._like.tokens(batch)

    def first(self) -> HostBatch:
        """Returns a padding batch of the largest shape; starts to read the first rows."""
        is_reading = self._next_sequences is not None
        if not is_reading and not self._loaded_chunks:
            self._read_ahead()
        batch = self._like.blank(self.rows_a_step)
        return {name: self._split_batches(array) for name, array in batch.items()}

    def batch(self, number: int) -> HostBatch:
        """Returns this process's batch for the step with `number` steps before it.

        Raises:
          TrainingError: a row cannot be read or used, or there is no row in all the data.
        """
        step_start = number * self.rows_a_step
        step_end = step_start + self.rows_a_step
        while not self._loaded_chunks or self._loaded_chunks[-1].end < step_end:
            self._take_next()
        while self._loaded_chunks[0].end <= step_start:
            self._loaded_chunks.pop(0)
        rows_of_packs = []
        origins = []
        for chunk in self._loaded_chunks:
            start = max(step_start - chunk.start, 0)
            end = max(step_end - chunk.start, 0)
            rows = chunk.rows[start:end]
            if len(rows):
                rows_of_packs.append((chunk.packs, rows))
            for row in rows.tolist():
                origins += chunk.packs.origins_of(row)
        self._step_origins.append((number, origins))
        batch = Packs.batch_of(rows_of_packs)
        return {name: self._split_batches(array) for name, array in batch.items()}

    def _split_batches(self, array: np.ndarray) -> np.ndarray:
        """Reshapes the rows of a step to [accumulate, batch, …]."""
        return array.reshape(self._accumulate, self._batch_size, -1)

    def _take_next(self) -> None:
        """Appends the next chunk to those in memory, and starts to read the one after it."""
        position = self._next_position
        if self._next_sequences is None:
            sequences = self._read(position)
        else:
            sequences = self._next_sequences.result()
            self._next_sequences = None
        chunk = self._shuffle(position, sequences)
        n_epoch_chunks = len(self._blocks_of_epoch(position.epoch))
        if len(chunk.rows):
            self._loaded_chunks.append(chunk)
            self._positions.append(position)
            self._n_empty_chunks = 0
        else:
            self._n_empty_chunks += 1
            if self._n_empty_chunks > n_epoch_chunks:
                raise TrainingError(
                    "the data have no row with a token that the loss counts. Add rows with "
                    "completions, or increase the sequence length."
                )
        is_epoch_over = position.chunk + 1 == n_epoch_chunks
        if is_epoch_over:
            self._next_position = Position(epoch=position.epoch + 1, chunk=0, first=chunk.end)
        else:
            self._next_position = position._replace(chunk=position.chunk + 1, first=chunk.end)
        if chunk.end < self._last_row:
            self._read_ahead()

    def _read_ahead(self) -> None:
        if self._reader is not None:
            self._next_sequences = self._reader.submit(self._read, self._next_position)

    def _read(self, position: Position) -> Sequences:
        blocks = self._blocks_of_epoch(position.epoch)[position.chunk]
        return self._source.load(blocks)

    def _shuffle(self, position: Position, sequences: Sequences) -> _LoadedChunk:
        """Returns a chunk with shuffled rows, in which rows of equal length share a step."""
        if not len(sequences):
            return _LoadedChunk(position, self._like, np.empty(0, np.int64))
        packs = pack(sequences, self._like.lengths[-1], packing=self._packing, like=self._like)
        seeds = [self._source.chunks.seed, position.epoch, _CHUNK_STREAM, position.chunk]
        generator = np.random.Generator(np.random.PCG64(seeds))
        rows = generator.permutation(len(packs))
        # The first rows end the step that the chunk before began.
        n_rows_of_last_step = -position.first % self.rows_a_step
        sort_by_group(
            rows, packs.groups, self.rows_a_step, n_rows_of_last_step, generator.permutation
        )
        return _LoadedChunk(position, packs, rows)

    def named(self, number: int) -> str:
        """Returns the names of the rows in a batch, if it is recent."""
        for step, origins in self._step_origins:
            if step == number:
                return list_rows(origins, lambda origin: self._source.named(*origin))
        return f"that of step {number + 1}, which is gone from memory"

    def cursor(self, step: int) -> dict[str, int]:
        """Returns the position after `step` steps: that of the chunk that continues there."""
        first_row = step * self.rows_a_step
        for position in reversed(self._positions):
            if position.first <= first_row:
                return position._asdict()
        raise AssertionError("this step is long gone")

    def seek(self, cursor: dict[str, Any], step: int) -> bool:
        """Continues after `step` steps from a cursor; returns False if it does not fit."""
        if cursor.keys() != set(Position._fields):
            return False
        position = Position(**cursor)
        is_behind_step = position.first > step * self.rows_a_step
        if is_behind_step or position.chunk >= len(self._blocks_of_epoch(position.epoch)):
            return False
        self.begin(position)
        return True
