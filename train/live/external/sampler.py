"""Finds the server of --sampler, and draws a run's completions by it.

The server holds the adapter as it was a few batches before.
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

_MAX_REQUESTS = 64  # requests under way
_SEED_STREAM = 2**16  # no attempt's number
_FORGET_SECONDS = 3.0  # seconds for a server to forget an adapter, as the run ends or cannot begin


def _forget(versions: Sequence[AdapterVersion], server: SamplerServer) -> None:
    """Has a server forget adapters; one that is gone has forgotten them."""
    for version in versions:
        with contextlib.suppress(TrainingError):
            version.drop(server)


def sampling_options(data: Any, outline: ModelInfo) -> SamplingOptions:
    """Returns the options of the draws of a run."""
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
    """The draws of a batch, under way: a future for each prompt, in the first process alone."""

    version: AdapterVersion
    answers: Sequence[Future[list[DrawnCompletion]]]


class ExternalSampler:
    """Draws completions by a server; all processes call its methods, and the first one asks.

    Attributes:
      server: the server.
    """

    def __init__(self, context: ModelContext, feed: PromptFeed, key: Any) -> None:
        """Takes the run.

        Args:
          context: the run.
          feed: its prompts.
          key: returns the key of a draw, by step and attempt.
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
        self._ahead: dict[int, _Request] = {}  # by the steps that they are for
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
        """Returns completions of prompts, those of one batch all of one adapter; see `Rollouts`.

        Raises:
          Dropped: a signal came meanwhile, or the server failed; raised in all processes.
        """
        if attempt:
            return self._hear(self._ask(self.version, rows, number, attempt))
        self._publish(params, number)
        request = self._ahead.pop(number)
        self._current = request.version
        return self._hear(request)

    def draw_by(self, params: Tree, label: str, rows: np.ndarray) -> GroupedCompletions:
        """Returns completions by an adapter that is loaded for these alone.

        Raises:
          UserError: the server does not load it, or does not draw; raised in all processes.
        """
        version = self._publisher.publish(params, label)
        forgetting_server = SamplerServer(self.server.url, _FORGET_SECONDS)
        try:
            drawn = self._hear(self._ask(version, rows, 0, _SEED_STREAM))
            forgetting_server = self.server  # it answers, and has the time that it needs
            return drawn
        except Dropped as error:
            if error.args:
                raise UserError(str(error)) from None
            self._context.stop.check()
            raise
        finally:
            _forget([version], forgetting_server)

    def close(self) -> None:
        """Ends the requests under way, and has the server forget the adapters."""
        for request in self._ahead.values():
            for answer in request.answers:
                answer.cancel()
        self._pool.shutdown(wait=False, cancel_futures=True)
        self.server.close()
        _forget([*self._versions], SamplerServer(self.server.url, _FORGET_SECONDS))
        self._publisher.close()

    def _publish(self, params: Tree, number: int) -> None:
        """Writes the adapter before a step, and asks for the batches that it draws."""
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
        """Has the server forget an adapter, which stays in the list where that fails."""
        version.drop(self.server)
        if version in self._versions:
            self._versions.remove(version)

    def _ask(
        self, version: AdapterVersion, rows: np.ndarray, number: int, attempt: int
    ) -> _Request:
        """Sends the requests for the completions of prompts; does not wait for the answers."""
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
        """Returns the completions of a prompt; loads the adapter again if the server lost it."""
        prompt = self._feed.prompts.tokens[row]
        load = 0
        for _ in range(2):
            load = version.load(self.server, load)
            model = self.server.model_of(version.name)
            drawn = self.server.complete(model, prompt, self._options, seed)
            if drawn is not None:
                return drawn
        raise UserError(
            f"{flag('sampler', self.server.url)}: it loads the adapter {version.name}, and then "
            "has no model of this name"
        )

    def _hear(self, request: _Request) -> GroupedCompletions:
        """Waits for the answers; the first process passes them on."""

        def wait_for_answers() -> list[list[DrawnCompletion]]:
            done = wait(request.answers, return_when=FIRST_EXCEPTION).done
            for answer in done:
                answer.result()  # raises the error of one that failed, whichever it is
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
        return self._grouped([DrawnCompletion(*values) for values in fields])

    def _grouped(self, completions: Sequence[DrawnCompletion]) -> GroupedCompletions:
        """Returns completions as arrays, those of one prompt in a group."""
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
    """Returns the server of a run's options, once it has answered the first process; or None.

    Raises:
      UserError: it is not there, it loads no adapters, or completions have several turns.
    """
    if data.sampler is None:
        return None
    if several_turns:
        raise UserError(
            f"--sampler {data.sampler} draws completions of one turn, and those of --dataset "
            f"{data.dataset} have several: leave --sampler out"
        )
    server = SamplerServer(data.sampler, data.sampler_timeout)
    if is_first():
        server.probe()
        server.check_loads()
    return server


def lines_of_server(server: SamplerServer, feed: PromptFeed) -> Iterator[str]:
    """Yields lines on a server, which draws completions of the first prompt by its base."""
    names = server.probe()
    options = sampling_options(feed.config.data, feed.outline)
    prompt = feed.prompts.tokens[0]
    start_time = time.perf_counter()
    drawn = server.complete(names[0], prompt, options, feed.config.optim.seed)
    seconds = time.perf_counter() - start_time
    if drawn is None:
        raise UserError(f"--sampler {server.url}: it lists the model {names[0]}, and has none such")
    n_tokens = sum(len(completion.ids) for completion in drawn)
    yield (
        f"{server.url} serves {', '.join(names)}; {names[0]} drew {n_tokens} tokens in "
        f"{len(drawn)} completions of the first prompt, in {duration(seconds)}"
    )
    yield "whether it draws from the adapter is tried as training begins"
