"""Tensors of GGUF files by Hugging Face's names, dequantised to fp32 or as codes."""

import math
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.typing import DTypeLike

from lora_jax.hf.counts import check_counts
from lora_jax.hf.fields import ConfigError
from lora_jax.hf.format import ModelFormats
from lora_jax.hf.gguf.files import open_gguf
from lora_jax.hf.keys import WeightsError, write_converted
from lora_jax.quantized import Coded, from_gguf
from lora_jax.quantized.gguf import TYPES


class GGUFFile:
    """A GGUF file of a known architecture; ``read`` dequantises to fp32.

    Args:
      path: the file.
      formats: the formats of all families.

    Attributes:
      metadata: the file's key-value pairs.
      coded_names: empty, since its codes are kept only if they are asked for.
      kept_forms_note: see `lora_jax.hf.sources.Source`.

    Raises:
      ConfigError: for another architecture or an unsupported option; names it.
      WeightsError: if the file is damaged or cut short.
    """

    coded_names: frozenset[str] = frozenset()
    kept_forms_note = (
        f"Weights of the GGUF types {', '.join(TYPES)} stay quantized if all layers of a kernel "
        "have the same type; the others are read as floats."
    )

    def __init__(self, path: Path, formats: ModelFormats):
        self.where = str(path)
        self._gguf, self.metadata, tensors = open_gguf(path)
        try:
            architecture = self.metadata.get("general.architecture")
            self.format, self._layout = formats.gguf_format_of(architecture)
            config_arrays: dict[str, np.ndarray] = {}
            self._tensors: dict[str, Any] = {}  # by Hugging Face's names
            self.shapes: dict[str, tuple[int, ...]] = {}
            for tensor in tensors:
                if tensor.name in self._layout.config_tensors:
                    config_arrays[tensor.name] = self._dequantize(tensor)
                    continue
                hf_name = self._layout.hf_name(tensor.name)
                self._tensors[hf_name] = tensor
                self.shapes[hf_name] = tuple(map(int, reversed(tensor.shape)))
            check_counts(self.metadata, lambda: self.shapes)
            self.config = self._layout.read(self.metadata, self.shapes, config_arrays)
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from None
        self.dtypes = dict.fromkeys(self.shapes, "F32")  # as they are read

    def read(self, name: str) -> np.ndarray:
        rows = self._dequantize(self._tensors[name]).reshape(self.shapes[name])
        return self._layout.reorder(rows, name, self.config)

    def _dequantize(self, tensor: Any) -> np.ndarray:
        """Returns the fp32 array of one of the file's tensors."""
        try:
            array = self._gguf.dequantize(tensor.data, tensor.tensor_type)
        except (ValueError, NotImplementedError) as error:
            raise WeightsError(f"{self.where}: cannot read {tensor.name}: {error}") from None
        return np.asarray(array, np.float32)

    def codes(self, name: str, dtype: DTypeLike) -> Coded | None:
        """Returns a tensor's codes as NumPy arrays; None for types that are not kept."""
        if self.form(name) not in TYPES:
            return None
        data = self._tensors[name].data
        coded = from_gguf(data, self.form(name), self.shapes[name], dtype)
        return coded.map(lambda rows: self._layout.reorder(rows, name, self.config))

    def code_shapes(self, name: str, dtype: DTypeLike) -> Coded | None:
        """Returns the shapes of the result of `codes`."""
        if self.form(name) not in TYPES:
            return None
        *leading_sizes, row_size = self.shapes[name]
        row_bytes = self._tensors[name].data.nbytes // math.prod(leading_sizes)
        coded_row = from_gguf(np.zeros(row_bytes, np.uint8), self.form(name), (1, row_size), dtype)

        def tensor_shape(row: np.ndarray) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct((*leading_sizes, row.shape[-1]), row.dtype)

        return coded_row.map(tensor_shape)

    def read_into(self, out: np.ndarray, name: str, index: tuple[slice, ...]) -> None:
        write_converted(self.read(name)[index], out, f"{self.where}: {name}")

    def locate(self, name: str) -> str:
        return self.where

    def form(self, name: str) -> str:
        return str(self._tensors[name].tensor_type.name)
