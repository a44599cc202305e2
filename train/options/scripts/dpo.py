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
_WITH_NLL = tuple(name for name, one in PREFERENCES.items() if one.nll is not None)
WITHOUT_REFERENCE = (*_WITH_NLL, SFT)
# Options of single losses, by the names of `PreferenceOptions`; without one of these they do
# nothing.
_READ_BY = {
    "smoothing": tuple(name for name, one in PREFERENCES.items() if one.smooths),
    "margin": ("simpo",),
    "temperature": ("discopop",),
    "kto_weights": (KTO,),
    "nll_weight": _WITH_NLL,
}
_LOSS = (
    "The loss of a pair, or of rows with labels (kto), or several, which are added up. "
    + "".join(f"{name}: {loss.about}. " for name, loss in PREFERENCES.items())
    + f"{KTO}: rows that are good or bad by themselves (2402.01306). {SFT}: the cross-entropy of "
    "the chosen completions, beside others."
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DpoDataConfig(SharedPromptOption, TokensConfig):
    """Model and data."""

    dataset: Place = DEFAULT_TASK
    """"sql" (the default task: a right query, and one that is a mistake away), a file (JSONL, JSON,
    CSV, TSV, also gzipped, or Parquet), a folder of them, a folder that `datasets` saved, or a
    dataset on the hub. Each row has `prompt`, `chosen` and `rejected`, as texts or as turns, and
    perhaps `system`, a text, and `tools`; without `prompt`, it is what the two have in common. For
    --loss kto also `prompt`, `completion` and `label`."""
    reference: str | None = option(None, field.HIDDEN)
    """The model to compare with: base, the folder of an adapter over the same base, or none. By
    default the adapter of --init-adapter, or else base; none for losses without a reference. A
    resumed run keeps its own."""
    reference_logps: Literal["cached", "live"] = option("cached", field.HIDDEN)
    """When its log-probabilities are computed. cached: of all rows before training, and kept for
    later runs as tokens are. live: of each batch before its step, which no row needs that no step
    sees."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class DpoOptimConfig(LanguageOptimConfig):
    """Optimisation."""

    batch_size: int = 8
    """Pairs in memory at once, on all devices together."""
    lr: float | None = None
    """The peak learning rate. By default 5e-5; a tenth of that with --full, and a third with
    --optimizer lion; sgd has no default."""
    loss: Annotated[tuple[LossName, ...], tyro.conf.arg(help=_LOSS)] = option(
        ("sigmoid",), field.OPTIMISATION
    )
    loss_weights: tuple[float, ...] = option((), field.OPTIMISATION)
    """A weight for each of several --loss; by default 1."""
    beta: float = option(0.1, field.OPTIMISATION)
    """The strength of the reference, or the scale of what is compared; of ipo τ. SimPO's paper has
    2 to 2.5."""
    smoothing: float | None = option(None, field.OPTIMISATION)
    """The share of pairs that are the wrong way round; by default 0, and 0.001 for exo_pair."""
    margin: float | None = option(None, field.OPTIMISATION)
    """SimPO's γ, by default 0.5."""
    temperature: float | None = option(None, field.OPTIMISATION)
    """DiscoPOP's τ, by default 0.05."""
    kto_weights: tuple[float, float] | None = option(None, field.OPTIMISATION)
    """KTO's weights of good and of bad rows, by default 1 and 1. Rather many bad rows want 1 to 4/3
    for good weight * good rows / (bad weight * bad rows)."""
    nll_weight: float | None = option(None, field.OPTIMISATION, older=0.0)
    """The weight of the cross-entropy of the chosen completions, and of their prompts with orpo,
    that is part of cpo, simpo and orpo (TRL's cpo_alpha). By default 1 with cpo or orpo; 0 for
    simpo, and where --loss names sft itself."""

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
        """Returns True if the loss counts the tokens of prompts, too."""
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
    """The output folder of the run; with --many, of the folders of all runs."""


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
    """Fills in --nll-weight, and --reference, by what the losses need.

    Args:
      config: the options.
      reference: the reference of the run that is resumed; None for a run that begins.
    """
    data = config.data
    optim = config.optim
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
    """Raises a UserError if options, with their defaults, make no sense for any task."""
    sft_options.check(
        config, beta=POSITIVE, margin=NOT_NEGATIVE, temperature=POSITIVE, nll_weight=NOT_NEGATIVE
    )
    data, optim = config.data, config.optim
    losses = set(optim.loss)
    given = flag("loss", *optim.loss)
    if len(losses) < len(optim.loss) or losses == {SFT} or (KTO in losses and len(losses) > 1):
        raise UserError(
            f"{given}: each loss once is needed; kto stands alone, and sft beside another"
        )
    if optim.loss_weights and len(optim.loss_weights) != len(optim.loss):
        raise UserError(
            f"{flag('loss_weights', *optim.loss_weights)}: {given} needs {len(optim.loss)} weights"
        )
    for name, readers in _READ_BY.items():
        if getattr(optim, name) is not None and losses.isdisjoint(readers):
            raise UserError(
                f"{flag(name)} is for the losses {', '.join(readers)}: leave it out, or take one "
                f"of these in the place of {given}"
            )
    if not 0 <= optim.preference.smoothing < 0.5:
        raise UserError(f"--smoothing {optim.smoothing}: a share from 0 to below 0.5 is needed")
    if len(losses) > 1 and optim.smoothing and not losses <= {*_READ_BY["smoothing"], SFT}:
        raise UserError(f"--smoothing: one of {given} has none")
    needs = sorted(losses.difference(WITHOUT_REFERENCE))
    if needs and data.reference == NONE:
        raise UserError(
            f"--reference none: the loss {needs[0]} compares with a reference; name one, or take "
            f"a loss without it: {', '.join(WITHOUT_REFERENCE[:-1])}"
        )
    if not needs and data.reference != NONE:
        raise UserError(
            f"--reference {data.reference} has no effect on {given}, which compare with none: "
            "leave it out"
        )
    if data.reference == NONE and data.reference_logps != "cached":
        raise UserError("--reference-logps live: there is no reference; leave it out")
    coupled = sorted(name for name in losses if name in PREFERENCES and PREFERENCES[name].coupled)
    if coupled and optim.grad_accum > 1:
        raise UserError(
            f"--grad-accum {optim.grad_accum}: the loss {coupled[0]} sorts all pairs of a batch, "
            "and parts of it would be other batches: give --batch-size all of them"
        )
    if data.packing and KTO in losses:
        raise UserError("--packing: kto compares the rows of a batch, one by one; leave it out")
    if KTO in losses and optim.batch_size * optim.grad_accum < 2:
        raise UserError("--batch-size 1: kto compares rows of a batch, so two are needed")
