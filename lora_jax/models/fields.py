"""Reads the parts of a config.json that several models share: fields, heads, and classes."""

import dataclasses
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from lora_jax.core.types import Fields
from lora_jax.hf.fields import ConfigError, check_field_values, check_multiple, check_supported
from lora_jax.models.layers.blocks import ACTIVATION


class FieldTable:
    """The fields of a configuration that config.json stores in the same form.

    Attributes:
      names: config.json's name of each field.
    """

    def __init__(
        self, kind: type[Any], excluded: Collection[str] = (), renamed: Mapping[str, str] = {}
    ) -> None:
        """Makes the table of these fields.

        Args:
          kind: the class of the configuration, a dataclass.
          excluded: the fields that config.json lacks, or holds in another form.
          renamed: config.json's names of fields, where they are not the dataclass's.
        """
        names = (field.name for field in dataclasses.fields(kind) if field.name not in excluded)
        self.names = {name: renamed.get(name, name) for name in names}

    @property
    def file_names(self) -> frozenset[str]:
        """The names in config.json."""
        return frozenset(self.names.values())

    def read(self, fields: Fields) -> dict[str, Any]:
        """Returns the fields of a config.json under the dataclass's names."""
        return {field: fields[name] for field, name in self.names.items() if name in fields}

    def write(self, config: object) -> dict[str, Any]:
        """Returns the fields of a configuration under config.json's names."""
        return {name: getattr(config, field) for field, name in self.names.items()}


def check_transformer(config: Any, names: Mapping[str, str] | None = None) -> None:
    """Checks a configuration's values, activation, and head size.

    Args:
      config: the configuration, as `check_values` takes it.
      names: config.json's names of fields, where they are not the dataclass's.

    Raises:
      ConfigError: a value is not supported, or hidden_size is no multiple of the number of heads.
    """
    check_field_values(config, names)
    file_names = names or {}
    act_name = file_names.get("hidden_act", "hidden_act")
    size_name = file_names.get("hidden_size", "hidden_size")
    heads_name = file_names.get("num_attention_heads", "num_attention_heads")
    check_supported(act_name, config.hidden_act, ACTIVATION)
    check_multiple(**{size_name: config.hidden_size, heads_name: config.num_attention_heads})


def read_head(config: Fields, classes: Iterable[str], endings: Mapping[str, Sequence[str]]) -> str:
    """Reads the head from the ``architectures`` of a config.json; "none" where it names none.

    Args:
      config: the parsed config.json.
      classes: the beginnings of transformers' names of the classes, such as "Bert".
      endings: their ends, by head: {"classification": ("ForSequenceClassification",)}.

    Raises:
      ConfigError: for a head that is not known.
    """
    architectures = config.get("architectures") or []
    pattern = re.compile(rf"({'|'.join(classes)})(\w+)")
    for architecture in architectures:
        match = pattern.fullmatch(architecture)
        if match is None:
            continue
        for head, head_endings in endings.items():
            if match[2] in head_endings:
                return head
    if architectures:
        raise ConfigError(
            f"architectures={list(architectures)!r} names a head that is not supported. Pass "
            f"head= with one of {', '.join(endings)}."
        )
    return "none"


def read_classes(config: Fields, num_labels: int | None = None) -> tuple[int, tuple[str, ...]]:
    """Returns the number of classes, and their names by index.

    Args:
      config: the parsed config.json.
      num_labels: the number to take instead of the file's.

    Returns:
      The number, and the names: () where there are none, or those of another number of classes.
    """
    id2label = config.get("id2label") or {}
    name_of_index = {str(index): str(name) for index, name in id2label.items()}
    indices = [str(index) for index in range(len(name_of_index))]
    names: tuple[str, ...] = ()
    if set(name_of_index) == set(indices):
        names = tuple(name_of_index[index] for index in indices)
    n_classes = num_labels or config.get("num_labels") or len(names) or 2
    has_default_names = names == _default_label_names(len(names))
    if has_default_names or len(names) != n_classes:
        names = ()
    return n_classes, names


def write_classes(number: int, names: Sequence[str]) -> dict[str, object]:
    """Returns the config.json fields that `read_classes` reads back."""
    names = names or _default_label_names(number)
    return {
        "id2label": {str(i): name for i, name in enumerate(names)},
        "label2id": {name: i for i, name in enumerate(names)},
    }


def check_classes(number: int, names: Sequence[str]) -> None:
    """Raises a ConfigError for fewer than one class, or a wrong number of names."""
    if number < 1:
        raise ConfigError(f"num_labels is {number}. Use a number of at least 1.")
    if names and len(names) != number:
        raise ConfigError(
            f"label_names has {len(names)} names for {number} labels. Give one name for each label."
        )


def _default_label_names(n: int) -> tuple[str, ...]:
    """Returns transformers' default names of n classes."""
    return tuple(f"LABEL_{i}" for i in range(n))
