"""Sources of weights: a folder of safetensors or a GGUF file, read one tensor at a time."""

import dataclasses
import math
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import ml_dtypes  # noqa: F401  registers bfloat16 with numpy, which safetensors asks for
import numpy as np
from jax.typing import DTypeLike
from safetensors import SafetensorError, safe_open

from lora_jax.core.types import Fields
from lora_jax.hf.fields import ConfigError, KindError, read_file
from lora_jax.hf.folder import INDEX, damage_message, not_a_model, weight_map
from lora_jax.hf.format import ModelFormat, ModelFormats
from lora_jax.hf.generation import with_generation
from lora_jax.hf.keys import SubTensor, WeightsError, convert
from lora_jax.hf.stored.kept import rename_modules
from lora_jax.hf.stored.methods import read_method, stored_tensors
from lora_jax.hf.stored.raw import Header, RawFile, TensorEntry
from lora_jax.quantized import Coded
from lora_jax.quantized.coded import host_array

# The dtypes of weights, by safetensors' names.
FLOATS = ("F64", "F32", "F16", "BF16")

_BLOCK_BYTES = 16_000_000
# Where config.json lacks this field, files with a head of their own leave it untied.
_TIES = "tie_word_embeddings"


class HasCodes(Protocol):
    """The shapes of the tensors of a model that lie in codes.

    Attributes:
      where: the folder or file, for messages.
      shipped: the names of tensors that lie in codes, and stay so unless another form is asked for.
    """

    where: str
    shipped: frozenset[str]

    def code_shapes(self, name: str, dtype: DTypeLike) -> Coded | None:
        """Returns the shapes of what `Source.codes` returns."""


