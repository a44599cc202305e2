"""Continuous batching: a sample enters between two tokens, and leaves when it ends."""

import dataclasses
import itertools
from collections import Counter, deque
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from train.serve.engine.base import Adapter, Base
from train.serve.engine.drawing import Drawing, How, Tokens
from train.serve.engine.pool import Pool
from train.serve.engine.prompts import Prefixes, Prompt
from train.serve.engine.sizes import Sizes
from train.serve.engine.trainer import Trainer
from train.serve.requests import Completion, Done, Drawn, Piece, Sample, Top

_HELD = 32  # decoded tokens after which fewer or shorter rows are chosen, if they would do


@dataclasses.dataclass(eq=False)
class Job:
    """A sample that was asked for.

    Attributes:
      adapter: its adapter's arrays, as they were when it was asked for; None for the base.
      completions: the finished ones, by place.
    """

    request: Sample
    adapter: Adapter | None
    seed: int
    done: Done
    seen: Callable[[Piece], None] | None
    slot: int = 0
    cancelled: bool = False
    completions: dict[int, Completion] = dataclasses.field(default_factory=dict)
    scores: tuple[Any, Any] = (None, None)
    cached: int = 0


@dataclasses.dataclass(eq=False)
class _Row:
    """A completion under way."""

    job: Job
    index: int
    ids: list[int] = dataclasses.field(default_factory=list)
    logps: list[float] = dataclasses.field(default_factory=list)
    top: list[tuple[np.ndarray, np.ndarray]] = dataclasses.field(default_factory=list)


