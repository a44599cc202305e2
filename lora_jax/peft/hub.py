"""Finds the folder of an adapter: local, one of several in a folder, or on the hub."""

import os
from fnmatch import fnmatch
from pathlib import Path

from lora_jax.buckets.copies import readable
from lora_jax.hf.hub import ModelNotFound, snapshot
from lora_jax.peft.config import FILE
from lora_jax.peft.errors import PeftError

_PATTERNS = ["*adapter_config.json", "*adapter_model.safetensors", "*chat_template.jinja"]


def adapter_folder(folder: str | os.PathLike[str], adapter: str | None) -> Path:
    """Finds the folder that holds adapter_config.json.

    PEFT puts an adapter that is not called "default" into a subfolder of its name.

    Args:
      folder: a local folder, one in a bucket (gs://), or a hub name.
      adapter: the adapter's name, if the folder holds several.

    Raises:
      PeftError: if there is no adapter, or one of several has to be chosen.
    """
    path = readable(folder, _is_of_adapter).expanduser()
    if not path.exists():
        name = str(folder)
        if name.count("/") != 1 or name.startswith((".", "/", "~")):
            raise PeftError(f"{name} is neither a folder here nor a hub name (owner/name)")
        try:
            path = snapshot(name, _PATTERNS)
        except ModelNotFound as error:
            raise PeftError(str(error)) from None
    if not path.is_dir():
        raise PeftError(f"{path} is no folder; a PEFT adapter is one, with {FILE} in it")
    if adapter is not None and adapter != "default":
        path = path / adapter
    if (path / FILE).is_file():
        return path
    inside = sorted(file.parent.name for file in path.glob(f"*/{FILE}"))
    if inside:
        raise PeftError(
            f"{path} holds several adapters, {', '.join(inside)}: choose one with adapter=…"
        )
    raise PeftError(f"{path} is no adapter of PEFT: {FILE} is missing")


def _is_of_adapter(file: str) -> bool:
    return any(fnmatch(file, pattern) for pattern in _PATTERNS)
