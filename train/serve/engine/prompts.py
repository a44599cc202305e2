"""Runs prompts in chunks, and runs a prefix that several prompts share only once.

A chunk is `Sizes.chunk` tokens of one prompt. A piece is a smaller number of tokens, which runs in
one call with pieces of other prompts.
"""

import dataclasses
import functools
import itertools
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from lora_jax.core.types import Tree
from lora_jax.models.layers.cache import Cache
from lora_jax.models.sampling.blocks import CacheBlock
from lora_jax.models.sampling.prompts import count_common_prefix
from train.serve.engine.jobs import ActiveCompletion, SampleJob
from train.serve.engine.prefixes import PrefixScope, PrefixStore
from train.serve.engine.programs import SamplingPrograms
from train.serve.engine.rows import RunningRows
from train.serve.engine.sizes import Sizes


@dataclasses.dataclass(eq=False)
class RunningPrompt:
    """A prompt whose tokens are running or have run.

    Attributes:
      job: the sample.
      ids: its tokens.
      cache: keys and values of the first `n_run` tokens.
      n_run: the tokens that ran, or were found.
      n_cached: the tokens among these that were found in the store.
      logits: [1, vocab], after the last token, once all ran.
      n_begun: completions that began.
    """

    job: SampleJob
    ids: np.ndarray
    cache: Cache | None = None
    n_run: int = 0
    n_cached: int = 0
    logits: Any = None
    n_begun: int = 0

    @property
    def is_done(self) -> bool:
        """True if all tokens of the prompt have run."""
        return self.n_run == len(self.ids)

    @property
    def n_left(self) -> int:
        """The number of tokens that have not run yet."""
        return len(self.ids) - self.n_run


