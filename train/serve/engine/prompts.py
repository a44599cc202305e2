"""Runs prompts in chunks, and a prefix that several share once."""

import dataclasses
import functools
import itertools
from collections.abc import Generator, Iterable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from lora_jax.core.types import Tree
from lora_jax.models.layers.cache import Cache
from lora_jax.models.sampling.blocks import CacheBlock
from lora_jax.models.sampling.prompts import common_prefix
from train.serve.engine.jobs import ActiveCompletion, SampleJob
from train.serve.engine.prefixes import PrefixScope, PrefixStore
from train.serve.engine.programs import SamplingPrograms
from train.serve.engine.rows import RunningRows
from train.serve.engine.sizes import Sizes


@dataclasses.dataclass(eq=False)
class RunningPrompt:
    """A prompt that runs, or did.

    Attributes:
      job: the sample.
      ids: its tokens.
      cache: keys and values of the first `n`.
      n: the tokens that ran.
      cached: number of tokens that others ran.
      logits: [1, vocab], after the last token, once all ran.
      begun: completions that began.
    """

    job: SampleJob
    ids: np.ndarray
    cache: Cache | None = None
    n: int = 0
    cached: int = 0
    logits: Any = None
    begun: int = 0

    @property
    def is_done(self) -> bool:
        """True once all tokens ran."""
        return self.n == len(self.ids)


