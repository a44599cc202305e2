"""Chooses the code that runs a model: a family of this library, or a torch module."""

import importlib
import importlib.util
import sys
from pathlib import Path
from typing import Any

from lora_jax.hf.fields import read_json_fields
from lora_jax.hf.sources import Source, read_config_file
from lora_jax.models import ConfigError
from lora_jax.models.families import FAMILIES, declined_field, module_of
from lora_jax.models.pretrained import open_source
from train.console.errors import UserError

OURS, TORCH, AUTO = "ours", "torch", "auto"
KEY = "model_code"  # in an outline's `head`, and in an adapter's facts about its base
_PACKAGES = ("torch", "torchax", "transformers", "accelerate")
_REMEDY = "Run: pip install 'lora_jax[torch]'"
_FAMILY_OPTIONS = ("rope_scaling", "quantize", "head", "num_labels")
_ANNOUNCED_KINDS: set[str] = set()


def code_of(path: Path, model_code: str | None) -> str:
    """Returns the code that runs a model: "ours" or "torch".

    Args:
      path: the folder or the file with the model, or its config.json.
      model_code: --model-code; None for "auto".

    Raises:
      UserError: the model needs the torch module, but its packages are not installed.
    """
    if model_code == TORCH:
        missing = _missing_packages()
        if missing:
            raise UserError(f"--model-code torch needs {missing}. {_REMEDY}")
        return TORCH
    # With "auto", only a config.json may name a model that needs torch.
    config = path / "config.json" if path.is_dir() else path
    if model_code == OURS or config.suffix != ".json" or not config.is_file():
        return OURS
    fields = read_json_fields(config, "a model", ConfigError)
    kind = fields.get("model_type")
    declined = declined_field(fields)
    is_ours = kind in FAMILIES and declined is None
    if is_ours or not isinstance(kind, str):
        return OURS
    if not _is_known_to_transformers(kind):
        return OURS  # the error of this code lists the supported kinds
    description = kind if declined is None else f"{kind} with {declined}"
    missing = _missing_packages()
    if missing:
        raise UserError(
            f"{config} describes a {description}, which no model family of this library supports. "
            f"The torch module of transformers needs {missing}. {_REMEDY}"
        )
    _announce(description)
    return TORCH


def _is_known_to_transformers(kind: str) -> bool:
    """Returns True if transformers is installed and has models of a kind."""
    if importlib.util.find_spec("transformers") is None:
        return False
    from transformers import CONFIG_MAPPING

    return kind in CONFIG_MAPPING


def _announce(description: str) -> None:
    """Prints once that a kind of model runs as a torch module."""
    if description in _ANNOUNCED_KINDS:
        return
    _ANNOUNCED_KINDS.add(description)
    print(
        f"no model family of this library supports a {description}, so the torch module of "
        "transformers runs through torchax (--model-code)",
        file=sys.stderr,
    )


def _missing_packages() -> str:
    """Returns the packages that a torch module needs and that are not installed; "" for none."""
    return " and ".join(name for name in _PACKAGES if importlib.util.find_spec(name) is None)


def _import_torch() -> Any:
    """Imports and returns `lora_jax.torch`, which imports torch, when a model needs it."""
    return importlib.import_module("lora_jax.torch")


def open_model(path: Path, code: str | None = None, **options: Any) -> Source:
    """Opens the files of a model; reads its configuration and headers only.

    Args:
      path: a folder or a GGUF file.
      code: --model-code; None for "auto".
      **options: keywords of `lora_jax.models.read_config`.
    """
    if code_of(path, code) == OURS:
        return open_source(path, **options)
    return _import_torch().TorchFolder(path)


def torch_config(path: Path) -> Any:
    """Returns the configuration of a torch module from its config.json."""
    return read_config_file(path, _import_torch().files.FORMATS)


def make_model(config: Any, dtype: Any, param_dtype: Any, **options: Any) -> Any:
    """Makes the module of a configuration; see `lora_jax.models.families.module_of`."""
    is_torch = hasattr(config, "key_rows")
    if not is_torch:
        return module_of(config, dtype, param_dtype, **options)
    torch_options = {name: options[name] for name in ("remat", "attention") if name in options}
    # A torch module gets one sequence per row; packing needs a module that separates sequences.
    return _import_torch().TorchModel(
        config, dtype, param_dtype, one_sequence=True, **torch_options
    )


def load_torch(name: str, *, experts: str = "auto", **options: Any) -> tuple[Any, Any]:
    """Loads a model that runs as a torch module; see `lora_jax.torch.from_torch`.

    Raises:
      UserError: an option does not apply to a torch module.
    """
    if experts != "auto":
        raise UserError(
            f"--experts {experts} has no effect, because {name} runs as a torch module with its "
            "own implementation of experts. Remove --experts."
        )
    torch_options = {}
    for key, value in options.items():
        if key not in _FAMILY_OPTIONS:
            torch_options[key] = value
    for key in _FAMILY_OPTIONS:
        if options.get(key) not in (None, "none"):
            raise UserError(
                f"--{key.replace('_', '-')} only applies to model families of this library, but "
                f"{name} runs as a torch module. Remove this option."
            )
    model, params = _import_torch().from_torch(name, **torch_options)
    return model.clone(one_sequence=True), params
