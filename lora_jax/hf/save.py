"""Writes a parameter tree as a folder that transformers and ``from_pretrained`` read."""

import json
import math
import os
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from lora_jax.core.types import Fields, Leaf, Tokenizer, Tree
from lora_jax.folders import TEMPLATE_FILE
from lora_jax.hf import generation as generation_config
from lora_jax.hf.format import ModelConfig
from lora_jax.hf.hub import find_model
from lora_jax.hf.images import IMAGE_PROCESSOR_FILE as IMAGES
from lora_jax.hf.keys import Row, WeightsError, check_leaves, hf_tensor_of_member, write_converted
from lora_jax.hf.stored.kept import CodesCheck, CodesFolder
from lora_jax.hf.stored.raw import SAFETENSORS_NAMES, Header, TensorEntry, write_tensors
from lora_jax.hf.tokenizer import TOKENIZER_FILES as TOKENIZER_FILES
from lora_jax.hf.tokenizer import load_tokenizer
from lora_jax.quantized import is_coded

MODEL_STEM = "model"  # the beginning of the names of the files of weights
_SAVED_DTYPES = ("float64", "float32", "float16", "bfloat16")

# The files of a tokenizer or an image processor, which make arrays of a user's data.
_TOKENIZER_FILES = (
    *TOKENIZER_FILES,
    "processor_config.json",
    "video_preprocessor_config.json",
    IMAGES,
)


def choose_file_dtypes(
    params: Tree, table: Sequence[Row], dtype: DTypeLike | None, *, in_codes: bool = False
) -> dict[str, np.dtype]:
    """Returns path -> dtype in the file, after a check of the tree; codes have none.

    Args:
      params: the parameter tree.
      table: the model's key table.
      dtype: dtype of all weights in the file; None keeps each parameter's.
      in_codes: accept codes, which stay as they are.

    Raises:
      WeightsError: if the tree does not fit the table (one error lists all), or is not merged.
    """
    leaves = check_leaves(params, table, in_codes=in_codes)
    dtypes: dict[str, np.dtype] = {}
    for path, leaf in leaves.items():
        if not is_coded(leaf):
            dtypes[path] = jnp.dtype(leaf.dtype if dtype is None else dtype)
    problems = [f"{path}: {d.name}" for path, d in dtypes.items() if d.name not in _SAVED_DTYPES]
    if problems:
        raise WeightsError(
            f"weights can only be saved as {', '.join(_SAVED_DTYPES)}, but some have another "
            "dtype. Pass dtype=, or convert these:\n  " + "\n  ".join(problems)
        )
    return dtypes


def write_model(
    folder: Path,
    config: ModelConfig,
    table: Sequence[Row],
    params: Tree,
    dtypes: Mapping[str, np.dtype],
    max_shard_size: int,
    source: CodesFolder | None = None,
) -> None:
    """Writes config.json, generation_config.json and the weights, a tensor at a time.

    Args:
      folder: exists.
      config: the model's.
      table: the model's key table.
      params: the parameter tree.
      dtypes: see `choose_file_dtypes`.
      max_shard_size: bytes of weights per file.
      source: the folder that the tree's codes are from; None if it has none.

    Raises:
      WeightsError: for values that fp16 cannot hold, or codes that `source` does not hold.
    """
    fields = config.to_hf()
    if source is None:
        leaves = check_leaves(params, table)
    else:
        codes_check = CodesCheck(params, table, source)
        leaves = codes_check.leaves
        fields["quantization_config"] = codes_check.quantization()
        codes_check.check()
    tensors: dict[str, TensorEntry] = {}
    for row in table:
        leaf = leaves[row.path]
        for index, name in zip(row.members, row.hf_names, strict=True):
            if source is not None and is_coded(leaf):
                tensors |= source.entries(name)
            else:
                dtype = dtypes[row.path]
                read = partial(_convert_member, row, leaf, index, dtype, name)
                tensors[name] = TensorEntry(Header(SAFETENSORS_NAMES[dtype], row.hf_shape), read)
    n_parameters = sum(math.prod(row.stacked_shape) for row in table)
    stem = getattr(config, "stem", MODEL_STEM)
    _write_shards(folder, tensors, max_shard_size, n_parameters, stem)
    if stem == MODEL_STEM:  # diffusers' configurations have no such field
        fields["dtype"] = _most_common_dtype(table, dtypes)
    _write_json(folder / "config.json", fields)
    generation = getattr(config, "generation", None)
    if generation is not None:
        (folder / generation_config.GENERATION_FILE).write_text(generation.text, encoding="utf-8")


