"""Opens GGUF files, including split files, of which any part may be named."""

import functools
import glob
import re
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

from lora_jax.core.types import Fields
from lora_jax.hf.folder import describe_damage
from lora_jax.hf.keys import WeightsError

_PART_NAME = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")  # as llama.cpp names them
_MAX_LISTED = 5  # missing parts that a message names


class OpenGGUF(NamedTuple):
    """An open GGUF file, or all parts of a split one.

    Attributes:
      gguf: the module gguf.
      metadata: the key-value pairs. Of a split file, the first part has them.
      tensors: gguf's tensors, of all parts.
    """

    gguf: ModuleType
    metadata: Fields
    tensors: Sequence[Any]


def open_gguf(path: Path) -> OpenGGUF:
    """Opens a GGUF file; any part of a split file opens all parts.

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
            "Reading a GGUF file needs the package gguf. Run pip install 'lora_jax[models]'."
        ) from None
    files = [path]
    part_match = _PART_NAME.fullmatch(path.name)
    if part_match is not None:
        parts_pattern = f"{glob.escape(part_match[1])}-*-of-{part_match[3]}.gguf"
        files = sorted(path.parent.glob(parts_pattern)) or [path]
    stamps = []  # a changed file is opened again
    for file in files:
        status = file.stat()
        stamps.append((file.absolute(), status.st_mtime_ns, status.st_size))
    return _open_parts(path, tuple(stamps))


@functools.lru_cache(maxsize=2)  # tokenizer, configuration and weights are read one by one
def _open_parts(path: Path, stamps: tuple[tuple[Path, int, int], ...]) -> OpenGGUF:
    """Opens all parts of a file.

    Args:
      path: the file.
      stamps: the file and those beside it that may be its parts, when each was changed, and its
        bytes; after a change, all are read anew.
    """
    import gguf

    reader_of_path = _open_reader(path)
    part_paths = _find_parts(path, reader_of_path)
    readers = [reader_of_path if part == path else _open_reader(part) for part in part_paths]
    try:
        metadata = {name: field.contents() for name, field in readers[0].fields.items()}
    except Exception as error:
        raise WeightsError(
            f"{part_paths[0]} is damaged or cut short ({error}). Download or copy it again."
        ) from None
    tensors = [tensor for reader in readers for tensor in reader.tensors]
    return OpenGGUF(gguf=gguf, metadata=metadata, tensors=tensors)


def _find_parts(path: Path, reader: Any) -> list[Path]:
    """Returns the parts of a split file in order, or the file alone.

    Raises:
      WeightsError: parts are missing; names them.
    """
    count_field = reader.fields.get("split.count")
    n_parts = 1 if count_field is None else int(count_field.contents())
    if n_parts == 1:
        return [path]
    part_number = int(reader.fields["split.no"].contents()) + 1
    description = f"{path} is part {part_number} of {n_parts} of a split model"
    match = _PART_NAME.fullmatch(path.name)
    if match is None or int(match[3]) != n_parts:
        raise WeightsError(
            f"{description}. The other parts are found by their names, but this name does not end "
            f"in -0000N-of-{n_parts:05}.gguf. Rename the parts to their published names."
        )
    names = [f"{match[1]}-{number:05}-of-{n_parts:05}.gguf" for number in range(1, n_parts + 1)]
    parts = [path.with_name(name) for name in names]
    missing_names = [part.name for part in parts if not part.exists()]
    if missing_names:
        listing = ", ".join(missing_names[:_MAX_LISTED])
        if len(missing_names) > _MAX_LISTED:
            listing += f" and {len(missing_names) - _MAX_LISTED} more"
        raise WeightsError(
            f"{description}, but these parts are missing in its folder: {listing}. Put all parts "
            "into one folder, and name one of them."
        )
    return parts


def _open_reader(path: Path) -> Any:
    """Returns gguf's reader of a file, with plain NumPy arrays.

    It slices its file for each token of a vocabulary, and slices of a memmap cost several times as
    much.

    Raises:
      WeightsError: if the file is damaged or cut short.
    """
    import gguf

    class _PlainArrayReader(gguf.GGUFReader):
        def __setattr__(self, name: str, value: object) -> None:
            is_file_content = name == "data"
            super().__setattr__(name, np.asarray(value) if is_file_content else value)

        def _get(self, offset: int, dtype: Any, count: int = 1, *args: Any, **options: Any) -> Any:
            # The slice of a file that is too short would be empty, and a loop over it endless.
            self._check_size(offset, int(count) * np.dtype(dtype).itemsize)
            return super()._get(offset, dtype, count, *args, **options)

        def _get_field_parts(self, orig_offs: int, raw_type: int) -> Any:
            if raw_type == gguf.GGUFValueType.ARRAY:
                item_type = self._get(orig_offs, np.uint32)
                n_items = self._get(orig_offs + 4, np.uint64)
                value_type = gguf.GGUFValueType(int(item_type[0]))
                item_dtype = self.gguf_scalar_to_np.get(value_type, np.uint64)
                self._check_size(orig_offs + 12, int(n_items[0]) * np.dtype(item_dtype).itemsize)
            return super()._get_field_parts(orig_offs, raw_type)

        def _check_size(self, offset: int, n_bytes: int) -> None:
            """Raises a ValueError if the file ends before these bytes."""
            if offset + n_bytes > len(self.data):
                raise ValueError(
                    f"{n_bytes} bytes are to follow at {offset}, but the file has {len(self.data)}"
                )

    try:
        return _PlainArrayReader(path)
    except Exception as error:  # it raises whatever its cursor runs into
        raise WeightsError(describe_damage(path, error)) from None
