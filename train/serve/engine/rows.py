"""The rows in which completions are drawn: each may leave between two tokens, and come back."""

import itertools
import time
from collections.abc import Iterator, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.core.types import Tree
from lora_jax.models.layers.cache import Cache
from lora_jax.models.sampling.blocks import CacheBlock
from lora_jax.models.sampling.choice import Sampling
from lora_jax.models.sampling.slots import DrawnTokens, RowState
from train.serve.engine.adjusting import RowAdjuster
from train.serve.engine.jobs import ActiveCompletion
from train.serve.engine.programs import SamplingPrograms
from train.serve.engine.sizes import Sizes
from train.serve.protocol.requests import SampleRequest

_HELD = 32  # decoded tokens after which fewer or shorter rows are chosen, if they would do
_SLOWER = 1.5  # times as long, at most, that a token takes beside other owners' rows
_COLDEST = 1e-4  # the lowest temperature: logits that are divided by less lose their digits


class RunningRows:
    """Rows on the device.

    Attributes:
      rows: the completion in each that is in use, those that came first before others.
      shared: rows that are in use where several owners draw: few, if all of them would have a token
        take much longer.
    """

    def __init__(self, programs: SamplingPrograms, sizes: Sizes, vocab: int) -> None:
        """Makes few and short rows.

        Args:
          programs: the compiled functions.
          sizes: shapes.
          vocab: size of the vocabulary.
        """
        self._programs, self._sizes, self._vocab = programs, sizes, vocab
        self._adjuster = RowAdjuster(vocab, sizes.max_length)
        self.rows: dict[int, ActiveCompletion] = {}
        self.shared = sizes.sequences
        self._width, self._length = sizes.widths[0], sizes.caches[0]
        self._idle = 0  # tokens since the rows were all needed
        self.reset()

    def reset(self) -> None:
        """Makes new arrays, for rows that nobody uses."""
        self._arrays = self._programs.empty(self._width, self._length)

    @property
    def are_lost(self) -> bool:
        """True where an error took the arrays with it."""
        return bool(self._arrays.last.is_deleted())

    def narrow(self) -> None:
        """Lets the rows shrink to the fewest that suffice, from the next token on."""
        self._idle = _HELD

    def begin(
        self, row: ActiveCompletion, logits: jax.Array, cache: Cache
    ) -> DrawnTokens[np.ndarray]:
        """Draws the first token of a completion, and gives it a row.

        Args:
          row: the completion.
          logits: [1, vocab], after the prompt.
          cache: keys and values of the prompt.
        """
        request = row.job.request
        sampling = self._sampling(row)
        alone = jax.tree.map(lambda x: x[None], sampling)
        adjusted = self._adjust(logits, {0: row}, alone)
        with_top = np.bool_(request.top > 0)
        tokens, _ = self._programs.draw(logits, adjusted, alone, np.zeros(1, np.int32), with_top)
        tokens = jax.tree.map(np.asarray, tokens)
        self._insert(row, cache, sampling, n=len(request.prompt), token=tokens.ids[0], drawn=1)
        return tokens

    def pause(self, row: ActiveCompletion) -> None:
        """Takes a completion out of its row; its cache goes to the host's memory."""
        row.cache = self._programs.take(self._arrays, np.int32(self._place(row)), row.n_cached)
        self.free(row)

    def free(self, row: ActiveCompletion) -> None:
        """Frees the row of a completion."""
        del self.rows[self._place(row)]

    def resume(self, row: ActiveCompletion) -> None:
        """Gives a paused completion a row again, in which it goes on with the same bits."""
        assert row.cache is not None
        length = self._sizes.cache(row.n_cached)
        cache, sampling = self._programs.give(row.cache, length), self._sampling(row)
        n, token, drawn = row.n_cached, row.ids[-1], len(row.ids)
        self._insert(row, cache, sampling, n=n, token=token, drawn=drawn)
        row.cache = None

    def block(self, row: ActiveCompletion, first: int) -> CacheBlock:
        """Returns a copy of a chunk of a completion, prompt included, which begins at a token."""
        return self._programs.row_block(self._arrays, self._place(row), first)

    def draw(self, tree: Tree) -> DrawnTokens[np.ndarray]:
        """Draws the next token of each completion."""
        self._fit(len(self.rows), max(row.n_cached + 1 for row in self.rows.values()))
        with_top = np.bool_(any(row.job.request.top for row in self.rows.values()))
        logits, arrays = self._programs.run(tree, self._arrays)
        self._arrays = arrays
        adjusted = self._adjust(logits, self.rows, arrays.sampling)
        tokens, drawn = self._programs.draw(
            logits, adjusted, arrays.sampling, arrays.drawn, with_top
        )
        self._arrays = arrays._replace(last=tokens.ids, drawn=drawn)
        return jax.tree.map(np.asarray, tokens)

    def _adjust(
        self, logits: jax.Array, rows: Mapping[int, ActiveCompletion], sampling: Sampling
    ) -> jax.Array:
        """Returns the logits to choose from: the very same where no row asks for others."""
        made = self._adjuster.adjustments(rows, len(logits))
        return logits if made is None else self._programs.adjust(logits, made, sampling.temperature)

    def _sampling(self, row: ActiveCompletion) -> Sampling:
        return self._sampling_of(row.job.request, row.job.seed, row.index)

    def _sampling_of(self, request: SampleRequest, seed: int, index: int) -> Sampling:
        """Returns the sampler's options for a completion of a request, [] each."""
        key = jax.random.fold_in(jax.random.key(seed % 2**32), index)
        t = request.temperature
        top_k = min(request.top_k, self._vocab) if request.top_k > 0 else self._vocab
        t = max(t, _COLDEST) if t else 0.0
        return Sampling(jnp.float32(t), jnp.float32(request.top_p), jnp.int32(top_k), key)

    def _place(self, row: ActiveCompletion) -> int:
        return next(place for place, other in self.rows.items() if other is row)

    def _insert(
        self,
        row: ActiveCompletion,
        cache: Cache,
        sampling: Sampling,
        *,
        n: int,
        token: int,
        drawn: int,
    ) -> None:
        self._fit(len(self.rows) + 1, n + 1)
        free = next(i for i in itertools.count() if i not in self.rows)
        self.rows[free] = row
        assert row.job.slot is not None
        state = RowState(
            *(cache, np.int32(n), np.int32(token), np.int32(drawn), np.int32(row.job.slot)),
            sampling,
        )
        self._arrays = self._programs.insert(self._arrays, np.int32(free), state)

    def _fit(self, n: int, length: int) -> None:
        """Makes room for n rows of a length; gives up room that is long unneeded."""
        width, least = self._sizes.width(n), self._sizes.cache(length)
        smaller = width < self._width or least < self._length
        self._idle = self._idle + 1 if smaller else 0
        if self._idle < _HELD:
            width, least = max(width, self._width), max(least, self._length)
        if (width, least) == (self._width, self._length):
            return
        if width != self._width:
            order = [*self.rows, *[0] * (width - len(self.rows))]
            self._resize(order, self._length)
            self.rows = dict(enumerate(self.rows.values()))
        for step in self._sizes.caches_to(self._length, least):
            self._resize(range(width), step)
        self._width, self._length, self._idle = width, least, 0

    def _resize(self, order: Sequence[int], length: int) -> None:
        self._arrays = self._programs.fit(self._arrays, np.array(order, np.int32), length)

    @property
    def steps(self) -> int:
        """The number of steps of `warm_up`."""
        n = len(self._sizes.caches)
        return len({1, *self._sizes.widths}) + 4 * n * len(self._sizes.widths)

    def warm_up(self, tree: Tree, logits: jax.Array, caches: Sequence[Cache]) -> Iterator[None]:
        """Compiles all functions of rows, for all shapes, step by step; nobody samples yet.

        Args:
          tree: the base with adapters in slots.
          logits: [1, vocab], after a prompt.
          caches: a prompt's, one of each length.
        """
        programs, sizes = self._programs, self._sizes
        slot, unit = np.int32(0), np.int32(1)
        sampling = self._sampling_of(SampleRequest(adapter=None, prompt=[0]), 0, 0)
        alone = jax.tree.map(lambda x: x[None], sampling)
        self._warm_up_draws(logits, alone, np.zeros(1, np.int32))
        yield
        for width in sizes.widths:
            for length in sizes.caches:
                rows = programs.empty(width, length)
                for cache in caches:
                    if cache.positions.shape[1] <= programs.whole(length):
                        state = RowState(cache, unit, unit, unit, slot, sampling)
                        rows = programs.insert(rows, slot, state)
                yield
                logits, rows = programs.run(tree, rows)
                if sizes.fast_prompts and length >= sizes.chunk:  # shorter rows have no block
                    programs.row_block(rows, 0, 0)
                yield
                paused = programs.give(programs.take(rows, slot, 1), length)
                rows = programs.insert(rows, slot, state._replace(cache=paused))
                yield
                for wide in set(sizes.widths) - {width}:
                    programs.fit(rows, np.zeros(wide, np.int32), length)
                for end in (sizes.caches[0], sizes.caches[-1]):  # a step towards each
                    for other in sizes.caches_to(length, end)[:1]:
                        programs.fit(rows, np.zeros(width, np.int32), other)
                yield
            self._warm_up_draws(logits, rows.sampling, rows.drawn)
            if width > 1:
                yield
        few, many = sizes.widths[0], sizes.widths[-1]
        if self._seconds(tree, many) > _SLOWER * self._seconds(tree, few):
            self.shared = few

    def _warm_up_draws(
        self, logits: jax.Array, sampling: Sampling, drawn: jax.Array | np.ndarray
    ) -> None:
        """Compiles the draws of a token of each row."""
        neutral = self._adjuster.neutral(len(logits))
        adjusted = self._programs.adjust(logits, neutral, sampling.temperature)
        self._programs.draw(logits, adjusted, sampling, drawn, np.bool_(False))

    def _seconds(self, tree: Tree, width: int) -> float:
        """Returns the seconds that a token takes in so many rows."""
        times, rows = [], self._programs.empty(width, self._sizes.caches[0])
        for _ in range(3):
            began = time.perf_counter()
            logits, rows = self._programs.run(tree, rows)
            tokens, drawn = self._programs.draw(
                logits, logits, rows.sampling, rows.drawn, np.bool_(False)
            )
            rows = rows._replace(last=tokens.ids, drawn=drawn)
            np.asarray(tokens.ids)
            times.append(time.perf_counter() - began)
        return min(times)
