"""Continuous batching: a sample enters between two tokens, and leaves when it ends."""

import itertools
from collections import Counter, deque
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any

import numpy as np

from lora_jax.models.sampling.slots import DrawnTokens
from lora_jax.models.sampling.text import ends_with_stop
from train.serve.engine.base import ServedBase
from train.serve.engine.jobs import ActiveCompletion, SampleJob
from train.serve.engine.pool import AdapterPool
from train.serve.engine.programs import SamplingPrograms
from train.serve.engine.prompts import PromptRunner, RunningPrompt
from train.serve.engine.rows import RunningRows
from train.serve.engine.sizes import Sizes
from train.serve.engine.trainer import Trainer
from train.serve.engine.turns import PARTY, TurnOrder, TurnPath, parties
from train.serve.protocol.requests import Completion, DrawnToken, SampleResult

_ALONE = 32  # tokens after which an owner who is alone has all rows


class Sampler:
    """Draws the completions of many samples side by side, each by its own adapter.

    Owners take turns, then an owner's sessions, a session's adapters, and an adapter's requests. A
    turn is a chunk of a prompt, or a token of each completion. Between two tokens of a completion,
    one chunk of a prompt runs at most, whosever it is. Rows and slots are shared evenly by owners,
    and by an owner's sessions: a completion that has to give its row to others is paused, and loses
    nothing.
    """

    def __init__(
        self,
        base: ServedBase,
        trainer: Trainer,
        programs: SamplingPrograms,
        pool: AdapterPool,
        sizes: Sizes,
        text_of: Callable[[Sequence[int]], str],
    ) -> None:
        """Begins without samples.

        Args:
          base, trainer, programs, pool, sizes: see their classes.
          text_of: decodes tokens, to find texts that end a completion.
        """
        self._base, self._trainer, self._sizes, self._text_of = base, trainer, sizes, text_of
        self._pool = pool
        self._places = RunningRows(programs, sizes, base.model.config.vocab_size)
        self._runner = PromptRunner(programs, sizes)
        self._waiting: dict[TurnPath, deque[SampleJob]] = {}  # by owner, session and adapter
        self._prompts: list[RunningPrompt] = []
        self._ready: list[RunningPrompt] = []  # ran, with completions that are to begin
        self._paused: list[ActiveCompletion] = []
        self._turns = TurnOrder()
        self._ran = False  # whether a chunk of a prompt did since the last token
        self._alone = _ALONE  # tokens since several owners drew
        self.rounds = self.prompt_tokens = self.found_tokens = self.drawn_tokens = 0

    @property
    def waiting(self) -> int:
        """The number of samples that wait."""
        ready = sum(not prompt.begun for prompt in [*self._ready])
        return sum(map(len, [*self._waiting.values()])) + len(self._prompts) + ready

    @property
    def drawing(self) -> int:
        """The number of completions under way."""
        return len(self._places.rows) + len(self._paused)

    @property
    def busy(self) -> bool:
        """True where there is anything to do."""
        return bool(self._waiting or self._active_jobs())

    @property
    def prefix_size(self) -> int:
        """The bytes of what is kept to be found again."""
        return self._runner.store.size

    def serves_others(self, path: TurnPath) -> bool:
        """Returns True if anybody else samples at the last level of a path."""
        return self._turns.has_others(path)

    def add(self, job: SampleJob) -> None:
        """Queues a sample."""
        self._turns.enter(job.path)
        self._waiting.setdefault(job.path[:-1], deque()).append(job)

    def step(self) -> None:
        """Runs a chunk of a prompt, or draws a token of each completion."""
        self._admit()
        self._fill_rows()
        if prompts := self._due_prompts():
            self._isolate(prompts[0].job, self._run_chunk, prompts)
        elif self._places.rows:
            self._draw()
        self._fill_rows()

    def end(self, job: SampleJob, error: Exception | None = None) -> None:
        """Ends a sample that is not over: with what was drawn so far, or with what went wrong."""
        if job.is_over:
            return
        job.is_over = True
        rows = self._places.rows
        for place in [place for place, row in rows.items() if row.job is job]:
            rows.pop(place).end(stopped=False)
        for row in [row for row in self._paused if row.job is job]:
            row.end(stopped=False)
        self._paused = [row for row in self._paused if row.job is not job]
        queue = self._waiting.get(job.path[:-1], deque())
        if job in queue:
            queue.remove(job)
            if not queue:
                del self._waiting[job.path[:-1]]
        self._prompts = [prompt for prompt in self._prompts if prompt.job is not job]
        self._ready = [prompt for prompt in self._ready if prompt.job is not job]
        self._turns.leave(job.path)
        self._give_slot(job)
        completions = [job.completions[i] for i in sorted(job.completions)]
        own, top, targets = job.scores
        job.done(error or SampleResult(completions, own, top, job.cached, targets))
        job.adapter, job.completions, job.scores = None, {}, (None, None, None)

    def fail(self, error: Exception) -> None:
        """Ends all samples, by an error in what they share."""
        for job in [*itertools.chain(*self._waiting.values()), *self._active_jobs()]:
            self.end(job, error)
        self._places.reset()

    def _active_jobs(self) -> list[SampleJob]:
        rows = [*self._places.rows.values(), *self._paused]
        return [each.job for each in self._prompts + self._ready] + [row.job for row in rows]

    # Slots

    def _take_slot(self, job: SampleJob) -> bool:
        """Gives a sample's adapter a slot, if need be another's; returns True if it has one."""
        if job.slot is None:
            job.slot = self._pool.take(job.adapter)
        if job.slot is None and (users := self._others_slot(job)):
            for other in users:
                self._suspend(other)
            job.slot = self._pool.take(job.adapter)
        return job.slot is not None

    def _others_slot(self, job: SampleJob) -> set[SampleJob]:
        """Returns the users of a slot that they have to give to a sample."""
        users: dict[Hashable, set[SampleJob]] = {}
        for other in self._active_jobs():
            if other.slot:  # all have 0, the base's
                users.setdefault(other.slot, set()).add(other)
        held = {slot: {other.path for other in there} for slot, there in users.items()}
        if (lost := self._turns.loser(job.path, held)) is None:
            return set()
        return users[max(lost[1], key=lambda slot: max(map(self._turns.order, held[slot])))]

    def _suspend(self, job: SampleJob) -> None:
        """Takes a sample's slot away, and the rows with it, until its next turn."""
        for row in [row for row in self._places.rows.values() if row.job is job]:
            self._pause(row)
        self._give_slot(job)

    def _give_slot(self, job: SampleJob) -> None:
        if job.slot is not None:
            self._pool.give(job.slot)
            job.slot = None

    # Prompts

    def _admit(self) -> None:
        """Takes in samples while there is room.

        One of an adapter that has nothing to begin is taken in without room, so that nobody's many
        completions hold it up; and so is one more, once the first began some. Where its adapter
        finds no slot, no other of the same session is taken in before; nor is one while a sample of
        the session that is under way has lost its slot.
        """
        to_begin = self._prompts + self._ready
        room = self._sizes.sequences - self.drawing
        room -= sum(prompt.job.request.n - prompt.begun for prompt in to_begin)
        last = {prompt.job.path[:-1]: prompt for prompt in to_begin}
        many = Counter(prompt.job.path[:-1] for prompt in to_begin)
        under_way: list[RunningPrompt | ActiveCompletion] = [*to_begin, *self._paused]
        blocked = {each.job.path[:PARTY] for each in under_way if each.job.slot is None}
        for who in sorted(self._waiting, key=self._turns.order):
            queue, party = self._waiting[who], who[:PARTY]
            while queue and (party not in blocked or queue[0].adapter is None):
                if room <= 0 and many[who] and not (many[who] == 1 and last[who].begun):
                    break
                if not self._take_slot(queue[0]):
                    blocked.add(party)
                    break
                job = queue.popleft()
                last[who] = self._runner.begin(job)
                many[who] += 1
                self._prompts.append(last[who])
                room -= job.request.n
            if not queue:
                del self._waiting[who]

    def _due_prompts(self) -> list[RunningPrompt]:
        """Returns the prompt of which a chunk runs now, and those that may run with it.

        There are none where tokens are drawn: after a chunk, if there are completions.
        """
        if self._places.rows and self._ran:
            return []
        due: list[RunningPrompt] = []
        for prompt in sorted(self._prompts, key=lambda each: self._turns.order(each.job.path)):
            if len(due) == self._sizes.pieces[0]:
                break
            if not self._runner.waits(prompt, self._prompts, due):
                if prompt.job.slot is not None or (not due and self._take_slot(prompt.job)):
                    due.append(prompt)
        return due

    def _run_chunk(self, prompts: list[RunningPrompt]) -> None:
        ran = self._runner.run(prompts, self._pool.tree)
        self._turns.note(prompt.job.path for prompt in ran)
        self._ran = True
        self.rounds += not self._places.rows
        self.prompt_tokens += sum(ran.values())
        for prompt in ran:
            if prompt.is_done:
                self._prompts.remove(prompt)
                self._isolate(prompt.job, self._finish_prompt, prompt)

    def _finish_prompt(self, prompt: RunningPrompt) -> None:
        job = prompt.job
        request, job.cached = job.request, prompt.cached
        self.found_tokens += prompt.cached
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

    # Completions

    def _limit(self) -> int:
        """Returns the number of rows to use: fewer for a while after several owners drew."""
        n_owners = self._turns.n_below(())
        if 1 < n_owners <= self._places.shared:
            self._alone = 0
        is_shared = n_owners <= self._places.shared and self._alone < _ALONE
        return self._places.shared if is_shared else self._sizes.sequences

    def _fill_rows(self) -> None:
        """Gives rows to completions that begin or go on, and takes some of others for them."""
        while len(self._places.rows) > self._limit():
            self._pause_one([*self._places.rows])
            self._places.narrow()
        while any(self._has_row(each) for each in self._next_completions()):
            pass

    def _next_completions(self) -> list[RunningPrompt | ActiveCompletion]:
        """Returns completions that wait for a row, those of parties with the fewest rows first.

        Of each party, the first one that has a slot is among them, and the first that has none: of
        these, one can go on where all slots are the party's own.
        """
        rows = Counter[TurnPath]()
        for row in self._places.rows.values():
            rows.update(parties(row.job.path))

        def order(each: RunningPrompt | ActiveCompletion) -> tuple[Any, ...]:
            path = each.job.path
            turn = self._turns.order(path)
            return rows[path[:1]], turn[0], rows[path[:2]], *turn[1:]

        firsts: dict[tuple[TurnPath, bool], RunningPrompt | ActiveCompletion] = {}
        waiting: list[RunningPrompt | ActiveCompletion] = [*self._paused, *self._ready]
        for each in sorted(waiting, key=order):
            firsts.setdefault((each.job.path[:PARTY], each.job.slot is None), each)
        return [*firsts.values()]

    def _has_row(self, each: RunningPrompt | ActiveCompletion) -> bool:
        """Gives a completion a row, if it gets one; returns whether it did."""
        job = each.job
        if len(self._places.rows) >= self._limit():
            held = {place: {row.job.path} for place, row in self._places.rows.items()}
            if (lost := self._turns.loser(job.path, held)) is None or not self._take_slot(job):
                return False
            if len(self._places.rows) >= self._limit():
                self._pause_one(lost[1])
        elif not self._take_slot(job):
            return False
        if isinstance(each, ActiveCompletion):
            self._paused.remove(each)
            self._isolate(job, self._places.resume, each)
        else:
            each.begun += 1
            if each.begun == job.request.n:
                self._ready.remove(each)
            self._isolate(job, self._begin, each, each.begun - 1)
        return True

    def _pause_one(self, places: Sequence[int]) -> None:
        """Pauses the latest completion of who has the most of some rows."""
        rows = [self._places.rows[place] for place in reversed(places)]
        counts = Counter(each for row in rows for each in parties(row.job.path))
        self._pause(max(rows, key=lambda row: [counts[each] for each in parties(row.job.path)]))

    def _pause(self, row: ActiveCompletion) -> None:
        self._places.pause(row)
        self._paused.append(row)

    def _begin(self, prompt: RunningPrompt, index: int) -> None:
        grammar = prompt.job.request.limits.grammar
        constraint = None if grammar is None else grammar.begin()
        row = ActiveCompletion(prompt.job, index, constraint=constraint)
        assert prompt.cache is not None  # it ran
        tokens = self._places.begin(row, prompt.logits, prompt.cache)
        self._turns.note([row.job.path])
        self._take(row, tokens, 0)

    def _draw(self) -> None:
        tokens = self._places.draw(self._pool.tree)
        self._ran = False
        self.rounds += 1
        self._alone += 1
        rows = [*self._places.rows.items()]
        self._turns.note(row.job.path for _, row in rows)
        for place, row in rows:
            if not row.job.is_over:
                self._isolate(row.job, self._take, row, tokens, place)

    def _take(self, row: ActiveCompletion, tokens: DrawnTokens[np.ndarray], at: int) -> None:
        """Notes the token that a row drew, and ends the row if it is the last one."""
        job = row.job
        request = job.request
        row.check()
        token, logp = int(tokens.ids[at]), float(tokens.logps[at])
        top = None
        if request.top:
            top = (tokens.top[0][at, : request.top], tokens.top[1][at, : request.top])
            row.top.append(top)
        row.ids.append(token)
        row.logps.append(logp)
        self.drawn_tokens += 1
        if job.seen:
            job.seen(DrawnToken(row.index, token, logp, top))
        room = self._sizes.max_length - len(request.prompt)
        most = room if request.max_tokens is None else min(room, request.max_tokens)
        searched = row.ids[request.limits.min_tokens :]
        says_stop = ends_with_stop(searched, request.stop, self._text_of)
        stopped = token in request.stop_ids or says_stop or row.accept(token)
        if stopped or len(row.ids) >= most:
            self._runner.keep_drawn(row, self._places)
            self._places.free(row)
            row.end(stopped)
            if len(job.completions) == request.n:
                self.end(job)

    def _isolate(self, job: SampleJob, function: Callable[..., None], *args: Any) -> None:
        """Calls a function for a sample: an error of it fails that sample alone, not the rows."""
        try:
            function(*args)
        except Exception as error:
            self.end(job, error)
            if self._places.are_lost:
                raise

    @property
    def steps(self) -> int:
        """The number of steps of `warm_up`."""
        return self._runner.steps + self._places.steps

    def warm_up(self) -> Iterator[None]:
        """Compiles all functions, for all shapes, step by step; nobody samples yet."""
        logits, caches = yield from self._runner.warm_up(self._pool.tree)
        yield from self._places.warm_up(self._pool.tree, logits, caches)
        self._pool.give(self._pool.take(self._base.none) or 0)
