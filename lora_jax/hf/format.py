"""How files hold the models of a family: what a reader is given for each ``model_type``."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from lora_jax.hf.fields import ConfigError
from lora_jax.hf.keys import Part, Row

Shapes = Mapping[str, tuple[int, ...]]


class Config(Protocol):
    """A family's configuration: hashable, and read from and written as a config.json."""

    @property
    def model_type(self) -> str:
        """Hugging Face's name of the family."""
        ...

    def to_hf(self) -> dict[str, Any]:
        """The config.json that reads back as this configuration."""
        ...


@dataclasses.dataclass(frozen=True)
class Format:
    """What reads a family's configuration, and names its tensors.

    Attributes:
      read: from the parsed config.json, and options by keyword, to the configuration.
      table: every parameter of a configuration; see ``keys.Row``.
      parts: the table's tensors that a file, of such names and shapes, holds within others.
      options: what ``read`` takes by keyword.
      name: (a file's name for a tensor, configuration) -> the table's name for it.
      ignored: tensors of other heads than the configuration's, which a file may hold.
    """

    read: Callable[..., Any]
    table: Callable[[Any], list[Row]]
    parts: Callable[[Any, Shapes], dict[str, Part]] = lambda *_: {}
    options: frozenset[str] = frozenset()
    name: Callable[[str, Any], str] = lambda name, config: name
    ignored: re.Pattern[str] | None = None


@dataclasses.dataclass(frozen=True)
class Formats:
    """The formats of all families.

    Attributes:
      by_type: model_type -> the family's.
      from_gguf: (a GGUF file's metadata, the shapes of its tensors) -> the configuration.
    """

    by_type: Mapping[str, Format]
    from_gguf: Callable[[Mapping[str, Any], Shapes], Any]

    def of(self, model_type: Any) -> Format:
        """The format of a model_type; ConfigError where there is none."""
        if model_type not in self.by_type:
            raise ConfigError(
                f"model_type {model_type!r} is not supported; supported are "
                f"{', '.join(self.by_type)}"
            )
        return self.by_type[model_type]

    def read_config(self, fields: Mapping[str, Any], **options: Any) -> Any:
        """The configuration that a parsed config.json describes.

        Args:
          fields: the parsed config.json.
          **options: what to read it as, such as ``head="classification"``.

        Raises:
          ConfigError: names what is missing, unsupported or unknown, in the file or the options.
        """
        model_type = fields.get("model_type")
        found = self.of(model_type)
        if unknown := sorted(set(options) - found.options):
            raise ConfigError(f"a {model_type} model has no option {', '.join(unknown)}")
        return found.read(fields, **options)
