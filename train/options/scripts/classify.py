"""The options of `python -m train.classify`."""

import dataclasses
from typing import Literal

from lora_jax.training.arguments import numbers_from
from train.console.errors import UserError
from train.console.help import HelpPage
from train.options import field
from train.options.common import AdapterConfig, OptimConfig, Options, RunConfig, check_shared, flag
from train.options.conditions import NO_ADAPTER, NoEffect
from train.options.defaults import Defaults
from train.options.field import CardSection, option
from train.options.paths import Place, kind_of
from train.options.tokenizer import TokenizerOption

DEFAULT_TASK = "vader"  # of train/settings/tasks.py
HEAD = "classifier"
HEAD_RATE = 3e-2  # the default learning rate with --head-only
INTRINSIC_RATE = 3e-2  # with --intrinsic 10000; see `rate_of_dimension`


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClassifyDataConfig(TokenizerOption):
    """Model and data."""

    model: Place | None = option(None, field.OF_BASE)
    """A BERT, RoBERTa or XLM-RoBERTa model, or for images a ViT or DINOv2: a name on the hub, or a
    folder. By default the base of --init-adapter, or else all-MiniLM-L6-v2 for texts."""
    dataset: Place = option(DEFAULT_TASK, field.HIDDEN)
    """The rows: "vader" (the default task: words rated by people), a file (JSONL, JSON, CSV, TSV,
    also gzipped, or Parquet), a folder of files, a folder that `datasets` saved, or a dataset on
    the hub. For images, also a folder with a folder of images for each class."""
    labels: Literal["classes", "pairs"] = option("classes", field.HIDDEN)
    """The kind of labels. classes: each row has the class of a text. pairs: each row says which of
    two completions is better, as for `train.dpo`. pairs trains a reward model for `train.grpo
    --reward`."""
    split: str = option("train", field.OF_HUB)
    """The split to train on, for a folder or a dataset on the hub."""
    subset: str | None = option(None, field.OF_HUB)
    """The subset (configuration) to load, for a dataset on the hub."""
    text: str = option("text", field.OF_FIELD, NoEffect.PREFERENCES, NoEffect.IMAGES)
    """The field that holds the text."""
    image: str | None = option(None, field.OF_FIELD, NoEffect.PREFERENCES)
    """The field that holds an image, as a path or as the bytes of its file. A folder of images
    does not need this option."""
    text_pair: str | None = option(None, field.OF_FIELD, NoEffect.PREFERENCES, NoEffect.IMAGES)
    """The field that holds the second text of a pair, such as a premise and a hypothesis."""
    label: str = option("label", field.OF_FIELD, NoEffect.PREFERENCES)
    """The field that holds the label, which is a name or a number."""
    test: str | None = option(None, field.HIDDEN)
    """The test rows: a file, or another split of the folder or of the dataset on the hub. By
    default --test-share of the rows is held out."""
    test_share: float = option(0.2, field.OF_FIELD, NoEffect.TEST)
    """The share of the rows to hold out for the test, stratified by label. With --labels pairs, the
    share of the prompts."""
    rows: int | None = option(None, field.ROWS)
    """Use only this many rows, from the beginning of the data."""
    seq_len: int = option(128, field.HIDDEN, NoEffect.IMAGES, card=CardSection.LENGTH)
    """The maximum number of tokens of a text, or of a prompt with its completion."""
    truncate: bool = option(False, field.HIDDEN, NoEffect.IMAGES, card=CardSection.LOSS)
    """Truncate texts that are longer than --seq-len. Without this option, such texts are an error.
    With --labels pairs, the beginning of the prompt is removed."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClassifyAdapterConfig(AdapterConfig):
    """Parameters that train."""

    head_only: bool = option(False, field.TRAINED, compared_by="methods")
    """Train only the head. The encoder stays frozen."""
    intrinsic: int | None = option(None, field.TRAINED, compared_by="dimensions")
    """Train a subspace with this many dimensions (the intrinsic dimension, Aghajanyan et al. 2020).
    A random projection turns the trained numbers into changes of every parameter, including the
    head. --seed draws the projection."""
    intrinsic_kind: Literal["did", "said"] = option(
        "said", field.TRAINED, NoEffect.NO_INTRINSIC, compared_by="methods"
    )
    """The kind of subspace of --intrinsic. did: one projection for all parameters. said: each layer
    also has a trained scale, which counts as one of the trained numbers."""
    train: tuple[str, ...] = ()
    """Modules to train in full besides the adapter and the head."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClassifyOptimConfig(OptimConfig):
    """Optimisation."""

    epochs: float | None = None
    """Number of passes over the data. By default 3, unless you pass --steps."""
    batch_size: int = 32
    """Number of texts, images or pairs in memory at once, on all devices together."""
    lr: float | None = None
    """The peak learning rate. By default 1e-3; 3e-5 with --full, 3e-2 with --head-only, and 0.03 *
    (10000 / D)^0.75 with --intrinsic D. --optimizer lion uses a third of the default. sgd has no
    default."""
    warmup: int = 20
    """Number of steps over which the learning rate rises linearly to its peak."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClassifyRunConfig(RunConfig):
    """Evaluation and output."""

    output: Place = "runs/classify"
    """The output folder of the run."""
    log_every: int = 20
    """Number of steps between lines of metrics."""
    save_every: int = 100
    """Number of steps between checkpoints. The last step always has a checkpoint."""
    eval_every: int = 0
    """Number of steps between evaluations of the loss on the test rows. 0 turns evaluations off."""
    eval_rows: int | None = option(None, field.CHANGEABLE, NoEffect.NONE_MEASURED)
    """Number of test rows to measure the loss of --eval-every on, spread evenly over all test rows.
    By default all test rows."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(Options):
    """Fine-tune an encoder to classify texts or images, or to score completions, with LoRA or in
    full."""

    HELP = HelpPage(
        "model dataset text label test output epochs rank lr resume",
        "--model FacebookAI/roberta-base --dataset reviews.csv --text review --label stars",
    )

    data: ClassifyDataConfig = ClassifyDataConfig()
    adapter: ClassifyAdapterConfig = ClassifyAdapterConfig()
    optim: OptimConfig = ClassifyOptimConfig()
    run: ClassifyRunConfig = ClassifyRunConfig()


