"""The options of scripts that train language models, which these share."""

import dataclasses
from typing import Any

from train.options import field
from train.options.common import OptimConfig
from train.options.conditions import NoEffect
from train.options.field import CardSection, option
from train.options.paths import Place
from train.options.tokenizer import ModelCode, TemplateOption, TokenizerOption


@dataclasses.dataclass(frozen=True, kw_only=True)
class LanguageDataConfig(TokenizerOption, TemplateOption):
    """Model and data."""

    model: Place | None = option(None, field.OF_BASE)
    """The language model: a name on the hub, a folder, or a GGUF file. By default the base of
    --init-adapter, or else SmolLM2-135M-Instruct."""
    model_code: ModelCode = option("auto", field.OF_BASE)
    """The code that the model runs by. ours: a family of this library. torch: the torch module that
    transformers has for it, through torchax (pip install 'lora_jax[torch]'). auto: ours where there
    is such a family, else torch. By default that of --init-adapter."""
    rope_scaling: str | None = option(None, field.OF_BASE, card=CardSection.ROPE)
    """Scale the model's RoPE, for rows longer than the model allows. A kind and the factor by which
    they may be longer: linear:2, yarn:4 or llama3:8; then further fields of config.json's
    rope_parameters (yarn:4,beta_fast=16). The adapter stores the scaling, and train.generate and
    train.export apply it. By default the scaling of --init-adapter."""
    template_date: str | None = option(None, field.OF_BASE)
    """The date that the model's chat template tells (gpt-oss's, Llama 3.1's), as YYYY-MM-DD. By
    default today's, and a run that is resumed on another day reads rows with another date."""
    dataset: Any = option(field.REQUIRED, field.HIDDEN)
    fields: tuple[str, ...] = option((), field.HIDDEN)
    """Names that your fields have instead: prompt=question completion=answer. Of several data sets,
    each takes the names that its first row has."""
    split: str = option("train", field.OF_HUB)
    """The split to train on, for a folder or a dataset on the hub."""
    subset: str | None = option(None, field.OF_HUB)
    """The subset (configuration) to load, for a dataset on the hub."""
    eval_dataset: Place | None = option(None, field.CHANGEABLE)
    """Data to measure the loss on every --eval-every steps, instead of held-out rows: one file,
    folder or dataset on the hub, as for --dataset."""
    eval_split: str = option("train", field.CHANGEABLE)
    """The split of --eval-dataset, for a folder or a dataset on the hub."""
    held_out_seed: int | None = option(None, field.ROWS, NoEffect.NONE_DRAWN)
    """Seed that draws the rows to hold out; by default --seed. Give it to compare runs of several
    seeds on the same rows."""
    rows: int | None = option(None, field.ROWS, NoEffect.STREAM)
    """Use only this many rows of each data set, from the beginning."""
    seq_len: int = option(128, field.HIDDEN, card=CardSection.LENGTH)
    """The maximum number of tokens of a sequence."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokensConfig(LanguageDataConfig):
    """Model and data that are tokenised before training."""

    truncate: bool = option(False, field.HIDDEN, card=CardSection.LOSS)
    """Truncate rows longer than --seq-len; without this option, they are an error."""
    packing: bool = option(False, field.HIDDEN, card=CardSection.PACKING)
    """Pack several rows into one sequence; no row attends to another. Without this option, rows of
    about one length share a batch."""
    token_cache: str | None = option(None, field.CHANGEABLE, NoEffect.ONLY_STREAM)
    """The folder where tokenised rows are kept for later runs, or off. By default lora_jax/tokens
    in the user's cache folder, for a thousand rows and more."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SharedPromptOption:
    """Several completions of one prompt."""

    share_prompt: bool = option(True, field.HIDDEN, older=False)
    """Give each completion a prompt of its own. By default a step computes a prompt once for all
    its completions, where prompts are a quarter of the tokens or more: exactly, but that dropout is
    drawn once as well. A run tells whether it does: linear layers, rows that are split over
    devices, and --neftune rule it out."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LanguageOptimConfig(OptimConfig):
    """Optimisation."""

    loss_chunk: int | None = option(None, field.HIDDEN, of_inputs=False, changeable=True)
    """Predictions whose logits are in memory at once, for each part of the batch on the mesh. Fewer
    take less memory; 0 for all at once. By default 256 on a CPU, and on an accelerator as many as
    have 512 MiB of logits, so that the head's products are not bound by reading it."""
