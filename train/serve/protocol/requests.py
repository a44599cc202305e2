"""The commands, samples and results that routes and engine exchange.

Arrays are NumPy's: routes know no JAX, and the engine knows no HTTP.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from train.serve.protocol.limits import ANY_TOKENS, NO_PENALTIES, Penalties, TokenLimits


class RequestError(Exception):
    """The error for an invalid request. Its message tells the client the fault and the remedy."""


@dataclasses.dataclass(frozen=True)
class Client:
    """The client of a request. Owners take turns, and an owner's sessions share the owner's turns.

    Attributes:
      owner: the name of a key.
      session: the owner's session; "" for requests without one.
    """

    owner: str = ""
    session: str = ""


ANYONE = Client()


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdapterSpec:
    """The description of an adapter.

    Attributes:
      rank: rank of all its factors.
      seed: seed of the initial A; by default 0, so that equal runs are equal.
      attention, mlp, unembed: whether the projections of attention, those of the MLPs, and the
        output head are adapted.
      alpha: the scale is alpha / rank.
    """

    rank: int
    seed: int | None = None
    attention: bool = True
    mlp: bool = True
    unembed: bool = True
    alpha: float = 32.0


@dataclasses.dataclass(frozen=True)
class Create:
    """Creates a tenant with a new adapter, whose B is zero. The result is its `AdapterSpec`."""

    spec: AdapterSpec


@dataclasses.dataclass(frozen=True)
class Load:
    """Loads a saved adapter into an existing or a new tenant. The result is its `AdapterSpec`.

    Attributes:
      path: the folder that a `Save` wrote, or one of PEFT.
      optimizer: whether the optimiser's state is loaded, too; else it begins anew.
    """

    path: Path
    optimizer: bool


@dataclasses.dataclass(frozen=True)
class Datum:
    """A sequence and the inputs of its loss.

    Attributes:
      tokens: [n] int32, the input.
      inputs: by name, such as target_tokens, weights, logprobs and advantages: [n] or [n, k].
        The token at place i predicts the target at place i.
    """

    tokens: np.ndarray
    inputs: Mapping[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Gradient:
    """Adds the gradient of a loss, summed over all data, to a tenant's gradient.

    Attributes:
      data: the sequences.
      loss: a name of `LOSSES`.
      config: numbers by name, such as clip_low_threshold.
      forward_only: compute the outputs alone.
    """

    data: Sequence[Datum]
    loss: str
    config: Mapping[str, float] = dataclasses.field(default_factory=dict)
    forward_only: bool = False


# The losses, and the inputs of each besides `target_tokens`.
LOSSES: dict[str, tuple[str, ...]] = {
    "cross_entropy": ("weights",),
    "importance_sampling": ("logprobs", "advantages"),
    "ppo": ("logprobs", "advantages"),
    "cispo": ("logprobs", "advantages"),
    "dro": ("logprobs", "advantages"),
    "gspo": ("logprobs", "advantages", "sequence_ratio_mask"),
}


@dataclasses.dataclass(frozen=True)
class Update:
    """Updates an adapter by an AdamW step and clears the gradient. The result is `UpdateResult`.

    Attributes:
      grad_clip_norm: the largest norm of the gradient over all factors; 0 for no limit.
    """

    learning_rate: float = 1e-4
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-12
    weight_decay: float = 0.0
    grad_clip_norm: float = 0.0


@dataclasses.dataclass(frozen=True)
class Discard:
    """Clears a tenant's summed gradient. The result is None."""


@dataclasses.dataclass(frozen=True)
class Save:
    """Writes a tenant's adapter as a PEFT folder atomically. The result is `SaveResult`.

    Attributes:
      path: a folder that is not there yet.
      optimizer: whether the optimiser's state lies beside it, for `Load`.
      name: the name by which samples choose these very weights from now on, whatever the tenant
        learns later; None for none.
      recipients: public keys for whom the files are encrypted; none for files as they are.
    """

    path: Path
    optimizer: bool = False
    name: str | None = None
    recipients: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Leave:
    """Removes a tenant but not its saved adapters. The result is None."""


Command = Create | Load | Gradient | Update | Discard | Save | Leave


@dataclasses.dataclass(frozen=True)
class GradientResult:
    """The result of a `Gradient`.

    Attributes:
      logprobs: log-probabilities of each datum's targets, fp32 [n] or [n, k].
      metrics: by name and reduction; "loss:sum" is among them.
    """

    logprobs: list[np.ndarray]
    metrics: Mapping[str, float]


