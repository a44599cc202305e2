"""Finds the server of --sampler, and draws a run's completions with it.

With --staleness, the server has the adapter from a few batches before.
"""

import contextlib
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from typing import Any, NamedTuple

import jax
import numpy as np

from lora_jax.core.types import Tree
from lora_jax.models.sampling.text import StopTexts
from lora_jax.training.errors import Dropped, TrainingError
from lora_jax.training.processes import is_first
from lora_jax.training.run.log import duration
from train.console.errors import UserError, flag
from train.live.external.versions import AdapterVersion, Publisher
from train.live.prompts import GroupedCompletions, PromptFeed
from train.live.rollouts import group_completions
from train.live.sampler_server import DrawnCompletion, SamplerServer, SamplingOptions
from train.processes import hosts
from train.run.pretrained import ModelInfo, end_tokens
from train.run.task import ModelContext

_MAX_REQUESTS = 64  # at the same time
_SEED_STREAM = 2**16  # a random stream that differs from the number of any attempt
_UNLOAD_SECONDS = 3.0  # to unload an adapter when the run ends or cannot begin


def _unload(versions: Sequence[AdapterVersion], server: SamplerServer) -> None:
    """Unloads adapters from a server. Errors are ignored, because the server may have ended."""
    for version in versions:
        with contextlib.suppress(TrainingError):
            version.drop(server)


def sampling_options(data: Any, outline: ModelInfo) -> SamplingOptions:
    """Returns the options of a run's requests."""
    return SamplingOptions(
        n=data.group,
        max_tokens=data.max_new_tokens,
        temperature=data.sampling_temperature,
        top_p=data.top_p,
        top_k=data.top_k,
        stop=data.stop,
        ends=end_tokens(outline),
    )


class _Request(NamedTuple):
    """The requests of a batch: a future for each prompt, only in the first process."""

    version: AdapterVersion
    answers: Sequence[Future[list[DrawnCompletion]]]


