"""Batches of data larger than memory: read a chunk at a time, from any place in the data.

The data are cut into blocks that can be read on their own. An epoch draws their order; a chunk is
as many of them as fit into a buffer, and its rows are shuffled, packed or grouped by length there.
So the rows of a step depend on nothing but the seed and where its chunk begins, and a resumed run
reads one chunk again.
"""

import dataclasses
import functools
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np

from lora_jax.training.data.batches import HostBatch, Packs, pack
from lora_jax.training.data.mixture import order
from lora_jax.training.data.order import list_rows, sort_by_group
from lora_jax.training.data.sequences import Sequences
from lora_jax.training.errors import TrainingError

_OF_CHUNK = 3  # the stream of draws within a chunk
_REMEMBERED = 512  # steps whose rows can be named


class Position(NamedTuple):
    """The position of a chunk.

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
    """The blocks of each chunk.

    Attributes:
      seed: seed of the draw.
      sizes: [blocks], in any unit.
      room: the size of a chunk, in that unit; a larger block is a chunk of its own.
    """

    seed: int
    sizes: np.ndarray
    room: int

    def blocks_of_epoch(self, epoch: int) -> list[np.ndarray]:
        """Returns the blocks of each chunk, in a drawn order."""
        blocks = order(self.seed, epoch, len(self.sizes))
        begins = np.cumsum(self.sizes[blocks]) - self.sizes[blocks]
        return np.split(blocks, np.flatnonzero(np.diff(begins // self.room)) + 1)


@dataclasses.dataclass(frozen=True)
class _Loaded:
    """Holds a chunk in memory: its rows of batches, and the order in which steps take them."""

    at: Position
    packs: Packs
    rows: np.ndarray

    @property
    def end(self) -> int:
        return self.at.first + len(self.rows)


class BlockSource(NamedTuple):
    """Data that are read in blocks.

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
    """The rows of a step.

    Attributes:
      batch_size: rows in memory at once.
      accumulate: batches of a step.
      steps: the number of the last step: chunks after it are not read.
    """

    batch_size: int
    accumulate: int
    steps: int


