"""The options of `python -m train.sft`: frozen dataclasses, checked before anything is read."""

import dataclasses
from typing import Annotated, Literal

import tyro

from lora_jax.hf.packaged import SMOLLM2
from lora_jax.training.arguments import SEED, NumberRange, minimum
from lora_jax.training.losses import DEFAULT, TOKEN_LOSSES
from train.console.errors import UserError
from train.console.help import HelpPage
from train.options import field
from train.options.common import AdapterConfig, Options, RunConfig, check_shared
from train.options.conditions import NoEffect
from train.options.field import CardSection, Uncompared, option
from train.options.paths import Place, Words
from train.options.scripts.language import LanguageDataConfig, LanguageOptimConfig, TokensConfig

DEFAULT_MODEL = SMOLLM2.name
LossName = Literal[*TOKEN_LOSSES]  # type: ignore[valid-type]
_LOSS = (
    "The loss of a token. "
    + "".join(f"{name}: {loss.about}. " for name, loss in TOKEN_LOSSES.items())
    + "Held-out data are measured by cross-entropy, whatever the loss."
)
DEFAULT_TASK = "sql"  # of train/settings/tasks.py


@dataclasses.dataclass(frozen=True, kw_only=True)
class SftDataConfig(TokensConfig):
    """Model and data."""

    dataset: tuple[Place, ...] = (DEFAULT_TASK,)
    """"sql" (the default task), a file (JSONL, JSON, CSV, TSV, also gzipped, or Parquet), a folder
    of them, a folder that `datasets` saved, or a dataset on the hub. Each row has `messages` (and
    `tools`), `prompt` and `completion`, `conversations` (ShareGPT), `instruction` and `output`
    (Alpaca), or `text`; a `system`, a text, is the first turn. With a model that reads images,
    parts of `messages` may show those of a field `images`. Several data sets may be named; an epoch
    has as many rows as all of them. Without weights each row comes once an epoch. With weights, as
    in a.jsonl:3 b.jsonl:1, three of four rows come from the first; a data set too small for its
    share starts over, reshuffled."""
    rows: int | None = None
    """Use only this many rows of each data set, from the beginning. The SQL task generates as many
    as requested, by default as many as 35 steps see, balanced over its query forms."""
    shuffle_schemas: bool = option(False, field.ROWS)
    """Pair each question of the SQL task with the tables of another database, as a control."""
    stream: bool = option(False, field.HIDDEN, card=CardSection.STREAM)
    """Read the data while training, in memory that does not grow with their size: lines of JSON,
    Parquet (by row groups), or what `datasets` loads. Rows are shuffled within a buffer of blocks
    drawn from all over the data. Needs --steps and --truncate."""
    train_on: Literal["all", "assistant", "last"] = option(
        "assistant", field.HIDDEN, card=CardSection.LOSS
    )
    """The tokens that the loss counts: all, the assistant's, or those of its last turn."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SftAdapterConfig(AdapterConfig):
    """Parameters that train."""

    alpha: float | None = None
    """The alpha of the adapter's scale; see --scaling. By default twice the rank; for the few steps
    of the SQL task, ten times the rank."""
    alora: Words | None = option(
        None, field.FACTORS, of_inputs=True, single=True, uncompared=Uncompared.ADAPTER
    )
    """Train an activated LoRA (aLoRA), which acts from the last occurrence of this text in a row
    on, or of these token ids (9,88,12): the tokens before it are the base's, whose keys and values
    a server can use again. The loss counts tokens after it alone. (In a shell, $'\\n' is a line
    break.)"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SftOptimConfig(LanguageOptimConfig):
    """Optimisation."""

    steps: int | None = None
    """Optimiser steps. By default 35 for the SQL task, and one epoch for other data."""
    lr: float | None = None
    """The peak learning rate. By default 2e-4, and 1e-3 for the few steps of the SQL task; a tenth
    of that with --full, and a third with --optimizer lion; sgd has no default. muon may need more
    in short runs, and schedule-free up to ten times as much."""
    beta2: float | None = None
    """Decay rate of the squared gradients (adamw, schedule-free): by default 0.999; 0.99 for the
    few steps of the SQL task, which would otherwise never forget its large first gradients. For
    lion, the decay rate of the mean gradient: by default 0.99."""
    seed: int = 0
    """Seed of the adapter's initialisation, data order, held-out rows, dropout and noise, and of
    the SQL task's training questions."""
    loss: Annotated[LossName, tyro.conf.arg(help=_LOSS)] = option(DEFAULT, field.OPTIMISATION)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SftRunConfig(RunConfig):
    """Evaluation and output."""

    output: Place = f"runs/{DEFAULT_TASK}"
    """The output folder of the run; with --many, of the folders of all runs. By default runs/sft
    for other data than the SQL task's."""
    many: str | None = option(None, field.OF_CALL, uncompared=Uncompared.TABLE)
    """Train a table of runs over one base side by side: a file (.csv, .tsv, .jsonl, .json or .yaml)
    with a row a run. `name` is its folder in --output; other columns are options, by their names
    here, that override the command line for this run."""
    sample_prompts: tuple[Words, ...] = option((), field.COURSE)
    """Prompts for the model to answer (greedily) while it trains, for the log and samples.jsonl:
    texts, or one file: .txt with a prompt per line, or .jsonl with rows that have a `prompt`, or
    `messages` that end with a user's."""
    sample_every: int = option(0, field.COURSE)
    """Steps between answers to --sample-prompts; 0 for none."""
    sample_tokens: int = option(64, field.COURSE, NoEffect.NO_PROMPTS)
    """The maximum number of tokens of an answer to --sample-prompts."""
    eval_questions: int | None = option(
        None,
        field.CHANGEABLE,
        NoEffect.NONE_HELD_OUT,
        NoEffect.EVAL_DATASET,
        NoEffect.STREAM,
    )
    """SQL task: questions of each kind to answer before and after training; by default 16, 0 for
    none. Other data, with --eval-every: rows to hold out, by default 64, at most a tenth of all,
    drawn by --seed; several data sets give their share. The rows of --eval-dataset take their
    place."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LanguageOptions(Options):
    """All options of a script that trains language models."""

    data: LanguageDataConfig
    optim: LanguageOptimConfig
    run: SftRunConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(LanguageOptions):
    """Fine-tune a language model, with LoRA or in full."""

    HELP = HelpPage(
        "model dataset output epochs batch_size seq_len rank lr quantize resume",
        "--model Qwen/Qwen3-0.6B --dataset chats.jsonl --output runs/mine --rank 16",
    )

    data: SftDataConfig = SftDataConfig()
    adapter: AdapterConfig = SftAdapterConfig()
    optim: SftOptimConfig = SftOptimConfig()
    run: SftRunConfig = SftRunConfig()


def check(config: LanguageOptions, **numbers: NumberRange) -> None:
    """Raises a UserError if options, with their defaults, make no sense for any task.

    Args:
      config: the options of this script, or of another that trains language models.
      **numbers: the numbers that further options take.
    """
    counted = dict.fromkeys(("seq_len", "rows", "sample_tokens"), minimum(1))
    counted |= dict.fromkeys(("eval_questions", "sample_every", "loss_chunk"), minimum(0))
    check_shared(config, held_out_seed=SEED, **counted, **numbers)
    if bool(config.run.sample_prompts) != bool(config.run.sample_every):
        raise UserError(
            "--sample-prompts says what to ask, and --sample-every how often: give both"
        )
    if config.data.seq_len < 2:
        raise UserError("--seq-len 1 leaves no token to predict")
