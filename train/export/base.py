"""The files of an export's base: their dtype, their tokenizer, and their codes that stay."""

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


def dtype_of_files(name: str) -> str:
    """Returns the commonest dtype of the base's tensors, less those in codes; float32 for GGUF."""
    source = open_model(find_model(name).path)
    kinds = Counter(
        kind for tensor, kind in source.dtypes.items() if tensor not in source.coded_names
    )
    return _DTYPES.get(kinds.most_common(1)[0][0], "float32")


def gguf_codes_of(name: str) -> str | None:
    """Returns the codes of most of a base's weights in a GGUF file, such as "Q4_1"; else None."""
    source = open_model(find_model(name).path)
    if not isinstance(source, GGUFFile):
        return None
    sizes: Counter[str] = Counter()
    for tensor, shape in source.shapes.items():
        sizes[source.form(tensor)] += math.prod(shape)
    ((form, _),) = sizes.most_common(1)
    return None if form in _DTYPES else form


def tokenizer_of(name: str, given: str | None, config: ModelConfig) -> str | Path | None:
    """Returns the source of the tokenizer's files; None if the base's folder has none.

    Args:
      name: the base.
      given: the tokenizer in the place of the base's own; see --tokenizer.
      config: the base's configuration.

    Raises:
      UserError: that tokenizer cannot be read, or has tokens that the base lacks.
    """
    if given is not None:
        read_tokenizer(name, given, config)
        return find_tokenizer(given)
    path = find_model(name).path
    if path.is_dir() and not find_tokenizer_files(path):
        print(f"{path} holds no tokenizer: the model is written without one", file=sys.stderr)
        return None
    return name


def keep_codes(
    params: Tree, model: Model, base: str, quantize: str | None
) -> tuple[Tree, str | None, str]:
    """Returns a merged tree whose codes a folder can hold, and arrays in the place of others.

    Args:
      params: the merged tree.
      model: its model.
      base: the name of the base.
      quantize: the codes that the base was read in; None to keep none.

    Returns:
      The tree; the base if codes are left, or None; and what to say of them, "" for nothing.
    """
    source = open_model(find_model(base).path, **reading_options(model.config))
    if quantize != QUANTIZE_STORED or not isinstance(source, SafetensorsFolder):
        return dequantize(params), None, ""
    table = key_table(model.config)
    codes_check = CodesCheck(params, table, source)
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
        remarks.append(f"{n_coded} kernels stay in the codes of {base}, byte for byte")
    if dequantized_names:
        remarks.append(
            f"{', '.join(dequantized_names)} are arrays, though the adapter leaves them alone: "
            "readers want them in one form with those that it changed"
        )
    return params, base if n_coded else None, "; ".join(remarks)