def fill_head_options(config: Config, defaults: Defaults) -> tuple[Config, Defaults]:
    """Returns the options and the learning rate of a run that trains a head or a subspace."""
    adapter = config.adapter
    if adapter.head_only and not adapter.full:
        adapter = dataclasses.replace(adapter, targets=NO_ADAPTER)
        config = dataclasses.replace(config, adapter=adapter)
        defaults = dataclasses.replace(defaults, lr=HEAD_RATE)
    if adapter.intrinsic is not None:
        rate = rate_of_dimension(max(1, adapter.intrinsic), INTRINSIC_RATE)
        defaults = dataclasses.replace(defaults, lr=rate)
    return config, defaults


def rate_of_dimension(dimension: int, rate: float) -> float:
    """Returns the learning rate of a subspace from the rate of one with 10,000 dimensions.

    A rule of thumb: it falls as d^(-3/4), between equal steps of the weights, whose length is √d
    times the rate, and equal gains by the gradient, of which a subspace holds the share √(d/D).
    """
    return rate * (10_000 / dimension) ** 0.75


def check(config: Config) -> None:
    """Raises a UserError if the options contradict each other, whatever the task is."""
    data = config.data
    if not 0 < data.test_share < 1:
        raise UserError(f"--test-share is {data.test_share}. Pass a number between 0 and 1.")
    names_file = data.test is None or kind_of(data.test)
    if not names_file and kind_of(data.dataset or ""):
        raise UserError(
            f"--test {data.test} names a split, but --dataset {data.dataset} is a file, which has "
            "no splits. Pass a file with --test, or remove --test to hold out a share of the rows."
        )
    for name in ("full", "peft_config", "init_adapter"):
        if config.adapter.head_only and getattr(config.adapter, name):
            raise UserError(f"--head-only trains only the head. Remove {flag(name)}.")
    for name in ("full", "head_only", "peft_config", "init_adapter"):
        if config.adapter.intrinsic is not None and getattr(config.adapter, name):
            raise UserError(
                f"--intrinsic trains a subspace of all parameters. Remove {flag(name)}."
            )
    if config.optim.lr_rule is not None:
        raise UserError("--lr-rule was fitted to language models only. Pass --lr instead.")
    check_shared(
        config,
        intrinsic=numbers_from(1),
        rows=numbers_from(1),
        eval_rows=numbers_from(1),
        seq_len=numbers_from(3),
    )
