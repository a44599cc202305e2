"""Limits of the tokens that a sample may draw: penalties, allowed tokens, and grammars."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np

MOST_BIASES = MOST_BAD = 1024


@dataclasses.dataclass(frozen=True, kw_only=True)
class Penalties:
    """Penalties of repeated tokens, with vLLM's meaning.

    Attributes:
      repetition: divides positive logits, and multiplies negative ones, of tokens of the prompt and
        the completion.
      frequency: is subtracted from a logit for each time that its token was drawn.
      presence: is subtracted once from the logits of tokens that were drawn.
    """

    repetition: float = 1.0
    frequency: float = 0.0
    presence: float = 0.0


class TokenConstraint(Protocol):
    """The tokens that a grammar allows in one completion.

    Attributes:
      is_over: True once the grammar has nothing more to come.
    """

    @property
    def is_over(self) -> bool:
        """True if the grammar is complete."""

    def accept(self, token: int) -> None:
        """Advances the grammar by a drawn token; raises a ValueError if it forbids the token."""


class Grammar(Protocol):
    """A grammar that restricts completions."""

    def begin(self) -> TokenConstraint:
        """Returns the constraint of a new completion."""

    def fill(self, rows: Mapping[int, Any], masks: np.ndarray) -> None:
        """Restricts masks, [rows, words] uint32, to the next tokens that each constraint allows."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenLimits:
    """Limits of the drawn tokens.

    Attributes:
      allowed: the only tokens that may be drawn; None for all.
      bad: runs of tokens; the last one of each does not follow the others.
      biases: numbers that are added to the logits of tokens.
      min_tokens: the number of tokens before which none of `ends` is drawn, nor a stop text looked
        for.
      ends: tokens that end a completion.
      grammar: form of the completion; None for any.
    """

    allowed: tuple[int, ...] | None = None
    bad: tuple[tuple[int, ...], ...] = ()
    biases: Mapping[int, float] = dataclasses.field(default_factory=dict)
    min_tokens: int = 0
    ends: frozenset[int] = frozenset()
    grammar: Grammar | None = None

    @property
    def masks(self) -> bool:
        """True if the limits forbid some tokens at some step."""
        is_restricted = self.allowed is not None or bool(self.bad)
        return is_restricted or self.min_tokens > 0 or self.grammar is not None


ANY_TOKENS, NO_PENALTIES = TokenLimits(), Penalties()
