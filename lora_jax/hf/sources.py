"""Sources of weights: a safetensors folder or a GGUF file, read one tensor at a time.

A *file name* of a tensor is the name in the files. A *table name* is the name in the family's key
table, under which callers ask for the tensor. A tensor of the table may be a part of one of the
files (`SubTensor`).
"""

import dataclasses
import math
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import ml_dtypes  # noqa: F401  registers bfloat16 with numpy, which safetensors asks for
import numpy as np
from jax.typing import DTypeLike
from safetensors import SafetensorError, safe_open

from lora_jax.core.types import Fields
from lora_jax.hf.counts import ShapesOf, check_counts
from lora_jax.hf.fields import ConfigError, FieldTypeError, read_json_fields
from lora_jax.hf.folder import (
    describe_damage,
    describe_folder_without_config,
    read_weight_map,
)
from lora_jax.hf.format import ModelFormat, ModelFormats
from lora_jax.hf.generation import add_generation_config
from lora_jax.hf.keys import SubTensor, WeightsError, write_converted
from lora_jax.hf.stored.kept import rename_modules
from lora_jax.hf.stored.methods import find_coded_tensors, read_method
from lora_jax.hf.stored.raw import Header, RawFile, TensorEntry
from lora_jax.quantized import Coded
from lora_jax.quantized.coded import host_array

# The dtypes of weights, by safetensors' names.
FLOAT_DTYPES = ("F64", "F32", "F16", "BF16")

_BLOCK_BYTES = 16_000_000
# Where config.json lacks this field, files with a head of their own leave it untied.
_TIE_FIELD = "tie_word_embeddings"


class HasCodes(Protocol):
    """The shapes of a model's quantized tensors.

    Attributes:
      where: the folder or file, for messages.
      coded_names: the names of tensors that lie in codes, and stay so unless another form
        is asked for.
    """

    where: str
    coded_names: frozenset[str]

    def code_shapes(self, name: str, dtype: DTypeLike) -> Coded | None:
        """Returns the shapes of the result of `Source.codes`."""


class Source(HasCodes, Protocol):
    """A model's configuration and tensors, by the table's names and in Hugging Face's layout.

    Attributes:
      format: the family's.
      config: the family's configuration.
      shapes: name -> shape, of every tensor.
      dtypes: name -> dtype as it is stored, by safetensors' names ("F32"); of codes, "F32".
      kept_forms_note: a sentence on the forms that stay quantized, for messages; "" where all do.
    """

    format: ModelFormat
    config: Any
    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, str]
    kept_forms_note: str

    def read(self, name: str) -> np.ndarray:
        """Reads a tensor, in its stored dtype or in fp32."""

    def read_into(self, out: np.ndarray, name: str, index: tuple[slice, ...]) -> None:
        """Writes ``tensor[index]`` into ``out``, in its dtype."""

    def codes(self, name: str, dtype: DTypeLike) -> Coded | None:
        """Returns a quantized tensor's stored codes as NumPy arrays; None if it is not quantized.

        Args:
          name: the tensor.
          dtype: dtype of the array that the codes stand for.
        """

    def locate(self, name: str) -> str:
        """Returns the file that contains a tensor."""

    def form(self, name: str) -> str:
        """Returns the form in which a tensor is stored, by the file's own name: "Q5_K", "F16"."""