class Sampler:
    """Draws the completions of many samples side by side, each by its own adapter."""

    def __init__(
        self,
        base: Base,
        trainer: Trainer,
        drawing: Drawing,
        pool: Pool,
        sizes: Sizes,
        text_of: Callable[[Sequence[int]], str],
    ) -> None:
        """Begins without samples.

        Args:
          base, trainer, drawing, pool, sizes: see their classes.
          text_of: decodes tokens, to find texts that end a completion.
        """
        self._base, self._trainer, self._sizes, self._text_of = base, trainer, sizes, text_of
        self._drawing, self._pool = drawing, pool
        self._prefixes = Prefixes(drawing, sizes)
        self._waiting: dict[Any, deque[Job]] = {}
        self._prompts: deque[Prompt] = deque()
        self._ready: deque[tuple[Prompt, int]] = deque()  # prompts that ran, completions to begin
        self._rows: dict[int, _Row] = {}
        self._width, self._length = sizes.widths[0], sizes.caches[0]
        self._arrays = drawing.empty(self._width, self._length)
        self._idle = 0  # tokens since the rows were all needed
        self._served: Counter[Any] = Counter()
        self.prompt_tokens = self.drawn_tokens = 0

    @property
    def waiting(self) -> int:
        """The number of samples that wait."""
        return sum(map(len, self._waiting.values())) + len(self._prompts)

    @property
    def drawing(self) -> int:
        """The number of completions under way."""
        return len(self._rows)

    @property
    def busy(self) -> bool:
        """Whether there is anything to do."""
        return bool(self._waiting or self._prompts or self._ready or self._rows)

    def add(self, job: Job) -> None:
        """Queues a sample; those of one adapter take turns with those of others."""
        who = job.request.adapter
        if who not in self._waiting and who not in self._active():
            least = min((self._served[one] for one in self._active()), default=0)
            self._served[who] = max(self._served[who], least)
        self._waiting.setdefault(who, deque()).append(job)

    def step(self) -> None:
        """Runs a chunk of a prompt, and draws a token of each completion."""
        self._drop_cancelled()
        self._admit()
        self._run_prompt()
        self._begin_rows()
        if self._rows:
            self._draw()

    def _active(self) -> set[Any]:
        under_way = [row.job for row in self._rows.values()] + [p.job for p in self._prompts]
        return {job.request.adapter for job in under_way} | self._waiting.keys()

    def _admit(self) -> None:
        """Takes in samples while there is room, of the adapter that was served least first."""
        room = self._sizes.sequences - len(self._rows) - len(self._prompts)
        room -= sum(count for _, count in self._ready)
        for who in sorted(self._waiting, key=lambda who: self._served[who]):
            queue = self._waiting[who]
            while queue and room > 0:
                slot = self._pool.take(queue[0].adapter)
                if slot is None:
                    break
                job = queue.popleft()
                job.slot = slot
                self._prompts.append(self._prefixes.begin(job))
                room -= 1
            if not queue:
                del self._waiting[who]

    def _run_prompt(self) -> None:
        """Runs a chunk of the prompt whose turn it is."""
        for _ in range(len(self._prompts)):
            prompt = self._prompts.popleft()
            if self._prefixes.waits(prompt, self._prompts):
                self._prompts.append(prompt)
                continue
            n = self._prefixes.run(prompt, self._pool.tree)
            self.prompt_tokens += n
            self._served[prompt.job.request.adapter] += n
            if prompt.is_done:
                self._finish_prompt(prompt)
            else:
                self._prompts.append(prompt)
            return

    def _finish_prompt(self, prompt: Prompt) -> None:
        job = prompt.job
        request, job.cached = job.request, prompt.cached
        if request.prompt_logprobs or request.top_prompt:
            adapter = job.adapter or self._base.none
            tokens = np.asarray(request.prompt, np.int32)
            job.scores = self._trainer.prompt(adapter, tokens, request.top_prompt)
        if request.max_tokens == 0:
            nothing = Completion(np.zeros(0, np.int32), np.zeros(0, np.float32), False)
            job.completions = dict.fromkeys(range(request.n), nothing)
            self._end(job)
        else:
            self._ready.append((prompt, 0))

    def _begin_rows(self) -> None:
        """Gives completions whose prompt ran a row each, as far as there are free ones."""
        while self._ready and len(self._rows) < self._sizes.sequences:
            prompt, index = self._ready.popleft()
            if index + 1 < prompt.job.request.n:
                self._ready.appendleft((prompt, index + 1))
            self._begin(prompt, index)

    def _begin(self, prompt: Prompt, index: int) -> None:
        job = prompt.job
        request, n = job.request, len(job.request.prompt)
        how = self._how(request, job.seed, index)
        alone = jax.tree.map(lambda x: x[None], how)
        tokens = self._drawing.first(prompt.logits, alone, np.bool_(request.top > 0))
        row, cache = _Row(job, index), prompt.cache
        assert cache is not None  # it ran
        self._fit(len(self._rows) + 1, n + 1)
        free = next(i for i in itertools.count() if i not in self._rows)
        self._rows[free] = row
        mine = (np.int32(job.slot), how)
        self._arrays = self._drawing.insert(
            self._arrays, np.int32(free), cache, np.int32(n), tokens.ids[0], mine
        )
        self._take(free, row, jax.tree.map(np.asarray, tokens), 0)

    def _how(self, request: Sample, seed: int, index: int) -> How:
        """Returns how the tokens of a completion are drawn."""
        key = jax.random.fold_in(jax.random.key(seed % 2**32), index)
        top_k = request.top_k if request.top_k > 0 else self._base.model.config.vocab_size
        return How(
            jnp.float32(request.temperature), jnp.float32(request.top_p), jnp.int32(top_k), key
        )

    def _draw(self) -> None:
        longest = max(len(r.job.request.prompt) + len(r.ids) for r in self._rows.values())
        self._fit(len(self._rows), longest)
        with_top = np.bool_(any(row.job.request.top for row in self._rows.values()))
        self._arrays, tokens = self._drawing.decode(self._pool.tree, self._arrays, with_top)
        found = jax.tree.map(np.asarray, tokens)
        for place, row in [*self._rows.items()]:
            self._take(place, row, found, place)

    def _take(self, place: int, row: _Row, tokens: Tokens, at: int) -> None:
        """Notes the token that a row drew, and ends the row if it is the last one."""
        request = row.job.request
        token, logp = int(tokens.ids[at]), float(tokens.logps[at])
        top = None
        if request.top:
            top = (tokens.top[0][at, : request.top], tokens.top[1][at, : request.top])
            row.top.append(top)
        row.ids.append(token)
        row.logps.append(logp)
        self.drawn_tokens += 1
        self._served[request.adapter] += 1
        if row.job.seen and not row.job.cancelled:
            row.job.seen(Piece(row.index, token, logp, top))
        room = self._sizes.max_length - len(request.prompt)
        most = room if request.max_tokens is None else min(room, request.max_tokens)
        stopped = token in request.stop_ids or self._says_stop(row)
        if stopped or len(row.ids) >= most:
            self._finish_row(place, stopped)

    def _says_stop(self, row: _Row) -> bool:
        stops = row.job.request.stop
        if not stops:
            return False
        text = self._text_of(row.ids[-(max(map(len, stops)) + 8) :])
        return any(stop in text for stop in stops)

    def _finish_row(self, place: int, stopped: bool) -> None:
        row = self._rows.pop(place)
        job = row.job
        top = Top(*map(np.stack, zip(*row.top, strict=True))) if row.top else None
        job.completions[row.index] = Completion(
            np.array(row.ids, np.int32), np.array(row.logps, np.float32), stopped, top
        )
        is_last = not any(other.job is job for other in self._rows.values())
        if len(job.completions) == job.request.n or (job.cancelled and is_last):
            self._end(job)

    def _end(self, job: Job) -> None:
        self._pool.give(job.slot)
        completions = [job.completions[i] for i in sorted(job.completions)]
        job.done(Drawn(completions, *job.scores, cached=job.cached))

    def warm_up(self) -> None:
        """Compiles all functions, for all shapes; nobody samples yet."""
        drawing, sizes, off = self._drawing, self._sizes, np.bool_(False)
        ids = np.zeros((1, sizes.chunk), np.int32)
        slot, one = np.zeros(1, np.int32), np.int32(1)
        cache = drawing.prompt(sizes.max_length)
        logits, cache = drawing.extend(self._pool.tree, slot, ids, one, cache)
        how = self._how(Sample(adapter=None, prompt=[0]), 0, 0)
        token = drawing.first(logits, jax.tree.map(lambda x: x[None], how), off).ids[0]
        for width in sizes.widths:
            for length in sizes.caches:
                rows = drawing.empty(width, length)
                rows = drawing.insert(rows, np.int32(0), cache, one, token, (np.int32(0), how))
                rows, _ = drawing.decode(self._pool.tree, rows, off)
                for wide in sizes.widths:
                    for long in sizes.caches:
                        if (wide, long) != (width, length):
                            drawing.fit(rows, np.zeros(wide, np.int32), long)
        self._pool.give(self._pool.take(self._base.none) or 0)

    def _drop_cancelled(self) -> None:
        for who, queue in [*self._waiting.items()]:
            kept = deque(job for job in queue if not job.cancelled)
            for job in queue:
                if job.cancelled:
                    job.done(Drawn([]))
            if kept:
                self._waiting[who] = kept
            else:
                del self._waiting[who]
        for places in (self._prompts, self._ready):
            for one in [*places]:
                prompt = one if isinstance(one, Prompt) else one[0]
                if prompt.job.cancelled:
                    places.remove(one)
                    if not any(row.job is prompt.job for row in self._rows.values()):
                        self._end(prompt.job)
        for place, row in [*self._rows.items()]:
            if row.job.cancelled:
                self._finish_row(place, stopped=False)

    def _fit(self, n: int, length: int) -> None:
        """Makes room for n rows of a length; gives up room that is long unneeded."""
        width, least = self._sizes.width(n), self._sizes.cache(length)
        smaller = width < self._width or least < self._length
        self._idle = self._idle + 1 if smaller else 0
        if self._idle < _HELD:
            width, least = max(width, self._width), max(least, self._length)
        if (width, least) == (self._width, self._length):
            return
        order = [*self._rows]
        rows = dict(enumerate(self._rows.values()))
        order += [0] * (width - len(order))
        if width == self._width:
            order, rows = [*range(width)], self._rows
        self._arrays = self._drawing.fit(self._arrays, np.array(order, np.int32), least)
        self._rows, self._width, self._length, self._idle = rows, width, least, 0
