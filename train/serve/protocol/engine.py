"""The interface between engine and routes: limits, state, methods, and checks of requests."""

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from train.serve.protocol.limits import MOST_BAD, MOST_BIASES
from train.serve.protocol.requests import (
    ANYONE,
    MOST_TARGETS,
    TOP,
    AdapterSpec,
    Client,
    Command,
    Done,
    DrawnToken,
    RequestError,
    SampleDone,
    SampleRequest,
    Update,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class EngineFacts:
    """The base and the limits of an engine.

    Attributes:
      model: the base's name.
      max_length: tokens of a sequence at most, and of prompt and completion together.
      max_rank: the largest rank of an adapter.
      vocab_size: ids are below it.
      eos: the tokens that end a text.
      slots: adapters in a batch of samples at most.
      sequences: completions that are drawn side by side at most.
    """

    model: str
    max_length: int
    max_rank: int
    vocab_size: int
    eos: tuple[int, ...]
    slots: int
    sequences: int


LATEST_LOSSES = 200  # the number of them in a status


@dataclasses.dataclass(frozen=True, kw_only=True)
class TenantStatus:
    """The progress of a tenant.

    Attributes:
      steps: updates taken; None where that is not known, of one that was parked by another process.
      losses: (step, loss per weighted target token) of the latest `LATEST_LOSSES` steps.
      size: bytes of its arrays on the device.
      queued: commands that wait.
      seconds: seconds of the engine's time that it had.
      client: the client that it is of.
      used: when its client's last command came, in seconds since 1970; None in the engine's own
        account, which does not tell a client's commands from those of parking.
      parked: whether its arrays lie on disk, until its next command.
    """

    spec: AdapterSpec
    steps: int | None
    losses: Sequence[tuple[int, float]]
    size: int
    queued: int
    seconds: float
    client: Client = ANYONE
    used: float | None = None
    parked: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Status:
    """The state of an engine.

    Attributes:
      tenants: by name.
      adapters: names that samples may choose.
      waiting: samples that wait for a place.
      drawing: completions that are being drawn.
      prompt_tokens: tokens of prompts that were run, since the start.
      found_tokens: tokens of prompts that had been run before, since the start.
      drawn_tokens, trained_tokens, compiled: numbers since the start.
      base_size: bytes of the base.
      prefix_size: bytes of what was computed of prompts, and is kept.
    """

    tenants: Mapping[str, TenantStatus]
    adapters: Sequence[str]
    waiting: int
    drawing: int
    prompt_tokens: int
    found_tokens: int
    drawn_tokens: int
    trained_tokens: int
    compiled: int
    base_size: int
    prefix_size: int


class EngineProtocol(Protocol):
    """The methods of an engine. Any thread may call them, and none of them blocks."""

    @property
    def facts(self) -> EngineFacts:
        """The model, and the limits of requests."""

    def submit(self, tenant: str, command: Command, done: Done, client: Client = ANYONE) -> None:
        """Queues a command. Commands of one tenant are executed in order.

        Args:
          tenant: the adapter that trains.
          command: what to do.
          done: gets the result.
          client: the client whose turn it takes.
        """

    def sample(
        self,
        request: SampleRequest,
        done: SampleDone,
        on_token: Callable[[DrawnToken], None] | None = None,
    ) -> Callable[[], None]:
        """Queues a sample.

        Args:
          request: what to draw.
          done: gets the result.
          on_token: gets each token as it is drawn, in the engine's thread.

        Returns:
          A function that ends it early: what was drawn so far is then the result.
        """

    def adopt(self, name: str, folder: Path, done: Done) -> None:
        """Reads an adapter from PEFT's folder or a run's folder, so that samples may choose it."""

    def drop(self, name: str) -> None:
        """Removes an adapter from those that samples may choose; running samples continue."""

    def knows(self, name: str) -> bool:
        """Returns True if samples may choose an adapter of this name."""

    def status(self) -> Status:
        """Returns the state of the engine."""


def check_sample(request: SampleRequest, facts: EngineFacts) -> None:
    """Raises a RequestError for a sample with invalid values."""
    n_tokens = len(request.prompt)
    if not n_tokens:
        raise RequestError("the prompt is empty. Pass at least one token.")
    min_length = n_tokens if request.max_tokens == 0 else n_tokens + 1
    if min_length > facts.max_length:
        raise RequestError(
            f"the prompt has {n_tokens} tokens, but prompt and completion together may have at "
            f"most {facts.max_length}. Pass a shorter prompt."
        )
    if not all(0 <= token < facts.vocab_size for token in request.prompt):
        raise RequestError(
            f"the prompt holds an id outside 0 to {facts.vocab_size - 1}. Use the tokenizer of the "
            "served model."
        )
    if not 1 <= request.n <= 1024:
        raise RequestError(
            f"{request.n} completions were requested. Request from 1 to 1024 completions."
        )
    if request.max_tokens is not None and request.max_tokens < 0:
        raise RequestError(f"max_tokens is {request.max_tokens}. Pass 0 or more.")
    if not (request.temperature >= 0 and np.isfinite(request.temperature)):
        raise RequestError(f"the temperature is {request.temperature}. Pass 0 or more.")
    if not 0 < request.top_p <= 1:
        raise RequestError(f"top_p is {request.top_p}. Pass a number above 0 and at most 1.")
    if not (request.top_k == -1 or request.top_k >= 1):
        raise RequestError(f"top_k is {request.top_k}. Pass at least 1, or -1 for all tokens.")
    _check_limits(request, facts)
    if "" in request.stop:
        raise RequestError("a stop is an empty text. Pass at least one character.")
    for n_top in (request.top, request.top_prompt):
        if not 0 <= n_top <= TOP:
            raise RequestError(f"{n_top} likeliest tokens were requested. Request at most {TOP}.")
    if request.targets is not None:
        _check_targets(request.targets, n_tokens, facts)


def _check_targets(targets: np.ndarray, n_tokens: int, facts: EngineFacts) -> None:
    """Raises a RequestError for targets that do not fit a prompt of n tokens."""
    has_row_of_each = targets.ndim == 2 and len(targets) == n_tokens - 1
    if not has_row_of_each or not 1 <= targets.shape[1] <= MOST_TARGETS:
        raise RequestError(
            f"targets of the prompt have the shape {targets.shape}. For its {n_tokens} tokens, "
            f"pass [{n_tokens - 1}, k], with k from 1 to {MOST_TARGETS}."
        )
    if targets.size and not -1 <= targets.min() <= targets.max() < facts.vocab_size:
        raise RequestError(
            f"targets of the prompt hold an id outside 0 to {facts.vocab_size - 1}. Pass -1 for a "
            "missing target."
        )


def _check_limits(request: SampleRequest, facts: EngineFacts) -> None:
    """Raises a RequestError for invalid limits of the drawn tokens."""
    limits = request.limits
    penalties = request.penalties
    settings = {"min_p": request.min_p} | vars(penalties)
    if not np.isfinite([*settings.values(), *limits.biases.values()]).all():
        raise RequestError(
            f"{settings} or the biases contain a number that is not finite. Pass finite numbers."
        )
    if not 0 <= request.min_p <= 1:
        raise RequestError(f"min_p is {request.min_p}. Pass a number from 0 to 1.")
    if penalties.repetition <= 0:
        raise RequestError(
            f"the repetition penalty is {penalties.repetition}. Pass a number above 0."
        )
    if len(limits.biases) > MOST_BIASES or len(limits.bad) > MOST_BAD or () in limits.bad:
        raise RequestError(
            "There are too many biases or bad words, or a bad word is empty. Pass at most "
            f"{MOST_BIASES} biases and {MOST_BAD} bad words."
        )
    if limits.allowed == ():
        raise RequestError("the list of allowed tokens is empty. Pass at least one token.")
    ids = [*(limits.allowed or ()), *limits.biases, *limits.ends, *itertools.chain(*limits.bad)]
    if ids and not 0 <= min(ids) <= max(ids) < facts.vocab_size:
        raise RequestError(
            f"limits of tokens hold an id outside 0 to {facts.vocab_size - 1}. Use the tokenizer "
            "of the served model."
        )


def check_update(settings: Update) -> None:
    """Raises a RequestError for invalid settings of an AdamW step."""
    for name in ("learning_rate", "eps", "weight_decay", "grad_clip_norm"):
        value = getattr(settings, name)
        may_be_negative = name == "learning_rate"
        if not (np.isfinite(value) and (value >= 0 or may_be_negative)):
            raise RequestError(f"{name} is {value}. Pass a finite number that is not negative.")
    for name in ("beta1", "beta2"):
        value = getattr(settings, name)
        if not 0 <= value < 1:
            raise RequestError(f"{name} is {value}. Pass a number from 0 to below 1.")
