"""Prompts run in chunks, and what they begin with alike runs once."""

import dataclasses
from collections.abc import Iterable
from typing import Any

import numpy as np

from lora_jax.core.types import Tree
from lora_jax.models.layers.cache import Cache
from lora_jax.models.sampling.prompts import common_prefix
from train.serve.engine.base import Adapter
from train.serve.engine.jobs import SampleJob
from train.serve.engine.programs import SamplingPrograms
from train.serve.engine.sizes import Sizes

_Computed = tuple[Adapter | None, np.ndarray, Cache | None]
_KEPT = 4  # prompts whose keys and values are kept


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


class PrefixCache:
    """Keeps the keys and values of the latest prompts.

    What a prompt has in common with one of them is taken over up to the end of a whole chunk, and
    only if their caches are of one length, so that each prompt has the very numbers that it would
    have had alone.
    """

    def __init__(self, programs: SamplingPrograms, sizes: Sizes) -> None:
        """Begins without any."""
        self._programs, self._sizes, self._chunk = programs, sizes, sizes.chunk
        self._kept: list[_Computed] = []

    def begin(self, job: SampleJob) -> RunningPrompt:
        """Returns a sample's prompt, of which nothing ran yet."""
        return RunningPrompt(job, np.asarray(job.request.prompt, np.int32))

    def waits(self, prompt: RunningPrompt, others: Iterable[RunningPrompt]) -> bool:
        """Returns True if another prompt is about to run the tokens that this one begins with."""
        if prompt.n:
            return False
        who = prompt.job.path[:-1]  # those of others have other turns
        others = [other for other in others if other.n and other.job.path[:-1] == who]
        coming = [(other.job.adapter, other.ids, other.cache) for other in others]
        return self._common(prompt, coming)[0] > self._common(prompt, self._computed(others))[0]

    def run(self, prompt: RunningPrompt, tree: Tree, others: Iterable[RunningPrompt] = ()) -> int:
        """Runs the next chunk of a prompt; returns its number of tokens.

        Args:
          prompt: the prompt.
          tree: the base with adapters in slots.
          others: prompts that run, too.
        """
        if prompt.cache is None:
            n, cache = self._common(prompt, self._computed(others))
            prompt.n = prompt.cached = n
            if cache is None:
                prompt.cache = self._programs.prompt(self._sizes.cache(len(prompt.ids)))
            else:
                prompt.cache = self._programs.cut(cache, np.int32(n))
        ids = np.zeros((1, self._chunk), np.int32)
        part = prompt.ids[prompt.n : prompt.n + self._chunk]
        ids[0, : len(part)] = part
        assert prompt.job.slot is not None
        slot = np.int32(prompt.job.slot)
        prompt.logits, prompt.cache = self._programs.extend(
            tree, slot, ids, np.int32(len(part)), prompt.cache
        )
        prompt.n += len(part)
        if prompt.is_done and len(prompt.ids) > self._chunk:
            self._kept = [*self._kept[1 - _KEPT :], (prompt.job.adapter, prompt.ids, prompt.cache)]
        return len(part)

    def _computed(self, others: Iterable[RunningPrompt]) -> list[_Computed]:
        """Returns the tokens that ran, with their adapters, and keys and values."""
        under_way = [(each.job.adapter, each.ids[: each.n], each.cache) for each in others]
        return self._kept + [each for each in under_way if len(each[1])]

    def _common(
        self, prompt: RunningPrompt, others: Iterable[_Computed]
    ) -> tuple[int, Cache | None]:
        """Returns the tokens of whole chunks that a prompt shares with another, and its cache."""
        best: tuple[int, Cache | None] = 0, None
        length = self._programs.whole(self._sizes.cache(len(prompt.ids)))
        for adapter, ids, cache in others:
            if cache is None or cache.positions.shape[1] != length:
                continue
            if adapter is not prompt.job.adapter:
                continue
            n = common_prefix(ids, prompt.ids[:-1])
            n -= n % self._chunk
            if n > best[0]:
                best = n, cache
        return best
