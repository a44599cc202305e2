"""The rows that draw completions. A completion may be paused between two tokens and resumed."""

import time
from collections.abc import Generator, Iterator, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.core.types import Tree
from lora_jax.models.layers.cache import Cache
from lora_jax.models.sampling.blocks import CacheBlock
from lora_jax.models.sampling.choice import Sampling
from lora_jax.models.sampling.slots import DecodingRows, DrawnTokens, RowState
from train.serve.engine.adjusting import RowAdjuster
from train.serve.engine.jobs import ActiveCompletion
from train.serve.engine.programs import SamplingPrograms
from train.serve.engine.sizes import Sizes
from train.serve.protocol.requests import SampleRequest

_SHRINK_AFTER_TOKENS = 32  # decoded tokens for which fewer or shorter rows would have sufficed
_MAX_SLOWDOWN = 1.5  # of a token that is drawn beside other owners' rows
_MIN_TEMPERATURE = 1e-4  # logits that are divided by less lose their digits


class RunningRows:
    """Rows on the device.

    Attributes:
      completions: the completion in each row that is in use, those that came first before others.
      shared: rows that are in use where several owners draw: few, if all of them would have a token
        take much longer.
    """

    def __init__(self, programs: SamplingPrograms, sizes: Sizes, vocab: int) -> None:
        """Creates rows of the smallest number and length.

        Args:
          programs: the compiled functions.
          sizes: shapes.
          vocab: size of the vocabulary.
        """
        self._programs = programs
        self._sizes = sizes
        self._vocab = vocab
        self._adjuster = RowAdjuster(vocab, sizes.max_length)
        self.completions: dict[int, ActiveCompletion] = {}
        self.shared = sizes.sequences
        self._width = sizes.widths[0]
        self._length = sizes.cache_lengths[0]
        self._idle_tokens = 0  # tokens since the rows were all needed
        self.reset()

    def reset(self) -> None:
        """Replaces the arrays of rows that no completion uses."""
        self._arrays = self._programs.empty_rows(self._width, self._length)

    @property
    def are_lost(self) -> bool:
        """True if an error deleted the arrays that it was given."""
        return bool(self._arrays.last.is_deleted())

    def narrow(self) -> None:
        """Allows the rows to shrink to the smallest sufficient number at the next token."""
        self._idle_tokens = _SHRINK_AFTER_TOKENS

    def begin(
        self, completion: ActiveCompletion, logits: jax.Array, cache: Cache
    ) -> DrawnTokens[np.ndarray]:
        """Draws the first token of a completion, and assigns a row to the completion.

        Args:
          completion: the completion.
          logits: [1, vocab], after the prompt.
          cache: keys and values of the prompt.
        """
        request = completion.job.request
        sampling = self._sampling_options_of(completion)
        sampling_of_row = jax.tree.map(lambda option: option[None], sampling)
        adjusted_logits = self._adjust_logits(logits, {0: completion}, sampling_of_row)
        tokens, _ = self._programs.draw(
            logits,
            adjusted_logits,
            sampling_of_row,
            np.zeros(1, np.int32),
            np.bool_(request.top > 0),
        )
        tokens = jax.tree.map(np.asarray, tokens)
        self._insert_row(
            completion,
            cache,
            sampling,
            n_cached=len(request.prompt),
            newest_token=tokens.ids[0],
            n_drawn=1,
        )
        return tokens

    def pause(self, completion: ActiveCompletion) -> None:
        """Copies a completion's cache to the host's memory, and frees its row."""
        row = np.int32(self._row_of(completion))
        completion.cache = self._programs.copy_row(self._arrays, row, completion.n_cached)
        self.free(completion)

    def free(self, completion: ActiveCompletion) -> None:
        """Frees the row of a completion."""
        del self.completions[self._row_of(completion)]

    def resume(self, completion: ActiveCompletion) -> None:
        """Assigns a row to a paused completion, which continues with identical numbers."""
        assert completion.cache is not None
        cache_length = self._sizes.cache_length(completion.n_cached)
        self._insert_row(
            completion,
            self._programs.restore_cache(completion.cache, cache_length),
            self._sampling_options_of(completion),
            n_cached=completion.n_cached,
            newest_token=completion.ids[-1],
            n_drawn=len(completion.ids),
        )
        completion.cache = None

    def block(self, completion: ActiveCompletion, start: int) -> CacheBlock:
        """Returns a copy of the chunk of a prompt with its completion that begins at `start`."""
        return self._programs.row_block(self._arrays, self._row_of(completion), start)

    def draw(self, tree: Tree) -> DrawnTokens[np.ndarray]:
        """Draws the next token of each completion."""
        completions = [*self.completions.values()]
        max_tokens = max(completion.n_cached + 1 for completion in completions)
        self._fit_shape(len(completions), max_tokens)
        with_top = np.bool_(any(completion.job.request.top for completion in completions))
        logits, arrays = self._programs.run(tree, self._arrays)
        self._arrays = arrays
        adjusted_logits = self._adjust_logits(logits, self.completions, arrays.sampling)
        tokens, n_drawn = self._programs.draw(
            logits, adjusted_logits, arrays.sampling, arrays.drawn, with_top
        )
        self._arrays = arrays._replace(last=tokens.ids, drawn=n_drawn)
        return jax.tree.map(np.asarray, tokens)

    def _adjust_logits(
        self, logits: jax.Array, completions: Mapping[int, ActiveCompletion], sampling: Sampling
    ) -> jax.Array:
        """Returns adjusted logits; the logits themselves if no completion asks for adjustments."""
        adjustments = self._adjuster.adjustments(completions, len(logits))
        if adjustments is None:
            return logits
        return self._programs.adjust(logits, adjustments, sampling.temperature)

    def _sampling_options_of(self, completion: ActiveCompletion) -> Sampling:
        """Returns the sampler's options for a completion, [] each."""
        job = completion.job
        return self._sampling_options(job.request, job.seed, completion.index)

    def _sampling_options(self, request: SampleRequest, seed: int, index: int) -> Sampling:
        """Returns the sampler's options for the completion of an index, [] each."""
        temperature = request.temperature
        if temperature > 0:
            temperature = max(temperature, _MIN_TEMPERATURE)
        top_k = min(request.top_k, self._vocab) if request.top_k > 0 else self._vocab
        return Sampling(
            temperature=jnp.float32(temperature),
            top_p=jnp.float32(request.top_p),
            top_k=jnp.int32(top_k),
            key=jax.random.fold_in(jax.random.key(seed % 2**32), index),
        )

    def _row_of(self, completion: ActiveCompletion) -> int:
        """Returns the row of a completion that has one."""
        for row, other in self.completions.items():
            if other is completion:
                return row
        raise AssertionError("the completion has no row")

    def _insert_row(
        self,
        completion: ActiveCompletion,
        cache: Cache,
        sampling: Sampling,
        *,
        n_cached: int,
        newest_token: int,
        n_drawn: int,
    ) -> None:
        """Writes a completion's state into the first free row."""
        self._fit_shape(len(self.completions) + 1, n_cached + 1)
        # Take the first free row.
        free_row = 0
        while free_row in self.completions:
            free_row += 1
        self.completions[free_row] = completion
        assert completion.job.slot is not None
        state = RowState(
            cache=cache,
            n=np.int32(n_cached),
            last=np.int32(newest_token),
            drawn=np.int32(n_drawn),
            adapter=np.int32(completion.job.slot),
            sampling=sampling,
        )
        self._arrays = self._programs.insert(self._arrays, np.int32(free_row), state)

    def _fit_shape(self, n_completions: int, n_tokens: int) -> None:
        """Grows the rows for n completions of a length, or shrinks rows that were too large."""
        width = self._sizes.width(n_completions)
        length = self._sizes.cache_length(n_tokens)
        could_shrink = width < self._width or length < self._length
        self._idle_tokens = self._idle_tokens + 1 if could_shrink else 0
        # Rows shrink only after some tokens that fewer or shorter rows would have held.
        if self._idle_tokens < _SHRINK_AFTER_TOKENS:
            width = max(width, self._width)
            length = max(length, self._length)
        if width == self._width and length == self._length:
            return
        if width != self._width:
            # The rows in use come first.
            rows = [*self.completions]
            rows += [0] * (width - len(rows))
            self._resize(rows, self._length)
            self.completions = dict(enumerate(self.completions.values()))
        for next_length in self._sizes.caches_to(self._length, length):
            self._resize(range(width), next_length)
        self._width = width
        self._length = length
        self._idle_tokens = 0

    def _resize(self, rows: Sequence[int], length: int) -> None:
        """Replaces the arrays by the given rows of them, with caches of another length."""
        self._arrays = self._programs.fit_rows(self._arrays, np.array(rows, np.int32), length)

    @property
    def steps(self) -> int:
        """The number of steps of `warm_up`."""
        n_draws = len({1, *self._sizes.widths})
        n_shapes = len(self._sizes.cache_lengths) * len(self._sizes.widths)
        return n_draws + 4 * n_shapes

    def warm_up(
        self, tree: Tree, logits: jax.Array, prompt_caches: Sequence[Cache]
    ) -> Iterator[None]:
        """Compiles all functions of rows for all shapes, one per iteration.

        Args:
          tree: the base with adapters in slots.
          logits: [1, vocab], after a prompt.
          prompt_caches: a prompt's, one of each length.
        """
        sizes = self._sizes
        sampling = self._sampling_options(SampleRequest(adapter=None, prompt=[0]), 0, 0)
        sampling_of_row = jax.tree.map(lambda option: option[None], sampling)
        self._warm_up_draws(logits, sampling_of_row, np.zeros(1, np.int32))
        yield
        for width in sizes.widths:
            for length in sizes.cache_lengths:
                logits, rows = yield from self._warm_up_shape(
                    tree, width, length, sampling, prompt_caches
                )
            self._warm_up_draws(logits, rows.sampling, rows.drawn)
            if width > 1:  # draws of one row were compiled above
                yield
        narrow = sizes.widths[0]
        if self._measure_token_seconds(
            tree, sizes.widths[-1]
        ) > _MAX_SLOWDOWN * self._measure_token_seconds(tree, narrow):
            self.shared = narrow

    def _warm_up_shape(
        self,
        tree: Tree,
        width: int,
        length: int,
        sampling: Sampling,
        prompt_caches: Sequence[Cache],
    ) -> Generator[None, None, tuple[jax.Array, DecodingRows]]:
        """Compiles the functions of one shape except the draws; returns logits and rows."""
        programs = self._programs
        sizes = self._sizes
        row = np.int32(0)
        rows = programs.empty_rows(width, length)
        for cache in prompt_caches:
            if cache.positions.shape[1] <= programs.round_up(length):
                state = RowState(
                    cache=cache,
                    n=np.int32(1),
                    last=np.int32(1),
                    drawn=np.int32(1),
                    adapter=np.int32(0),
                    sampling=sampling,
                )
                rows = programs.insert(rows, row, state)
        yield
        logits, rows = programs.run(tree, rows)
        if sizes.fast_prompts and length >= sizes.chunk:  # shorter rows have no block
            programs.row_block(rows, 0, 0)
        yield
        restored_cache = programs.restore_cache(programs.copy_row(rows, row, 1), length)
        rows = programs.insert(rows, row, state._replace(cache=restored_cache))
        yield
        for other_width in set(sizes.widths) - {width}:
            programs.fit_rows(rows, np.zeros(other_width, np.int32), length)
        for end_length in (sizes.cache_lengths[0], sizes.cache_lengths[-1]):
            for next_length in sizes.caches_to(length, end_length)[:1]:  # a step towards each
                programs.fit_rows(rows, np.zeros(width, np.int32), next_length)
        yield
        return logits, rows

    def _warm_up_draws(
        self, logits: jax.Array, sampling: Sampling, n_drawn: jax.Array | np.ndarray
    ) -> None:
        """Compiles the function that draws a token for each row."""
        neutral = self._adjuster.neutral(len(logits))
        adjusted_logits = self._programs.adjust(logits, neutral, sampling.temperature)
        self._programs.draw(logits, adjusted_logits, sampling, n_drawn, np.bool_(False))

    def _measure_token_seconds(self, tree: Tree, width: int) -> float:
        """Returns the seconds of a decoding step of so many rows."""
        durations: list[float] = []
        rows = self._programs.empty_rows(width, self._sizes.cache_lengths[0])
        for _ in range(3):
            start_time = time.perf_counter()
            logits, rows = self._programs.run(tree, rows)
            tokens, n_drawn = self._programs.draw(
                logits, logits, rows.sampling, rows.drawn, np.bool_(False)
            )
            rows = rows._replace(last=tokens.ids, drawn=n_drawn)
            np.asarray(tokens.ids)  # waits for the device
            durations.append(time.perf_counter() - start_time)
        return min(durations)
