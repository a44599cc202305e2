"""The options of `python -m train.grpo`."""

import dataclasses
from collections.abc import Collection
from typing import Annotated, Literal

import tyro

from lora_jax.training.arguments import NOT_NEGATIVE, POSITIVE, numbers_from
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
    "The loss. dapo and bnpo: the mean over all tokens. grpo: the mean over completions of their "
    "mean over tokens. dr_grpo: the sum over tokens divided by --max-new-tokens, so that a token's "
    "weight does not depend on the length. gspo: probability ratios of whole completions. cispo: "
    "bounded ratios as weights. rloo: the mean reward of the group's other completions as baseline."
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class GrpoDataConfig(SamplerOptions, RolloutDataConfig):
    """Model, prompts, completions and rewards."""

    dataset: Place = DEFAULT_TASK
    """The prompts: "arithmetic" (the default task: sums, with a small model that is made for them),
    "sql" (questions whose answers are executed; the default with --model or --init-adapter),
    "guess" (a game of several turns), a file (JSONL, JSON, CSV, TSV, also gzipped, or Parquet), a
    folder of files, a folder that `datasets` saved, or a dataset on the hub. Each row has a
    `prompt` (a text or turns) or `messages`. Rewards receive all other fields."""
    reward: tuple[str, ...] = option((), field.HIDDEN)
    """The rewards of a completion: file.py:function, file.py:object.method, the folder of a run of
    `train.classify --labels pairs`, sql, arithmetic, or length. Several rewards are added up. A
    function receives lists as keyword arguments: `prompts`, `completions`, `completion_ids` and the
    fields of the rows. It returns a number for each completion, or None for no opinion, as in TRL.
    Functions run in their own processes. By default the reward of the task."""
    reward_weights: tuple[float, ...] = option((), field.HIDDEN)
    """One weight for each --reward, in the same order. By default each weight is 1."""
    reward_timeout: float = option(30.0, field.CHANGEABLE)
    """Maximum number of seconds that a reward function may take for the completions of one
    prompt."""
    reward_workers: int = option(2, field.CHANGEABLE)
    """Number of processes in which reward functions run at the same time."""
    tools: tuple[str, ...] = option((), field.HIDDEN)
    """Functions that a completion may call: file.py:function or file.py:object.method, and further
    functions of the same file by their names alone (file.py:f g). The result of a call becomes a
    turn of the chat, and the model continues after it."""
    environment: str | None = option(None, field.HIDDEN)
    """A class with which completions interact: file.py:Class, guess or sql. It follows TRL's
    protocol: `reset` starts a completion, other public methods are its tools, and `get_reward`
    returns an additional reward."""
    tool_timeout: float = option(30.0, field.CHANGEABLE, NoEffect.NO_TOOLS)
    """Maximum number of seconds for a call of a tool. A completion whose tool takes longer is
    discarded."""
    max_turns: int | None = option(None, field.HIDDEN, NoEffect.NO_TOOLS)
    """Maximum number of the model's turns in a completion. Calls in the last turn are not run. By
    default limited only by --max-new-tokens, which counts the tokens of all turns, including those
    of tools."""
    max_tool_output: int | None = option(None, field.HIDDEN, NoEffect.NO_TOOLS)
    """Maximum number of tokens of a tool's answer. A longer answer is cut and says so. By default
    256."""
    redraw: int = option(0, field.OPTIMISATION)
    """Maximum number of times to draw a group again if all its rewards are equal. Nothing can be
    learned from such a group (DAPO's dynamic sampling)."""
    reference: str | None = option(None, field.HIDDEN)
    """The model that --beta keeps the adapter close to: base, or the folder of an adapter over the
    same base. By default the adapter of --init-adapter, or else base."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class GrpoOptimConfig(RolloutOptimConfig):
    """Optimisation."""

    lr: float | None = None
    """The peak learning rate. By default 5e-5. --full uses a tenth of the default, and --optimizer
    lion a third. sgd has no default."""
    loss: Annotated[LossName, tyro.conf.arg(help=_LOSS)] = option("dapo", field.OPTIMISATION)
    scale: Scale = option("group", field.OPTIMISATION)
    """The divisor of a reward's difference from its group's mean: the standard deviation of the
    group, the standard deviation of the batch, or none."""
    clip: float | None = option(None, field.OPTIMISATION)
    """Probability ratios are clipped at 1 - clip from below. By default 0.2, and 3e-4 for gspo."""
    clip_high: float | None = option(None, field.OPTIMISATION)
    """Probability ratios are clipped at 1 + clip_high from above (cispo: at clip_high itself). By
    default --clip; 4e-4 for gspo, and 5 for cispo."""
    bound: float | None = option(None, field.OPTIMISATION)
    """The largest ratio of a completion whose reward is below its group's mean. By default there is
    no such limit."""
    beta: float = option(0.0, field.OPTIMISATION)
    """The weight of the divergence from --reference. With --loss rloo, the divergence is part of
    the reward. 0 uses no reference."""
    divergence: Divergence = option("corrected", field.OPTIMISATION)
    """The estimator of the divergence. k3: e^x - x - 1, where x is the log-ratio of reference and
    adapter. corrected: k3 times the probability ratio, which has the gradient of the divergence."""

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
    """The output folder of the run. With --many, it contains the folders of all runs."""
    eval_questions: int | None = None
    """Number of prompts to hold out. Their greedy completions are rewarded before and after
    training, and every --score-every steps. By default 64 (for the SQL task, 16 of each kind), at
    most a tenth of all prompts; 0 for none. --seed draws them. --eval-dataset replaces them."""


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
    """Fills in the default of --dataset, which is the default of `train.sft` for a named base.

    Args:
      config: the options.
      given: the names of the options that the user passed.
      resumed: the data of the resumed run; None for a new run.
    """
    if "dataset" in given:
        return config
    # The small model of the arithmetic task is only for a run without a base.
    has_base = "model" in given or "init_adapter" in given
    default_task = sft.DEFAULT_TASK if has_base else DEFAULT_TASK
    return replace_options(config, {"dataset": resumed or default_task})


def fill_reference(config: Config, reference: str | None = None) -> Config:
    """Fills in the default of --reference for --beta: as in TRL, the adapter at the run's start.

    Args:
      config: the options.
      reference: the reference of the resumed run; None for a new run.
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
    """Raises a UserError if the options contradict each other, whatever the task is."""
    data, optim = config.data, config.optim
    rollouts.check(
        config,
        **dict.fromkeys(("reward_timeout", "tool_timeout", "bound"), POSITIVE),
        **dict.fromkeys(("clip", "clip_high", "beta"), NOT_NEGATIVE),
        **dict.fromkeys(("reward_workers", "max_turns", "max_tool_output"), numbers_from(1)),
        redraw=numbers_from(0),
        **sampler.NUMBERS,
    )
    sampler.check(config)
    if data.group < 2:
        raise UserError(
            "--group 1 leaves nothing to compare, because each completion is compared with others "
            "of its prompt. Pass at least 2."
        )
    if bool(optim.beta) != (data.reference != "none"):
        raise UserError(
            f"--reference {data.reference} and --beta {optim.beta:g} do not fit together. Pass a "
            "reference with a positive --beta, or remove both options."
        )
    if not optim.beta and optim.divergence != "corrected":
        raise UserError(
            f"--divergence {optim.divergence} has no effect without --beta. Remove --divergence, "
            "or pass --beta."
        )
    # Options that the chosen loss does not read.
    clip_options = [
        name for name in ("clip", "clip_high", "bound") if getattr(optim, name) is not None
    ]
    if optim.loss == RLOO and (clip_options or optim.scale != "group"):
        name = clip_options[0] if clip_options else "scale"
        raise UserError(f"{flag(name)} has no effect on --loss rloo. Remove {flag(name)}.")
    if optim.loss == "cispo" and (optim.clip is not None or optim.bound is not None):
        raise UserError("--loss cispo uses only one bound, --clip-high. Remove --clip and --bound.")
    if data.reward_weights and len(data.reward_weights) != len(data.reward):
        raise UserError(
            f"{flag('reward_weights', *data.reward_weights)} has {len(data.reward_weights)} "
            f"weights for {len(data.reward)} rewards. Pass one weight for each --reward."
        )
