"""Continuous batching: a sample starts between two tokens of others, and leaves at its end."""

import itertools
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from lora_jax.models.sampling.slots import DrawnTokens
from lora_jax.models.sampling.text import ends_with_stop
from train.serve.engine.base import ServedBase
from train.serve.engine.jobs import ActiveCompletion, PromptScores, SampleJob
from train.serve.engine.pool import AdapterPool
from train.serve.engine.programs import SamplingPrograms
from train.serve.engine.prompts import PromptRunner, RunningPrompt
from train.serve.engine.rows import RunningRows
from train.serve.engine.sizes import Sizes
from train.serve.engine.trainer import Trainer
from train.serve.engine.turns import PARTY_LEVELS, TurnOrder, TurnPath, parties
from train.serve.protocol.requests import Completion, DrawnToken, SampleResult

_LONE_OWNER_TOKENS = 32  # tokens after which an owner who draws alone has all rows
Waiting = RunningPrompt | ActiveCompletion  # a prompt waits to begin its next completion


class Sampler:
    """Draws the completions of many samples together, each with its own adapter.

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
        """Creates a sampler without samples.

        Args:
          base, trainer, programs, pool, sizes: see their classes.
          text_of: decodes tokens, to find texts that end a completion.
        """
        self._base = base
        self._trainer = trainer
        self._sizes = sizes
        self._text_of = text_of
        self._pool = pool
        self._rows = RunningRows(programs, sizes, base.model.config.vocab_size)
        self._runner = PromptRunner(programs, sizes)
        self._waiting: dict[TurnPath, deque[SampleJob]] = {}  # by owner, session and adapter
        self._prompts: list[RunningPrompt] = []
        self._ready: list[RunningPrompt] = []  # ran, with completions that are to begin
        self._paused: list[ActiveCompletion] = []
        self._turns = TurnOrder()
        self._ran_chunk = False  # whether a chunk of a prompt ran since the last token
        self._lone_tokens = _LONE_OWNER_TOKENS  # tokens since several owners drew
        self.rounds = 0
        self.prompt_tokens = 0
        self.found_tokens = 0
        self.drawn_tokens = 0

    @property
    def waiting(self) -> int:
        """The number of waiting samples."""
        n_queued = sum(len(queue) for queue in [*self._waiting.values()])
        n_ready = sum(not prompt.n_begun for prompt in [*self._ready])
        return n_queued + len(self._prompts) + n_ready

    @property
    def drawing(self) -> int:
        """The number of completions that have begun and not ended."""
        return len(self._rows.completions) + len(self._paused)

    @property
    def busy(self) -> bool:
        """True if a sample waits or runs."""
        return bool(self._waiting or self._active_jobs())

    @property
    def prefix_size(self) -> int:
        """The bytes of the stored prefixes."""
        return self._runner.store.size

    def serves_others(self, path: TurnPath) -> bool:
        """Returns True if another path with the same parent has samples."""
        return self._turns.has_others(path)

    def add(self, job: SampleJob) -> None:
        """Queues a sample."""
        self._turns.enter(job.path)
        self._waiting.setdefault(job.path[:-1], deque()).append(job)

    def step(self) -> None:
        """Runs a chunk of a prompt, or draws a token for each completion."""
        self._admit_samples()
        self._fill_rows()
        due_prompts = self._due_prompts()
        if due_prompts:
            self._call_isolated(due_prompts[0].job, self._run_chunk, due_prompts)
        elif self._rows.completions:
            self._draw_tokens()
        self._fill_rows()

    def end(self, job: SampleJob, error: Exception | None = None) -> None:
        """Ends a running sample with its tokens so far, or with an error."""
        if job.is_over:
            return
        job.is_over = True
        for row, completion in [*self._rows.completions.items()]:
            if completion.job is job:
                del self._rows.completions[row]
                completion.end(stopped=False)
        for completion in self._paused:
            if completion.job is job:
                completion.end(stopped=False)
        self._paused = [completion for completion in self._paused if completion.job is not job]
        self._remove_queued(job)
        self._prompts = [prompt for prompt in self._prompts if prompt.job is not job]
        self._ready = [prompt for prompt in self._ready if prompt.job is not job]
        self._turns.leave(job.path)
        self._release_slot(job)
        result = SampleResult(
            completions=[job.completions[i] for i in sorted(job.completions)],
            prompt_logprobs=job.scores.prompt_logprobs,
            top_prompt=job.scores.top_prompt,
            cached=job.n_cached,
            targets=job.scores.targets,
        )
        job.done(error or result)
        # Frees the arrays, though a client may still hold the job.
        job.adapter = None
        job.completions = {}
        job.scores = PromptScores()

    def _remove_queued(self, job: SampleJob) -> None:
        """Removes a sample from its queue if it is waiting there."""
        queue = self._waiting.get(job.path[:-1], deque())
        if job in queue:
            queue.remove(job)
            if not queue:
                del self._waiting[job.path[:-1]]

    def fail(self, error: Exception) -> None:
        """Ends all samples with an error of the arrays that they share."""
        for job in [*itertools.chain(*self._waiting.values()), *self._active_jobs()]:
            self.end(job, error)
        self._rows.reset()

    def _active_jobs(self) -> list[SampleJob]:
        """Returns the sample of each admitted prompt and of each begun completion."""
        prompts = self._prompts + self._ready
        completions = [*self._rows.completions.values(), *self._paused]
        return [prompt.job for prompt in prompts] + [completion.job for completion in completions]

    # Slots

    def _take_slot(self, job: SampleJob) -> bool:
        """Assigns a slot to a sample, perhaps one of others; returns True if the sample has one."""
        if job.slot is None:
            job.slot = self._pool.acquire(job.adapter)
        if job.slot is None:
            losers = self._slot_losers(job)
            for loser in losers:
                self._suspend_sample(loser)
            if losers:
                job.slot = self._pool.acquire(job.adapter)
        return job.slot is not None

    def _slot_losers(self, job: SampleJob) -> set[SampleJob]:
        """Returns the samples that must give up their slot for another sample."""
        users_of_slot: dict[int, set[SampleJob]] = {}
        for user in self._active_jobs():
            if user.slot:  # all have 0, the base's
                users_of_slot.setdefault(user.slot, set()).add(user)
        holders: dict[int, set[TurnPath]] = {}
        for slot, users in users_of_slot.items():
            holders[slot] = {user.path for user in users}
        loss = self._turns.loser(job.path, holders)
        if loss is None:
            return set()
        _, slots = loss

        # Of the slots of the party that gives one up, the one used last is taken.
        def latest_turn(slot: int) -> tuple[int, ...]:
            return max(self._turns.order(path) for path in holders[slot])

        return users_of_slot[max(slots, key=latest_turn)]

    def _suspend_sample(self, job: SampleJob) -> None:
        """Takes away a sample's slot, and pauses its completions."""
        for completion in [*self._rows.completions.values()]:
            if completion.job is job:
                self._pause_completion(completion)
        self._release_slot(job)

    def _release_slot(self, job: SampleJob) -> None:
        """Releases the slot of a sample if it has one."""
        if job.slot is not None:
            self._pool.release(job.slot)
            job.slot = None

    # Prompts

    def _admit_samples(self) -> None:
        """Admits waiting samples while rows are free.

        The first sample of an adapter needs no free row, so that nobody's many completions delay
        it. The second one needs none either, once the first has begun a completion. If an adapter
        finds no slot, no later sample of its session is admitted, nor is one while an admitted
        sample of the session has lost its slot.
        """
        # Count the rows that admitted samples leave free.
        admitted = self._prompts + self._ready
        n_to_begin = sum(prompt.job.request.n - prompt.n_begun for prompt in admitted)
        n_free_rows = self._sizes.sequences - self.drawing - n_to_begin
        # By adapter: the latest admitted prompt, and the number of admitted prompts.
        last_admitted = {prompt.job.path[:-1]: prompt for prompt in admitted}
        n_admitted = Counter(prompt.job.path[:-1] for prompt in admitted)
        blocked_sessions = self._sessions_without_slot()
        for adapter_path in sorted(self._waiting, key=self._turns.order):
            queue = self._waiting[adapter_path]
            session = adapter_path[:PARTY_LEVELS]
            while queue:
                job = queue[0]
                if session in blocked_sessions and job.adapter is not None:
                    break
                has_one_begun = (
                    n_admitted[adapter_path] == 1 and last_admitted[adapter_path].n_begun > 0
                )
                needs_no_room = n_admitted[adapter_path] == 0 or has_one_begun
                if n_free_rows <= 0 and not needs_no_room:
                    break
                if not self._take_slot(job):
                    blocked_sessions.add(session)
                    break
                # The sample leaves the queue, and its prompt may run.
                queue.popleft()
                prompt = self._runner.begin(job)
                last_admitted[adapter_path] = prompt
                n_admitted[adapter_path] += 1
                self._prompts.append(prompt)
                n_free_rows -= job.request.n
            if not queue:
                del self._waiting[adapter_path]

    def _sessions_without_slot(self) -> set[TurnPath]:
        """Returns the sessions with an admitted sample that has lost its slot."""
        waiting: list[Waiting] = [*self._prompts, *self._ready, *self._paused]
        return {item.job.path[:PARTY_LEVELS] for item in waiting if item.job.slot is None}

    def _due_prompts(self) -> list[RunningPrompt]:
        """Returns the prompt whose next chunk runs now, and prompts that may run with it.

        The list is empty in a step that draws tokens: after a chunk, if there are completions.
        """
        is_turn_of_tokens = self._rows.completions and self._ran_chunk
        if is_turn_of_tokens:
            return []
        due_prompts: list[RunningPrompt] = []
        for prompt in sorted(self._prompts, key=self._job_order):
            if len(due_prompts) == self._sizes.piece_prompts:
                break
            # A prompt waits while another one computes the prefix that both share.
            if self._runner.waits(prompt, self._prompts, due_prompts):
                continue
            has_slot = prompt.job.slot is not None
            if not has_slot and not due_prompts:  # the first one may take another's slot
                has_slot = self._take_slot(prompt.job)
            if has_slot:
                due_prompts.append(prompt)
        return due_prompts

    def _job_order(self, item: Waiting) -> tuple[int, ...]:
        """Returns a sort key by the order of turns. The smallest key is next."""
        return self._turns.order(item.job.path)

    def _run_chunk(self, prompts: list[RunningPrompt]) -> None:
        """Runs a chunk of a prompt, or pieces of several, and finishes prompts that are done."""
        tokens_of_prompt = self._runner.run(prompts, self._pool.tree)
        self._turns.note(prompt.job.path for prompt in tokens_of_prompt)
        self._ran_chunk = True
        if not self._rows.completions:
            self.rounds += 1
        self.prompt_tokens += sum(tokens_of_prompt.values())
        for prompt in tokens_of_prompt:
            if prompt.is_done:
                self._prompts.remove(prompt)
                self._call_isolated(prompt.job, self._finish_prompt, prompt)

    def _finish_prompt(self, prompt: RunningPrompt) -> None:
        """Scores a finished prompt if its request asks for scores; then completions may begin."""
        job = prompt.job
        request = job.request
        job.n_cached = prompt.n_cached
        self.found_tokens += prompt.n_cached
        needs_scores = request.prompt_logprobs or request.top_prompt or request.targets is not None
        if needs_scores:
            adapter = job.adapter or self._base.zero_adapter
            tokens = np.asarray(request.prompt, np.int32)
            job.scores = self._trainer.score_prompt(
                adapter, tokens, request.top_prompt, request.targets
            )
        if request.max_tokens == 0:  # the scores are all that was asked for
            empty = Completion(
                tokens=np.zeros(0, np.int32), logprobs=np.zeros(0, np.float32), stopped=False
            )
            job.completions = dict.fromkeys(range(request.n), empty)
            self.end(job)
        else:
            self._ready.append(prompt)

    # Completions

    def _n_usable_rows(self) -> int:
        """Returns the number of usable rows, smaller while several owners have samples."""
        n_owners = self._turns.n_below(())
        if 1 < n_owners <= self._rows.shared:
            self._lone_tokens = 0
        is_shared = n_owners <= self._rows.shared and self._lone_tokens < _LONE_OWNER_TOKENS
        return self._rows.shared if is_shared else self._sizes.sequences

    def _fill_rows(self) -> None:
        """Assigns rows to waiting completions, and pauses other completions if necessary."""
        while len(self._rows.completions) > self._n_usable_rows():
            self._pause_one([*self._rows.completions])
            self._rows.narrow()
        while any(self._assign_row(waiting) for waiting in self._next_completions()):
            pass

    def _next_completions(self) -> list[Waiting]:
        """Returns waiting completions, beginning with owners and sessions with the fewest rows.

        For each session, these are the first that has a slot and the first that has none. If all
        slots belong to the session, only the one with a slot can continue.
        """
        n_rows = Counter[TurnPath]()
        for completion in self._rows.completions.values():
            n_rows.update(parties(completion.job.path))

        def order(item: Waiting) -> tuple[Any, ...]:
            path = item.job.path
            owner_turn, *later_turns = self._turns.order(path)
            return n_rows[path[:1]], owner_turn, n_rows[path[:2]], *later_turns

        next_of_session: dict[tuple[TurnPath, bool], Waiting] = {}
        waiting: list[Waiting] = [*self._paused, *self._ready]
        for item in sorted(waiting, key=order):
            session = item.job.path[:PARTY_LEVELS]
            needs_slot = item.job.slot is None
            next_of_session.setdefault((session, needs_slot), item)
        return [*next_of_session.values()]

    def _assign_row(self, item: Waiting) -> bool:
        """Assigns a row to a waiting completion if it is entitled to one; returns True if so."""
        job = item.job
        if len(self._rows.completions) < self._n_usable_rows():
            if not self._take_slot(job):
                return False
        else:
            # All rows are in use: another party may have to give one up.
            holders = {
                row: {completion.job.path} for row, completion in self._rows.completions.items()
            }
            loss = self._turns.loser(job.path, holders)
            if loss is None or not self._take_slot(job):
                return False
            # Taking the slot may have freed a row.
            if len(self._rows.completions) >= self._n_usable_rows():
                _, rows = loss
                self._pause_one(rows)
        # A paused completion continues, and a prompt begins its next completion.
        if isinstance(item, ActiveCompletion):
            self._paused.remove(item)
            self._call_isolated(job, self._rows.resume, item)
        else:
            index = item.n_begun
            item.n_begun += 1
            if item.n_begun == job.request.n:
                self._ready.remove(item)
            self._call_isolated(job, self._begin_completion, item, index)
        return True

    def _pause_one(self, rows: Sequence[int]) -> None:
        """Pauses the newest completion of the owner and session with the most of these rows."""
        completions = [self._rows.completions[row] for row in reversed(rows)]
        n_rows = Counter[TurnPath]()
        for completion in completions:
            n_rows.update(parties(completion.job.path))

        def rows_of_parties(completion: ActiveCompletion) -> list[int]:
            return [n_rows[party] for party in parties(completion.job.path)]

        self._pause_completion(max(completions, key=rows_of_parties))

    def _pause_completion(self, completion: ActiveCompletion) -> None:
        """Pauses a completion until it is assigned a row again."""
        self._rows.pause(completion)
        self._paused.append(completion)

    def _begin_completion(self, prompt: RunningPrompt, index: int) -> None:
        """Draws the first token of a prompt's completion, and assigns a row to it."""
        grammar = prompt.job.request.limits.grammar
        constraint = None if grammar is None else grammar.begin()
        completion = ActiveCompletion(prompt.job, index, constraint=constraint)
        assert prompt.cache is not None  # it ran
        tokens = self._rows.begin(completion, prompt.logits, prompt.cache)
        self._turns.note([completion.job.path])
        self._add_token(completion, tokens, 0)

    def _draw_tokens(self) -> None:
        """Draws the next token of each completion in a row."""
        tokens = self._rows.draw(self._pool.tree)
        self._ran_chunk = False
        self.rounds += 1
        self._lone_tokens += 1
        completions = {**self._rows.completions}  # rows are freed in the loop below
        self._turns.note(completion.job.path for completion in completions.values())
        for row, completion in completions.items():
            if not completion.job.is_over:
                self._call_isolated(completion.job, self._add_token, completion, tokens, row)

    def _add_token(
        self, completion: ActiveCompletion, tokens: DrawnTokens[np.ndarray], row: int
    ) -> None:
        """Adds a row's drawn token to its completion, and ends a complete completion."""
        job = completion.job
        request = job.request
        completion.check()
        token = int(tokens.ids[row])
        logprob = float(tokens.logps[row])
        top = None
        if request.top:
            top_ids, top_logps = tokens.top
            top = (top_ids[row, : request.top], top_logps[row, : request.top])
            completion.top.append(top)
        # The token belongs to the completion, and the client gets it at once.
        completion.ids.append(token)
        completion.logps.append(logprob)
        self.drawn_tokens += 1
        if job.on_token:
            job.on_token(DrawnToken(index=completion.index, token=token, logprob=logprob, top=top))
        # A completion ends by a token, a text, its grammar or its length.
        searched_ids = completion.ids[request.limits.min_tokens :]
        has_stop_text = ends_with_stop(searched_ids, request.stop, self._text_of)
        stopped = token in request.stop_ids or has_stop_text or completion.accept(token)
        max_tokens = self._sizes.max_length - len(request.prompt)
        if request.max_tokens is not None:
            max_tokens = min(max_tokens, request.max_tokens)
        if stopped or len(completion.ids) >= max_tokens:
            self._runner.store_completion(completion, self._rows)
            self._rows.free(completion)
            completion.end(stopped)
            if len(job.completions) == request.n:
                self.end(job)

    def _call_isolated(self, job: SampleJob, function: Callable[..., None], *args: Any) -> None:
        """Calls a function for a sample. An error ends this sample only, unless rows are lost."""
        try:
            function(*args)
        except Exception as error:
            self.end(job, error)
            if self._rows.are_lost:
                raise

    @property
    def steps(self) -> int:
        """The number of steps of `warm_up`."""
        return self._runner.steps + self._rows.steps

    def warm_up(self) -> Iterator[None]:
        """Compiles all functions for all shapes, one per iteration."""
        logits, caches = yield from self._runner.warm_up(self._pool.tree)
        yield from self._rows.warm_up(self._pool.tree, logits, caches)
        slot = self._pool.acquire(self._base.zero_adapter)
        assert slot is not None  # nobody samples
        self._pool.release(slot)
