"""Where weights are read from: a folder of safetensors, or a GGUF file, one tensor at a time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Protocol

import ml_dtypes  # noqa: F401  registers bfloat16 with numpy, which safetensors asks for
import numpy as np
from safetensors import SafetensorError, safe_open

from lora_jax.models.families import read_config
from lora_jax.models.fields import ConfigError
from lora_jax.models.keys import WeightsError


class Source(Protocol):
    """A model's configuration and its tensors, under Hugging Face's names and in its layout."""

    where: str
    config: Any
    shapes: dict[str, tuple[int, ...]]

    def read(self, name: str) -> np.ndarray:
        """The tensor, as it is stored or in fp32."""
        ...


class SafetensorsFolder:
    """A folder with config.json and model.safetensors, or shards and their index.

    Only headers are read here, and ``read`` maps one tensor at a time. The options are those of
    ``families.read_config``.

    Raises:
      ConfigError: if config.json is missing or describes another model.
      WeightsError: if a file is missing, truncated or damaged; it names the file.
    """

    def __init__(self, folder: Path, **options: Any):
        self.where = str(folder)
        self.config = _read_config(folder / "config.json", options)
        self._files: dict[str, Any] = {}
        self.shapes = {}
        for path in _weight_files(folder):
            try:
                file = safe_open(path, framework="np")
                for name in file.keys():
                    self._files[name] = file
                    self.shapes[name] = tuple(file.get_slice(name).get_shape())
            except (SafetensorError, OSError) as error:
                raise WeightsError(f"{path} is damaged or cut short: {error}") from None

    def read(self, name: str) -> np.ndarray:
        try:
            return self._files[name].get_tensor(name)
        except (SafetensorError, OSError, TypeError, AttributeError) as error:
            raise WeightsError(f"{self.where}: cannot read {name}: {error}") from None


def _read_config(path: Path, options: dict[str, Any]) -> Any:
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path} is missing: a model folder holds config.json") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from None
    try:
        return read_config(fields, **options)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def _weight_files(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        single = folder / "model.safetensors"
        if not single.exists():
            raise WeightsError(f"{folder} holds neither model.safetensors nor {index.name}")
        return [single]
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise WeightsError(f"{index} cannot be read: {error!r}") from None
    if missing := [name for name in names if not (folder / name).exists()]:
        raise WeightsError(f"{folder} lacks shards that {index.name} lists: {', '.join(missing)}")
    return [folder / name for name in names]
