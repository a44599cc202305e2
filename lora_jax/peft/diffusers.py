"""Reads and writes adapters in the form of diffusers, which ComfyUI and PEFT read, too.

Such a file is one safetensors file. Its keys have the name of the adapted part of the pipeline as a
prefix, and its header holds the fields of PEFT's adapter_config.json. Without these fields,
diffusers takes alpha = rank.
"""

import importlib.util
import json
import os
import tempfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

from lora_jax.core.types import JsonObject, Model, Tree
from lora_jax.folders import local_path, partial_folder_of
from lora_jax.peft.config import CONFIG_FILE
from lora_jax.peft.contents import adapter_contents
from lora_jax.peft.errors import PeftError
from lora_jax.peft.load import load, read_tensors
from lora_jax.peft.names import KEY_PREFIX, WEIGHTS_FILE

_METADATA_KEY = "lora_adapter_metadata"
_TEXT_ENCODERS = ("text_encoder", "lora_te", "te1_", "te2_")
# The classes of diffusers that convert the files of other programs, by the class of the module.
_CONVERTERS = {
    "FluxTransformer2DModel": "FluxLoraLoaderMixin",
    "SD3Transformer2DModel": "SD3LoraLoaderMixin",
    "QwenImageTransformer2DModel": "QwenImageLoraLoaderMixin",
}


def save_diffusers(
    file: str | os.PathLike[str],
    model: Model,
    params: Tree,
    *,
    prefix: str = "transformer",
    overwrite: bool = False,
) -> None:
    """Writes an adapter for ``load_lora_weights`` of diffusers, completely or not at all.

    Args:
      file: the safetensors file.
      model: the function that `from_torch` returned.
      params: an adapted tree.
      prefix: the part of the pipeline that is adapted: "transformer", or "unet".
      overwrite: replace a file that is there. Without it, an existing file is an error.

    Raises:
      PeftError: diffusers has no form for the adapter.
      FileExistsError: if the file exists.

    >>> from lora_jax import models
    >>> fields = {"model_type": "gpt2", "n_embd": 8, "n_head": 2, "n_layer": 1, "vocab_size": 16}
    >>> model = models.GPT2(models.read_config(fields | {"n_positions": 16}))
    >>> ids = jnp.array([[1, 2, 3]])
    >>> params = model.init(jax.random.key(0), ids)["params"]
    >>> from lora_jax import peft
    >>> import tempfile
    >>> tree = lj.lorafy(params, [lj.LoraRule(targets=["c_attn"], rank=2)])
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     file = f"{folder}/style.safetensors"
    ...     peft.save_diffusers(file, model, tree)
    ...     loaded = peft.load_diffusers(file, model, params)
    >>> jax.tree.structure(loaded) == jax.tree.structure(tree)
    True
    """
    path = local_path(file).absolute()
    if path.exists() and not overwrite:
        raise FileExistsError(
            f"{path} already exists. Name another file, or pass overwrite=True to replace it."
        )
    if path.suffix != ".safetensors":
        raise PeftError(f"{path} has no name of a safetensors file. Name it *.safetensors.")
    config, tensors = adapter_contents(model, params)
    names_of_others = [
        name for name in tensors if ".lora_A." not in name and ".lora_B." not in name
    ]
    if names_of_others:
        raise PeftError(
            f"diffusers has no form for {names_of_others[0].removeprefix(KEY_PREFIX)}. It reads A "
            "and B of LoRA alone. Train an adapter of plain LoRA, or use lora_jax.peft.save."
        )
    renamed = {
        f"{prefix}.{name.removeprefix(KEY_PREFIX)}": np.asarray(x) for name, x in tensors.items()
    }
    fields = {f"{prefix}.{name}": value for name, value in sorted(config.items())}
    metadata = {"format": "pt", _METADATA_KEY: json.dumps(fields, indent=2)}
    path.parent.mkdir(parents=True, exist_ok=True)
    partial_file = partial_folder_of(path)
    try:
        save_file(renamed, partial_file, metadata)
        os.replace(partial_file, path)
    finally:
        partial_file.unlink(missing_ok=True)


