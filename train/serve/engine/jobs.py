"""The records of requested samples, and of the completions that are being drawn."""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from lora_jax.models.sampling.blocks import CacheBlock
from train.serve.engine.adapter import Adapter
from train.serve.engine.turns import TurnPath
from train.serve.protocol.limits import TokenConstraint
from train.serve.protocol.requests import (
    Completion,
    DrawnToken,
    RequestError,
    SampleDone,
    SampleRequest,
    Top,
)


class PromptScores(NamedTuple):
    """Log-probabilities of a prompt, as in `SampleResult`; None if they are not requested."""

    prompt_logprobs: np.ndarray | None = None
    top_prompt: Top | None = None
    targets: np.ndarray | None = None


@dataclasses.dataclass(eq=False)
class SampleJob:
    """A requested sample.

    Attributes:
      adapter: its adapter's arrays, as they were when it was asked for; None for the base.
      done: gets the result, or an error.
      on_token: gets each token as it is drawn.
      slot: the slot of these arrays, while the sample holds one.
      completions: the finished ones, by index.
      scores: scores of the prompt, if they were asked for.
      n_cached: the prompt's tokens that were found in the store.
      active_start: the index of the first token of the prompt that the adapter acts on; 0 but for
        an activated LoRA.
      is_over: whether `done` was called; then it holds no arrays.
    """

    request: SampleRequest
    adapter: Adapter | None
    seed: int
    done: SampleDone
    on_token: Callable[[DrawnToken], None] | None
    slot: int | None = None
    is_over: bool = False
    completions: dict[int, Completion] = dataclasses.field(default_factory=dict)
    scores: PromptScores = PromptScores()
    n_cached: int = 0
    active_start: int = 0

    @property
    def path(self) -> TurnPath:
        """The sample's path in the order of turns."""
        request = self.request
        return request.client.owner, request.client.session, request.adapter, self


@dataclasses.dataclass(eq=False)
class ActiveCompletion:
    """A completion that is being drawn.

    Attributes:
      cache: its cache, in the host's memory, while it is paused; see `SamplingPrograms.take`.
      constraint: what its grammar allows; None without one.
      allowed_mask: mask of the tokens that its request allows, once it was made.
      problem: why no further token may come; None where one may.
    """

    job: SampleJob
    index: int
    ids: list[int] = dataclasses.field(default_factory=list)
    logps: list[float] = dataclasses.field(default_factory=list)
    top: list[tuple[np.ndarray, np.ndarray]] = dataclasses.field(default_factory=list)
    cache: CacheBlock | None = None
    constraint: TokenConstraint | None = None
    allowed_mask: np.ndarray | None = None
    problem: str | None = None

    @property
    def n_cached(self) -> int:
        """The number of tokens in the cache: all tokens except the newest."""
        return len(self.job.request.prompt) + len(self.ids) - 1

    def check(self) -> None:
        """Raises a RequestError if no token is allowed next."""
        if self.problem is not None:
            raise RequestError(self.problem)

    def accept(self, token: int) -> bool:
        """Advances the grammar by a token, and returns True if the grammar is complete.

        Raises:
          RequestError: the grammar cannot go on.
        """
        if self.constraint is None:
            return False
        try:
            self.constraint.accept(token)
        except ValueError as error:
            raise RequestError(f"after {len(self.ids)} tokens: {error}") from None
        return self.constraint.is_over

    def end(self, stopped: bool) -> None:
        """Adds the finished completion to its job."""
        top = None
        if self.top:
            top_ids, top_logps = zip(*self.top, strict=True)
            top = Top(np.stack(top_ids), np.stack(top_logps))
        self.job.completions[self.index] = Completion(
            tokens=np.array(self.ids, np.int32),
            logprobs=np.array(self.logps, np.float32),
            stopped=stopped,
            top=top,
        )
