"""The options of how texts and chats become a model's tokens: --tokenizer, --chat-template."""

import dataclasses
from typing import Literal

from train.options import field
from train.options.conditions import NoEffect
from train.options.field import option
from train.options.paths import Place

ModelCode = Literal["auto", "ours", "torch"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenizerOption:
    """The tokenizer that a model reads and writes texts with."""

    tokenizer: str | None = option(None, field.OF_BASE, NoEffect.IMAGES)
    """The tokenizer to use instead of the model's own: a folder with its files, a GGUF file, or a
    name on the hub. Adapters store the choice. By default the tokenizer that the adapters name, or
    else the model's own."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TemplateOption:
    """The template that renders chats."""

    chat_template: Place | None = option(None, field.OF_BASE)
    """The path of a Jinja file that renders chats instead of the model's chat template, for example
    a template with tools. Adapters store it as chat_template.jinja. By default the template of the
    adapters, or else the model's own."""
