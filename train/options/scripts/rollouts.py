"""The options of scripts that draw completions while they train."""

import dataclasses
from typing import TypeVar

from lora_jax.training.arguments import POSITIVE, NumberRange, minimum
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
    """The maximum number of tokens of a prompt and its completion. By default 512, and 64 for
    sums."""
    max_new_tokens: int = option(0, field.HIDDEN)
    """The maximum number of tokens of a completion. By default 128; 80 for the questions of the SQL
    task, and 8 for sums."""
    group: int = option(8, field.OPTIMISATION)
    """Completions of each prompt, which are compared with one another."""
    sampling_temperature: float | None = option(None, field.OPTIMISATION)
    """Divides the logits to draw from; the loss has it, too. By default 1; 1.5 for arithmetic."""
    top_p: float = option(1.0, field.OPTIMISATION)
    """Draw from the fewest tokens whose probabilities add up to it."""
    top_k: int | None = option(None, field.OPTIMISATION)
    """Draw from this many tokens."""
    stop: tuple[Words, ...] = option((), field.HIDDEN)
    """Texts that end a completion, which has no token after the one in which they are complete."""
    replay_routing: bool = option(True, field.HIDDEN, older=False)
    """Let a step choose experts anew, in a mixture of experts. By default each token goes through
    the experts that it went through when it was drawn, in each layer; rounding would choose others
    here and there."""
    mask_truncated: bool = option(False, field.OPTIMISATION)
    """Do not learn from completions that --max-new-tokens cut off; their rewards count in their
    group."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RolloutOptimConfig(LanguageOptimConfig):
    """Optimisation."""

    batch_size: int = 32
    """Completions in memory at once, on all devices together: a multiple of --group."""
    updates: int = option(1, field.OPTIMISATION)
    """Steps on each batch of completions."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RolloutOptions(LanguageOptions):
    """All options of a script that draws completions."""

    data: RolloutDataConfig
    optim: RolloutOptimConfig


Config = TypeVar("Config", bound=RolloutOptions)
_SHARE = NumberRange(lambda x: 0 < x <= 1, "a share above 0, up to 1, is needed")


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
    """Raises a UserError if options, with their defaults, make no sense for any task.

    Args:
      config: the options.
      **numbers: the numbers that further options take.
    """
    data, optim, run = config.data, config.optim, config.run
    sft_options.check(
        config,
        **dict.fromkeys(("max_new_tokens", "top_k", "updates", "group"), minimum(1)),
        sampling_temperature=POSITIVE,
        top_p=_SHARE,
        **numbers,
    )
    check_group(optim.batch_size, data.group, data.max_new_tokens, data.seq_len)
    if "" in data.stop:
        raise UserError("--stop '': an empty text would end every completion before it begins")
    if run.eval_every:
        raise UserError(
            f"--eval-every {run.eval_every}: there is no held-out loss; --score-every measures the "
            "score of a task"
        )


def check_group(batch_size: int, group: int, max_new_tokens: int, seq_len: int) -> None:
    """Raises a UserError if completions do not fill a batch, or leave no room for prompts."""
    if batch_size % group:
        raise UserError(
            f"--batch-size {batch_size} is no multiple of --group {group}: completions of one "
            "prompt stay together"
        )
    if max_new_tokens >= seq_len:
        raise UserError(
            f"--max-new-tokens {max_new_tokens} leaves no room for prompts in --seq-len {seq_len}: "
            "raise this, or lower that"
        )
