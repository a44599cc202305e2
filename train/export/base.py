"""Finds the dtype, the tokenizer and the quantized kernels in the files of an export's base."""

import math
import sys
from collections import Counter
from pathlib import Path

from lora_jax.core.types import Model, Tree
from lora_jax.core.weight import map_leaves
from lora_jax.hf.coded import QUANTIZE_STORED
from lora_jax.hf.format import ModelConfig
from lora_jax.hf.gguf.model import GGUFFile
from lora_jax.hf.hub import find_model
from lora_jax.hf.save import find_tokenizer_files
from lora_jax.hf.sources import SafetensorsFolder
from lora_jax.hf.stored.kept import CodesCheck
from lora_jax.hf.tokenizer import find_tokenizer
from lora_jax.models import key_table
from lora_jax.models.families import reading_options
from lora_jax.quantized import dequantize, is_coded
from train.run.model_code import open_model
from train.run.pretrained import read_tokenizer

_DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}  # by their names in files


def find_file_dtype(name: str) -> str:
    """Returns the most common dtype of a base's float tensors; float32 for a GGUF file."""
    source = open_model(find_model(name).path)
    kinds = Counter(
        kind for tensor, kind in source.dtypes.items() if tensor not in source.coded_names
    )
    return _DTYPES.get(kinds.most_common(1)[0][0], "float32")


def find_gguf_codes(name: str) -> str | None:
    """Returns the quantization of most weights in a GGUF file, such as "Q4_1"; None for floats."""
    source = open_model(find_model(name).path)
    if not isinstance(source, GGUFFile):
        return None
    sizes: Counter[str] = Counter()
    for tensor, shape in source.shapes.items():
        sizes[source.form(tensor)] += math.prod(shape)
    ((form, _),) = sizes.most_common(1)
    return None if form in _DTYPES else form


def choose_tokenizer(name: str, tokenizer: str | None, config: ModelConfig) -> str | Path | None:
    """Returns the path or name of the tokenizer to write; None if the base's folder has none.

    Args:
      name: the base.
      tokenizer: the value of --tokenizer, which replaces the base's tokenizer.
      config: the base's configuration.

    Raises:
      UserError: that tokenizer cannot be read, or has tokens that the base lacks.
    """
    if tokenizer is not None:
        read_tokenizer(name, tokenizer, config)  # raises a UserError if it does not fit
        return find_tokenizer(tokenizer)
    path = find_model(name).path
    if path.is_dir() and not find_tokenizer_files(path):
        print(
            f"{path} holds no tokenizer, so the model is written without one. Name one with "
            "--tokenizer.",
            file=sys.stderr,
        )
        return None
    return name


def keep_codes(
    params: Tree, model: Model, base: str, quantize: str | None
) -> tuple[Tree, str | None, str]:
    """Dequantizes the kernels of a merged tree that the base's file format cannot keep quantized.

    Args:
      params: the merged tree.
      model: its model.
      base: the name of the base.
      quantize: the --quantize that the base was read with; None dequantizes all kernels.

    Returns:
      The tree; the base if some kernels stay quantized, or None; and a remark for the user, or "".
    """
    source = open_model(find_model(base).path, **reading_options(model.config))
    if quantize != QUANTIZE_STORED or not isinstance(source, SafetensorsFolder):
        return dequantize(params), None, ""
    table = key_table(model.config)
    codes_check = CodesCheck(params, table, source)
    # The format may need kernels as arrays that the adapter did not change.
    array_paths = codes_check.paths_to_dequantize()
    params = map_leaves(
        lambda path, leaf: dequantize(leaf) if path in array_paths else leaf, params
    )
    n_coded = 0
    dequantized_names: list[str] = []
    for row in table:
        if row.path in array_paths:
            dequantized_names.append(row.hf.removesuffix(".weight"))
        elif is_coded(codes_check.leaves[row.path]):
            n_coded += len(row.hf_names)
    remarks: list[str] = []
    if n_coded:
        remarks.append(f"{n_coded} kernels stay quantized as in {base}, byte for byte.")
    if dequantized_names:
        remarks.append(
            f"{', '.join(dequantized_names)} are dequantized, though the adapter does not change "
            "them. Readers need them in the same form as the kernels that it changed."
        )
    return params, base if n_coded else None, " ".join(remarks)