class ExternalSampler:
    """Draws completions with a server. All processes call its methods; the first sends requests.

    Attributes:
      server: the server.
    """

    def __init__(self, context: ModelContext, feed: PromptFeed, key: Any) -> None:
        """Creates a sampler without requests.

        Args:
          context: the run.
          feed: the prompts of the run.
          key: returns the key of a draw from its step and attempt.
        """
        assert feed.server is not None
        self.server = feed.server
        self._context = context
        self._feed = feed
        self._key = key
        self._options = sampling_options(context.config.data, context.outline)
        self._stops = StopTexts(context.outline.tokenizer, context.config.data.stop)
        self._publisher = Publisher(context)
        self._pool = ThreadPoolExecutor(_MAX_REQUESTS, thread_name_prefix="sampler")
        self._ahead: dict[int, _Request] = {}  # the step of a batch -> its requests
        self._versions: list[AdapterVersion] = []
        self._current: AdapterVersion | None = None

    @property
    def version(self) -> AdapterVersion:
        """Returns the adapter that drew the newest batch."""
        assert self._current is not None
        return self._current

    def draw(
        self, params: Tree, rows: np.ndarray, number: int, attempt: int = 0
    ) -> GroupedCompletions:
        """Draws the completions of a batch with one adapter; see `Rollouts.draw`.

        Raises:
          Dropped: a signal came, or the server failed; raised in all processes.
        """
        if attempt:
            return self._hear(self._ask(self.version, rows, number, attempt))
        self._publish(params, number)
        request = self._ahead.pop(number)
        self._current = request.version
        return self._hear(request)

    def draw_by(self, params: Tree, label: str, rows: np.ndarray) -> GroupedCompletions:
        """Draws completions with an adapter that is loaded only for this draw.

        Raises:
          UserError: the server does not load it, or does not draw; raised in all processes.
        """
        version = self._publisher.publish(params, label)
        # A server that fails gets little time to unload the adapter.
        unloading_server = SamplerServer(self.server.url, _UNLOAD_SECONDS)
        try:
            drawn = self._hear(self._ask(version, rows, 0, _SEED_STREAM))
            unloading_server = self.server
            return drawn
        except Dropped as error:
            if error.args:
                raise UserError(str(error)) from None
            self._context.stop.check()
            raise
        finally:
            _unload([version], unloading_server)

    def close(self) -> None:
        """Ends all requests, and unloads the adapters from the server."""
        for request in self._ahead.values():
            for answer in request.answers:
                answer.cancel()
        self._pool.shutdown(wait=False, cancel_futures=True)
        self.server.close()
        _unload(list(self._versions), SamplerServer(self.server.url, _UNLOAD_SECONDS))
        self._publisher.close()

    def _publish(self, params: Tree, number: int) -> None:
        """Publishes the adapter before a step, and requests the batches that it draws."""
        # The steps whose batches this adapter draws: with --staleness, later batches, too.
        updates = self._context.config.optim.updates
        staleness = self._context.config.data.staleness
        due_steps = []
        for step in range(number, number + (staleness + 1) * updates, updates):
            is_in_run = step == number or step < self._feed.steps
            if is_in_run and step not in self._ahead:
                due_steps.append(step)
        old_versions = [version for version in self._versions if version.last < number]
        for version in old_versions:
            self._pool.submit(self._drop, version)
        if not due_steps:
            return
        version = self._publisher.publish(params, f"step{number}", keeps=bool(staleness))
        version.step = number
        version.last = due_steps[-1]
        self._versions.append(version)
        for step in due_steps:
            self._ahead[step] = self._ask(version, self._feed.rows(step), step, 0)

    def _drop(self, version: AdapterVersion) -> None:
        """Unloads an adapter. If this fails, the adapter stays in the list."""
        version.drop(self.server)
        if version in self._versions:
            self._versions.remove(version)

    def _ask(
        self, version: AdapterVersion, rows: np.ndarray, number: int, attempt: int
    ) -> _Request:
        """Sends the requests for the completions of prompts without waiting for answers."""
        key = jax.random.fold_in(self._key(number, attempt), _SEED_STREAM)
        seeds = np.asarray(jax.random.bits(key, (len(rows),))).astype(np.int64) % 2**31
        if jax.process_index():
            return _Request(version, ())
        answers = [
            self._pool.submit(self._complete, version, row, seed)
            for row, seed in zip(rows.tolist(), seeds.tolist(), strict=True)
        ]
        return _Request(version, answers)

    def _complete(self, version: AdapterVersion, row: int, seed: int) -> list[DrawnCompletion]:
        """Returns the completions of a prompt. If the server lost the adapter, loads it again."""
        prompt = self._feed.prompts.tokens[row]
        load = 0
        for _ in range(2):
            load = version.load(self.server, load)
            model = self.server.model_of(version.name)
            drawn = self.server.complete(model, prompt, self._options, seed)
            if drawn is not None:
                return drawn
        raise UserError(
            f"{flag('sampler', self.server.url)}: the server loads the adapter {version.name}, but "
            "then has no model with this name. Check the log of the server."
        )

    def _hear(self, request: _Request) -> GroupedCompletions:
        """Waits for the answers, which the first process passes to all processes."""

        def wait_for_answers() -> list[list[DrawnCompletion]]:
            done = wait(request.answers, return_when=FIRST_EXCEPTION).done
            for answer in done:
                answer.result()  # raises the error of a failed request
            return [answer.result() for answer in request.answers]

        def as_json(answers: list[list[DrawnCompletion]]) -> list[Any]:
            fields = []
            for completions in answers:
                fields += [list(completion) for completion in completions]
            return fields

        try:
            fields = hosts.ask_first_process(wait_for_answers, as_json, self._context.stop)
        except UserError as error:
            raise Dropped(str(error)) from None
        return self._group([DrawnCompletion(*values) for values in fields])

    def _group(self, completions: Sequence[DrawnCompletion]) -> GroupedCompletions:
        """Returns completions as arrays, with one group per prompt."""
        shape = (len(completions), self._options.max_tokens)
        tokens = np.zeros(shape, np.int32)
        logps = np.zeros(shape, np.float32)
        for index, completion in enumerate(completions):
            n_tokens = len(completion.ids)
            tokens[index, :n_tokens] = completion.ids
            logps[index, :n_tokens] = completion.logps
        return group_completions(
            tokens,
            logps,
            lengths=np.array([len(completion.ids) for completion in completions]),
            ended=np.array([completion.ended for completion in completions]),
            stops=self._stops,
            group=self._options.n,
        )


def find_server(data: Any, *, several_turns: bool) -> SamplerServer | None:
    """Returns the server of --sampler after a first answer; None without --sampler.

    Raises:
      UserError: the server cannot be reached, it loads no adapters, or completions have several
        turns.
    """
    if data.sampler is None:
        return None
    if several_turns:
        raise UserError(
            f"--sampler {data.sampler} draws completions of one turn, but completions of --dataset "
            f"{data.dataset} have several turns. Remove --sampler."
        )
    server = SamplerServer(data.sampler, data.sampler_timeout)
    if is_first():
        server.probe()
        server.check_loads()
    return server


def lines_of_server(server: SamplerServer, feed: PromptFeed) -> Iterator[str]:
    """Yields log lines about a server, which draws completions of the first prompt."""
    names = server.probe()
    options = sampling_options(feed.config.data, feed.outline)
    prompt = feed.prompts.tokens[0]
    start_time = time.perf_counter()
    drawn = server.complete(names[0], prompt, options, feed.config.optim.seed)
    seconds = time.perf_counter() - start_time
    if drawn is None:
        raise UserError(
            f"--sampler {server.url}: the server lists the model {names[0]}, but cannot find it. "
            "Check the log of the server."
        )
    n_tokens = sum(len(completion.ids) for completion in drawn)
    yield (
        f"{server.url} serves {', '.join(names)}; {names[0]} drew {n_tokens} tokens in "
        f"{len(drawn)} completions of the first prompt, in {duration(seconds)}"
    )
    yield "the start of training checks that the server draws from the adapter"
