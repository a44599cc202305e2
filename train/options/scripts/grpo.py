"""The options of `python -m train.grpo`."""

import dataclasses
from collections.abc import Collection
from typing import Annotated, Literal

import tyro

from lora_jax.training.arguments import NOT_NEGATIVE, POSITIVE, minimum
from lora_jax.training.losses import ONLINE, Online, dr_grpo
from lora_jax.training.losses.online import Divergence, Scale
from train.console.errors import UserError, flag
from train.console.help import HelpPage
from train.options import field
from train.options.conditions import NoEffect
from train.options.field import option
from train.options.file import replace_options
from train.options.paths import Place
from train.options.scripts import rollouts, sampler, sft
from train.options.scripts.rollouts import RolloutDataConfig, RolloutOptimConfig, RolloutOptions
from train.options.scripts.sampler import SamplerOptions
from train.options.scripts.sft import SftAdapterConfig, SftRunConfig

DEFAULT_TASK = "arithmetic"  # of train/settings/tasks.py
RLOO, DR_GRPO = "rloo", "dr_grpo"
LossName = Literal[*ONLINE, DR_GRPO, RLOO]  # type: ignore[valid-type]
_LOSS = (
    "The loss. dapo: the mean over all tokens; bnpo: the same. grpo: the mean over completions of "
    "their mean over tokens. dr_grpo: the sum over tokens by --max-new-tokens, so that length "
    "does not weigh. gspo: ratios of whole completions. cispo: bounded ratios as weights. rloo: "
    "the rewards of the others of a group as baseline."
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class GrpoDataConfig(SamplerOptions, RolloutDataConfig):
    """Model, prompts, completions and rewards."""

    dataset: Place = DEFAULT_TASK
    """"arithmetic" (the default task: sums, with a small model that is made for them), "sql"
    (questions whose answers are executed; the default with --model or --init-adapter), "guess" (a
    game of several turns), a file (JSONL, JSON, CSV, TSV, also gzipped, or Parquet), a folder of
    them, a folder that `datasets` saved, or a dataset on the hub. Each row has a `prompt` (a text
    or turns) or `messages`; a reward gets all other fields."""
    reward: tuple[str, ...] = option((), field.HIDDEN)
    """Rewards of a completion: file.py:function, the folder of a run of `train.classify --labels
    pairs`, sql, arithmetic, or length; or several, which are added up. A function gets lists by
    keyword: `prompts`, `completions`, `completion_ids` and the fields of the rows; it returns a
    number for each completion, or None for no opinion, as for TRL. It runs in processes of its own.
    By default that of the task."""
    reward_weights: tuple[float, ...] = option((), field.HIDDEN)
    """A weight for each --reward; by default 1."""
    reward_timeout: float = option(30.0, field.CHANGEABLE)
    """Seconds that a function may take for the completions of a prompt."""
    reward_workers: int = option(2, field.CHANGEABLE)
    """Processes in which functions run side by side."""
    tools: tuple[str, ...] = option((), field.HIDDEN)
    """Functions that a completion may call: file.py:function, and others of the file by their names
    alone (file.py:f g). What one returns becomes a turn of the chat, and the model goes on."""
    environment: str | None = option(None, field.HIDDEN)
    """A class that completions talk to, as file.py:Class, or guess or sql: by TRL's protocol,
    `reset` begins a completion, other public methods are its tools, and `get_reward` is a reward of
    its own."""
    tool_timeout: float = option(30.0, field.CHANGEABLE, NoEffect.NO_TOOLS)
    """Seconds that a tool may take for a call; a completion whose tool takes longer is lost."""
    max_turns: int | None = option(None, field.HIDDEN, NoEffect.NO_TOOLS)
    """Turns of the model in a completion; calls of the last one are not run. By default as many as
    --max-new-tokens has room for, which counts the tokens of all turns, those of tools included."""
    max_tool_output: int | None = option(None, field.HIDDEN, NoEffect.NO_TOOLS)
    """Tokens of a tool's answer, which says where it was cut. By default 256."""
    redraw: int = option(0, field.OPTIMISATION)
    """Draw a group again, so many times, whose rewards are all equal, and from which nothing can be
    learned (DAPO's dynamic sampling)."""
    reference: str | None = option(None, field.HIDDEN)
    """With --beta, what the adapter is kept close to: base, or the folder of an adapter over the
    same base. By default the adapter of --init-adapter, or else base."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class GrpoOptimConfig(RolloutOptimConfig):
    """Optimisation."""

    lr: float | None = None
    """The peak learning rate. By default 5e-5; a tenth of that with --full, and a third with
    --optimizer lion; sgd has no default."""
    loss: Annotated[LossName, tyro.conf.arg(help=_LOSS)] = option("dapo", field.OPTIMISATION)
    scale: Scale = option("group", field.OPTIMISATION)
    """The divisor of a reward's distance from its group's mean: the deviation of the group, that of
    the batch, or none."""
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
    """The estimate of the divergence. k3: e^x - x - 1, x the log-ratio of reference and adapter.
    corrected: k3 times the ratio, whose gradient is that of the divergence."""

    def online(self, length: int) -> Online | None:
        """Returns the options of the loss; None for rloo.

        Args:
          length: the maximum number of tokens of a completion.
        """
        if self.loss == RLOO:
            return None
        preset = dr_grpo(length) if self.loss == DR_GRPO else ONLINE[self.loss]
        return dataclasses.replace(
            preset,
            beta=self.beta,
            divergence=self.divergence,
            low=preset.low if self.clip is None else self.clip,
            high=preset.high if self.clip_high is None else self.clip_high,
            bound=self.bound,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class GrpoRunConfig(SftRunConfig):
    """Evaluation and output."""

    output: Place = "runs/grpo"
    """The output folder of the run; with --many, of the folders of all runs."""
    eval_questions: int | None = None
    """Prompts to hold out, whose greedy completions are rewarded before and after training, and
    every --score-every steps; by default 64 (of the SQL task 16 of each kind), at most a tenth of
    all, drawn by --seed; 0 for none. The prompts of --eval-dataset take their place."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(RolloutOptions):
    """Train a language model on rewards of its own completions, with LoRA or in full."""

    HELP = HelpPage(
        "model dataset reward output steps group max_new_tokens rank lr resume",
        "--model Qwen/Qwen3-0.6B --dataset prompts.jsonl --reward judge.py:judge --steps 200",
    )

    data: GrpoDataConfig = GrpoDataConfig()
    adapter: SftAdapterConfig = SftAdapterConfig()
    optim: GrpoOptimConfig = GrpoOptimConfig()
    run: GrpoRunConfig = GrpoRunConfig()


def fill_dataset(config: Config, given: Collection[str], resumed: str | None = None) -> Config:
    """Fills in --dataset for a base of one's own: the task that `train.sft` fine-tunes it on.

    Args:
      config: the options.
      given: the names of those that were given.
      resumed: the data of the run that is resumed; None for a run that begins.
    """
    if "dataset" in given:
        return config
    has_base = "model" in given or "init_adapter" in given
    default_task = sft.DEFAULT_TASK if has_base else DEFAULT_TASK
    return replace_options(config, {"dataset": resumed or default_task})


def fill_reference(config: Config, reference: str | None = None) -> Config:
    """Fills in --reference, where --beta needs one: as in TRL, the adapter as the run begins.

    Args:
      config: the options.
      reference: the reference of the run that is resumed; None for a run that begins.
    """
    if config.data.reference is not None:
        return config
    if reference is None:
        reference = "none"
        if config.optim.beta:
            reference = config.adapter.init_adapter or "base"
    data = dataclasses.replace(config.data, reference=reference)
    return dataclasses.replace(config, data=data)


def check(config: Config) -> None:
    """Raises a UserError if options, with their defaults, make no sense for any task."""
    data, optim = config.data, config.optim
    rollouts.check(
        config,
        **dict.fromkeys(("reward_timeout", "tool_timeout", "bound"), POSITIVE),
        **dict.fromkeys(("clip", "clip_high", "beta"), NOT_NEGATIVE),
        **dict.fromkeys(("reward_workers", "max_turns", "max_tool_output"), minimum(1)),
        redraw=minimum(0),
        **sampler.NUMBERS,
    )
    sampler.check(config)
    if data.group < 2:
        raise UserError("--group 1: a completion is compared with others of its prompt; give more")
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