class PromptRunner:
    """Runs prompts in chunks, reuses stored prefixes, and stores new ones.

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
        """Creates a runner with an empty store."""
        self._programs = programs
        self._sizes = sizes
        self._chunk_tokens = sizes.chunk
        self.store = PrefixStore(sizes.chunk, sizes.prefixes, programs.has_memory)

    def begin(self, job: SampleJob) -> RunningPrompt:
        """Returns a new record of a sample's prompt, none of whose tokens have run."""
        return RunningPrompt(job, np.asarray(job.request.prompt, np.int32))

    def waits(
        self,
        prompt: RunningPrompt,
        others: Iterable[RunningPrompt],
        due: Sequence[RunningPrompt] = (),
    ) -> bool:
        """Returns True if a prompt should wait for another prompt that runs the same prefix.

        Args:
          prompt: the prompt.
          others: the prompts under way.
          due: prompts among `others` whose next tokens run at once.
        """
        has_started = prompt.cache is not None
        if has_started or not self._sizes.prefixes:
            return False
        max_coming_tokens = 0  # of prefixes that other prompts are about to run
        for other in others:
            is_running = other.n_run > 0 or other in due
            if is_running and self._can_reuse(prompt, other):
                prefix_tokens = self._count_shared_tokens(prompt, other)
                is_coming = other.n_run < prefix_tokens
                if is_coming:
                    max_coming_tokens = max(max_coming_tokens, prefix_tokens)
        if not max_coming_tokens:
            return False
        stored_tokens = len(self._find_blocks(prompt)) * self._chunk_tokens
        return max_coming_tokens > stored_tokens

    def run(self, prompts: Sequence[RunningPrompt], tree: Tree) -> dict[RunningPrompt, int]:
        """Runs the next chunk of one prompt, or a piece of each of several prompts.

        Args:
          prompts: the prompt, and others that may run with it, if that takes no longer.
          tree: the base with adapters in slots.

        Returns:
          The number of tokens that ran, of each prompt that did.
        """
        # Either a whole chunk of the first prompt runs, or a piece of each prompt.
        leader = prompts[0]
        caches = {prompt: self._prepare_cache(prompt) for prompt in prompts}
        batch = self._batch_with(leader, caches)
        piece_tokens = {prompt: min(self._sizes.piece_tokens, prompt.n_left) for prompt in batch}
        chunk_tokens = min(self._chunk_tokens, leader.n_left)
        is_chunk_start = leader.n_run % self._chunk_tokens == 0
        runs_chunk = is_chunk_start and chunk_tokens >= sum(piece_tokens.values())
        tokens_run = {leader: chunk_tokens} if runs_chunk else piece_tokens
        try:
            if runs_chunk:
                self._run_chunk(leader, caches[leader], tree)
            else:
                self._run_pieces({prompt: caches[prompt] for prompt in batch}, tree)
            for prompt, n_tokens in tokens_run.items():
                prompt.n_run += n_tokens
                self._store_newest_chunk(prompt)
        except Exception:  # the call consumed the caches: prompts that go on start again
            for prompt in tokens_run:
                prompt.cache = None
                prompt.n_run = 0
            raise
        return tokens_run

    def _batch_with(
        self, leader: RunningPrompt, caches: Mapping[RunningPrompt, Cache]
    ) -> list[RunningPrompt]:
        """Returns the prompts that can run in one call with `leader`, which is first."""
        cache_length = caches[leader].positions.shape[1]
        batch = [leader]
        for prompt, cache in caches.items():
            if prompt is leader or cache.positions.shape[1] != cache_length:
                continue
            # An activated LoRA runs by itself: one of its chunks is the base's up to the invocation
            if not (prompt.job.active_start or leader.job.active_start):
                batch.append(prompt)
        return batch[: self._sizes.piece_prompts]

    def store_completion(self, completion: ActiveCompletion, rows: RunningRows) -> None:
        """Stores a completion's tokens for reuse, if --fast-prompts permits different last bits.

        Not in models with linear layers: these remember a row's newest token, not each chunk's end.
        Nor where keys depend on the length of the cache: that of a row is that of the longest one.

        Args:
          completion: a completion that ends.
          rows: the rows, one of which still is its.
        """
        programs = self._programs
        has_reusable_blocks = not (programs.has_memory or programs.depends_on_cache_length)
        if not self._sizes.fast_prompts or not has_reusable_blocks:
            return
        is_activated_later = completion.job.active_start > 0
        if is_activated_later:
            return
        scope = self._prefix_scope(completion.job)
        prompt = completion.job.request.prompt
        ids = np.asarray([*prompt, *completion.ids[:-1]], np.int32)
        chunk_tokens = self._chunk_tokens
        # The prompt's last chunk, if it is not whole, goes on with drawn tokens.
        drawn_start = len(prompt) - len(prompt) % chunk_tokens
        for start in range(drawn_start, len(ids) - chunk_tokens + 1, chunk_tokens):
            make_block = functools.partial(rows.block, completion, start)
            self.store.add(scope, ids[: start + chunk_tokens], make_block)

    def _can_reuse(self, prompt: RunningPrompt, other: RunningPrompt) -> bool:
        """Returns True if a prompt can reuse the blocks that another prompt computes.

        Both must be of one adapter in one session, and have the same weights. A prompt with other
        weights of the same name may wait for the slot that this prompt holds.
        """
        if other.job.path[:-1] != prompt.job.path[:-1]:
            return False
        has_same_weights = other.job.adapter is prompt.job.adapter
        return has_same_weights and self._prefix_scope(other.job) == self._prefix_scope(prompt.job)

    def _count_shared_tokens(self, prompt: RunningPrompt, other: RunningPrompt) -> int:
        """Returns the length of two prompts' common prefix, rounded down to chunks."""
        n_tokens = count_common_prefix(_storable_ids(prompt), _storable_ids(other))
        return n_tokens - n_tokens % self._chunk_tokens

    def _prefix_scope(self, job: SampleJob) -> PrefixScope:
        """Returns the store's scope for the tokens of a prompt before an invocation."""
        cache_length = None
        if self._programs.depends_on_cache_length:
            cache_length = self._sizes.cache_length(len(job.request.prompt))
        # Up to its invocation, the prompt of an activated LoRA is the base's, and is found as such.
        adapter = None if job.active_start else job.adapter
        return PrefixScope(job.request.client.owner, adapter, cache_length)

    def _active_scope(self, prompt: RunningPrompt) -> tuple[PrefixScope, int]:
        """Returns the scope of the tokens after an invocation, and their first index.

        The tokens before the chunk with the invocation are part of the scope.
        """
        job = prompt.job
        base_scope = self._prefix_scope(job)
        text_end = job.active_start - job.active_start % self._chunk_tokens
        kind = (base_scope.kind, job.active_start, prompt.ids[:text_end].tobytes())
        return dataclasses.replace(base_scope, adapter=job.adapter, kind=kind), text_end

    def _find_blocks(self, prompt: RunningPrompt) -> list[CacheBlock]:
        """Returns the stored blocks of a prompt's longest prefix, in order."""
        blocks = self.store.find(self._prefix_scope(prompt.job), _storable_ids(prompt))
        if prompt.job.active_start:
            active_scope, text_end = self._active_scope(prompt)
            if len(blocks) * self._chunk_tokens == text_end:
                blocks += self.store.find(active_scope, prompt.ids[text_end:-1])
        return blocks

    def _next_cache_length(self, prompt: RunningPrompt) -> int:
        """Returns the length of the cache in which a prompt's next chunk runs."""
        if self._programs.depends_on_cache_length:
            return self._sizes.cache_length(len(prompt.ids))
        return self._sizes.cache_length(prompt.n_run + 1)

    def _prepare_cache(self, prompt: RunningPrompt) -> Cache:
        """Returns a prompt's cache with the stored prefix and room for the next chunk."""
        if prompt.cache is None:
            # The prompt starts: the stored blocks of its prefix are copied into a new cache.
            blocks = self._find_blocks(prompt)
            prompt.n_cached = len(blocks) * self._chunk_tokens
            prompt.n_run = prompt.n_cached
            cache = self._programs.prompt_cache(self._next_cache_length(prompt))
            for i, block in enumerate(blocks):
                cache = self._programs.put_block(cache, np.int32(i * self._chunk_tokens), block)
            prompt.cache = cache
        cache_length = self._programs.round_up(self._next_cache_length(prompt))
        if prompt.cache.positions.shape[1] < cache_length:
            prompt.cache = self._programs.grow(prompt.cache, cache_length)
        return prompt.cache

    def _run_chunk(self, prompt: RunningPrompt, cache: Cache, tree: Tree) -> None:
        """Runs the next chunk of a prompt, with the base for tokens before an invocation."""
        ids, n_tokens = self._next_ids(prompt, self._chunk_tokens)
        slot = np.int32(_slot_of_prompt(prompt))
        n_base_tokens = np.int32(prompt.job.active_start - prompt.n_run)
        if 0 < n_base_tokens < n_tokens:
            prompt.logits, prompt.cache = self._programs.extend_after(
                tree, slot, ids, n_tokens, cache, n_base_tokens
            )
            return
        if n_base_tokens > 0:  # the whole chunk lies before the invocation
            slot = np.int32(0)
        prompt.logits, prompt.cache = self._programs.extend(tree, slot, ids, n_tokens, cache)

    def _run_pieces(self, caches: dict[RunningPrompt, Cache], tree: Tree) -> None:
        """Runs the next piece of each prompt in one call, padded to a fixed batch size."""
        n_prompts = self._sizes.piece_prompts
        slots = np.zeros(n_prompts, np.int32)
        ids = np.zeros((n_prompts, 1, self._sizes.piece_tokens), np.int32)
        n_tokens = np.zeros(n_prompts, np.int32)
        for i, prompt in enumerate(caches):
            slots[i] = _slot_of_prompt(prompt)
            ids[i], n_tokens[i] = self._next_ids(prompt, self._sizes.piece_tokens)
        # The compiled call takes a fixed number of prompts: empty caches fill it up.
        batch_caches = [*caches.values()]
        cache_length = batch_caches[0].positions.shape[1]
        while len(batch_caches) < n_prompts:
            batch_caches.append(self._programs.prompt_cache(cache_length))
        logits, extended_caches = self._programs.extend_all(
            tree, slots, ids, n_tokens, tuple(batch_caches)
        )
        for i, prompt in enumerate(caches):
            prompt.logits = logits[i]
            prompt.cache = extended_caches[i]

    def _next_ids(self, prompt: RunningPrompt, length: int) -> tuple[np.ndarray, np.int32]:
        """Returns a prompt's next tokens, [1, length] int32, padded, and their number."""
        next_ids = prompt.ids[prompt.n_run : prompt.n_run + length]
        padded = np.zeros((1, length), np.int32)
        padded[0, : len(next_ids)] = next_ids
        return padded, np.int32(len(next_ids))

    def _store_newest_chunk(self, prompt: RunningPrompt) -> None:
        """Stores the newest chunk for reuse if it is complete."""
        is_chunk_end = prompt.n_run % self._chunk_tokens == 0
        if not is_chunk_end:
            return
        assert prompt.cache is not None
        scope = self._prefix_scope(prompt.job)
        text_start = 0
        was_activated = 0 < prompt.job.active_start < prompt.n_run
        if was_activated:
            scope, text_start = self._active_scope(prompt)
        chunk_start = prompt.n_run - self._chunk_tokens
        make_block = functools.partial(self._programs.copy_chunk, prompt.cache, chunk_start)
        self.store.add(scope, prompt.ids[text_start : prompt.n_run], make_block)

    @property
    def steps(self) -> int:
        """The number of steps of `warm_up`."""
        return len(self._sizes.cache_lengths) * (2 if self._sizes.fast_prompts else 1)

    def warm_up(self, tree: Tree) -> Generator[None, None, tuple[jax.Array, list[Cache]]]:
        """Compiles all functions of prompts for all shapes, one per iteration.

        Args:
          tree: the base with adapters in slots.

        Returns:
          The logits after a prompt, [1, vocab], and a cache of each length.
        """
        programs = self._programs
        caches: list[Cache] = []
        chunk_ids = np.zeros((1, self._chunk_tokens), np.int32)
        n_prompts = self._sizes.piece_prompts
        piece_ids = np.zeros((n_prompts, 1, self._sizes.piece_tokens), np.int32)
        zeros = np.zeros(n_prompts, np.int32)
        for length in self._sizes.cache_lengths:
            cache = programs.prompt_cache(length)
            logits, cache = programs.extend(tree, np.int32(0), chunk_ids, np.int32(1), cache)
            block = programs.copy_chunk(cache, 0)
            cache = programs.put_block(cache, np.int32(0), block)
            if programs.has_memory:
                cache = programs.put_block(cache, np.int32(0), block._replace(recurrent=None))
            caches.append(cache)
            yield
            if self._sizes.fast_prompts:
                empty_caches = tuple(programs.prompt_cache(length) for _ in range(n_prompts))
                programs.extend_all(tree, zeros, piece_ids, zeros, empty_caches)
                yield
        for length, next_length in self._cache_growth_lengths():
            programs.grow(programs.prompt_cache(length), next_length)
        return logits, caches

    def _cache_growth_lengths(self) -> Iterator[tuple[int, int]]:
        """Yields each length of a cache with the next larger length."""
        chunk_starts = range(0, self._sizes.max_length, self._chunk_tokens)
        lengths = [
            self._programs.round_up(self._sizes.cache_length(start + 1)) for start in chunk_starts
        ]
        for length, next_length in itertools.pairwise(lengths):
            if length != next_length:
                yield length, next_length


def _storable_ids(prompt: RunningPrompt) -> np.ndarray:
    """Returns a prompt's reusable tokens: all before an invocation, and never the last token."""
    ids = prompt.ids[:-1]
    return ids[: prompt.job.active_start] if prompt.job.active_start else ids


def _slot_of_prompt(prompt: RunningPrompt) -> int:
    """Returns the slot of a prompt's adapter."""
    assert prompt.job.slot is not None
    return prompt.job.slot
