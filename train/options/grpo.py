"""The options of `python -m train.grpo`."""

import dataclasses
from typing import Annotated, Literal

import tyro

from lora_jax.training.arguments import NOT_NEGATIVE, POSITIVE, Numbers, at_least
from lora_jax.training.losses import ONLINE, Online, dr_grpo
from lora_jax.training.losses.online import Divergence, Scale
from train.console.errors import UserError, flag
from train.options import field
from train.options import sft as sft_options
from train.options.common import Options
from train.options.field import option
from train.options.language import LanguageDataConfig, LanguageOptimConfig
from train.options.sft import SftAdapterConfig, SftRunConfig

DEFAULT_TASK = "sql"  # of train/options/tasks.py
RLOO, DR_GRPO = "rloo", "dr_grpo"
LossName = Literal[*ONLINE, DR_GRPO, RLOO]  # type: ignore[valid-type]
_SHARE = Numbers(lambda x: 0 < x <= 1, "a share above 0, up to 1, is needed")
_LOSS = (
    "The loss. dapo: the mean over all tokens; bnpo: the same. grpo: the mean over completions of "
    "their mean over tokens. dr_grpo: the sum over tokens by --max-new-tokens, so that length "
    "does not weigh. gspo: ratios of whole completions. cispo: bounded ratios as weights. rloo: "
    "the rewards of the others of a group as baseline."
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class GrpoDataConfig(LanguageDataConfig):
    """Model, prompts, completions and rewards."""

    dataset: str = DEFAULT_TASK
    """"sql" (the default task: questions whose answers are executed), "arithmetic", a file (JSONL,
    JSON, CSV, TSV, also gzipped, or Parquet), a folder of them, a folder that `datasets` saved, or
    a dataset on the hub. Each row has a `prompt` (a text or turns) or `messages`; a reward gets all
    other fields."""
    seq_len: int = 256
    """The maximum number of tokens of a prompt and its completion."""
    max_new_tokens: int = option(80, field.HIDDEN)
    """The maximum number of tokens of a completion."""
    group: int = option(8, field.OPTIMISATION)
    """Completions of each prompt, which are compared with one another."""
    sampling_temperature: float = option(1.0, field.OPTIMISATION)
    """Divides the logits to draw from; the loss has it, too."""
    top_p: float = option(1.0, field.OPTIMISATION)
    """Draw from the fewest tokens whose probabilities add up to it."""
    top_k: int | None = option(None, field.OPTIMISATION)
    """Draw from this many tokens."""
    stop: tuple[str, ...] = option((), field.HIDDEN)
    """Texts that end a completion, which has no token after the one in which they are complete."""
    reward: tuple[str, ...] = option((), field.HIDDEN)
    """What rewards a completion: file.py:function, sql, arithmetic, or length; or several, which
    are added up. A function gets lists by keyword: `prompts`, `completions`, `completion_ids` and
    the fields of the rows; it returns a number for each completion, or None for no opinion. It runs
    in processes of its own. By default that of the task."""
    reward_weights: tuple[float, ...] = option((), field.HIDDEN)
    """A weight for each --reward; by default 1."""
    reward_timeout: float = option(30.0, field.CHANGEABLE)
    """Seconds that a reward may take for the completions of a step."""
    reward_workers: int = option(2, field.CHANGEABLE)
    """Processes in which functions run side by side."""
    redraw: int = option(0, field.OPTIMISATION)
    """How often to draw a group again whose rewards are all equal, and from which nothing can be
    learned (DAPO's dynamic sampling)."""
    mask_truncated: bool = option(False, field.OPTIMISATION)
    """Do not learn from completions that --max-new-tokens cut off; their rewards count in their
    group."""
    reference: str | None = option(None, field.HIDDEN)
    """With --beta, what the adapter is kept close to: base, or the folder of an adapter over the
    same base. By default base."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class GrpoOptimConfig(LanguageOptimConfig):
    """Optimisation."""

    batch_size: int = 32
    """Completions in memory at once, on all devices together: a multiple of --group."""
    lr: float | None = None
    """The peak learning rate. By default 5e-5; a tenth of that with --full, and a third with
    --optimizer lion; sgd has no default."""
    loss: Annotated[LossName, tyro.conf.arg(help=_LOSS)] = option("dapo", field.OPTIMISATION)
    scale: Scale = option("group", field.OPTIMISATION)
    """What a reward's distance from its group's mean is divided by: the deviation within the group,
    that of the batch, or nothing."""
    clip: float | None = option(None, field.OPTIMISATION)
    """Ratios of probabilities are clipped from 1 - clip on. By default 0.2; of gspo 3e-4."""
    clip_high: float | None = option(None, field.OPTIMISATION)
    """They are clipped to 1 + this, of cispo to this itself. By default --clip; of gspo 4e-4, of
    cispo 5."""
    bound: float | None = option(None, field.OPTIMISATION)
    """The largest ratio of a completion that is worse than its group; none by default."""
    beta: float = option(0.0, field.OPTIMISATION)
    """The strength of the divergence from --reference; of rloo it is part of the reward."""
    divergence: Divergence = option("corrected", field.OPTIMISATION)
    """How the divergence is estimated. k3: e^x - x - 1, x the log-ratio of reference and adapter.
    corrected: k3 times the ratio, whose gradient is that of the divergence."""
    updates: int = option(1, field.OPTIMISATION)
    """Steps on each batch of completions."""

    def online(self, length: int) -> Online | None:
        """Returns the options of the loss; None for rloo.

        Args:
          length: the maximum number of tokens of a completion.
        """
        if self.loss == RLOO:
            return None
        known = dr_grpo(length) if self.loss == DR_GRPO else ONLINE[self.loss]
        given = {"low": self.clip, "high": self.clip_high, "bound": self.bound}
        return dataclasses.replace(
            known,
            beta=self.beta,
            divergence=self.divergence,
            **{name: value for name, value in given.items() if value is not None},
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class GrpoRunConfig(SftRunConfig):
    """Evaluation and output."""

    output: str = "runs/grpo"
    """The output folder of the run; with --many, of the folders of all runs."""
    eval_questions: int | None = None
    """Prompts to hold out, whose greedy completions are rewarded before and after training, and
    every --score-every steps; by default 64 (of the SQL task 16 of each kind), at most a tenth of
    all, drawn by --seed; 0 for none."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(Options):
    """Train a language model on rewards of its own completions, with LoRA or in full."""

    data: GrpoDataConfig = GrpoDataConfig()
    adapter: SftAdapterConfig = SftAdapterConfig()
    optim: GrpoOptimConfig = GrpoOptimConfig()
    run: GrpoRunConfig = GrpoRunConfig()


def with_reference(config: Config) -> Config:
    """Fills in --reference, where --beta needs one."""
    if config.data.reference is not None:
        return config
    data = dataclasses.replace(config.data, reference="base" if config.optim.beta else "none")
    return dataclasses.replace(config, data=data)


def check(config: Config) -> None:
    """Raises a UserError if options, with their defaults, make no sense for any task."""
    data, optim, run = config.data, config.optim, config.run
    one = at_least(1)
    sft_options.check(
        config,
        **dict.fromkeys(("max_new_tokens", "top_k", "reward_workers", "updates"), one),
        **dict.fromkeys(("sampling_temperature", "reward_timeout", "bound"), POSITIVE),
        **dict.fromkeys(("clip", "clip_high", "beta"), NOT_NEGATIVE),
        group=at_least(2),
        top_p=_SHARE,
        redraw=at_least(0),
    )
    if optim.batch_size % data.group:
        raise UserError(
            f"--batch-size {optim.batch_size} is no multiple of --group {data.group}: completions "
            "of one prompt are compared, and stay together"
        )
    if data.max_new_tokens >= data.seq_len:
        raise UserError(
            f"--max-new-tokens {data.max_new_tokens} leaves no room for prompts in --seq-len "
            f"{data.seq_len}: raise this, or lower that"
        )
    if run.eval_every:
        raise UserError(
            f"--eval-every {run.eval_every}: there is no held-out loss; --score-every measures the "
            "reward of held-out prompts"
        )
    if bool(optim.beta) != (data.reference != "none"):
        raise UserError(
            f"--reference {data.reference} and --beta {optim.beta:g}: the divergence needs both, "
            "or neither"
        )
    if not optim.beta and optim.divergence != "corrected":
        raise UserError(f"--divergence {optim.divergence} has no effect without --beta")
    of_clip = [name for name in ("clip", "clip_high", "bound") if getattr(optim, name) is not None]
    if optim.loss == RLOO and (of_clip or optim.scale != "group"):
        name = of_clip[0] if of_clip else "scale"
        raise UserError(f"{flag(name)} has no effect on --loss rloo: leave it out")
    if optim.loss == "cispo" and (optim.clip is not None or optim.bound is not None):
        raise UserError("--loss cispo has one bound, --clip-high: leave the others out")
    if data.reward_weights and len(data.reward_weights) != len(data.reward):
        raise UserError(
            f"{flag('reward_weights', *data.reward_weights)}: {len(data.reward)} rewards need as "
            "many"
        )
