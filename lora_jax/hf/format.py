"""The file format of a model family: its configuration reader and its tensor names."""

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any, Protocol, TypeAlias

import numpy as np

from lora_jax.core.types import Fields
from lora_jax.hf.counts import check_counts
from lora_jax.hf.fields import ConfigError, check_supported
from lora_jax.hf.keys import Row, SubTensor

AnyConfig: TypeAlias = Any  # the configuration of a family, with its own fields
Shapes = Mapping[str, tuple[int, ...]]


class ModelConfig(Protocol):
    """A family's configuration: hashable, read from and written to a config.json."""

    @property
    def model_type(self) -> str:
        """Hugging Face's name of the family."""

    def to_hf(self) -> dict[str, object]:
        """Returns the config.json fields of this configuration."""


@dataclasses.dataclass(frozen=True)
class GGUFLayout:
    """The layout of a family's GGUF files.

    Attributes:
      architecture: the files' ``general.architecture``.
      hf_name: a tensor's name in a file -> Hugging Face's name; an unknown name stays as it is, and
        is refused later.
      read: (a file's metadata, its shapes by Hugging Face's names, its `config_tensors`) -> the
        configuration.
      reorder: (a tensor's rows, its name, the configuration) -> the rows in Hugging Face's order.
      config_tensors: the names of a file's tensors that belong to the configuration, and are no
        parameters.
    """

    architecture: str
    hf_name: Callable[[str], str]
    read: Callable[[Fields, Shapes, Mapping[str, np.ndarray]], AnyConfig]
    reorder: Callable[[np.ndarray, str, AnyConfig], np.ndarray]
    config_tensors: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class ModelFormat:
    """A family's configuration reader and its tensor names.

    Attributes:
      read: (parsed config.json, options by keyword) -> the configuration.
      table: configuration -> its key table, every parameter once; see ``keys.Row``.
      parts: (configuration, a file's shapes by name) -> the table's tensors that the file holds
        within others.
      options: the keywords that ``read`` takes.
      table_name: (a tensor's name in a file, configuration) -> its name in the table.
      ignored_tensors: matches tensors of heads that the configuration lacks. A file may hold them.
      gguf: the layout in GGUF files; None if these are not read.
    """

    read: Callable[..., AnyConfig]
    table: Callable[[AnyConfig], list[Row]]
    parts: Callable[[AnyConfig, Shapes], dict[str, SubTensor]] = lambda *_: {}
    options: frozenset[str] = frozenset()
    table_name: Callable[[str, AnyConfig], str] = lambda name, config: name
    ignored_tensors: re.Pattern[str] | None = None
    gguf: GGUFLayout | None = None


@dataclasses.dataclass(frozen=True)
class ModelFormats:
    """The formats of all families, by model_type."""

    by_type: Mapping[str, ModelFormat]

    def format_of(self, model_type: object) -> ModelFormat:
        """Returns the format of a model_type.

        Raises:
          ConfigError: for an unknown model_type; lists the known ones.
        """
        return self.by_type[check_supported("model_type", model_type, self.by_type)]

    def gguf_format_of(self, architecture: object) -> tuple[ModelFormat, GGUFLayout]:
        """Returns the format of a GGUF file's architecture, and its layout in such files.

        Raises:
          ConfigError: for an unknown architecture; lists the known ones.
        """
        formats: dict[str, tuple[ModelFormat, GGUFLayout]] = {}
        for format in self.by_type.values():
            if format.gguf is not None:
                formats[format.gguf.architecture] = (format, format.gguf)
        return formats[check_supported("GGUF architecture", architecture, formats)]

    def read_config(self, fields: Fields, **options: object) -> AnyConfig:
        """Reads a configuration from a parsed config.json.

        Args:
          fields: the parsed config.json.
          **options: the reader's keywords, such as ``head="classification"``.

        Returns:
          The family's configuration.

        Raises:
          ConfigError: names what is missing, unsupported or unknown, in the file or the options.
        """
        check_counts(fields)
        model_type = fields.get("model_type")
        format = self.format_of(model_type)
        unknown_options = sorted(set(options) - format.options)
        if unknown_options:
            raise ConfigError(
                f"A {model_type} model has no option {', '.join(unknown_options)}. Remove it."
            )
        return format.read(fields, **options)
