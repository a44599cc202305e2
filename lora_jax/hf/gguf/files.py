"""Opens GGUF files; of one that was split, all parts, whichever of them is named."""

import functools
import glob
import re
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

from lora_jax.core.types import Fields
from lora_jax.hf.folder import damage_message
from lora_jax.hf.keys import WeightsError

_PART = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")  # as llama.cpp names them
_NAMED = 5  # missing parts that a message names


class OpenGGUF(NamedTuple):
    """An open file, or the open parts of one.

    Attributes:
      gguf: the module gguf.
      metadata: the key-value pairs. Of a split file, the first part has them.
      tensors: gguf's tensors, of all parts.
    """

    gguf: ModuleType
    metadata: Fields
    tensors: Sequence[Any]


def open_gguf(path: Path) -> OpenGGUF:
    """Opens a GGUF file; of a split one, any of its parts names them all.

    Args:
      path: the file.

    Raises:
      ImportError: if the gguf package is not installed.
      WeightsError: if the file is damaged or cut short, or a part of it is missing.
    """
    try:
        import gguf  # noqa: F401
    except ImportError:
        raise ImportError(
            "reading a GGUF file needs the package gguf: pip install 'lora_jax[models]'"
        ) from None
    match = _PART.fullmatch(path.name)
    names = [path]
    if match:
        names = sorted(path.parent.glob(f"{glob.escape(match[1])}-*-of-{match[3]}.gguf"))
    statuses = [(name.absolute(), name.stat()) for name in names or [path]]
    stamps = tuple((name, status.st_mtime_ns, status.st_size) for name, status in statuses)
    return _open_parts(path, stamps)


@functools.lru_cache(maxsize=2)  # tokenizer, configuration and weights are read one by one
def _open_parts(path: Path, stamps: tuple[tuple[Path, int, int], ...]) -> OpenGGUF:
    """Opens a file.

    Args:
      path: the file.
      stamps: the file and those beside it that may be its parts, when each was changed, and its
        bytes; after a change, all are read anew.
    """
    import gguf

    first = _reader(path)
    parts = _parts(path, first)
    readers = [first if part == path else _reader(part) for part in parts]
    try:
        metadata = {name: field.contents() for name, field in readers[0].fields.items()}
    except Exception as error:
        raise WeightsError(f"{parts[0]} is damaged or cut short: {error}") from None
    return OpenGGUF(gguf, metadata, [tensor for reader in readers for tensor in reader.tensors])


def _parts(path: Path, reader: Any) -> list[Path]:
    """Returns the parts of a file in their order; the file alone if it is whole.

    Raises:
      WeightsError: parts are missing; names them.
    """
    count = reader.fields.get("split.count")
    n = 1 if count is None else int(count.contents())
    if n == 1:
        return [path]
    part = f"{path} is part {int(reader.fields['split.no'].contents()) + 1} of {n} of a split model"
    match = _PART.fullmatch(path.name)
    if match is None or int(match[3]) != n:
        raise WeightsError(
            f"{part}, and its name does not end in -0000N-of-{n:05}.gguf, by which the other parts "
            "are found: give the parts the names that they were published under"
        )
    parts = [path.with_name(f"{match[1]}-{i + 1:05}-of-{n:05}.gguf") for i in range(n)]
    if missing := [each.name for each in parts if not each.exists()]:
        more = f" and {len(missing) - _NAMED} more" if len(missing) > _NAMED else ""
        raise WeightsError(
            f"{part}, and {', '.join(missing[:_NAMED])}{more} are missing beside it: put all parts "
            "into one folder, and name any of them"
        )
    return parts


def _reader(path: Path) -> Any:
    """Returns gguf's reader of a file, with its arrays as plain ones.

    It slices its file for each token of a vocabulary, and slices of a memmap cost several times as
    much.

    Raises:
      WeightsError: if the file is damaged or cut short.
    """
    import gguf

    class _PlainArrayReader(gguf.GGUFReader):
        def __setattr__(self, name: str, value: object) -> None:
            super().__setattr__(name, np.asarray(value) if name == "data" else value)

    try:
        return _PlainArrayReader(path)
    except Exception as error:  # it raises whatever its cursor runs into
        raise WeightsError(damage_message(path, error)) from None
