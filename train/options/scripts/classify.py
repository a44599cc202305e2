"""The options of `python -m train.classify`."""

import dataclasses
from typing import Literal

from lora_jax.training.arguments import minimum
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
    folder. By default the base of --init-adapter, or else, for texts, all-MiniLM-L6-v2."""
    dataset: Place = option(DEFAULT_TASK, field.HIDDEN)
    """"vader" (the default task: words rated by people), a file (JSONL, JSON, CSV, TSV, also
    gzipped, or Parquet), a folder of them, a folder that `datasets` saved, or a dataset on the
    hub; or a folder of images, with a folder for each class."""
    labels: Literal["classes", "pairs"] = option("classes", field.HIDDEN)
    """The labels of the rows. classes: the class of a text. pairs: which of two completions is
    better, as in rows of `train.dpo`; it trains a reward model, which `train.grpo --reward` takes.
    """
    split: str = option("train", field.OF_HUB)
    """The split to train on, for a folder or a dataset on the hub."""
    subset: str | None = option(None, field.OF_HUB)
    """The subset (configuration) to load, for a dataset on the hub."""
    text: str = option("text", field.OF_FIELD, NoEffect.PREFERENCES, NoEffect.IMAGES)
    """The field that holds the text."""
    image: str | None = option(None, field.OF_FIELD, NoEffect.PREFERENCES)
    """The field that holds an image, as a path or as its file's bytes, in the place of a text. A
    folder of images needs no such name."""
    text_pair: str | None = option(None, field.OF_FIELD, NoEffect.PREFERENCES, NoEffect.IMAGES)
    """The field that holds a second text, for pairs (a premise and a hypothesis)."""
    label: str = option("label", field.OF_FIELD, NoEffect.PREFERENCES)
    """The field that holds the label: a name or a number."""
    test: str | None = option(None, field.HIDDEN)
    """The test rows: a file, or another split of the folder or of the dataset on the hub. By
    default --test-share of the rows is held out."""
    test_share: float = option(0.2, field.OF_FIELD, NoEffect.TEST)
    """The share of the rows to hold out for the test, stratified by label; of pairs, of prompts."""
    rows: int | None = option(None, field.ROWS)
    """Use only this many rows, from the beginning."""
    seq_len: int = option(128, field.HIDDEN, NoEffect.IMAGES, card=CardSection.LENGTH)
    """The maximum number of tokens of a text, or of a prompt and its completion."""
    truncate: bool = option(False, field.HIDDEN, NoEffect.IMAGES, card=CardSection.LOSS)
    """Truncate texts longer than --seq-len; without this option, they are an error. With --labels
    pairs, they lose the prompt's beginning."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClassifyAdapterConfig(AdapterConfig):
    """Parameters that train."""

    head_only: bool = option(False, field.TRAINED, compared_by="methods")
    """Train only the head, on the frozen encoder."""
    intrinsic: int | None = option(None, field.TRAINED, compared_by="dimensions")
    """Train this many numbers, which a random projection turns into changes of every parameter, the
    head's too: the intrinsic dimension (Aghajanyan et al. 2020). --seed draws the projection."""
    intrinsic_kind: Literal["did", "said"] = option(
        "said", field.TRAINED, NoEffect.NO_INTRINSIC, compared_by="methods"
    )
    """The kind of --intrinsic. did: one projection for all. said: with a trained scale for each
    layer, which is one of the numbers."""
    train: tuple[str, ...] = ()
    """Modules that train in full, besides the adapter and the head."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClassifyOptimConfig(OptimConfig):
    """Optimisation."""

    epochs: float | None = None
    """Passes over the data. By default 3, if --steps is not given."""
    batch_size: int = 32
    """Texts, images or pairs in memory at once, on all devices together."""
    lr: float | None = None
    """The peak learning rate. By default 1e-3; with --full 3e-5, with --head-only 3e-2,
    with --intrinsic D 0.03 * (10000 / D)^0.75. With --optimizer lion a third of that; sgd has no
    default."""
    warmup: int = 20
    """Steps of linear warmup of the learning rate."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClassifyRunConfig(RunConfig):
    """Evaluation and output."""

    output: Place = "runs/classify"
    """The output folder of the run."""
    log_every: int = 20
    """Steps between lines of metrics."""
    save_every: int = 100
    """Steps between checkpoints; the last step always has one."""
    eval_every: int = 0
    """Steps between evaluations of the loss on the test rows; 0 for none."""
    eval_rows: int | None = option(None, field.CHANGEABLE, NoEffect.NONE_MEASURED)
    """Test rows to measure that loss on, spread over all of them; by default all."""


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
    """Returns options and defaults for the parameters that train: a head, or a subspace."""
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
    """Returns the learning rate in a subspace, given that of one of 10,000 dimensions.

    A rule of thumb: it falls as d^(-3/4), between equal steps of the weights, whose length is √d
    times the rate, and equal gains by the gradient, of which a subspace holds the share √(d/D).
    """
    return rate * (10_000 / dimension) ** 0.75


def check(config: Config) -> None:
    """Raises a UserError if options, with their defaults, make no sense for any task."""
    data = config.data
    if not 0 < data.test_share < 1:
        raise UserError(f"--test-share {data.test_share}: a number between 0 and 1 is needed")
    names_file = data.test is None or kind_of(data.test)
    if not names_file and kind_of(data.dataset or ""):
        raise UserError(
            f"--test {data.test}: --dataset {data.dataset} is a file, which has no splits. Give "
            "another file with --test, or leave it out to hold out a share of the rows"
        )
    for name in ("full", "peft_config", "init_adapter"):
        if config.adapter.head_only and getattr(config.adapter, name):
            raise UserError(f"--head-only trains only the head: leave out {flag(name)}")
    for name in ("full", "head_only", "peft_config", "init_adapter"):
        if config.adapter.intrinsic is not None and getattr(config.adapter, name):
            raise UserError(
                f"--intrinsic trains a subspace of all parameters: leave out {flag(name)}"
            )
    if config.optim.lr_rule is not None:
        raise UserError("--lr-rule was fitted to language models: give --lr instead")
    check_shared(
        config,
        intrinsic=minimum(1),
        rows=minimum(1),
        eval_rows=minimum(1),
        seq_len=minimum(3),
    )
