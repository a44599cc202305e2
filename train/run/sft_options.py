"""The options of `python -m train.sft`: frozen dataclasses, checked as far as that can be early."""

import dataclasses

from lora_jax.hf.bundled import SMOLLM2
from train.run.errors import UserError
from train.run.options import AdapterConfig, OptimConfig, Options, RunConfig, at_least, check_shared

DEFAULT_MODEL = SMOLLM2.name
SQL = "sql"  # the name of the default task, made in train/tasks/sql


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Model and data."""

    model: str | None = None
    """A name on the hub, a folder, or a GGUF file. By default the base of --init-adapter, or
    SmolLM2-135M-Instruct."""
    dataset: str = SQL
    """"sql" (the default task), a JSONL, Parquet or CSV file, or a dataset of the hub. Rows have
    `messages`, or `prompt` and `completion`."""
    split: str = "train"
    """Which split of a dataset of the hub."""
    subset: str | None = None
    """Which subset of a dataset of the hub."""
    rows: int | None = None
    """Use the first rows only. Of the SQL task there are as many as wanted: by default what
    35 steps see, evenly spread over its forms."""
    shuffle_schemas: bool = False
    """A control for the SQL task: train on questions beside the tables of another database."""
    seq_len: int = 128
    """Tokens a sequence."""
    truncate: bool = False
    """Cut rows off that are longer than --seq-len, which are an error otherwise."""
    packing: bool = False
    """Put several rows into one sequence; none sees another."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SftAdapterConfig(AdapterConfig):
    """What trains."""

    alpha: float | None = None
    """The adapter's product is scaled by alpha / rank. By default twice the rank; for the few steps
    of the SQL task, ten times."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SftOptimConfig(OptimConfig):
    """Optimisation."""

    steps: int | None = None
    """Optimiser steps. 35 for the SQL task, one epoch for other data, if --epochs is not given."""
    lr: float | None = None
    """The highest learning rate (AdamW). By default 2e-4, for the few steps of the SQL task 1e-3;
    a tenth of that for --full."""
    beta2: float | None = None
    """Adam's memory of squared gradients. By default 0.999; for the few steps of the SQL task, in
    which the first large gradients would never be forgotten, 0.99."""
    seed: int = 0
    """Of the adapter's start, the order of the data, dropout, and the SQL task's questions."""
    loss_chunk: int = 256
    """Predictions, of each part that --mesh shares the batch out into, whose logits are in memory
    at once; fewer take less of it. The head then runs once more in the backward pass. 0 for all."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SftRunConfig(RunConfig):
    """Evaluation and output."""

    output: str = "runs/sql"
    """The folder of this run."""
    eval_questions: int = 64
    """The SQL task: questions answered before and after training, of each kind; 0 for none. Other
    data: rows held out (at most a tenth) if --eval-every is given."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(Options):
    """Fine-tune a language model, with LoRA or in full."""

    data: DataConfig = DataConfig()
    adapter: AdapterConfig = SftAdapterConfig()
    optim: SftOptimConfig = SftOptimConfig()
    run: SftRunConfig = SftRunConfig()


def check(config: Config) -> None:
    """Raises UserError where options with their defaults make no sense, whatever the task is."""
    check_shared(config)
    at_least(1, config.data, "seq_len", "rows")
    at_least(0, config.run, "eval_questions")
    at_least(0, config.optim, "loss_chunk")
    if config.data.seq_len < 2:
        raise UserError("--seq-len 1 leaves no token to predict")