def load_diffusers(
    file: str | os.PathLike[str], model: Model, params: Tree, *, prefix: str = "transformer"
) -> Tree:
    """Loads an adapter that diffusers or another program wrote for diffusers.

    Other forms, such as kohya's keys with ``.alpha`` and joined q, k and v, are first converted by
    diffusers.

    Args:
      file: the safetensors file.
      model: the function that `from_torch` returned.
      params: the plain tree of the base.
      prefix: the part of the pipeline that is adapted: "transformer", or "unet".

    Returns:
      The adapted tree, as `load` returns it.

    Raises:
      PeftError: the file is no safetensors file, has keys of text encoders, or has keys that match
        nothing.

    See the example of `lora_jax.peft.save_diffusers`.
    """
    path = local_path(file)
    if path.suffix != ".safetensors":
        raise PeftError(
            f"{path} is no safetensors file. A pickle (.bin, .pt) can run any code when it is "
            "loaded, so lora_jax does not read it. Save the adapter as safetensors."
        )
    tensors = read_tensors(path)
    alphas: Mapping[str, float] = {}
    fields = _fields_in_header(path, prefix)
    encoder_names = [name for name in tensors if name.startswith(_TEXT_ENCODERS)]
    if encoder_names:
        raise PeftError(
            f"{path}: {encoder_names[0]} belongs to a text encoder, which is not adapted here. "
            f"Save the adapter of the {prefix} in a file of its own."
        )
    if not all(_is_plain_key(name, prefix) for name in tensors):
        tensors, alphas = _convert(path, model)
    by_module = {name.removeprefix(f"{prefix}."): x for name, x in tensors.items()}
    config = fields or _config_of(by_module, alphas, prefix)
    with tempfile.TemporaryDirectory() as folder:
        save_file(
            {f"{KEY_PREFIX}{name}": np.ascontiguousarray(x) for name, x in by_module.items()},
            Path(folder) / WEIGHTS_FILE,
        )
        text = json.dumps({"peft_type": "LORA"} | config)
        (Path(folder) / CONFIG_FILE).write_text(text, encoding="utf-8")
        try:
            return load(folder, model, params)
        except PeftError as error:
            message = str(error).replace(str(Path(folder) / WEIGHTS_FILE), str(path))
            message = message.replace(folder, str(path)).replace(KEY_PREFIX, f"{prefix}.")
            raise PeftError(message) from None


def _is_plain_key(name: str, prefix: str) -> bool:
    """Returns True for a key that is PEFT's but for the prefix."""
    return name.startswith(f"{prefix}.") and (".lora_A." in name or ".lora_B." in name)


def _fields_in_header(path: Path, prefix: str) -> JsonObject:
    """Returns the fields of the adapter's configuration in a header; {} if there are none."""
    with safe_open(path, framework="np") as file:
        text = (file.metadata() or {}).get(_METADATA_KEY, "{}")
    try:
        fields = json.loads(text)
    except ValueError:
        raise PeftError(f"{path}: {_METADATA_KEY} in its header is no JSON.") from None
    start = f"{prefix}."
    return {
        name.removeprefix(start): value for name, value in fields.items() if name.startswith(start)
    }


def _convert(path: Path, model: Model) -> tuple[dict[str, np.ndarray], dict[str, float]]:
    """Returns the tensors of another program's file in diffusers' form, and alphas by name."""
    class_name = str(getattr(getattr(model, "config", None), "model_type", ""))
    converter = _CONVERTERS.get(class_name)
    if converter is None:
        raise PeftError(
            f"{path} has keys of another form than diffusers'. Such keys are converted only for "
            f"{', '.join(sorted(_CONVERTERS))}. Save the adapter with diffusers first."
        )
    if importlib.util.find_spec("diffusers") is None:
        raise PeftError(
            f"{path} has keys of another form than diffusers', which diffusers can convert, but "
            "diffusers is not installed. Run pip install 'lora_jax[diffusion]'"
        )
    from diffusers.loaders import lora_pipeline

    mixin: Any = getattr(lora_pipeline, converter)
    options = {"return_alphas": True} if converter.startswith("Flux") else {}
    try:
        converted = mixin.lora_state_dict(str(path), **options)
    except (ValueError, KeyError) as error:
        reason = str(error).partition("\n")[0]
        raise PeftError(f"{path}: diffusers cannot convert its keys: {reason}") from error
    tensors, alphas = converted if isinstance(converted, tuple) else (converted, None)
    arrays = {name: tensor.float().numpy() for name, tensor in tensors.items()}
    return arrays, {name: float(alpha) for name, alpha in (alphas or {}).items()}


def _config_of(
    tensors: Mapping[str, np.ndarray], alphas: Mapping[str, float], prefix: str
) -> JsonObject:
    """Returns the configuration of tensors without one: alpha = rank but where alphas are known."""
    ranks = {
        name.partition(".lora_B.")[0]: x.shape[1]
        for name, x in tensors.items()
        if ".lora_B." in name
    }
    if not ranks:
        raise PeftError("the file has no lora_B of any module.")
    alpha_of_module = {
        name.removeprefix(f"{prefix}.").removesuffix(".alpha"): alpha
        for name, alpha in alphas.items()
    }
    module_alphas = {name: alpha_of_module.get(name, rank) for name, rank in ranks.items()}
    ((rank, _),) = Counter(ranks.values()).most_common(1)
    return {
        "r": rank,
        "lora_alpha": rank,
        "target_modules": sorted(ranks),
        "rank_pattern": ranks,
        "alpha_pattern": module_alphas,
    }
