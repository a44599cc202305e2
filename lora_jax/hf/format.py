"""A family's file format: its configuration's reader and its tensors' names, by ``model_type``."""

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
        """Returns the config.json that reads back as this configuration."""
        ...


@dataclasses.dataclass(frozen=True)
class Format:
    """A family's reader of configurations, and its names of tensors.

    Attributes:
      read: (parsed config.json, options by keyword) -> the configuration.
      table: configuration -> its key table, every parameter once; see ``keys.Row``.
      parts: (configuration, a file's shapes by name) -> the table's tensors that the file holds
        within others.
      options: the keywords that ``read`` takes.
      name: (a tensor's name in a file, configuration) -> its name in the table.
      ignored: matches tensors of other heads than the configuration's, which a file may hold.
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
        """Returns the format of a model_type.

        Raises:
          ConfigError: for an unknown model_type; lists the known ones.
        """
        if model_type not in self.by_type:
            raise ConfigError(
                f"model_type {model_type!r} is not supported; supported are "
                f"{', '.join(self.by_type)}"
            )
        return self.by_type[model_type]

    def read_config(self, fields: Mapping[str, Any], **options: Any) -> Any:
        """Reads a configuration from a parsed config.json.

        Args:
          fields: the parsed config.json.
          **options: the reader's keywords, such as ``head="classification"``.

        Returns:
          The family's configuration.

        Raises:
          ConfigError: names what is missing, unsupported or unknown, in the file or the options.
        """
        model_type = fields.get("model_type")
        found = self.of(model_type)
        if unknown := sorted(set(options) - found.options):
            raise ConfigError(f"a {model_type} model has no option {', '.join(unknown)}")
        return found.read(fields, **options)
