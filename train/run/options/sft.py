"""The options of `python -m train.sft`: frozen dataclasses, checked before anything is read."""

import dataclasses
from typing import Literal

from lora_jax.hf.bundled import SMOLLM2
from train.run.errors import UserError
from train.run.options.common import (
    AdapterConfig,
    OptimConfig,
    Options,
    RunConfig,
    at_least,
    check_shared,
)

DEFAULT_MODEL = SMOLLM2.name
SQL = "sql"  # the name of the default task, defined in train/tasks/sql


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Model and data."""

    model: str | None = None
    """The language model: a name on the hub, a folder, or a GGUF file. By default the base of
    --init-adapter, or else SmolLM2-135M-Instruct."""
    rope_scaling: str | None = None
    """Scale the model's RoPE, for rows longer than it allows: linear:2, yarn:4 or llama3:8, the
    factor by which they may be longer, and further fields of config.json's rope_parameters
    (yarn:4,beta_fast=16). The adapter's folder says it, so that train.generate and train.export do
    the same. By default the scaling of --init-adapter."""
    dataset: str = SQL
    """"sql" (the default task), a file (JSONL, JSON, CSV, TSV, also gzipped, or Parquet), a folder
    of them, a folder that `datasets` saved, or a dataset on the hub. Each row has `messages` (and
    `tools`), `prompt` and `completion`, `conversations` (ShareGPT), `instruction` and `output`
    (Alpaca), or `text`."""
    fields: tuple[str, ...] = ()
    """Fields by other names: prompt=question completion=answer."""
    split: str = "train"
    """The split to train on, for a folder or a dataset on the hub."""
    subset: str | None = None
    """The subset (configuration) to load, for a dataset on the hub."""
    eval_dataset: str | None = None
    """Data to measure the loss on every --eval-every steps, in the place of rows that are held out:
    whatever --dataset takes."""
    eval_split: str = "train"
    """The split of --eval-dataset, for a folder or a dataset on the hub."""
    rows: int | None = None
    """Use only this many rows, from the beginning. The SQL task generates as many as requested, by
    default as many as 35 steps see, balanced over its query forms."""
    shuffle_schemas: bool = False
    """Pair each question of the SQL task with the tables of another database, as a control."""
    seq_len: int = 128
    """The maximum number of tokens of a sequence."""
    truncate: bool = False
    """Truncate rows longer than --seq-len; without this option, they are an error."""
    packing: bool = False
    """Pack several rows into one sequence; no row attends to another. Without this option, rows of
    about one length share a batch."""
    train_on: Literal["all", "assistant", "last"] = "assistant"
    """The tokens that the loss counts: those of the assistant, of its last turn, or all."""
    token_cache: str | None = None
    """The folder where tokenised rows are kept for later runs, or off. By default lora_jax/tokens
    in the user's cache folder, for a thousand rows and more."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SftAdapterConfig(AdapterConfig):
    """Parameters that train."""

    alpha: float | None = None
    """The adapter's product is scaled by alpha / rank. By default alpha is twice the rank; for the
    few steps of the SQL task, ten times the rank."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SftOptimConfig(OptimConfig):
    """Optimisation."""

    steps: int | None = None
    """Optimiser steps. By default 35 for the SQL task, and one epoch for other data."""
    lr: float | None = None
    """The peak learning rate. By default 2e-4, and 1e-3 for the few steps of the SQL task; with
    --full, a tenth of that. With --optimizer lion a third (3 to 10 times lower than AdamW's is its
    authors' advice); adafactor makes steps as large as AdamW's, and so does muon in long runs (in
    short ones it may need more); schedule-free takes as much, or up to ten times more. sgd has no
    default."""
    beta2: float | None = None
    """Decay rate of the squared gradients, of adamw and schedule-free: by default 0.999; 0.99 for
    the few steps of the SQL task, which would otherwise never forget its large first gradients. Of
    lion's mean gradient: by default 0.99."""
    seed: int = 0
    """Seed of the adapter's initialisation, data order, dropout, and the SQL task's questions."""
    loss_chunk: int = 256
    """Predictions whose logits are in memory at once, for each part of the batch on the mesh. Fewer
    take less memory; the head is recomputed in the backward pass. 0 for all at once."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SftRunConfig(RunConfig):
    """Evaluation and output."""

    output: str = "runs/sql"
    """The output folder of the run."""
    sample_prompts: tuple[str, ...] = ()
    """Prompts that the model answers on the way, greedily, for the log and samples.jsonl: texts, or
    one file, of lines (.txt) or of rows with a `prompt`, or `messages` up to a user's (.jsonl)."""
    sample_every: int = 0
    """Steps between those answers; 0 for none."""
    sample_tokens: int = 64
    """The maximum number of tokens of such an answer."""
    eval_questions: int = 64
    """SQL task: questions of each kind to answer before and after training; 0 for none. Other data:
    rows to hold out, at most a tenth of them, if --eval-every is given; --seed draws them."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(Options):
    """Fine-tune a language model, with LoRA or in full."""

    data: DataConfig = DataConfig()
    adapter: AdapterConfig = SftAdapterConfig()
    optim: SftOptimConfig = SftOptimConfig()
    run: SftRunConfig = SftRunConfig()


def check(config: Config) -> None:
    """Raises a UserError if options, with their defaults, make no sense for any task."""
    check_shared(config)
    at_least(1, config.data, "seq_len", "rows")
    at_least(0, config.run, "eval_questions", "sample_every")
    at_least(1, config.run, "sample_tokens")
    if bool(config.run.sample_prompts) != bool(config.run.sample_every):
        raise UserError(
            "--sample-prompts says what to ask, and --sample-every how often: give both"
        )
    at_least(0, config.optim, "loss_chunk")
    if config.data.seq_len < 2:
        raise UserError("--seq-len 1 leaves no token to predict")