class Stream:
    """Batches of data that are read while training; see `Batches`.

    Steps have to be asked for one after the other. The next chunk is read in the background.
    """

    n_examples = None

    def __init__(
        self, source: BlockSource, like: Packs, size: StepSize, *, packing: bool, ahead: bool = True
    ) -> None:
        """Begins at the first row of the first epoch.

        Args:
          source: the data.
          like: examples whose lengths batches have: no sequence is longer than their longest.
          size: the rows of a step, and the last step.
          packing: puts several sequences into one row.
          ahead: reads the next chunk in a thread of its own.
        """
        self._load, self._chunks, self._like = source.load, source.chunks, like
        self._digest, self._name = source.digest, source.named
        self._packing, self._batch_size = packing, size.batch_size
        self._accumulate = size.accumulate
        # One thread for all chunks: each new one would get a part of the heap of its own.
        self._reader = ThreadPoolExecutor(1, "reading ahead") if ahead else None
        self._until = size.steps * self.rows_a_step
        self._of_epoch = functools.lru_cache(maxsize=2)(source.chunks.blocks_of_epoch)
        self._taken: deque[tuple[int, list[tuple[int, int]]]] = deque(maxlen=_REMEMBERED)
        self.begin(Position(0, 0, 0))

    def begin(self, at: Position) -> None:
        """Goes on with the chunk at a position. Call it before any call of `batch`."""
        self._positions = deque([at], maxlen=2)
        self._loaded: list[_Loaded] = []
        self._next = at
        self._coming: Future[Sequences] | None = None
        self._empty = 0

    @property
    def batch_size(self) -> int:
        """Returns the rows in memory at once."""
        return self._batch_size

    @property
    def rows_a_step(self) -> int:
        """Returns the number of rows that one optimiser step sees."""
        return self._batch_size * self._accumulate

    def digest(self) -> str:
        """Returns a fingerprint of the data."""
        return self._digest

    def tokens(self, batch: HostBatch) -> int:
        """Returns the number of tokens in a batch, without padding."""
        return self._like.tokens(batch)

    def first(self) -> HostBatch:
        """Returns a batch of the largest shape, of padding alone; has the first rows read."""
        if self._coming is None and not self._loaded:
            self._read_ahead()
        batch = self._like.blank(self._batch_size * self._accumulate)
        return {name: self._split_batches(array) for name, array in batch.items()}

    def batch(self, number: int) -> HostBatch:
        """Returns the batch of the step that has `number` steps before it, in this process.

        Raises:
          TrainingError: a row cannot be read or used, or there is no row in all the data.
        """
        first = number * self.rows_a_step
        last = first + self.rows_a_step
        while not self._loaded or self._loaded[-1].end < last:
            self._take_next()
        while self._loaded[0].end <= first:
            self._loaded.pop(0)
        parts, names = [], []
        for chunk in self._loaded:
            here = slice(max(first - chunk.at.first, 0), max(last - chunk.at.first, 0))
            rows = chunk.rows[here]
            parts.append((chunk.packs, rows))
            names += [name for row in rows.tolist() for name in chunk.packs.origins_of(row)]
        self._taken.append((number, names))
        taken = [(packs, rows) for packs, rows in parts if len(rows)]
        batch = Packs.batch_of(taken)
        return {name: self._split_batches(array) for name, array in batch.items()}

    def _split_batches(self, array: np.ndarray) -> np.ndarray:
        return array.reshape(self._accumulate, self._batch_size, -1)

    def _take_next(self) -> None:
        """Puts the next chunk behind those in memory, and has the one after it read."""
        at = self._next
        coming, self._coming = self._coming, None
        loaded = self._shuffle(at, self._read(at) if coming is None else coming.result())
        if len(loaded.rows):
            self._loaded.append(loaded)
            self._positions.append(at)
            self._empty = 0
        else:
            self._empty += 1
            if self._empty > len(self._of_epoch(at.epoch)):
                raise TrainingError("no row of the data has a token that the loss counts")
        over = at.chunk + 1 == len(self._of_epoch(at.epoch))
        epoch, chunk = (at.epoch + 1, 0) if over else (at.epoch, at.chunk + 1)
        self._next = Position(epoch, chunk, loaded.end)
        if loaded.end < self._until:
            self._read_ahead()

    def _read_ahead(self) -> None:
        if self._reader is not None:
            self._coming = self._reader.submit(self._read, self._next)

    def _read(self, at: Position) -> Sequences:
        return self._load(self._of_epoch(at.epoch)[at.chunk])

    def _shuffle(self, at: Position, sequences: Sequences) -> _Loaded:
        """Returns a chunk with its rows in a drawn order; rows of one length share a step."""
        if not len(sequences):
            return _Loaded(at, self._like, np.empty(0, np.int64))
        packs = pack(sequences, self._like.lengths[-1], packing=self._packing, like=self._like)
        stream = [self._chunks.seed, at.epoch, _OF_CHUNK, at.chunk]
        draw = np.random.Generator(np.random.PCG64(stream))
        rows = draw.permutation(len(packs))
        rest = -at.first % self.rows_a_step  # the rows that end the step of the chunk before
        sort_by_group(rows, packs.groups, self.rows_a_step, rest, draw.permutation)
        return _Loaded(at, packs, rows)

    def named(self, number: int) -> str:
        """Returns the names of what is in a batch, unless it is long gone."""
        names = next((names for step, names in self._taken if step == number), None)
        if names is None:
            return f"that of step {number + 1}, which is gone from memory"
        return list_rows(names, lambda row: self._name(*row))

    def cursor(self, step: int) -> dict[str, int]:
        """Returns the position in the data after `step` steps: the chunk that goes on there."""
        first = step * self.rows_a_step
        at = next((at for at in reversed(self._positions) if at.first <= first), None)
        assert at is not None, "this step is long gone"
        return at._asdict()

    def seek(self, cursor: dict[str, Any], step: int) -> bool:
        """Goes on after `step` steps, from their cursor; returns True if it can be one."""
        if cursor.keys() != set(Position._fields):
            return False
        at = Position(**cursor)
        if at.first > step * self.rows_a_step or at.chunk >= len(self._of_epoch(at.epoch)):
            return False
        self.begin(at)
        return True
