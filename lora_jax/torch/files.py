"""Reads a torch module's weights from safetensors files, which may store tensors in parts."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import torch
from transformers.core_model_loading import dot_natural_key, rename_source_key

from lora_jax.hf.format import ModelFormat, ModelFormats
from lora_jax.hf.keys import WeightsError, write_converted
from lora_jax.hf.sources import SafetensorsFolder
from lora_jax.models.families import key_table
from lora_jax.torch.config import TorchConfig
from lora_jax.torch.diffusion import STEM
from lora_jax.torch.module import build_module


def _find_module_name(name: str, config: TorchConfig) -> tuple[str, str | None, str]:
    """Returns the module's name of a stored tensor; the stored name if it is a part.

    Two more values follow: the pattern by which the tensor is part of a conversion (None if it is
    not), and the name of the conversion's first result.
    """
    renamings, converters, stored = build_module(config).conversions
    if name in stored:
        return name, None, name
    prefix = getattr(build_module(config).module, "base_model_prefix", "") or None
    target, pattern = rename_source_key(name, renamings, converters, prefix, stored)
    return (name if pattern else target), pattern, target


FORMAT = ModelFormat(
    TorchConfig.from_hf,
    key_table,
    options=frozenset({"auto", "scan", "example"}),
    table_name=lambda name, config: _find_module_name(name, config)[0],
    ignored_tensors=re.compile(r".*rotary_emb\..*|.*\.inv_freq|mtp\..*|model\.mtp.*"),
)


class _Formats(ModelFormats):
    """A format registry that has one format for all model types."""

    def format_of(self, model_type: object) -> ModelFormat:
        return FORMAT


FORMATS = _Formats({})


class _JoinedTensor(NamedTuple):
    """A tensor of the module that files store in parts.

    Attributes:
      converter: transformers' conversion of the parts.
      first_result: the name of the first tensor that the conversion makes.
      part_names: the names of the parts, by the pattern that they match.
    """

    converter: Any
    first_result: str
    part_names: dict[str, list[str]]


class TorchFolder(SafetensorsFolder):
    """A folder whose files may store tensors in parts, such as one kernel per expert.

    Transformers' own conversions join the parts of one tensor at a time. Quantized tensors are
    dequantized, because torch's code needs plain arrays.

    Args:
      folder: the folder.
      **options: fields of `TorchConfig`.

    Raises:
      WeightsError: see `SafetensorsFolder`.
    """

    def __init__(self, folder: Path, **options: object):
        super().__init__(folder, FORMATS, **options)
        self._joined: dict[str, _JoinedTensor] = {}
        self._parts_of: dict[str, tuple[int, ...]] = {}
        self._coded, self.coded_names = self.coded_names, frozenset()
        plain = Counter(kind for name, kind in self.dtypes.items() if name not in self._coded)
        for kind, _ in plain.most_common(1):  # the dtype of dequantized tensors
            self.dtypes |= dict.fromkeys(self._coded, kind)
        module_shapes = {
            name: row.hf_shape for row in key_table(self.config) for name in row.hf_names
        }
        _, converters, stored = build_module(self.config).conversions
        # Replace the parts of tensors in the listing by the module's own tensors.
        for name in sorted(self.shapes, key=dot_natural_key):
            _, pattern, first = _find_module_name(name, self.config)
            if pattern is None:
                continue
            converter = next(c for c in converters if pattern in c.source_patterns)
            patterns = converter.target_patterns
            targets = {first.replace(patterns[0], target_pattern) for target_pattern in patterns}
            for target in targets & module_shapes.keys():
                joined = self._joined.setdefault(target, _JoinedTensor(converter, first, {}))
                joined.part_names.setdefault(pattern, []).append(name)
                self.shapes[target] = module_shapes[target]
                self.dtypes.setdefault(target, self.dtypes[name])
                self._locations.setdefault(target, self._locations[name])
                self._parts_of[name] = self.shapes[name]
        ignored = {
            n for n in self.shapes.keys() - stored.keys() if build_module(self.config).ignores(n)
        }
        for name in {*self._parts_of, *ignored}:
            del self.shapes[name]

    def read_into(self, out: np.ndarray, name: str, index: tuple[slice, ...]) -> None:
        if name not in self._joined and name not in self._coded:
            return super().read_into(out, name, index)
        # Reading in blocks would join or dequantize the whole tensor again for each block.
        return write_converted(self._read_slice(name, index), out, f"{self.locate(name)}: {name}")

    def _read_slice(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        """Reads a slice of a tensor, joining its parts if it is stored in parts."""
        if name not in self._joined:
            return super()._read_slice(name, index)
        part_names = self._joined[name].part_names
        parts = {
            pattern: list(map(self._read_part, names)) for pattern, names in part_names.items()
        }
        tensor = self._join_parts(name, parts)
        shape = self.shapes[name]
        if tensor.shape != shape:
            raise WeightsError(
                f"{self.where}: the parts of {name} in the files, such as "
                f"{next(iter(part_names.values()))[-1]}, have the shape {list(tensor.shape)} "
                f"together, expected {list(shape)}. Check that all files of the model are complete."
            )
        return tensor[index]

    def _read_part(self, name: str) -> np.ndarray:
        """Reads a stored tensor completely."""
        return super()._read_slice(name, tuple(slice(None) for _ in self._parts_of[name]))

    def _join_parts(self, name: str, parts: Mapping[str, Sequence[np.ndarray]]) -> np.ndarray:
        """Joins the stored parts of a tensor."""
        converter, first_result, _ = self._joined[name]
        is_bf16 = next(iter(parts.values()))[0].dtype == ml_dtypes.bfloat16
        tensors: Any = {}
        for pattern, arrays in parts.items():
            if is_bf16:  # which torch does not read from NumPy
                arrays = [array.view(np.int16) for array in arrays]
            tensors[pattern] = list(map(torch.from_numpy, arrays))
        # Conversions ask the module for the shapes of its parameters.
        model = SimpleNamespace(get_parameter=lambda n: torch.empty(self.shapes[n], device="meta"))
        for operation in converter.operations:
            tensors = operation.convert(
                tensors,
                source_patterns=converter.source_patterns,
                target_patterns=converter.target_patterns,
                full_layer_name=first_result,
                model=model,
                config=self.config.hf,
            )
        result = next((v for k, v in tensors.items() if k in name), None)
        if result is None:
            raise WeightsError(
                f"{self.where}: transformers' conversion of the files' tensors does not make "
                f"{name}. Install a newer version of transformers."
            )
        array: np.ndarray = (result[0] if isinstance(result, list) else result).numpy()
        return array.view(ml_dtypes.bfloat16) if is_bf16 else array


class DiffusionFolder(TorchFolder):
    """The folder of a part of a pipeline of diffusers; see `TorchFolder`."""

    stem = STEM