class Source(HasCodes, Protocol):
    """A model's configuration and its tensors, by the table's names, in Hugging Face's layout.

    Attributes:
      format: the family's.
      config: the family's configuration.
      shapes: name -> shape, of every tensor.
      dtypes: name -> dtype as it is stored, by safetensors' names ("F32"); of codes, "F32".
      kept_forms_note: a sentence on the forms that stay in codes, for messages; "" where all do.
    """

    format: ModelFormat
    config: Any
    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, str]
    kept_forms_note: str

    def read(self, name: str) -> np.ndarray:
        """Reads a tensor, as it is stored or in fp32."""

    def read_into(self, out: np.ndarray, name: str, index: tuple[slice, ...]) -> None:
        """Writes ``tensor[index]`` into ``out``, in its dtype."""

    def codes(self, name: str, dtype: DTypeLike) -> Coded | None:
        """Returns a tensor in the codes of its file, of NumPy arrays; None if it is in no codes.

        Args:
          name: the tensor.
          dtype: dtype of the array that the codes stand for.
        """

    def locate(self, name: str) -> str:
        """Returns the file that holds a tensor."""

    def form(self, name: str) -> str:
        """Returns the form that a tensor lies in, by the file's own name for it: "Q5_K", "F16"."""


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

    def __init__(self, folder: Path, formats: ModelFormats, **options: object):
        self.where = str(folder)
        config, fields = _read_config(folder / "config.json", formats, options)
        self.config = with_generation(config, folder)
        self.format = formats.format_of(self.config.model_type)
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, str] = {}
        self._paths: dict[str, Path] = {}
        self._files: dict[Path, Any] = {}
        listed = weight_map(folder)
        for path in sorted({folder / shard for shard in listed.values()}):
            self._open(path)
        for name, shard in listed.items():
            if name and self._paths.get(name) != folder / shard:
                raise WeightsError(f"{folder / INDEX} puts {name} in {shard}, which lacks it")
        self._raw: dict[Path, RawFile] = {}
        headers = {name: Header(self.dtypes[name], shape) for name, shape in self.shapes.items()}
        self._headers = headers
        self._stored = stored_tensors(read_method(fields), headers, self._fetch, self.where)
        for name, stored in self._stored.items():
            path = self._paths[stored.tensors[0]]
            for tensor in stored.tensors:
                del self.shapes[tensor]
            self.shapes[name], self.dtypes[name], self._paths[name] = stored.shape, "F32", path
        parts = self.format.parts(self.config, self.shapes)
        apart = {part.name for part in parts.values()}
        held = {name: SubTensor(name, ()) for name in self.shapes if name not in apart} | parts
        parts = self._parts = {name: held[own] for name, own in self._names_of(held).items()}
        shapes, dtypes, paths = self.shapes, self.dtypes, self._paths
        self.shapes = {name: part.shape_of(shapes[part.name]) for name, part in parts.items()}
        self.dtypes = {name: dtypes[part.name] for name, part in parts.items()}
        self._locations = {name: paths[part.name] for name, part in parts.items()}
        self.shipped = frozenset(n for n, part in parts.items() if part.name in self._stored)
        quantization: Fields = fields.get("quantization_config") or {}
        if any(self.format.name(name, self.config) != name for name in headers):
            quantization = rename_modules(
                quantization, lambda name: self.format.name(name, self.config)
            )
        self.quantization = quantization
        if fields.get(_TIES) is None and self._has_own_head():
            self.config = dataclasses.replace(self.config, **{_TIES: False})

    def _has_own_head(self) -> bool:
        """Returns True if the configuration ties a head that differs from its embedding here."""
        if not vars(self.config).get(_TIES):
            return False
        pairs = [(row.hf, alias) for row in self.format.table(self.config) for alias in row.aliases]
        tensors = [pair for pair in pairs if self.shapes.keys() >= set(pair)]
        # The first row tells most heads from the embedding, so that the others are not read.
        for rows in (slice(0, 1), slice(None)):
            for table, head in tensors:
                values = self._slice(table, (rows,)), self._slice(head, (rows,))
                if not np.array_equal(*values, equal_nan=True):
                    return True
        return False

    def _names_of(self, held: Iterable[str]) -> dict[str, str]:
        """Returns the tensors' names in the family's table -> their names in the files.

        A tied tensor that the files hold by an alias alone gets its own name.
        """
        names: dict[str, str] = {}
        for own in held:
            name = self.format.name(own, self.config)
            if name in names:
                raise WeightsError(f"{self.where} holds both {names[name]} and {own}")
            names[name] = own
        for row in self.format.table(self.config):
            for alias in row.aliases:
                if row.hf not in names and alias in names:
                    names[row.hf] = names.pop(alias)
        return names

    def _open(self, path: Path) -> None:
        try:
            file = self._files[path] = safe_open(path, framework="np", backend="pread")
            for name in file.keys():
                if name in self._paths:
                    raise WeightsError(f"{path} and {self._paths[name].name} both hold {name}")
                self._paths[name] = path
                self.shapes[name] = tuple(file.get_slice(name).get_shape())
                self.dtypes[name] = file.get_slice(name).get_dtype()
        except (SafetensorError, OSError) as error:
            raise WeightsError(damage_message(path, error)) from None

    def _fetch(self, name: str, rows: slice | None) -> np.ndarray:
        path = self._paths[name]
        try:
            if path not in self._raw:
                self._raw[path] = RawFile(path)
            return self._raw[path].read(name, rows)
        except OSError as error:
            raise WeightsError(f"{path}: cannot read {name}: {error}") from None

    def entries(self, name: str) -> dict[str, TensorEntry]:
        """Returns the stored tensors of a coded weight, keyed by the key table's names."""
        tensors = self._stored[self._parts[name].name].tensors
        return {
            self.format.name(n, self.config): TensorEntry(
                self._headers[n], partial(self._fetch, n, None)
            )
            for n in tensors
        }

    def read(self, name: str) -> np.ndarray:
        return self._slice(name, tuple(slice(None) for _ in self.shapes[name]))

    def read_into(self, out: np.ndarray, name: str, index: tuple[slice, ...]) -> None:
        # Block by block, so that there is never a second copy of a large tensor.
        if not index or name in self.shipped:
            return convert(self._slice(name, index), out, f"{self.locate(name)}: {name}")
        row_bytes = out.itemsize * math.prod(out.shape[1:])
        rows = max(1, _BLOCK_BYTES // max(1, row_bytes))
        first, *rest = index
        for at in range(0, out.shape[0], rows):
            stop = min(at + rows, out.shape[0])
            block = slice(first.start + at, first.start + stop)
            values = self._slice(name, (block, *rest))
            convert(values, out[at:stop], f"{self.locate(name)}: {name}")

    def codes(self, name: str, dtype: DTypeLike) -> Coded | None:
        stored = self._stored.get(self._parts[name].name)
        return None if stored is None else stored.coded(dtype, self._parts[name].at)

    def code_shapes(self, name: str, dtype: DTypeLike) -> Coded | None:
        stored = self._stored.get(self._parts[name].name)
        return None if stored is None else stored.shapes(dtype, self._parts[name].at)

    def locate(self, name: str) -> str:
        return str(self._locations[name])

    def form(self, name: str) -> str:
        return self.dtypes[name]

    def _slice(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        path, part = self._locations[name], self._parts[name]
        if (coded := self.codes(name, np.float32)) is not None:
            return host_array(coded)[index]
        try:
            return np.asarray(self._files[path].get_slice(part.name)[part.inside(index)])
        except (SafetensorError, OSError, TypeError, AttributeError) as error:
            raise WeightsError(f"{path}: cannot read {name}: {error}") from None


def read_config_file(path: Path, formats: ModelFormats, **options: object) -> Any:
    """Reads the configuration in a config.json; see ``ModelFormats.read_config``.

    Raises:
      ConfigError: names the file, and what is wrong with it.
    """
    return _read_config(path, formats, options)[0]


def _read_config(path: Path, formats: ModelFormats, options: Fields) -> tuple[Any, Fields]:
    """Returns a configuration, and the fields of the file, whose codes are known."""
    if not path.exists() and (why := not_a_model(path.parent)):
        raise ConfigError(f"{path} is missing: {why}")
    fields = read_file(path, "a model", ConfigError)
    try:
        read_method(fields)
        own = {name: value for name, value in fields.items() if name != "quantization_config"}
        return formats.read_config(own, **options), fields
    except KindError as error:
        raise ConfigError(f"{path} has a field of the wrong kind: {error}") from None
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    except (TypeError, ValueError, ArithmeticError) as error:  # "24" in the place of 24, 0 heads
        raise ConfigError(f"{path} has a field of the wrong kind: {error}") from error
