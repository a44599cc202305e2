"""The options of `python -m train.classify`."""

import dataclasses

from train.data.labelled import VADER, DataConfig
from train.run.adapter import NO_ADAPTER
from train.run.errors import UserError
from train.run.options import (
    AdapterConfig,
    OptimConfig,
    Options,
    RunConfig,
    at_least,
    check_shared,
    flag,
)

HEAD = "classifier"
EPOCHS = 3.0
RATE, FULL_RATE, HEAD_RATE = 1e-3, 3e-5, 3e-2


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

    @property
    def is_vader(self) -> bool:
        """Whether the run trains on the default task."""
        return self.data.dataset == VADER


def settled(config: Config) -> Config:
    """The options with those filled in whose defaults depend on what trains."""
    adapter, optim = config.adapter, config.optim
    if adapter.head_only and not adapter.full:
        adapter = dataclasses.replace(adapter, targets=NO_ADAPTER)
    if adapter.alpha is None and adapter.peft_config is None:
        adapter = dataclasses.replace(adapter, alpha=2.0 * adapter.rank)
    if optim.lr is None:
        rate = FULL_RATE if adapter.full else HEAD_RATE if adapter.head_only else RATE
        optim = dataclasses.replace(optim, lr=rate)
    if optim.epochs is None and optim.steps is None:
        optim = dataclasses.replace(optim, epochs=EPOCHS)
    if optim.beta2 is None:
        optim = dataclasses.replace(optim, beta2=0.999)
    return dataclasses.replace(config, adapter=adapter, optim=optim)


def check(config: Config) -> None:
    """Everything that can be checked of settled options without data or model; or UserError."""
    data = config.data
    if not 0 < data.test_share < 1:
        raise UserError(f"--test-share {data.test_share}: a number between 0 and 1")
    for name in ("full", "peft_config", "init_adapter"):
        if config.adapter.head_only and getattr(config.adapter, name):
            raise UserError(f"--head-only trains the head alone: leave {flag(name)} out")
    if config.is_vader and data.test is not None:
        raise UserError("--test: the words of --dataset vader have a split of their own, by stem")
    if config.optim.lr_rule is not None:
        raise UserError("--lr-rule was fitted to language models: give --lr")
    check_shared(config)
    at_least(1, data, "rows")
    at_least(3, data, "seq_len")