@dataclasses.dataclass(frozen=True)
class UpdateResult:
    """The metrics of an `Update`, by name and reduction."""

    metrics: Mapping[str, float]


@dataclasses.dataclass(frozen=True)
class SaveResult:
    """The number of bytes that a `Save` wrote."""

    size: int


# The result of a command, or the error in its place.
CommandResult = AdapterSpec | GradientResult | UpdateResult | SaveResult | Exception | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class SampleRequest:
    """A request for completions of a prompt.

    Attributes:
      adapter: the name of a saved or adopted adapter; None for the base.
      prompt: token ids, one at least.
      n: the number of completions.
      max_tokens: length of each; None for as many as fit. 0 for none, to score the prompt alone.
      temperature: 0 takes the most likely token.
      top_k: the number of tokens to draw from; -1 for all.
      top_p: the probability of the tokens to draw from.
      seed: seed of the draws; None for a seed of the engine's choice.
      stop_ids: tokens that end a completion; they are part of it.
      stop: texts that end a completion; the tokens that complete one are part of it.
      prompt_logprobs: whether the log-probability of each prompt token is wanted.
      top_prompt, top: the number of most likely tokens wanted at each place of the prompt and of
        the completions, `TOP` at most.
      targets: tokens whose log-probability is wanted at each place of the prompt but the first,
        [prompt - 1, k] int32, -1 for none; k is `MOST_TARGETS` at most.
      min_p: the least probability of a token to draw, relative to that of the likeliest.
      penalties: penalties of tokens that were there.
      limits: the tokens that may be drawn.
      client: the client that asks.
    """

    adapter: str | None
    prompt: Sequence[int]
    n: int = 1
    max_tokens: int | None = None
    temperature: float = 1.0
    top_k: int = -1
    top_p: float = 1.0
    seed: int | None = None
    stop_ids: frozenset[int] = frozenset()
    stop: tuple[str, ...] = ()
    prompt_logprobs: bool = False
    top_prompt: int = 0
    top: int = 0
    targets: np.ndarray | None = None
    min_p: float = 0.0
    penalties: Penalties = NO_PENALTIES
    limits: TokenLimits = ANY_TOKENS
    client: Client = ANYONE

    @property
    def is_adjusted(self) -> bool:
        """True if tokens are drawn from adjusted logits."""
        has_penalties = self.penalties != NO_PENALTIES
        has_biases = bool(self.limits.biases)
        return has_penalties or has_biases or self.min_p > 0 or self.limits.masks


TOP, MOST_TARGETS = 20, 127


@dataclasses.dataclass(frozen=True)
class Top:
    """The most likely tokens at each of n places, in descending order.

    Attributes:
      ids: [n, k] int32.
      logprobs: [n, k] fp32.
    """

    ids: np.ndarray
    logprobs: np.ndarray


@dataclasses.dataclass(frozen=True)
class Completion:
    """The tokens of one completion, with their log-probabilities.

    Attributes:
      tokens: [m] int32, what ended it among them.
      logprobs: [m] fp32, under softmax(logits / temperature); at temperature 1 where that is 0.
      stopped: whether a stop ended it, not its length.
      top: the most likely tokens, if they were asked for.
    """

    tokens: np.ndarray
    logprobs: np.ndarray
    stopped: bool
    top: Top | None = None


@dataclasses.dataclass(frozen=True)
class SampleResult:
    """The answer to a `SampleRequest`.

    Attributes:
      completions: n of them.
      prompt_logprobs: [prompt] fp32, NaN at place 0; None if they were not asked for.
      top_prompt: the most likely tokens at each place, of place 0 none (id 0, -99999).
      cached: the number of prompt tokens whose keys and values were there already.
      targets: the log-probabilities of `SampleRequest.targets`, fp32; 0 for none.
    """

    completions: list[Completion]
    prompt_logprobs: np.ndarray | None = None
    top_prompt: Top | None = None
    cached: int = 0
    targets: np.ndarray | None = None


@dataclasses.dataclass(frozen=True)
class DrawnToken:
    """One token of a completion that is still being drawn.

    Attributes:
      index: which completion.
      token, logprob: the token.
      top: the most likely tokens there, [k] each, or None.
    """

    index: int
    token: int
    logprob: float
    top: tuple[np.ndarray, np.ndarray] | None = None


# Called once, in a thread of the engine's, with the result, or with what went wrong: `RequestError`
# for a fault of the client's. It must return at once.
Done = Callable[[CommandResult], None]
SampleDone = Callable[[SampleResult | Exception], None]
