"""The option --tokenizer, of all scripts that read a model and write or read its tokens."""

import dataclasses

from train.options import field
from train.options.conditions import Idle
from train.options.field import option


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenizerOption:
    """The tokenizer that a model reads and writes texts with."""

    tokenizer: str | None = option(None, field.OF_BASE, Idle.IMAGES)
    """The tokenizer to use in the place of the model's own: a folder with its files, a GGUF file,
    or a name on the hub. Adapters store it. By default that of the adapters, if they name one, or
    else the model's own."""