def _most_common_dtype(table: Sequence[Row], dtypes: Mapping[str, np.dtype]) -> str:
    """Returns the name of the dtype that most of the parameters are saved in."""
    n_parameters: Counter[str] = Counter()
    for row in table:
        if row.path in dtypes:
            n_parameters[dtypes[row.path].name] += math.prod(row.stacked_shape)
    return n_parameters.most_common(1)[0][0]


def _write_shards(
    folder: Path,
    tensors: Mapping[str, TensorEntry],
    max_shard_size: int,
    n_parameters: int,
    stem: str,
) -> None:
    """Writes the weights, and the index of their files if there are several."""
    tensor_bytes = {name: entry.header.nbytes for name, entry in tensors.items()}
    shards = _split_into_shards(tensor_bytes, max_shard_size)
    weight_map: dict[str, str] = {}
    for shard_number, names in enumerate(shards, 1):
        file = f"{stem}-{shard_number:05d}-of-{len(shards):05d}.safetensors"
        if len(shards) == 1:
            file = f"{stem}.safetensors"
        write_tensors(folder / file, {name: tensors[name] for name in names})
        weight_map.update(dict.fromkeys(names, file))
    if len(shards) > 1:
        metadata = {"total_parameters": n_parameters, "total_size": sum(tensor_bytes.values())}
        index = {"metadata": metadata, "weight_map": weight_map}
        _write_json(folder / f"{stem}.safetensors.index.json", index)


def _split_into_shards(tensor_bytes: Mapping[str, int], max_shard_size: int) -> list[list[str]]:
    """Splits names, in order, into files of at most the maximum size."""
    shards: list[list[str]] = [[]]
    shard_bytes = 0
    for name, n_bytes in tensor_bytes.items():
        is_full = shard_bytes + n_bytes > max_shard_size
        if shards[-1] and is_full:
            shards.append([])
            shard_bytes = 0
        shards[-1].append(name)
        shard_bytes += n_bytes
    return shards


def _convert_member(
    row: Row, leaf: Leaf, index: tuple[int, ...], dtype: np.dtype, name: str
) -> np.ndarray:
    """Returns a tensor of a parameter, cast to its dtype in the file."""
    tensor = hf_tensor_of_member(row, leaf, index)
    if tensor.dtype == dtype:
        return tensor
    converted = np.empty(tensor.shape, dtype)
    write_converted(tensor, converted, name)
    return converted


def write_tokenizer(folder: Path, tokenizer: Tokenizer) -> None:
    """Writes the files of a tokenizer or an image processor; see ``models.save_pretrained``."""
    if not isinstance(tokenizer, str | os.PathLike):
        tokenizer.save_pretrained(folder)
        return
    source = find_model(Path(tokenizer)).path
    is_gguf_file = not source.is_dir()
    if is_gguf_file:
        load_tokenizer(Path(tokenizer)).save_pretrained(folder)
        return
    files = find_tokenizer_files(source)
    if not files:
        raise FileNotFoundError(
            f"{source} contains neither a tokenizer nor {IMAGES}. Check the path."
        )
    for file in files:
        shutil.copyfile(file, folder / file.name)


def write_chat_template(folder: Path, template: str) -> None:
    """Replaces the chat template of a folder's tokenizer."""
    for file in folder.glob("chat_template*"):
        file.unlink()
    (folder / TEMPLATE_FILE).write_text(template, encoding="utf-8")
    config = folder / "tokenizer_config.json"
    if config.is_file():
        fields = json.loads(config.read_text(encoding="utf-8"))
        if fields.get("chat_template") is not None:  # older readers look there
            _write_json(config, {**fields, "chat_template": template})


def find_tokenizer_files(folder: Path) -> list[Path]:
    """Returns the files of the tokenizer, or of the image processor, in a model's folder."""
    files: set[Path] = set()
    for pattern in _TOKENIZER_FILES:
        files.update(path for path in folder.glob(pattern) if path.is_file())
    return sorted(files)


def _write_json(path: Path, fields: Fields) -> None:
    path.write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n", encoding="utf-8")
