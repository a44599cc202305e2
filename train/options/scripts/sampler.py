"""The options of a server that draws the completions of `python -m train.grpo`."""

import dataclasses
from typing import Any, Literal, NamedTuple

from lora_jax.training.arguments import POSITIVE, numbers_from
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
    "staleness": numbers_from(0),
}
CAP = 3.0  # TRL's


class ImportanceWeighting(NamedTuple):
    """The weighting of losses of tokens that another policy drew; see `importance_weights`.

    Attributes:
      level: whether a ratio belongs to a token or to its completion.
      masked: whether a ratio outside the bounds gets the weight 0 instead of the bound.
      cap, floor: the largest and the smallest ratio.
    """

    level: Literal["token", "sequence"]
    masked: bool
    cap: float
    floor: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplerOptions:
    """A server that draws the completions, and the correction for differences of its policy."""

    sampler: Words | None = option(None, field.CHANGEABLE, uncompared=Uncompared.SAMPLER)
    """The address (http://HOST:PORT) of a server that draws the completions: vLLM, SGLang or
    train.serve. The server must offer OpenAI's API, serve the same base, and load adapters by
    /v1/load_lora_adapter. If it needs a key, set the environment variable LORA_JAX_SAMPLER_KEY."""
    sampler_folder: str | None = option(None, field.CHANGEABLE, NoEffect.NO_SAMPLER)
    """The folder to which the run writes the adapter for the server, which must be able to read it.
    By default the folder `sampler` in --output."""
    sampler_mount: Words | None = option(None, field.CHANGEABLE, NoEffect.NO_SAMPLER)
    """The path of --sampler-folder on the server's machine. By default the same path as here."""
    sampler_timeout: float = option(600.0, field.CHANGEABLE, NoEffect.NO_SAMPLER)
    """Number of seconds to wait for the completions of one prompt. Within this time, requests to a
    busy or unreachable server are repeated."""
    max_mismatch: float = option(0.05, field.CHANGEABLE, NoEffect.NO_SAMPLER)
    """Largest allowed difference between the log-probabilities of the sampler and of the same
    adapter here, as a mean over tokens. Above it, a run does not start, and a batch is skipped."""
    staleness: int = option(0, field.OPTIMISATION, NoEffect.NO_SAMPLER)
    """Number of batches that are drawn ahead while other batches train. Each batch is drawn with
    the adapter from so many batches before. With 0, each step waits for completions of the newest
    adapter."""
    importance_sampling: Importance | None = option(None, field.OPTIMISATION, NoEffect.NO_SAMPLER)
    """Weigh losses by the ratio of the adapter's probability to the sampler's probability. The
    ratio is computed for each token, for the whole sequence, or not at all (none). A ratio outside
    the bounds is clipped to them (truncate), or gets the weight 0 (mask). By default
    token_truncate; none with --loss rloo."""
    importance_cap: float | None = option(None, field.OPTIMISATION, NoEffect.NO_SAMPLER)
    """The upper bound of the ratio of --importance-sampling. By default 3."""
    importance_floor: float | None = option(None, field.OPTIMISATION, NoEffect.NO_SAMPLER)
    """The lower bound of the ratio of --importance-sampling. By default there is no lower bound."""


def importance_of(config: Any) -> ImportanceWeighting | None:
    """Returns the weighting of importance sampling; None without importance sampling."""
    data = config.data
    mode: Any = data.importance_sampling
    if not mode:
        mode = "none" if config.optim.loss == "rloo" else "token_truncate"
    if data.sampler is None or mode == "none":
        return None
    level, _, bound_kind = mode.partition("_")  # such as "token" and "mask"
    return ImportanceWeighting(
        level=level,
        masked=bound_kind == "mask",
        cap=CAP if data.importance_cap is None else data.importance_cap,
        floor=data.importance_floor or 0.0,
    )


def check(config: Any) -> None:
    """Raises a UserError for options that contradict --sampler or have no effect with it."""
    data = config.data
    if data.sampler is None:
        return
    option_text = f"--sampler {data.sampler}"
    for name in ("tools", "environment"):
        if getattr(data, name):
            raise UserError(
                f"{option_text} draws completions of one turn, so {flag(name)} cannot be used with "
                f"it. Remove {flag(name)} or --sampler."
            )
    if config.adapter.full:
        raise UserError(
            f"{option_text} needs an adapter to load, but --full trains without an adapter. Remove "
            "one of the two options."
        )
    if data.staleness and data.redraw:
        raise UserError(
            f"--staleness {data.staleness} and --redraw {data.redraw} cannot be combined. The "
            "rewards decide which groups are drawn again, but by then the next batches are "
            "already drawn. Remove one of the two options."
        )
    if data.importance_sampling not in (None, "none") and config.optim.loss == "rloo":
        raise UserError(
            f"--importance-sampling {data.importance_sampling} has no effect on --loss rloo. "
            "Remove --importance-sampling."
        )
    weighting = importance_of(config)
    for name in ("importance_cap", "importance_floor"):
        if weighting is None and getattr(data, name) is not None:
            raise UserError(
                f"{flag(name, getattr(data, name))} has no effect without importance sampling. "
                f"Remove {flag(name)}."
            )
    if weighting is not None and weighting.floor >= weighting.cap:
        raise UserError(
            f"--importance-floor {weighting.floor:g} must be below --importance-cap "
            f"{weighting.cap:g}. Pass a smaller --importance-floor, or a larger --importance-cap."
        )
