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
    """The tokenizer to use in the place of the model's own: a folder with its files, a GGUF file,
    or a name on the hub. Adapters store it. By default that of the adapters, if they name one, or
    else the model's own."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TemplateOption:
    """The template that renders chats."""

    chat_template: Place | None = option(None, field.OF_BASE)
    """A file of Jinja to render chats with, in the place of the model's chat template, such as one
    that knows tools. Adapters store it as chat_template.jinja. By default that of the adapters, if
    they have one, or else the model's own."""
