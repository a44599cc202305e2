"""The options of scripts that draw completions while they train."""

import dataclasses
from typing import TypeVar

from lora_jax.training.arguments import POSITIVE, NumberRange, numbers_from
from train.console.errors import UserError
from train.options import field
from train.options.defaults import Defaults
from train.options.field import option
from train.options.paths import Words
from train.options.scripts import sft as sft_options
from train.options.scripts.language import (
    LanguageDataConfig,
    LanguageOptimConfig,
    SharedPromptOption,
)
from train.options.scripts.sft import LanguageOptions


@dataclasses.dataclass(frozen=True, kw_only=True)
class RolloutDataConfig(SharedPromptOption, LanguageDataConfig):
    """Model, prompts and completions."""

    seq_len: int = 0
    """The maximum number of tokens of a prompt with its completion. By default 512, and 64 for
    the arithmetic task."""
    max_new_tokens: int = option(0, field.HIDDEN)
    """The maximum number of tokens of a completion. By default 128; 80 for the questions of the SQL
    task, and 8 for the arithmetic task."""
    group: int = option(8, field.OPTIMISATION)
    """Number of completions that are drawn for each prompt and compared with one another."""
    sampling_temperature: float | None = option(None, field.OPTIMISATION)
    """The number that divides the logits before tokens are drawn. The loss divides by it, too. By
    default 1; 1.5 for the arithmetic task."""
    top_p: float = option(1.0, field.OPTIMISATION)
    """Draw from the smallest set of tokens whose probabilities add up to this share."""
    top_k: int | None = option(None, field.OPTIMISATION)
    """Draw from this many of the most likely tokens. By default tokens are drawn from the whole
    vocabulary."""
    stop: tuple[Words, ...] = option((), field.HIDDEN)
    """Texts that end a completion. The token that completes such a text is the last one of the
    completion."""
    replay_routing: bool = option(True, field.HIDDEN, older=False)
    """Let each step of a mixture of experts choose the experts again. By default each token uses
    the experts that it used when it was drawn, in each layer. Rounding would otherwise change some
    of the choices."""
    mask_truncated: bool = option(False, field.OPTIMISATION)
    """Exclude completions that --max-new-tokens cut off from the loss. Their rewards still count in
    their group."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RolloutOptimConfig(LanguageOptimConfig):
    """Optimisation."""

    batch_size: int = 32
    """Number of completions in memory at once, on all devices together. It must be a multiple of
    --group."""
    updates: int = option(1, field.OPTIMISATION)
    """Number of steps that train on each batch of completions."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RolloutOptions(LanguageOptions):
    """All options of a script that draws completions."""

    data: RolloutDataConfig
    optim: RolloutOptimConfig


Config = TypeVar("Config", bound=RolloutOptions)
_SHARE = NumberRange(lambda x: 0 < x <= 1, "a share above 0 and at most 1")


def fill_sampling(config: Config, defaults: Defaults) -> Config:
    """Fills in a task's --seq-len, --max-new-tokens and --sampling-temperature."""
    data: RolloutDataConfig = config.data
    temperature = data.sampling_temperature
    data = dataclasses.replace(
        data,
        seq_len=data.seq_len or defaults.seq_len,
        max_new_tokens=data.max_new_tokens or defaults.max_new_tokens,
        sampling_temperature=defaults.temperature if temperature is None else temperature,
    )
    return dataclasses.replace(config, data=data)


def check(config: RolloutOptions, **numbers: NumberRange) -> None:
    """Raises a UserError if the options contradict each other, whatever the task is.

    Args:
      config: the options.
      **numbers: the numbers that further options take.
    """
    data, optim, run = config.data, config.optim, config.run
    sft_options.check(
        config,
        **dict.fromkeys(("max_new_tokens", "top_k", "updates", "group"), numbers_from(1)),
        sampling_temperature=POSITIVE,
        top_p=_SHARE,
        **numbers,
    )
    check_group(optim.batch_size, data.group, data.max_new_tokens, data.seq_len)
    if "" in data.stop:
        raise UserError(
            "--stop '' would end every completion before it begins. Pass texts that are not empty."
        )
    if run.eval_every:
        raise UserError(
            f"--eval-every {run.eval_every} has nothing to measure, because this script has no "
            "held-out loss. Use --score-every, which measures the task's score."
        )


def check_group(batch_size: int, group: int, max_new_tokens: int, seq_len: int) -> None:
    """Raises a UserError if groups do not fill a batch or completions leave no room for prompts."""
    if batch_size % group:
        raise UserError(
            f"--batch-size {batch_size} is not a multiple of --group {group}, but all completions "
            "of a prompt must be in one batch. Pass a multiple of --group."
        )
    if max_new_tokens >= seq_len:
        raise UserError(
            f"--max-new-tokens {max_new_tokens} leaves no room for prompts in --seq-len {seq_len}. "
            "Increase --seq-len, or reduce --max-new-tokens."
        )
