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

_CHUNKS = 8  # of prompts, between two tokens where all rows are free
_HELD = 32  # decoded tokens after which fewer or shorter rows are chosen, if they would do
_COLDEST = 1e-4  # the lowest temperature: logits that are divided by less lose their digits


@dataclasses.dataclass(eq=False)
class Job:
    """A sample that was asked for.

    Attributes:
      adapter: its adapter's arrays, as they were when it was asked for; None for the base.
      slot: theirs, once it was taken in.
      completions: the finished ones, by place.
      is_over: whether `done` was called; then it holds no arrays.
    """

    request: Sample
    adapter: Adapter | None
    seed: int
    done: Done
    seen: Callable[[Piece], None] | None
    slot: int | None = None
    is_over: bool = False
    completions: dict[int, Completion] = dataclasses.field(default_factory=dict)
    scores: tuple[Any, Any, Any] = (None, None, None)
    cached: int = 0


@dataclasses.dataclass(eq=False)
class _Row:
    """A completion under way."""

    job: Job
    index: int
    ids: list[int] = dataclasses.field(default_factory=list)
    logps: list[float] = dataclasses.field(default_factory=list)
    top: list[tuple[np.ndarray, np.ndarray]] = dataclasses.field(default_factory=list)

    def end(self, stopped: bool) -> None:
        """Hands over what was drawn."""
        top = Top(*map(np.stack, zip(*self.top, strict=True))) if self.top else None
        ids, logps = np.array(self.ids, np.int32), np.array(self.logps, np.float32)
        self.job.completions[self.index] = Completion(ids, logps, stopped, top)


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
        self._prompts: list[Prompt] = []
        self._ready: list[Prompt] = []  # prompts that ran, with completions that are to begin
        self._rows: dict[int, _Row] = {}
        self._width, self._length = sizes.widths[0], sizes.caches[0]
        self._arrays = drawing.empty(self._width, self._length)
        self._idle = 0  # tokens since the rows were all needed
        self._ran = 0  # chunks of prompts since the last token
        self._served: Counter[Any] = Counter()
        self.prompt_tokens = self.drawn_tokens = 0

    @property
    def waiting(self) -> int:
        """The number of samples that wait."""
        ready = sum(not prompt.begun for prompt in [*self._ready])
        return sum(map(len, self._waiting.values())) + len(self._prompts) + ready

    @property
    def drawing(self) -> int:
        """The number of completions under way."""
        return len(self._rows)

    @property
    def busy(self) -> bool:
        """True where there is anything to do."""
        return bool(self._waiting or self._prompts or self._ready or self._rows)

    def add(self, job: Job) -> None:
        """Queues a sample; those of one adapter take turns with those of others."""
        who, active = job.request.adapter, self._active()
        if who not in active:  # it neither saved up turns, nor owes those that nobody wanted
            behind = [self._served[one] for one in active]
            least = min(behind) if behind else max(self._served.values(), default=0)
            self._served[who] = max(self._served[who], least)
            kept = {one: n for one, n in self._served.items() if n > least or one in active}
            self._served = Counter(kept | {who: self._served[who]})
        self._waiting.setdefault(who, deque()).append(job)

    def step(self) -> None:
        """Runs a chunk of a prompt, or draws a token of each completion.

        A token costs as much for few rows as for all. So the more rows are free, the more chunks
        run before the next token.
        """
        self._admit()
        free = self._sizes.sequences - len(self._rows)
        chunks = max(1, _CHUNKS * free // self._sizes.sequences)
        if self._prompts and (not self._rows or self._ran < chunks):
            self._ran += 1
            self._run_prompt()
        elif self._rows:
            self._ran = 0
            self._draw()
        self._begin_rows()

    def end(self, job: Job, error: Exception | None = None) -> None:
        """Ends a sample that is not over: with what was drawn so far, or with what went wrong."""
        if job.is_over:
            return
        job.is_over, who = True, job.request.adapter
        for place in [place for place, row in self._rows.items() if row.job is job]:
            self._rows.pop(place).end(stopped=False)
        if job in self._waiting.get(who, ()):
            self._waiting[who].remove(job)
            if not self._waiting[who]:
                del self._waiting[who]
        self._prompts = [prompt for prompt in self._prompts if prompt.job is not job]
        self._ready = [prompt for prompt in self._ready if prompt.job is not job]
        if job.slot is not None:
            self._pool.give(job.slot)
        completions = [job.completions[i] for i in sorted(job.completions)]
        own, top, targets = job.scores
        job.done(error or Drawn(completions, own, top, job.cached, targets))
        job.adapter, job.completions, job.scores = None, {}, (None, None, None)

    def fail(self, error: Exception) -> None:
        """Ends all samples, by an error in what they share."""
        jobs = [*itertools.chain(*self._waiting.values()), *self._under_way()]
        for job in jobs:
            self.end(job, error)
        self._arrays = self._drawing.empty(self._width, self._length)

    def _under_way(self) -> list[Job]:
        prompts = self._prompts + self._ready
        return [prompt.job for prompt in prompts] + [row.job for row in self._rows.values()]

    def _active(self) -> set[Any]:
        return {job.request.adapter for job in self._under_way()} | self._waiting.keys()

    def _by_turn(self, prompts: Sequence[Prompt]) -> list[Prompt]:
        """Returns prompts, those of the adapter that was served least first."""
        return sorted(prompts, key=lambda prompt: self._served[prompt.job.request.adapter])

    def _admit(self) -> None:
        """Takes in samples while there is room, of the adapter that was served least first.

        One of an adapter that has nothing to begin is taken in without room, so that nobody's many
        completions hold it up. Where its adapter finds no slot, no other one is taken in before.
        """
        to_begin = self._prompts + self._ready
        room = self._sizes.sequences - len(self._rows)
        room -= sum(prompt.job.request.n - prompt.begun for prompt in to_begin)
        slots, has_slot = {prompt.job.slot for prompt in to_begin}, True
        for who in sorted(self._waiting, key=lambda who: self._served[who]):
            queue = self._waiting[who]
            while queue and (has_slot or queue[0].adapter is None):
                job = queue[0]
                slot = self._pool.take(job.adapter)
                if slot is None:
                    has_slot = False
                    break
                if room <= 0 and slot in slots:
                    self._pool.give(slot)
                    break
                job.slot = slot
                slots.add(slot)
                self._prompts.append(self._prefixes.begin(queue.popleft()))
                room -= job.request.n
            if not queue:
                del self._waiting[who]

    def _run_prompt(self) -> None:
        """Runs a chunk of the prompt whose turn it is."""
        for prompt in self._by_turn(self._prompts):
            if not self._prefixes.waits(prompt, self._prompts):
                self._prompts.remove(prompt)
                self._prompts.append(prompt)
                self._for(prompt.job, self._run_chunk, prompt)
                return

    def _run_chunk(self, prompt: Prompt) -> None:
        n = self._prefixes.run(prompt, self._pool.tree, self._prompts)
        self.prompt_tokens += n
        self._served[prompt.job.request.adapter] += n
        if prompt.is_done:
            self._prompts.remove(prompt)
            self._finish_prompt(prompt)

    def _for(self, job: Job, function: Callable[..., None], *args: Any) -> None:
        """Does something for a sample, which alone fails if that does, and the rows stay whole."""
        try:
            function(*args)
        except Exception as error:
            self.end(job, error)
            if self._arrays.last.is_deleted():
                raise

    def _finish_prompt(self, prompt: Prompt) -> None:
        job = prompt.job
        request, job.cached = job.request, prompt.cached
        if request.prompt_logprobs or request.top_prompt or request.targets is not None:
            adapter = job.adapter or self._base.none
            tokens = np.asarray(request.prompt, np.int32)
            job.scores = self._trainer.prompt(adapter, tokens, request.top_prompt, request.targets)
        if request.max_tokens == 0:
            nothing = Completion(np.zeros(0, np.int32), np.zeros(0, np.float32), False)
            job.completions = dict.fromkeys(range(request.n), nothing)
            self.end(job)
        else:
            self._ready.append(prompt)

    def _begin_rows(self) -> None:
        """Gives completions whose prompt ran a row each, as far as there are free ones."""
        while self._ready and len(self._rows) < self._sizes.sequences:
            prompt = self._by_turn(self._ready)[0]
            prompt.begun += 1
            if prompt.begun == prompt.job.request.n:
                self._ready.remove(prompt)
            self._for(prompt.job, self._begin, prompt, prompt.begun - 1)

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
        vocab, t = self._base.model.config.vocab_size, request.temperature
        top_k = min(request.top_k, vocab) if request.top_k > 0 else vocab
        t = max(t, _COLDEST) if t else 0.0
        return How(jnp.float32(t), jnp.float32(request.top_p), jnp.int32(top_k), key)

    def _draw(self) -> None:
        longest = max(len(r.job.request.prompt) + len(r.ids) for r in self._rows.values())
        self._fit(len(self._rows), longest)
        with_top = np.bool_(any(row.job.request.top for row in self._rows.values()))
        self._arrays, tokens = self._drawing.decode(self._pool.tree, self._arrays, with_top)
        found = jax.tree.map(np.asarray, tokens)
        for place, row in [*self._rows.items()]:
            if not row.job.is_over:
                self._for(row.job, self._take, place, row, found, place)

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
        if row.job.seen:
            row.job.seen(Piece(row.index, token, logp, top))
        room = self._sizes.max_length - len(request.prompt)
        most = room if request.max_tokens is None else min(room, request.max_tokens)
        stopped = token in request.stop_ids or self._says_stop(row)
        if stopped or len(row.ids) >= most:
            self._rows.pop(place).end(stopped)
            if len(row.job.completions) == request.n:
                self.end(row.job)

    def _says_stop(self, row: _Row) -> bool:
        stops = row.job.request.stop
        if not stops:
            return False
        longest = max(len(stop.encode()) for stop in stops)  # a token may be a byte
        text = self._text_of(row.ids[-(longest + 8) :])
        return any(stop in text for stop in stops)

    def warm_up(self) -> None:
        """Compiles all functions, for all shapes; nobody samples yet."""
        drawing, sizes, off = self._drawing, self._sizes, np.bool_(False)
        ids = np.zeros((1, sizes.chunk), np.int32)
        slot, one = np.int32(0), np.int32(1)
        caches, how = [], self._how(Sample(adapter=None, prompt=[0]), 0, 0)
        for length in sizes.caches:
            cache = drawing.prompt(length)
            logits, cache = drawing.extend(self._pool.tree, slot, ids, one, cache)
            caches.append(cache)
            drawing.cut(cache, one)
        token = drawing.first(logits, jax.tree.map(lambda x: x[None], how), off).ids[0]
        for width in sizes.widths:
            for length in sizes.caches:
                rows = drawing.empty(width, length)
                for cache in caches:
                    if cache.positions.shape[1] <= drawing.whole(length):
                        mine = (np.int32(0), how)
                        rows = drawing.insert(rows, np.int32(0), cache, one, token, mine)
                rows, _ = drawing.decode(self._pool.tree, rows, off)
                for wide in set(sizes.widths) - {width}:
                    drawing.fit(rows, np.zeros(wide, np.int32), length)
                for end in (sizes.caches[0], sizes.caches[-1]):  # a step towards each
                    for other in sizes.caches_to(length, end)[:1]:
                        drawing.fit(rows, np.zeros(width, np.int32), other)
        self._pool.give(self._pool.take(self._base.none) or 0)

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
            order = [*self._rows, *[0] * (width - len(self._rows))]
            self._resize(order, self._length)
            self._rows = dict(enumerate(self._rows.values()))
        for step in self._sizes.caches_to(self._length, least):
            self._resize(range(width), step)
        self._width, self._length, self._idle = width, least, 0

    def _resize(self, order: Sequence[int], length: int) -> None:
        self._arrays = self._drawing.fit(self._arrays, np.array(order, np.int32), length)
