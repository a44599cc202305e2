"""The options of a server that draws the completions of `python -m train.grpo`."""

import dataclasses
from typing import Any, Literal, NamedTuple

from lora_jax.training.arguments import POSITIVE, minimum
from train.console.errors import UserError, flag
from train.options import field
from train.options.conditions import NoEffect
from train.options.field import Uncompared, option
from train.options.paths import Words

Importance = Literal["token_truncate", "token_mask", "sequence_truncate", "sequence_mask", "none"]
NUMBERS = {
    **dict.fromkeys(
        ("sampler_timeout", "max_mismatch", "importance_cap", "importance_floor"), POSITIVE
    ),
    "staleness": minimum(0),
}
CAP = 3.0  # TRL's


class ImportanceWeighting(NamedTuple):
    """The weighting of losses of tokens that another policy drew; see `importance_weights`.

    Attributes:
      level: whether a ratio is a token's or its completion's.
      masked: whether a ratio beyond the bounds weighs nothing, rather than the bound.
      cap, floor: the largest and the smallest ratio.
    """

    level: Literal["token", "sequence"]
    masked: bool
    cap: float
    floor: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplerOptions:
    """A server that draws, and what is done about its being another policy."""

    sampler: Words | None = option(None, field.CHANGEABLE, uncompared=Uncompared.SAMPLER)
    """The address of a server that draws the completions, http://HOST:PORT, of OpenAI's API, with
    adapters that are loaded by /v1/load_lora_adapter: vLLM, SGLang, or train.serve. It serves the
    same base. A key that it asks for comes from the environment, LORA_JAX_SAMPLER_KEY."""
    sampler_folder: str | None = option(None, field.CHANGEABLE, NoEffect.NO_SAMPLER)
    """A folder that the server can read, in which the adapter lies for it; by default `sampler` in
    --output."""
    sampler_mount: Words | None = option(None, field.CHANGEABLE, NoEffect.NO_SAMPLER)
    """That folder, as the server's machine has it; by default as here."""
    sampler_timeout: float = option(600.0, field.CHANGEABLE, NoEffect.NO_SAMPLER)
    """Seconds for the completions of a prompt; a server that is busy or away is asked again for so
    long."""
    max_mismatch: float = option(0.05, field.CHANGEABLE, NoEffect.NO_SAMPLER)
    """The largest distance of the sampler's log-probabilities from those of the adapter that it was
    given, in the mean over tokens. Beyond it, a run does not begin, and a batch is skipped."""
    staleness: int = option(0, field.OPTIMISATION, NoEffect.NO_SAMPLER)
    """Batches that are drawn ahead, while others train: a batch is of the adapter as it was so many
    batches before. 0: each batch is drawn by the newest adapter, and waited for."""
    importance_sampling: Importance | None = option(None, field.OPTIMISATION, NoEffect.NO_SAMPLER)
    """Weigh losses by the ratio of the adapter's probability to the sampler's, of each token, of
    the whole sequence, or none. A ratio beyond the bounds is cut to them (truncate), or weighs
    nothing (mask). By default token_truncate; rloo has none."""
    importance_cap: float | None = option(None, field.OPTIMISATION, NoEffect.NO_SAMPLER)
    """The largest such ratio. By default 3."""
    importance_floor: float | None = option(None, field.OPTIMISATION, NoEffect.NO_SAMPLER)
    """The smallest such ratio. By default there is none."""


def importance_of(config: Any) -> ImportanceWeighting | None:
    """Returns the weighting of importance sampling; None where there is none."""
    data = config.data
    mode: Any = data.importance_sampling
    if not mode:
        mode = "none" if config.optim.loss == "rloo" else "token_truncate"
    if data.sampler is None or mode == "none":
        return None
    level, _, form = mode.partition("_")  # such as "token" and "mask"
    return ImportanceWeighting(
        level=level,
        masked=form == "mask",
        cap=CAP if data.importance_cap is None else data.importance_cap,
        floor=data.importance_floor or 0.0,
    )


def check(config: Any) -> None:
    """Raises a UserError for options that make no sense with a server, or that it cannot have."""
    data = config.data
    if data.sampler is None:
        return
    option_text = f"--sampler {data.sampler}"
    for name in ("tools", "environment"):
        if getattr(data, name):
            raise UserError(
                f"{option_text} draws completions of one turn: leave out {flag(name)}, or --sampler"
            )
    if config.adapter.full:
        raise UserError(
            f"{option_text} loads adapters, and --full trains none: leave one of them out"
        )
    if data.staleness and data.redraw:
        raise UserError(
            f"--staleness {data.staleness} and --redraw {data.redraw}: whether a group is drawn "
            "again is known once it is rewarded, and then the next batches are drawn already; "
            "leave one of them out"
        )
    if data.importance_sampling not in (None, "none") and config.optim.loss == "rloo":
        raise UserError(
            f"--importance-sampling {data.importance_sampling} has no effect on --loss rloo: leave "
            "it out"
        )
    weighting = importance_of(config)
    for name in ("importance_cap", "importance_floor"):
        if weighting is None and getattr(data, name) is not None:
            raise UserError(
                f"{flag(name, getattr(data, name))} has no effect without importance sampling: "
                "leave it out"
            )
    if weighting is not None and weighting.floor >= weighting.cap:
        raise UserError(
            f"--importance-floor {weighting.floor:g} leaves no ratio below --importance-cap "
            f"{weighting.cap:g}: give a smaller floor, or a larger cap"
        )
