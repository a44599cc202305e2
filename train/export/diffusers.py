"""Exports adapters of image models: a file for pipelines of diffusers, or a merged module."""

import importlib
import json
from collections import Counter
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from rich.console import Console

import lora_jax as lj
import lora_jax.peft as lp
from lora_jax.core.types import Model, Tree
from lora_jax.folders import local_path
from lora_jax.models import save_pretrained
from train.adapters.source import AdapterSource
from train.console.errors import UserError, as_user_errors
from train.console.output import tell
from train.export.options import ExportOptions
from train.run.costs import byte_size

_CLASS_FIELD = "_class_name"
_PIPELINE_FILE = "model_index.json"
_DTYPES = {"F64": "float32", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def is_image_export(options: ExportOptions, adapter: AdapterSource, base: str) -> bool:
    """Returns True for an export whose base is a module of diffusers."""
    if options.diffusers is not None or subfolder_of(options, adapter) is not None:
        return True
    folder = Path(base).expanduser()
    if (folder / _PIPELINE_FILE).is_file():
        return True
    try:
        fields = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False  # a hub name, or a folder that others report
    return isinstance(fields, dict) and _CLASS_FIELD in fields


def subfolder_of(options: ExportOptions, adapter: AdapterSource) -> str | None:
    """Returns the part of the pipeline that is adapted; None if the base is no pipeline."""
    if options.subfolder is not None:
        return options.subfolder
    if adapter.is_peft:
        return None
    name: str | None = adapter.base_info.get("subfolder")
    return name


def export_image_adapter(
    options: ExportOptions, console: Console, adapter: AdapterSource, base: str, shard: int
) -> None:
    """Writes an adapter file for diffusers or, with --merged, the folder of a module.

    Args:
      options: the options.
      console: the console to print to.
      adapter: the adapter.
      base: the folder or the hub name of the module, or of a pipeline.
      shard: the maximum size of a file of weights, in bytes.

    Raises:
      UserError: the export has no such form, or a file cannot be read.
    """
    if options.diffusers is None and (not options.merged or options.output is None):
        raise UserError(
            f"{base} is an image model of diffusers. Write its adapter with --diffusers FILE, or "
            "the whole module with --merged --output FOLDER."
        )
    for name in ("gguf", "push_to_hub", "quantize", "tokenizer", "num_labels"):
        if getattr(options, name) is not None:
            flag = f"--{name.replace('_', '-')}"
            raise UserError(f"{flag} has no effect on an image model of diffusers. Remove {flag}.")
    with as_user_errors(ImportError, ValueError, OSError):
        subfolder = subfolder_of(options, adapter)
        fn, params = _torch_package().from_torch(base, subfolder=subfolder)
    tree = adapter.load(fn, params, base, allow_base_mismatch=options.allow_base_mismatch)
    if options.diffusers is not None:
        _write_file(options, console, fn, tree, subfolder)
        return
    assert options.output is not None, "check_options asks for it"
    output = Path(options.output).expanduser()
    dtype = options.dtype or _file_dtype(base, subfolder)
    with as_user_errors(ValueError, OSError, prefix="--merged: "):
        save_pretrained(
            output,
            fn,
            lj.merge(tree),
            dtype=jnp.dtype(dtype),
            max_shard_size=shard,
            overwrite=options.overwrite,
        )
    class_name = fn.config.model_type
    tell(console, f"{options.adapter} merged into {base}, in {dtype}: {output}")
    tell(console, f'Load it with: {class_name}.from_pretrained("{output}")')


def _write_file(
    options: ExportOptions, console: Console, fn: Model, tree: Tree, subfolder: str | None
) -> None:
    """Writes the safetensors file of --diffusers."""
    assert options.diffusers is not None
    is_unet = subfolder == "unet" or fn.config.model_type.startswith("UNet")
    prefix = "unet" if is_unet else "transformer"
    file = local_path(options.diffusers).expanduser()
    problem = f"--diffusers {file}: "
    with as_user_errors(ValueError, OSError, prefix=problem):
        lp.save_diffusers(file, fn, tree, prefix=prefix, overwrite=options.overwrite)
    size = byte_size(file.stat().st_size)
    tell(console, f"{options.adapter} as an adapter of diffusers: {file} ({size})")
    tell(
        console,
        f'Load it with: pipeline.load_lora_weights("{file.parent}", weight_name="{file.name}")',
    )


def _torch_package() -> Any:
    """Imports `lora_jax.torch`, which no other export needs."""
    return importlib.import_module("lora_jax.torch")


def _file_dtype(base: str, subfolder: str | None) -> str:
    """Returns the most common dtype of the module's files."""
    package = _torch_package()
    find_part = package.diffusion.find_part
    folder = find_part(base, subfolder) if subfolder else Path(base).expanduser()
    kinds: Counter[Any] = Counter(package.files.DiffusionFolder(folder).dtypes.values())
    return _DTYPES.get(kinds.most_common(1)[0][0], "float32")
