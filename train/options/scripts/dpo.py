"""The options of `python -m train.dpo`."""

import dataclasses
from typing import Annotated, Literal

import tyro

from lora_jax.training.arguments import NOT_NEGATIVE, POSITIVE
from lora_jax.training.losses import NLL, PREFERENCES, PreferenceOptions
from train.console.errors import UserError, flag
from train.console.help import HelpPage
from train.options import field
from train.options.field import option
from train.options.paths import Place
from train.options.scripts import sft as sft_options
from train.options.scripts.language import LanguageOptimConfig, SharedPromptOption, TokensConfig
from train.options.scripts.sft import LanguageOptions, SftAdapterConfig, SftRunConfig

KTO, SFT = "kto", "sft"
DEFAULT_TASK = "sql"  # of train/settings/tasks.py
BASE, NONE = "base", "none"  # values of --reference
LossName = Literal[*PREFERENCES, KTO, SFT]  # type: ignore[valid-type]
_WITH_NLL = tuple(name for name, loss in PREFERENCES.items() if loss.nll is not None)
WITHOUT_REFERENCE = (*_WITH_NLL, SFT)
# The losses that read an option, by the names of `PreferenceOptions`.
_LOSSES_BY_OPTION = {
    "smoothing": tuple(name for name, loss in PREFERENCES.items() if loss.smooths),
    "margin": ("simpo",),
    "temperature": ("discopop",),
    "kto_weights": (KTO,),
    "nll_weight": _WITH_NLL,
}
_LOSS = (
    "The loss of a pair, or of a row with a label (kto). Several losses are added up. "
    + "".join(f"{name}: {loss.about}. " for name, loss in PREFERENCES.items())
    + f"{KTO}: for rows that are labelled good or bad (2402.01306). {SFT}: the cross-entropy of "
    "the chosen completions, together with other losses."
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DpoDataConfig(SharedPromptOption, TokensConfig):
    """Model and data."""

    dataset: Place = DEFAULT_TASK
    """The preferences: "sql" (the default task: a right query and one with a mistake), a file
    (JSONL, JSON, CSV, TSV, also gzipped, or Parquet), a folder of files, a folder that `datasets`
    saved, or a dataset on the hub. Each row has `prompt`, `chosen` and `rejected`, as texts or as
    turns. It may have `system`, a text, and `tools`. Without `prompt`, the common beginning of the
    two completions is the prompt. For --loss kto, rows may have `prompt`, `completion` and
    `label`."""
    reference: str | None = option(None, field.HIDDEN)
    """The reference model of the loss: base, the folder of an adapter over the same base, or none.
    By default the adapter of --init-adapter, or else base. Losses without a reference use none. A
    resumed run keeps its reference."""
    reference_logps: Literal["cached", "live"] = option("cached", field.HIDDEN)
    """The time at which the reference's log-probabilities are computed. cached: for all rows before
    training, and stored for later runs like tokens. live: for each batch before its step, so that
    only rows that a step uses are computed."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class DpoOptimConfig(LanguageOptimConfig):
    """Optimisation."""

    batch_size: int = 8
    """Number of pairs in memory at once, on all devices together."""
    lr: float | None = None
    """The peak learning rate. By default 5e-5. --full uses a tenth of the default, and --optimizer
    lion a third. sgd has no default."""
    loss: Annotated[tuple[LossName, ...], tyro.conf.arg(help=_LOSS)] = option(
        ("sigmoid",), field.OPTIMISATION
    )
    loss_weights: tuple[float, ...] = option((), field.OPTIMISATION)
    """One weight for each --loss, in the same order. By default each weight is 1."""
    beta: float = option(0.1, field.OPTIMISATION)
    """The β of the loss: a larger value keeps the adapter closer to the reference. For losses
    without a reference, β scales the compared log-probabilities (SimPO's paper uses 2 to 2.5). For
    ipo, it is τ."""
    smoothing: float | None = option(None, field.OPTIMISATION)
    """The expected share of pairs whose completions are swapped, from 0 to below 0.5. By default 0,
    and 0.001 for exo_pair."""
    margin: float | None = option(None, field.OPTIMISATION)
    """The margin γ of SimPO. By default 0.5."""
    temperature: float | None = option(None, field.OPTIMISATION)
    """The temperature τ of DiscoPOP. By default 0.05."""
    kto_weights: tuple[float, float] | None = option(None, field.OPTIMISATION)
    """The weights of good rows and of bad rows in KTO. By default 1 and 1. If there are more bad
    rows, choose weights so that (good weight * good rows) / (bad weight * bad rows) is 1 to
    4/3."""
    nll_weight: float | None = option(None, field.OPTIMISATION, older=0.0)
    """The weight of the cross-entropy of the chosen completions in cpo, simpo and orpo (TRL's
    cpo_alpha). With orpo, their prompts count, too. By default 1 with cpo or orpo, and 0 for simpo
    or if --loss names sft."""

    @property
    def terms(self) -> dict[str, float]:
        """Returns the weight of each term of the loss, by its name."""
        weights = self.loss_weights or (1.0,) * len(self.loss)
        terms = dict(zip(self.loss, weights, strict=True))
        if self.nll_weight:
            name = NLL if self.predicts_prompts else SFT
            terms[name] = terms.get(name, 0.0) + self.nll_weight
        return terms

    @property
    def predicts_prompts(self) -> bool:
        """Returns True if the loss also counts the tokens of prompts."""
        predict_prompts = any(
            name in PREFERENCES and PREFERENCES[name].predict_prompts for name in self.loss
        )
        return bool(self.nll_weight) and predict_prompts

    @property
    def preference(self) -> PreferenceOptions:
        """Returns the options of the loss."""
        smoothing = self.smoothing
        if smoothing is None:
            smoothing = 0.001 if "exo_pair" in self.loss else 0.0
        options = {
            "beta": self.beta,
            "smoothing": smoothing,
            "margin": self.margin,
            "temperature": self.temperature,
        }
        return PreferenceOptions(
            **{name: value for name, value in options.items() if value is not None}
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class DpoRunConfig(SftRunConfig):
    """Evaluation and output."""

    output: Place = "runs/dpo"
    """The output folder of the run. With --many, it contains the folders of all runs."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(LanguageOptions):
    """Train a language model on preferences, with LoRA or in full."""

    HELP = HelpPage(
        "model dataset output init_adapter loss beta epochs batch_size rank resume",
        "--model Qwen/Qwen3-0.6B --dataset pairs.jsonl --output runs/dpo --beta 0.1",
    )

    data: DpoDataConfig = DpoDataConfig()
    adapter: SftAdapterConfig = SftAdapterConfig()
    optim: DpoOptimConfig = DpoOptimConfig()
    run: DpoRunConfig = DpoRunConfig()


def fill_reference(config: Config, reference: str | None = None) -> Config:
    """Fills in the defaults of --nll-weight and --reference for the chosen losses.

    Args:
      config: the options.
      reference: the reference of the resumed run; None for a new run.
    """
    data = config.data
    optim = config.optim
    # --nll-weight: a loss `sft` counts the same cross-entropy already.
    losses_with_nll = [loss for loss in optim.loss if loss in _WITH_NLL]
    if optim.nll_weight is None and losses_with_nll:
        weight = max(PREFERENCES[loss].nll or 0.0 for loss in losses_with_nll)
        if SFT in optim.loss:
            weight = 0.0
        optim = dataclasses.replace(optim, nll_weight=weight)
    if data.reference is None:
        if reference is None:
            needs_none = all(loss in WITHOUT_REFERENCE for loss in optim.loss)
            reference = NONE if needs_none else config.adapter.init_adapter or BASE
        data = dataclasses.replace(data, reference=reference)
    return dataclasses.replace(config, data=data, optim=optim)


def check(config: Config) -> None:
    """Raises a UserError if the options contradict each other, whatever the task is."""
    sft_options.check(
        config, beta=POSITIVE, margin=NOT_NEGATIVE, temperature=POSITIVE, nll_weight=NOT_NEGATIVE
    )
    data, optim = config.data, config.optim
    losses = set(optim.loss)
    loss_text = flag("loss", *optim.loss)
    if len(losses) < len(optim.loss) or losses == {SFT} or (KTO in losses and len(losses) > 1):
        raise UserError(
            f"{loss_text} is not a valid combination. Name each loss once, kto without any other "
            "loss, and sft only together with another loss."
        )
    if optim.loss_weights and len(optim.loss_weights) != len(optim.loss):
        raise UserError(
            f"{flag('loss_weights', *optim.loss_weights)} has {len(optim.loss_weights)} weights, "
            f"but {loss_text} needs {len(optim.loss)}. Pass one weight for each loss."
        )
    # Options that none of the losses reads.
    for name, readers in _LOSSES_BY_OPTION.items():
        if getattr(optim, name) is not None and losses.isdisjoint(readers):
            raise UserError(
                f"{flag(name)} has no effect on {loss_text}; only these losses use it: "
                f"{', '.join(readers)}. Remove {flag(name)}, or choose one of these losses."
            )
    if not 0 <= optim.preference.smoothing < 0.5:
        raise UserError(
            f"--smoothing is {optim.smoothing}. Pass a share of pairs from 0 to below 0.5."
        )
    if len(losses) > 1 and optim.smoothing and not losses <= {*_LOSSES_BY_OPTION["smoothing"], SFT}:
        raise UserError(
            f"--smoothing does not apply to every loss of {loss_text}. Remove --smoothing, or the "
            "losses without it."
        )
    # The reference must be there exactly if a loss compares with it.
    losses_with_reference = sorted(losses.difference(WITHOUT_REFERENCE))
    if losses_with_reference and data.reference == NONE:
        raise UserError(
            f"--reference none: the loss {losses_with_reference[0]} compares with a reference. "
            "Name a reference, or choose a loss without one: "
            f"{', '.join(WITHOUT_REFERENCE[:-1])}."
        )
    if not losses_with_reference and data.reference != NONE:
        raise UserError(
            f"--reference {data.reference} has no effect on {loss_text}, which uses no reference. "
            "Remove --reference."
        )
    if data.reference == NONE and data.reference_logps != "cached":
        raise UserError(
            "--reference-logps live has no effect without a reference. Remove --reference-logps."
        )
    # Losses that compare all rows of a batch with each other.
    coupled = sorted(name for name in losses if name in PREFERENCES and PREFERENCES[name].coupled)
    if coupled and optim.grad_accum > 1:
        raise UserError(
            f"--grad-accum {optim.grad_accum} cannot be used with the loss {coupled[0]}, which "
            "sorts all pairs of a batch. Remove --grad-accum, and pass a larger --batch-size."
        )
    if data.packing and KTO in losses:
        raise UserError(
            "--packing cannot be used with --loss kto, which compares single rows of a batch. "
            "Remove --packing."
        )
    if KTO in losses and optim.batch_size * optim.grad_accum < 2:
        raise UserError(
            "--batch-size 1 is too small for --loss kto, which compares the rows of a batch. Pass "
            "at least 2."
        )
