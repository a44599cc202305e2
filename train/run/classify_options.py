"""The options of `python -m train.classify`."""

import dataclasses

from train.run import options
from train.run.adapter import NO_ADAPTER
from train.run.errors import UserError
from train.run.options import (
    AdapterConfig,
    Defaults,
    OptimConfig,
    Options,
    RunConfig,
    at_least,
    check_shared,
    flag,
)

VADER = "vader"  # the name of the default task, made in train/tasks/vader.py
HEAD = "classifier"
HEAD_RATE = 3e-2  # the default of --head-only


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Model and data."""

    model: str | None = None
    """A BERT, RoBERTa or XLM-RoBERTa: a name on the hub, or a folder. By default the base of
    --init-adapter, or all-MiniLM-L6-v2."""
    dataset: str = VADER
    """"vader" (the default task: words, rated by people), a JSONL, Parquet or CSV file, or a
    dataset of the hub."""
    split: str = "train"
    """Which split of a dataset of the hub."""
    subset: str | None = None
    """Which subset of a dataset of the hub."""
    text: str = "text"
    """The field that holds the text."""
    text_pair: str | None = None
    """The field that holds a second text, for pairs (a premise and a hypothesis)."""
    label: str = "label"
    """The field that holds the label: a name or a number."""
    test: str | None = None
    """What to test on: a file, or another split of the hub's dataset. By default --test-share of
    the rows is held out."""
    test_share: float = 0.2
    """The share of the rows to hold out; of each label alike."""
    rows: int | None = None
    """Use the first rows only."""
    seq_len: int = 128
    """The most tokens of a text."""
    truncate: bool = False
    """Cut texts off that are longer than --seq-len, which are an error otherwise."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClassifyAdapterConfig(AdapterConfig):
    """What trains."""

    head_only: bool = False
    """Train the head alone, on the model as it is."""
    train: tuple[str, ...] = ()
    """Names of modules that train in full beside the adapter and the head."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClassifyOptimConfig(OptimConfig):
    """Optimisation."""

    epochs: float | None = None
    """Passes over the data. By default three, if --steps is not given."""
    batch_size: int = 32
    """Texts that are in memory at once."""
    lr: float | None = None
    """The highest learning rate (AdamW). By default 1e-3; 3e-5 for --full, 3e-2 for
    --head-only."""
    warmup: int = 20
    """Steps over which the learning rate rises."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClassifyRunConfig(RunConfig):
    """Evaluation and output."""

    output: str = "runs/classify"
    """The folder of this run."""
    log_every: int = 20
    """Steps between lines of metrics."""
    save_every: int = 100
    """Steps between checkpoints; the last step always has one."""
    eval_every: int = 0
    """Steps between measurements of the loss on the test rows; 0 for none."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(Options):
    """Fine-tune an encoder to classify texts, with LoRA or in full."""

    data: DataConfig = DataConfig()
    adapter: ClassifyAdapterConfig = ClassifyAdapterConfig()
    optim: OptimConfig = ClassifyOptimConfig()
    run: ClassifyRunConfig = ClassifyRunConfig()


def with_defaults(config: Config, defaults: Defaults) -> Config:
    """Returns the options with those filled in whose defaults depend on what trains."""
    adapter = config.adapter
    if adapter.head_only and not adapter.full:
        adapter = dataclasses.replace(adapter, targets=NO_ADAPTER)
        config = dataclasses.replace(config, adapter=adapter)
        defaults = dataclasses.replace(defaults, lr=HEAD_RATE)
    return options.with_defaults(config, defaults)


def check(config: Config) -> None:
    """Raises UserError where options with their defaults make no sense, whatever the task is."""
    data = config.data
    if not 0 < data.test_share < 1:
        raise UserError(f"--test-share {data.test_share}: a number between 0 and 1")
    for name in ("full", "peft_config", "init_adapter"):
        if config.adapter.head_only and getattr(config.adapter, name):
            raise UserError(f"--head-only trains the head alone: leave {flag(name)} out")
    if config.optim.lr_rule is not None:
        raise UserError("--lr-rule was fitted to language models: give --lr")
    check_shared(config)
    at_least(1, data, "rows")
    at_least(3, data, "seq_len")