class SafetensorsFolder:
    """A folder with config.json and model.safetensors, or shards and their index.

    Only headers are read here, and the shapes and tables of codes. Tensors are read by file access,
    not through a map of the file: mapped pages would count as this process's memory.

    Args:
      folder: the folder.
      formats: the formats of all families.
      **options: see ``ModelFormats.read_config``.

    Raises:
      ConfigError: if config.json is missing, or describes another model or unknown codes.
      WeightsError: if a file is missing, truncated or damaged, if the index and its shards
        disagree, or if codes lack their scales; it names the file and the tensor.
    """

    kept_forms_note = ""
    stem = "model"  # the beginning of the names of the weights and of their index

    def __init__(self, folder: Path, formats: ModelFormats, **options: object):
        self.where = str(folder)
        self._files: dict[Path, Any] = {}
        self._raw_files: dict[Path, RawFile] = {}
        self._headers: dict[str, Header] = {}
        self._paths: dict[str, Path] = {}  # by file names
        shapes_of_files = partial(self._shapes_of_files, folder)
        config, fields = _read_config(folder / "config.json", formats, options, shapes_of_files)
        self.config = add_generation_config(config, folder)
        self.format = formats.format_of(self.config.model_type)
        if not self._files:
            self._open_shards(folder)
        self._stored = find_coded_tensors(
            read_method(fields), self._headers, self._fetch_rows, self.where
        )
        tensors = dict(self._headers)
        # A tensor in codes replaces the tensors of the files that hold it.
        for name, stored in self._stored.items():
            path = self._paths[stored.tensors[0]]
            for tensor in stored.tensors:
                del tensors[tensor]
            tensors[name] = Header("F32", stored.shape)
            self._paths[name] = path
        self._sub_tensors = self._sub_tensors_by_table_name(tensors)
        self.shapes = {
            name: part.shape_of(tensors[part.name].shape)
            for name, part in self._sub_tensors.items()
        }
        self.dtypes = {name: tensors[part.name].dtype for name, part in self._sub_tensors.items()}
        self._locations = {name: self._paths[part.name] for name, part in self._sub_tensors.items()}
        self.coded_names = frozenset(
            n for n, part in self._sub_tensors.items() if part.name in self._stored
        )
        self.quantization = self._quantization_by_table_names(fields)
        if fields.get(_TIE_FIELD) is None and self._has_own_head():
            self.config = dataclasses.replace(self.config, **{_TIE_FIELD: False})

    def _table_name(self, file_name: str) -> str:
        """Returns the table's name of a tensor in the files."""
        return self.format.table_name(file_name, self.config)

    def _sub_tensors_by_table_name(self, tensors: Mapping[str, Header]) -> dict[str, SubTensor]:
        """Returns the stored slice of each tensor of the table."""
        shapes = {name: header.shape for name, header in tensors.items()}
        parts = self.format.parts(self.config, shapes)
        divided_tensors = {part.name for part in parts.values()}
        all_parts = {name: SubTensor(name, ()) for name in tensors if name not in divided_tensors}
        all_parts |= parts
        file_names = self._file_names_by_table_name(all_parts)
        return {name: all_parts[file_name] for name, file_name in file_names.items()}

    def _quantization_by_table_names(self, fields: Fields) -> Fields:
        """Returns the quantization_config by the table's module names."""
        quantization: Fields = fields.get("quantization_config") or {}
        if all(self._table_name(name) == name for name in self._headers):
            return quantization
        return rename_modules(quantization, self._table_name)

    def _has_own_head(self) -> bool:
        """Returns True if a tied head differs from its embedding in the files."""
        if not vars(self.config).get(_TIE_FIELD):
            return False
        tied_pairs = []
        for row in self.format.table(self.config):
            tied_pairs += [(row.hf, alias) for alias in row.aliases]
        pairs = [
            (embedding, head)
            for embedding, head in tied_pairs
            if embedding in self.shapes and head in self.shapes
        ]
        # The first row tells most heads from the embedding, so that the others are not read.
        for rows in (slice(0, 1), slice(None)):
            for embedding, head in pairs:
                embedding_rows = self._read_slice(embedding, (rows,))
                head_rows = self._read_slice(head, (rows,))
                if not np.array_equal(embedding_rows, head_rows, equal_nan=True):
                    return True
        return False

    def _file_names_by_table_name(self, names: Iterable[str]) -> dict[str, str]:
        """Returns table name -> name in the files.

        A tied tensor that the files hold by an alias alone gets the name of its row.
        """
        file_name_of: dict[str, str] = {}
        for file_name in names:
            table_name = self._table_name(file_name)
            if table_name in file_name_of:
                raise WeightsError(
                    f"{self.where} holds one weight under two names, "
                    f"{file_name_of[table_name]} and {file_name}. Remove one of them."
                )
            file_name_of[table_name] = file_name
        for row in self.format.table(self.config):
            for alias in row.aliases:
                if row.hf not in file_name_of and alias in file_name_of:
                    file_name_of[row.hf] = file_name_of.pop(alias)
        return file_name_of

    def _shapes_of_files(self, folder: Path) -> dict[str, tuple[int, ...]]:
        """Opens all shards, and returns the shapes of their tensors by file names."""
        self._open_shards(folder)
        return {name: header.shape for name, header in self._headers.items()}

    def _open_shards(self, folder: Path) -> None:
        """Opens all shards; raises a WeightsError if the index names others."""
        shard_of_tensor = read_weight_map(folder, self.stem)
        for shard in sorted(set(shard_of_tensor.values())):
            self._open_shard(folder / shard)
        for name, shard in shard_of_tensor.items():
            if name and self._paths.get(name) != folder / shard:
                index = f"{self.stem}.safetensors.index.json"
                raise WeightsError(
                    f"{folder / index} names {shard} for {name}, but this file does not contain "
                    "it. Download or copy both files again."
                )

    def _open_shard(self, path: Path) -> None:
        """Opens a file, and reads the headers of its tensors."""
        try:
            file = safe_open(path, framework="np", backend="pread")
            self._files[path] = file
            for name in file.keys():
                if name in self._paths:
                    raise WeightsError(
                        f"{path} and {self._paths[name].name} both contain {name}. Move the file "
                        "that does not belong to the model to another folder."
                    )
                tensor = file.get_slice(name)
                self._paths[name] = path
                self._headers[name] = Header(tensor.get_dtype(), tuple(tensor.get_shape()))
        except (SafetensorError, OSError) as error:
            raise WeightsError(describe_damage(path, error)) from None

    def _fetch_rows(self, file_name: str, rows: slice | None) -> np.ndarray:
        """Reads rows of a stored tensor unconverted; all rows for None."""
        path = self._paths[file_name]
        try:
            if path not in self._raw_files:
                self._raw_files[path] = RawFile(path)
            return self._raw_files[path].read(file_name, rows)
        except OSError as error:
            raise WeightsError(f"{path}: {file_name} cannot be read: {error}") from None

    def entries(self, name: str) -> dict[str, TensorEntry]:
        """Returns the stored tensors of a quantized weight, by the table's names."""
        stored = self._stored[self._sub_tensors[name].name]
        entries: dict[str, TensorEntry] = {}
        for tensor in stored.tensors:
            entry = TensorEntry(self._headers[tensor], partial(self._fetch_rows, tensor, None))
            entries[self._table_name(tensor)] = entry
        return entries

    def read(self, name: str) -> np.ndarray:
        return self._read_slice(name, tuple(slice(None) for _ in self.shapes[name]))

    def read_into(self, out: np.ndarray, name: str, index: tuple[slice, ...]) -> None:
        """Reads a slice into an array, block by block if it is large."""
        label = f"{self.locate(name)}: {name}"
        if not index or name in self.coded_names:
            write_converted(self._read_slice(name, index), out, label)
            return
        # Block by block, so that there is never a second copy of a large tensor.
        row_bytes = out.itemsize * math.prod(out.shape[1:])
        block_rows = max(1, _BLOCK_BYTES // max(1, row_bytes))
        first_row = index[0].start
        for start in range(0, out.shape[0], block_rows):
            stop = min(start + block_rows, out.shape[0])
            rows = slice(first_row + start, first_row + stop)
            values = self._read_slice(name, (rows, *index[1:]))
            write_converted(values, out[start:stop], label)

    def codes(self, name: str, dtype: DTypeLike) -> Coded | None:
        part = self._sub_tensors[name]
        stored = self._stored.get(part.name)
        return None if stored is None else stored.coded(dtype, part.file_index)

    def code_shapes(self, name: str, dtype: DTypeLike) -> Coded | None:
        part = self._sub_tensors[name]
        stored = self._stored.get(part.name)
        return None if stored is None else stored.shapes(dtype, part.file_index)

    def locate(self, name: str) -> str:
        return str(self._locations[name])

    def form(self, name: str) -> str:
        return self.dtypes[name]

    def _read_slice(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        """Reads a slice of a table's tensor, in its stored dtype or in fp32."""
        part = self._sub_tensors[name]
        path = self._locations[name]
        coded = self.codes(name, np.float32)
        if coded is not None:
            return host_array(coded)[index]
        try:
            tensor = self._files[path].get_slice(part.name)
            return np.asarray(tensor[part.index_in_tensor(index)])
        except (SafetensorError, OSError, TypeError, AttributeError) as error:
            raise WeightsError(f"{path}: {name} cannot be read: {error}") from None


def read_config_file(path: Path, formats: ModelFormats, **options: object) -> Any:
    """Reads the configuration in a config.json; see ``ModelFormats.read_config``.

    Raises:
      ConfigError: names the file, and what is wrong with it.
    """
    return _read_config(path, formats, options)[0]


def _read_config(
    path: Path, formats: ModelFormats, options: Fields, shapes_of_files: ShapesOf | None = None
) -> tuple[Any, Fields]:
    """Returns a configuration, and the raw fields, after a check of their quantization.

    Args:
      path: the file.
      formats: the formats of all families.
      options: see ``ModelFormats.read_config``.
      shapes_of_files: see `check_counts`.
    """
    problem = None if path.exists() else describe_folder_without_config(path.parent)
    if problem is not None:
        raise ConfigError(f"{path} is missing: {problem}")
    fields = read_json_fields(path, "a model", ConfigError)
    try:
        check_counts(fields, shapes_of_files)
        read_method(fields)
        model_fields = {n: value for n, value in fields.items() if n != "quantization_config"}
        return formats.read_config(model_fields, **options), fields
    except WeightsError:  # of the files that `check_counts` opens
        raise
    except FieldTypeError as error:
        raise ConfigError(f"{path} has a field of the wrong type: {error}") from None
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    except (TypeError, ValueError, ArithmeticError) as error:  # "24" in the place of 24, 0 heads
        raise ConfigError(f"{path} has a field of the wrong type: {error}") from error
