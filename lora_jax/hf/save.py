"""Writes a parameter tree as a folder that transformers and ``from_pretrained`` read."""

import itertools
import json
import math
import os
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from safetensors import SafetensorError
from safetensors.numpy import save_file

from lora_jax.core.types import Fields, Tokenizer, Tree
from lora_jax.hf.format import Config
from lora_jax.hf.hub import resolve
from lora_jax.hf.images import FILE as IMAGES
from lora_jax.hf.keys import Row, WeightsError, checked_leaves, convert, hf_tensors
from lora_jax.hf.tokenizer import load_tokenizer

_DTYPES = ("float64", "float32", "float16", "bfloat16")

# Those of what makes arrays of a user's data: a tokenizer or an image processor.
_TOKENIZER_FILES = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "merges.txt",
    "vocab.*",
    "*.model",
    "processor_config.json",
    IMAGES,
)


def file_dtypes(params: Tree, table: Sequence[Row], dtype: DTypeLike | None) -> dict[str, np.dtype]:
    """Returns path -> dtype in the file, after a check of the tree.

    Args:
      params: the parameter tree.
      table: the model's key table.
      dtype: dtype of all weights in the file; None keeps each parameter's.

    Raises:
      WeightsError: if the tree does not fit the table (one error lists all), or is not merged.
    """
    leaves = checked_leaves(params, table).items()
    asked = {path: jnp.dtype(leaf.dtype if dtype is None else dtype) for path, leaf in leaves}
    if wrong := [f"{path}: {got.name}" for path, got in asked.items() if got.name not in _DTYPES]:
        raise WeightsError(
            f"weights are saved as {', '.join(_DTYPES)}, and not as\n  " + "\n  ".join(wrong)
        )
    return asked


def write_model(
    folder: Path,
    config: Config,
    table: Sequence[Row],
    params: Tree,
    dtypes: Mapping[str, np.dtype],
    max_shard_size: int,
) -> None:
    """Writes config.json and the weights.

    Args:
      folder: exists.
      config: the model's.
      table: the model's key table.
      params: the parameter tree.
      dtypes: see `file_dtypes`.
      max_shard_size: bytes of weights per file.

    Raises:
      WeightsError: for values that fp16 cannot hold.
    """
    rows = {name: row for row in table for name in row.hf_names}
    out = {name: dtypes[row.path] for name, row in rows.items()}
    sizes = {name: math.prod(row.shape) * out[name].itemsize for name, row in rows.items()}
    shards = _shards(sizes, max_shard_size)
    tensors = hf_tensors(params, table)
    weight_map = {}
    for i, names in enumerate(shards, 1):
        many = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        path = folder / ("model.safetensors" if len(shards) == 1 else many)
        some = itertools.islice(tensors, len(names))
        write_tensors(path, {name: _converted(array, out[name], name) for name, array in some})
        weight_map.update(dict.fromkeys(names, path.name))
    if len(shards) > 1:
        total = sum(math.prod(row.stacked_shape) for row in table)
        metadata = {"total_parameters": total, "total_size": sum(sizes.values())}
        index = {"metadata": metadata, "weight_map": weight_map}
        _write_json(folder / "model.safetensors.index.json", index)
    counts: Counter[str] = Counter()
    for row in table:
        counts[dtypes[row.path].name] += math.prod(row.stacked_shape)
    main_dtype = counts.most_common(1)[0][0]  # of most of the parameters
    _write_json(folder / "config.json", {**config.to_hf(), "dtype": main_dtype})


def write_tensors(path: Path, tensors: dict[str, np.ndarray]) -> None:
    """Writes a safetensors file, marked as PyTorch's libraries mark theirs.

    Args:
      path: the file.
      tensors: name -> array.

    Raises:
      OSError: if the file cannot be written.
    """
    path.touch()
    mode = path.stat().st_mode  # by the umask; safetensors leaves files to their owner alone
    try:
        save_file(tensors, path, metadata={"format": "pt"})
    except SafetensorError as error:
        raise OSError(f"{path} cannot be written: {error}") from None
    path.chmod(mode)


def _shards(sizes: Mapping[str, int], limit: int) -> list[list[str]]:
    """Splits names, in their order, where a file would grow beyond the limit."""
    shards: list[list[str]] = [[]]
    used = 0
    for name, size in sizes.items():
        if shards[-1] and used + size > limit:
            shards.append([])
            used = 0
        shards[-1].append(name)
        used += size
    return shards


def _converted(array: np.ndarray, dtype: np.dtype, name: str) -> np.ndarray:
    if array.dtype == dtype:
        return array
    out = np.empty(array.shape, dtype)
    convert(array, out, name)
    return out


def write_tokenizer(folder: Path, tokenizer: Tokenizer) -> None:
    """Writes the files of a tokenizer or an image processor; see ``models.save_pretrained``."""
    if not isinstance(tokenizer, str | os.PathLike):
        tokenizer.save_pretrained(folder)
        return
    source = resolve(Path(tokenizer)).path
    if not source.is_dir():
        load_tokenizer(source).save_pretrained(folder)
        return
    files = tokenizer_files(source)
    if not files:
        raise FileNotFoundError(f"{source} holds no tokenizer's files, and no {IMAGES}")
    for file in files:
        shutil.copyfile(file, folder / file.name)


def tokenizer_files(folder: Path) -> list[Path]:
    """Returns the files of the tokenizer, or of the image processor, in a model's folder."""
    return sorted({p for name in _TOKENIZER_FILES for p in folder.glob(name) if p.is_file()})


def _write_json(path: Path, fields: Fields) -> None:
    path.write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n", encoding="utf-8")
