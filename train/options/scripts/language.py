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
    """The code that runs the model. ours: a model family of this library. torch: the torch module
    of transformers, through torchax (pip install 'lora_jax[torch]'). auto: ours if the library has
    the model's family, else torch. By default the code that --init-adapter was trained with."""
    rope_scaling: str | None = option(None, field.OF_BASE, card=CardSection.ROPE)
    """Scale the model's RoPE, for rows longer than the model allows. Pass a kind and the factor by
    which rows may be longer: linear:2, yarn:4 or llama3:8. Further fields of config.json's
    rope_parameters may follow (yarn:4,beta_fast=16). The adapter stores the scaling, and
    train.generate and train.export apply it. By default the scaling of --init-adapter."""
    template_date: str | None = option(None, field.OF_BASE)
    """The date (YYYY-MM-DD) in the text of the model's chat template, for models such as gpt-oss
    and Llama 3.1. By default today's date, which changes if the run is resumed on another day."""
    dataset: Any = option(field.REQUIRED, field.HIDDEN)
    fields: tuple[str, ...] = option((), field.HIDDEN)
    """The names of your fields, if they differ from the expected names: prompt=question
    completion=answer. With several data sets, each uses the names that its first row contains."""
    split: str = option("train", field.OF_HUB)
    """The split to train on, for a folder or a dataset on the hub."""
    subset: str | None = option(None, field.OF_HUB)
    """The subset (configuration) to load, for a dataset on the hub."""
    eval_dataset: Place | None = option(None, field.CHANGEABLE)
    """The data to measure the loss on every --eval-every steps, instead of held-out rows: one file,
    folder or dataset on the hub, as for --dataset."""
    eval_split: str = option("train", field.CHANGEABLE)
    """The split of --eval-dataset, for a folder or a dataset on the hub."""
    held_out_seed: int | None = option(None, field.ROWS, NoEffect.NONE_DRAWN)
    """Seed that draws the rows to hold out. By default --seed. Pass it to compare runs of several
    seeds on the same rows."""
    rows: int | None = option(None, field.ROWS, NoEffect.STREAM)
    """Use only this many rows of each data set, from its beginning."""
    seq_len: int = option(128, field.HIDDEN, card=CardSection.LENGTH)
    """The maximum number of tokens of a sequence."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokensConfig(LanguageDataConfig):
    """Model and data that are tokenised before training."""

    truncate: bool = option(False, field.HIDDEN, card=CardSection.LOSS)
    """Truncate rows that are longer than --seq-len. Without this option, such rows are an error."""
    packing: bool = option(False, field.HIDDEN, card=CardSection.PACKING)
    """Pack several rows into one sequence, in which no row attends to another. Without this option,
    rows of about the same length share a batch."""
    token_cache: str | None = option(None, field.CHANGEABLE, NoEffect.ONLY_STREAM)
    """The folder where tokenised rows are kept for later runs, or off. By default lora_jax/tokens
    in the user's cache folder, if there are a thousand rows or more."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SharedPromptOption:
    """Several completions of one prompt."""

    share_prompt: bool = option(True, field.HIDDEN, older=False)
    """Compute the prompt again for each of its completions. By default a step computes a prompt
    once for all its completions, if prompts are at least a quarter of the tokens. The result is the
    same, except that dropout is also drawn once. The run logs whether prompts are shared. Linear
    layers, rows that are split over devices, and --neftune prevent it."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LanguageOptimConfig(OptimConfig):
    """Optimisation."""

    loss_chunk: int | None = option(None, field.HIDDEN, of_inputs=False, changeable=True)
    """Number of predictions whose logits are in memory at once, for each part of the batch on the
    mesh. A smaller number takes less memory. 0 computes all logits at once. By default 256 on a
    CPU, and on an accelerator as many as fit into 512 MiB of logits."""
