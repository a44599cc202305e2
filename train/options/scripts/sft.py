"""The options of `python -m train.sft`: frozen dataclasses, checked before anything is read."""

import dataclasses
from typing import Annotated, Literal

import tyro

from lora_jax.hf.packaged import SMOLLM2
from lora_jax.training.arguments import SEED, NumberRange, numbers_from
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
    "The loss per token. "
    + "".join(f"{name}: {loss.about}. " for name, loss in TOKEN_LOSSES.items())
    + "Held-out data are always measured by cross-entropy."
)
DEFAULT_TASK = "sql"  # of train/settings/tasks.py


@dataclasses.dataclass(frozen=True, kw_only=True)
class SftDataConfig(TokensConfig):
    """Model and data."""

    dataset: tuple[Place, ...] = (DEFAULT_TASK,)
    """The training data: "sql" (the default task), a file (JSONL, JSON, CSV, TSV, also gzipped, or
    Parquet), a folder of files, a folder that `datasets` saved, or a dataset on the hub. Each row
    has `messages` (and `tools`), `prompt` and `completion`, `conversations` (ShareGPT),
    `instruction` and `output` (Alpaca), or `text`. A field `system` with a text becomes the first
    turn. With a model that reads images, parts of `messages` may show the images of a field
    `images`. You may name several data sets. An epoch then has as many rows as all of them
    together. Without weights, each row comes once per epoch. With weights, as in a.jsonl:3
    b.jsonl:1, three of four rows come from the first data set. A data set that is too small for its
    share is reshuffled and repeated."""
    rows: int | None = None
    """Use only this many rows of each data set, from its beginning. The SQL task generates this
    many rows, balanced over its query forms. By default it generates the rows of 35 steps."""
    shuffle_schemas: bool = option(False, field.ROWS)
    """Pair each question of the SQL task with the tables of another database, as a control
    experiment."""
    stream: bool = option(False, field.HIDDEN, card=CardSection.STREAM)
    """Read the data while training, so that memory does not grow with the size of the data. The
    data may be lines of JSON, Parquet files, or anything that `datasets` loads. Rows are shuffled
    within a buffer of blocks from random places of the data. Needs --steps and --truncate."""
    train_on: Literal["all", "assistant", "last"] = option(
        "assistant", field.HIDDEN, card=CardSection.LOSS
    )
    """The tokens that count in the loss: all tokens, the assistant's, or those of its last turn."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SftAdapterConfig(AdapterConfig):
    """Parameters that train."""

    alpha: float | None = None
    """The alpha of the adapter's scale (see --scaling). By default twice the rank, and ten times
    the rank for the few steps of the SQL task."""
    alora: Words | None = option(
        None, field.FACTORS, of_inputs=True, single=True, uncompared=Uncompared.ADAPTER
    )
    """Train an activated LoRA (aLoRA), which acts after the last occurrence of this text, or of
    these token ids (9,88,12), in a row. Tokens before it have the keys and values of the base,
    which a server can reuse. Only tokens after it count in the loss. (In a shell, $'\\n' is a line
    break.)"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SftOptimConfig(LanguageOptimConfig):
    """Optimisation."""

    steps: int | None = None
    """Number of optimiser steps. By default 35 for the SQL task, and one epoch for other data."""
    lr: float | None = None
    """The peak learning rate. By default 2e-4, and 1e-3 for the few steps of the SQL task. --full
    uses a tenth of the default, and --optimizer lion a third. sgd has no default. muon may need a
    larger rate in short runs, and schedule-free up to ten times as much."""
    beta2: float | None = None
    """Decay rate of the squared gradients (adamw, schedule-free). By default 0.999, and 0.99 for
    the few steps of the SQL task, so that its large first gradients are forgotten. For lion, the
    decay rate of the mean gradient, by default 0.99."""
    seed: int = 0
    """Seed of the adapter's initialisation, the order of the data, held-out rows, dropout and
    noise, and of the SQL task's training questions."""
    loss: Annotated[LossName, tyro.conf.arg(help=_LOSS)] = option(DEFAULT, field.OPTIMISATION)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SftRunConfig(RunConfig):
    """Evaluation and output."""

    output: Place = f"runs/{DEFAULT_TASK}"
    """The output folder of the run. With --many, it contains the folders of all runs. By default
    runs/sft for data other than the SQL task."""
    many: str | None = option(None, field.OF_CALL, uncompared=Uncompared.TABLE)
    """Train several runs over one base side by side, from a file with one run per row (.csv, .tsv,
    .jsonl, .json or .yaml). The column `name` is the run's folder in --output. Other columns are
    options, named as on this page, that override the command line for this run."""
    sample_prompts: tuple[Words, ...] = option((), field.COURSE)
    """Prompts that the model answers greedily during training, for the log and samples.jsonl. Pass
    texts, or one file: a .txt with a prompt per line, or a .jsonl whose rows have a `prompt`, or
    `messages` that end with a user's turn."""
    sample_every: int = option(0, field.COURSE)
    """Number of steps between answers to --sample-prompts. 0 turns answers off."""
    sample_tokens: int = option(64, field.COURSE, NoEffect.NO_PROMPTS)
    """The maximum number of tokens of an answer to --sample-prompts."""
    eval_questions: int | None = option(
        None,
        field.CHANGEABLE,
        NoEffect.NONE_HELD_OUT,
        NoEffect.EVAL_DATASET,
        NoEffect.STREAM,
    )
    """Number of questions of each kind that the SQL task answers before and after training: by
    default 16, 0 for none. For other data with --eval-every, the number of rows to hold out: by
    default 64, at most a tenth of all rows. --seed draws them, and each of several data sets
    contributes its share. --eval-dataset replaces these rows."""


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
    """Raises a UserError if the options contradict each other, whatever the task is.

    Args:
      config: the options of this script, or of another that trains language models.
      **numbers: the ranges of the numbers that further options take.
    """
    counted = dict.fromkeys(("seq_len", "rows", "sample_tokens"), numbers_from(1))
    counted |= dict.fromkeys(("eval_questions", "sample_every", "loss_chunk"), numbers_from(0))
    check_shared(config, held_out_seed=SEED, **counted, **numbers)
    if bool(config.run.sample_prompts) != bool(config.run.sample_every):
        raise UserError(
            "--sample-prompts sets the prompts, and --sample-every sets how often they are "
            "answered. Pass both options, or neither."
        )
    if config.data.seq_len < 2:
        raise UserError("--seq-len 1 leaves no token to predict. Pass at least 2.")
