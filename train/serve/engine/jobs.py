"""Samples that were asked for, and their completions under way."""

import dataclasses
from collections.abc import Callable
from typing import Any

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


@dataclasses.dataclass(eq=False)
class SampleJob:
    """A sample that was asked for.

    Attributes:
      adapter: its adapter's arrays, as they were when it was asked for; None for the base.
      active: the first token of the prompt that the adapter acts on; 0 but for an activated LoRA.
      slot: the slot of these, while it holds one.
      completions: the finished ones, by place.
      is_over: whether `done` was called; then it holds no arrays.
    """

    request: SampleRequest
    adapter: Adapter | None
    seed: int
    done: SampleDone
    seen: Callable[[DrawnToken], None] | None
    slot: int | None = None
    is_over: bool = False
    completions: dict[int, Completion] = dataclasses.field(default_factory=dict)
    scores: tuple[Any, Any, Any] = (None, None, None)
    cached: int = 0
    active: int = 0

    @property
    def path(self) -> TurnPath:
        """Its place among the turns."""
        request = self.request
        return request.client.owner, request.client.session, request.adapter, self


@dataclasses.dataclass(eq=False)
class ActiveCompletion:
    """A completion under way.

    Attributes:
      cache: its cache, in the host's memory, while it is paused; see `SamplingPrograms.take`.
      constraint: what its grammar allows; None without one.
      allowed: the mask of the tokens that its request allows, once it was made.
      problem: why no further token may come; None where one may.
    """

    job: SampleJob
    index: int
    ids: list[int] = dataclasses.field(default_factory=list)
    logps: list[float] = dataclasses.field(default_factory=list)
    top: list[tuple[np.ndarray, np.ndarray]] = dataclasses.field(default_factory=list)
    cache: CacheBlock | None = None
    constraint: TokenConstraint | None = None
    allowed: np.ndarray | None = None
    problem: str | None = None

    @property
    def n_cached(self) -> int:
        """The tokens that its cache holds: all but the newest."""
        return len(self.job.request.prompt) + len(self.ids) - 1

    def check(self) -> None:
        """Raises a RequestError if no further token may come."""
        if self.problem is not None:
            raise RequestError(self.problem)

    def accept(self, token: int) -> bool:
        """Has the grammar take a token that does not end the completion; returns whether it ends.

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
        """Hands over what was drawn."""
        top = Top(*map(np.stack, zip(*self.top, strict=True))) if self.top else None
        ids, logps = np.array(self.ids, np.int32), np.array(self.logps, np.float32)
        self.job.completions[self.index] = Completion(ids, logps, stopped, top)
