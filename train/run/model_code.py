"""The code that a model runs by: a family of this library, or a torch module of transformers."""

import importlib
import importlib.util
import sys
from pathlib import Path
from typing import Any

from lora_jax.hf.fields import read_file
from lora_jax.hf.sources import Source, read_config_file
from lora_jax.models import ConfigError
from lora_jax.models.families import FAMILIES, declined_field, module_of
from lora_jax.models.pretrained import open_source
from train.console.errors import UserError

OURS, TORCH, AUTO = "ours", "torch", "auto"
KEY = "model_code"  # in an outline's `head`, and in what an adapter says of its base
_PACKAGES = ("torch", "torchax", "transformers", "accelerate")
_REMEDY = "pip install 'lora_jax[torch]'"
_NO_OPTIONS = ("rope_scaling", "quantize", "head", "num_labels")
_TOLD: set[str] = set()


def code_of(path: Path, asked: str | None) -> str:
    """Returns the code that a model runs by: "ours" or "torch".

    Args:
      path: the folder or the file with the model, or its config.json.
      asked: --model-code; None for "auto".

    Raises:
      UserError: torch is asked for, or alone knows the model, and cannot be had.
    """
    if asked == TORCH:
        if lacking := _lacking():
            raise UserError(f"--model-code torch needs {lacking}: {_REMEDY}")
        return TORCH
    config = path / "config.json" if path.is_dir() else path
    if asked == OURS or config.suffix != ".json" or not config.is_file():
        return OURS
    fields = read_file(config, "a model", ConfigError)
    kind, declined = fields.get("model_type"), declined_field(fields)
    if (kind in FAMILIES and declined is None) or not isinstance(kind, str):
        return OURS
    what = kind if declined is None else f"{kind} with {declined}"
    if importlib.util.find_spec("transformers") is None:
        return OURS  # its error says what is known
    from transformers import CONFIG_MAPPING

    if kind not in CONFIG_MAPPING:
        return OURS
    if lacking := _lacking():
        raise UserError(
            f"{config}: no family of this library is a {what}, and to run transformers' torch "
            f"module {lacking} has to be installed: {_REMEDY}"
        )
    if what not in _TOLD:
        _TOLD.add(what)
        print(
            f"no family of this library is a {what}: transformers' torch module runs, by torchax "
            "(--model-code)",
            file=sys.stderr,
        )
    return TORCH


def _lacking() -> str:
    """Returns the packages that a torch module needs and that are not installed; "" for none."""
    return " and ".join(name for name in _PACKAGES if importlib.util.find_spec(name) is None)


def _torch() -> Any:
    """Imports `lora_jax.torch`, which brings torch: not before a model needs it."""
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
    return _torch().TorchFolder(path)


def torch_config(path: Path) -> Any:
    """Returns the configuration of a torch module by its config.json."""
    return read_config_file(path, _torch().files.FORMATS)


def make_model(config: Any, dtype: Any, param_dtype: Any, **options: Any) -> Any:
    """Makes the module of a configuration; see `lora_jax.models.families.module_of`."""
    if not hasattr(config, "key_rows"):
        return module_of(config, dtype, param_dtype, **options)
    own = {name: options[name] for name in ("remat", "attention") if name in options}
    # Rows are packed only for a module that keeps their sequences apart.
    return _torch().TorchModel(config, dtype, param_dtype, one_sequence=True, **own)


def load_torch(name: str, *, experts: str = "auto", **options: Any) -> tuple[Any, Any]:
    """Loads a model that runs as a torch module; see `lora_jax.torch.from_torch`.

    Raises:
      UserError: an option that a torch module does not have.
    """
    if experts != "auto":
        raise UserError(
            f"--experts {experts}: {name} runs as a torch module, whose own code has it"
        )
    if refused := [key for key in _NO_OPTIONS if options.get(key) not in (None, "none")]:
        raise UserError(
            f"{refused[0].replace('_', '-')} is for families of this library, and {name} runs as "
            "a torch module"
        )
    model, params = _torch().from_torch(
        name, **{key: value for key, value in options.items() if key not in _NO_OPTIONS}
    )
    return model.clone(one_sequence=True), params
