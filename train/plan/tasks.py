"""The scripts whose runs can be planned: their rows, loss, arrays, and programs between steps."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Literal

from lora_jax.training.losses import ONLINE, Loss, pair_loss, rollout_loss, token_loss

REFERENCE, SCORER, SAMPLER = "reference", "scorer", "sampler"


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlannedTask:
    """Facts about the rows of a script.

    Attributes:
      loss: returns the function to minimise, from what `Layout.chunks` returns; see `token_loss`.
      rows: name of several rows.
      row: name of what --longest counts the tokens of.
      sequences: the sequences of a row.
      draws: True for rows that are completions, drawn in groups.
      texts_alone: True for rows that hold no images, and of one adapter.
      between: programs that run between the steps.
      counts: int32 arrays beside those of tokens, with the sizes of a row.
      numbers: fp32 arrays with the sizes of a row; None for the number of predictions.
    """

    loss: Callable[..., Loss]
    rows: str = "rows"
    row: str = "row"
    sequences: int = 1
    draws: bool = False
    texts_alone: bool = True
    between: tuple[str, ...] = ()
    counts: dict[str, list[int]] = dataclasses.field(default_factory=dict)
    numbers: dict[str, list[int] | None] = dataclasses.field(default_factory=dict)


Task = Literal["sft", "dpo", "grpo"]
TASKS: dict[Task, PlannedTask] = {
    "sft": PlannedTask(loss=token_loss, texts_alone=False),
    "dpo": PlannedTask(
        loss=functools.partial(pair_loss, "sigmoid"),
        rows="pairs",
        row="sequence",
        sequences=2,
        between=(REFERENCE,),
        counts={"counts": [2]},
        numbers={"reference": [2], "mean_tokens": []},
    ),
    "grpo": PlannedTask(
        loss=functools.partial(rollout_loss, ONLINE["dapo"]),
        rows="completions",
        draws=True,
        between=(SCORER, SAMPLER),
        numbers={"old": None, "advantages": []},
    ),
}
DRAWING: Task = "grpo"
PLAIN: Task = "sft"