class PromptRunner:
    """Runs prompts in chunks; takes their prefixes from the cache, and adds to it.

    A chunk runs in a cache whose length depends on the chunk's place alone, and what a prompt
    begins with as another did is taken over up to the end of a whole chunk. So each prompt has the
    very numbers that it would have alone, whatever was found.

    The tokens before the invocation of an activated LoRA are the base's, whoever ran them.

    Where `Sizes.fast_prompts` says that last bits may differ, pieces of several prompts run
    together, and what completions drew is found again, too.

    Attributes:
      store: what was computed.
    """

    def __init__(self, programs: SamplingPrograms, sizes: Sizes) -> None:
        """Begins without any."""
        self._programs, self._sizes, self._chunk = programs, sizes, sizes.chunk
        self.store = PrefixStore(sizes.chunk, sizes.prefixes, programs.has_memory)

    def begin(self, job: SampleJob) -> RunningPrompt:
        """Returns a sample's prompt, of which nothing ran yet."""
        return RunningPrompt(job, np.asarray(job.request.prompt, np.int32))

    def waits(
        self,
        prompt: RunningPrompt,
        others: Iterable[RunningPrompt],
        due: Sequence[RunningPrompt] = (),
    ) -> bool:
        """Returns True if another prompt is about to run the tokens that this one begins with.

        Args:
          prompt: the prompt.
          others: the prompts under way.
          due: prompts among `others` whose next tokens run at once.
        """
        if prompt.cache is not None or not self._sizes.prefixes:
            return False
        who, scope = prompt.job.path[:-1], self._scope(prompt.job)  # those of others: other turns
        coming = [
            shared
            for other in others
            if (other.n or other in due) and other.job.path[:-1] == who
            # Other weights of the same name may wait for the slot that this prompt holds.
            if other.job.adapter is prompt.job.adapter and self._scope(other.job) == scope
            if other.n < (shared := self._shared(prompt, other))
        ]
        return bool(coming) and max(coming) > len(self._find(prompt)) * self._chunk

    def run(self, prompts: Sequence[RunningPrompt], tree: Tree) -> dict[RunningPrompt, int]:
        """Runs the next chunk of a prompt, or as many tokens of several ones.

        Args:
          prompts: the prompt, and others that may run with it, if that takes no longer.
          tree: the base with adapters in slots.

        Returns:
          The number of tokens that ran, of each prompt that did.
        """
        first, (most, piece) = prompts[0], self._sizes.pieces
        caches = {prompt: self._make_room(prompt) for prompt in prompts}
        length = caches[first].positions.shape[1]
        same = [each for each in prompts if caches[each].positions.shape[1] == length]
        # An activated LoRA runs by itself: one of its chunks is the base's up to the invocation.
        same = [each for each in same if each is first or not (each.job.active or first.job.active)]
        same = same[:most]
        together = {each: min(piece, len(each.ids) - each.n) for each in same}
        apart = min(self._chunk, len(first.ids) - first.n)
        alone = first.n % self._chunk == 0 and apart >= sum(together.values())
        together = {first: apart} if alone else together
        try:
            if alone:
                self._run_chunk(first, caches[first], tree)
            else:
                self._run_pieces({each: caches[each] for each in together}, tree)
            for prompt, n in together.items():
                prompt.n += n
                self._keep(prompt)
        except Exception:  # all caches were given away: those whose sample goes on begin anew
            for each in together:
                each.cache, each.n = None, 0
            raise
        return together

    def keep_drawn(self, row: ActiveCompletion, rows: RunningRows) -> None:
        """Keeps the tokens of a completion to be found again, where last bits may differ.

        Not in models with linear layers: these remember a row's newest token, not each chunk's end.
        Nor where keys depend on the length of the cache: that of a row is that of the longest one.

        Args:
          row: a completion that ends.
          rows: the rows, one of which still is its.
        """
        programs = self._programs
        if not self._sizes.fast_prompts or programs.has_memory or programs.depends_on_room:
            return
        if row.job.active:
            return
        scope, first = self._scope(row.job), len(row.job.request.prompt)
        ids = np.asarray([*row.job.request.prompt, *row.ids[:-1]], np.int32)
        for start in range(first - first % self._chunk, len(ids) - self._chunk + 1, self._chunk):
            block = functools.partial(rows.block, row, start)
            self.store.add(scope, ids[: start + self._chunk], block)

    def _shared(self, prompt: RunningPrompt, other: RunningPrompt) -> int:
        """Returns the tokens, of whole chunks, that two prompts begin with alike."""
        n = common_prefix(_sharable(prompt), _sharable(other))
        return n - n % self._chunk

    def _scope(self, job: SampleJob) -> PrefixScope:
        length = None
        if self._programs.depends_on_room:
            length = self._sizes.cache(len(job.request.prompt))
        # Up to its invocation, the prompt of an activated LoRA is the base's, and is found as such.
        return PrefixScope(job.request.client.owner, None if job.active else job.adapter, length)

    def _after(self, prompt: RunningPrompt) -> tuple[PrefixScope, int]:
        """Returns the scope of what an activated LoRA computed after a text, and that text's end.

        The text is what stands before the chunk with the invocation. It is part of the scope.
        """
        job, scope = prompt.job, self._scope(prompt.job)
        start = job.active - job.active % self._chunk
        kind = (scope.kind, job.active, prompt.ids[:start].tobytes())
        return dataclasses.replace(scope, adapter=job.adapter, kind=kind), start

    def _find(self, prompt: RunningPrompt) -> list[CacheBlock]:
        blocks = self.store.find(self._scope(prompt.job), _sharable(prompt))
        if prompt.job.active:
            scope, start = self._after(prompt)
            if len(blocks) * self._chunk == start:
                blocks += self.store.find(scope, prompt.ids[start:-1])
        return blocks

    def _length(self, prompt: RunningPrompt) -> int:
        """Returns the length of the cache in which the next chunk of a prompt runs."""
        n = len(prompt.ids) if self._programs.depends_on_room else prompt.n + 1
        return self._sizes.cache(n)

    def _make_room(self, prompt: RunningPrompt) -> Cache:
        """Returns a prompt's cache with room for its next chunk, and with all that was found."""
        if prompt.cache is None:
            blocks = self._find(prompt)
            prompt.n = prompt.cached = len(blocks) * self._chunk
            cache = self._programs.prompt(self._length(prompt))
            for i, block in enumerate(blocks):
                cache = self._programs.put(cache, np.int32(i * self._chunk), block)
            prompt.cache = cache
        length = self._programs.whole(self._length(prompt))
        if prompt.cache.positions.shape[1] < length:
            prompt.cache = self._programs.grow(prompt.cache, length)
        return prompt.cache

    def _run_chunk(self, prompt: RunningPrompt, cache: Cache, tree: Tree) -> None:
        ids, n = self._piece(prompt, self._chunk)
        slot, of_base = np.int32(_slot(prompt)), np.int32(prompt.job.active - prompt.n)
        if 0 < of_base < n:
            after = self._programs.extend_after(tree, slot, ids, n, cache, of_base)
            prompt.logits, prompt.cache = after
            return
        slot = np.int32(0) if of_base > 0 else slot
        prompt.logits, prompt.cache = self._programs.extend(tree, slot, ids, n, cache)

    def _run_pieces(self, caches: dict[RunningPrompt, Cache], tree: Tree) -> None:
        most, width = self._sizes.pieces
        pieces = [self._piece(prompt, width) for prompt in caches]
        slots = [_slot(prompt) for prompt in caches]
        length = next(iter(caches.values())).positions.shape[1]
        empty, n_empty = np.zeros((1, width), np.int32), most - len(caches)
        logits, after = self._programs.extend_all(
            tree,
            np.array([*slots, *[0] * n_empty], np.int32),
            np.stack([*(ids for ids, _ in pieces), *[empty] * n_empty]),
            np.array([*(n for _, n in pieces), *[0] * n_empty], np.int32),
            (*caches.values(), *(self._programs.prompt(length) for _ in range(n_empty))),
        )
        for i, prompt in enumerate(caches):
            prompt.logits, prompt.cache = logits[i], after[i]

    def _piece(self, prompt: RunningPrompt, width: int) -> tuple[np.ndarray, np.int32]:
        """Returns a prompt's next tokens, [1, width] int32, filled up, and how many there are."""
        ids, part = np.zeros((1, width), np.int32), prompt.ids[prompt.n : prompt.n + width]
        ids[0, : len(part)] = part
        return ids, np.int32(len(part))

    def _keep(self, prompt: RunningPrompt) -> None:
        """Keeps the newest chunk, once it is whole, to be found again."""
        if prompt.n % self._chunk == 0:
            assert prompt.cache is not None
            scope, start = self._scope(prompt.job), 0
            if 0 < prompt.job.active < prompt.n:
                scope, start = self._after(prompt)
            first = prompt.n - self._chunk
            block = functools.partial(self._programs.block, prompt.cache, first)
            self.store.add(scope, prompt.ids[start : prompt.n], block)

    @property
    def steps(self) -> int:
        """The number of steps of `warm_up`."""
        return len(self._sizes.caches) * (2 if self._sizes.fast_prompts else 1)

    def warm_up(self, tree: Tree) -> Generator[None, None, tuple[jax.Array, list[Cache]]]:
        """Compiles all functions of prompts, for all shapes, step by step.

        Args:
          tree: the base with adapters in slots.

        Returns:
          The logits after a prompt, [1, vocab], and a cache of each length.
        """
        programs, caches = self._programs, list[Cache]()
        ids = np.zeros((1, self._chunk), np.int32)
        most, width = self._sizes.pieces
        none = np.zeros((most, 1, width), np.int32), np.zeros(most, np.int32)
        for length in self._sizes.caches:
            cache = programs.prompt(length)
            logits, cache = programs.extend(tree, np.int32(0), ids, np.int32(1), cache)
            block = programs.block(cache, 0)
            cache = programs.put(cache, np.int32(0), block)
            if programs.has_memory:
                cache = programs.put(cache, np.int32(0), block._replace(recurrent=None))
            caches.append(cache)
            yield
            if self._sizes.fast_prompts:
                empty = tuple(programs.prompt(length) for _ in range(most))
                programs.extend_all(tree, none[1], *none, empty)
                yield
        for start, then in self._growths():
            programs.grow(programs.prompt(start), then)
        return logits, caches

    def _growths(self) -> Iterator[tuple[int, int]]:
        """Yields the lengths of caches from which prompts go on to others, and these."""
        starts = range(0, self._sizes.max_length, self._chunk)
        lengths = [self._programs.whole(self._sizes.cache(n + 1)) for n in starts]
        return ((a, b) for a, b in itertools.pairwise(lengths) if a != b)


def _sharable(prompt: RunningPrompt) -> np.ndarray:
    """Returns the tokens that may be cached: without the last, and before an invocation."""
    return prompt.ids[:-1][: prompt.job.active or None]


def _slot(prompt: RunningPrompt) -> int:
    assert prompt.job.slot is not None
    return prompt.job.slot
