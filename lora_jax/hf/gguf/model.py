"""Quantised tensors of GGUF files, to fp32 or as their codes, under Hugging Face's names."""

import math
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.typing import DTypeLike

from lora_jax.hf.fields import ConfigError
from lora_jax.hf.format import ModelFormats
from lora_jax.hf.gguf.files import open_gguf
from lora_jax.hf.keys import WeightsError, convert
from lora_jax.quantized import Coded, from_gguf
from lora_jax.quantized.gguf import TYPES


class GGUFFile:
    """A GGUF file of an architecture that a family knows; ``read`` dequantises to fp32.

    Args:
      path: the file.
      formats: the formats of all families.

    Attributes:
      metadata: the file's key-value pairs.
      shipped: empty, since its codes are kept only if they are asked for.
      kept_forms_note: see `lora_jax.hf.sources.Source`.

    Raises:
      ConfigError: for another architecture or an unsupported option; names it.
      WeightsError: if the file is damaged or cut short.
    """

    shipped: frozenset[str] = frozenset()
    kept_forms_note = (
        f"Of the types of GGUF files, {', '.join(TYPES)} stay in codes, where all layers of a "
        "kernel have the same one; the others are read as floats"
    )

    def __init__(self, path: Path, formats: ModelFormats):
        self.where = str(path)
        self._gguf, self.metadata, tensors = open_gguf(path)
        try:
            self.format, self._layout = formats.gguf_format_of(
                self.metadata.get("general.architecture")
            )
            facts = {t.name: self._array(t) for t in tensors if t.name in self._layout.facts}
            self._tensors = {self._layout.name(t.name): t for t in tensors if t.name not in facts}
            self.shapes = {
                name: tuple(int(n) for n in reversed(t.shape)) for name, t in self._tensors.items()
            }
            self.config = self._layout.read(self.metadata, self.shapes, facts)
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from None
        self.dtypes = dict.fromkeys(self.shapes, "F32")  # as they are read

    def read(self, name: str) -> np.ndarray:
        rows = self._array(self._tensors[name]).reshape(self.shapes[name])
        return self._layout.reorder(rows, name, self.config)

    def _array(self, tensor: Any) -> np.ndarray:
        try:
            array = self._gguf.dequantize(tensor.data, tensor.tensor_type)
        except (ValueError, NotImplementedError) as error:
            raise WeightsError(f"{self.where}: cannot read {tensor.name}: {error}") from None
        return np.asarray(array, np.float32)

    def codes(self, name: str, dtype: DTypeLike) -> Coded | None:
        tensor = self._tensors[name]
        if self.form(name) not in TYPES:
            return None
        coded = from_gguf(tensor.data, self.form(name), self.shapes[name], dtype)
        return coded.map(lambda rows: self._layout.reorder(rows, name, self.config))

    def code_shapes(self, name: str, dtype: DTypeLike) -> Coded | None:
        tensor, shape = self._tensors[name], self.shapes[name]
        if self.form(name) not in TYPES:
            return None
        row = np.zeros(tensor.data.nbytes // math.prod(shape[:-1]), np.uint8)
        coded_row = from_gguf(row, self.form(name), (1, shape[-1]), dtype)
        lead = shape[:-1]
        return coded_row.map(lambda row: jax.ShapeDtypeStruct((*lead, row.shape[-1]), row.dtype))

    def read_into(self, out: np.ndarray, name: str, index: tuple[slice, ...]) -> None:
        convert(self.read(name)[index], out, f"{self.where}: {name}")

    def locate(self, name: str) -> str:
        return self.where

    def form(self, name: str) -> str:
        return str(self._tensors[name].tensor_type.name)
