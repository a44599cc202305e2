"""Writes a whole model as a GGUF file, for llama.cpp, Ollama and LM Studio."""

import os
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np

from lora_jax.core.types import Leaf, Model, Tokenizer, Tree
from lora_jax.folders import local_path
from lora_jax.hf.generation import end_token_ids
from lora_jax.hf.gguf.files import open_gguf
from lora_jax.hf.gguf.tokenizer import END_ROLES
from lora_jax.hf.gguf.vocabulary import model_name_for_llama_cpp, tokenizer_metadata
from lora_jax.hf.gguf.write import (
    FILE_TYPES,
    GGUFTensor,
    check_gguf_type,
    gguf_type_for_shape,
    write_gguf,
)
from lora_jax.hf.keys import WeightsError, check_leaves
from lora_jax.models.decoder.gguf_form import Piece, check_form, facts_of, metadata_of, pieces
from lora_jax.models.decoder.keys import decoder_table

_ROUTERS = "ffn_gate_inp.weight"  # stay fp32, as llama.cpp's converter has them
_OUTER = ("token_embd.weight", "output.weight")
_NAMED = 3  # tensors that a note names


def save_gguf(
    path: str | os.PathLike[str],
    model: Model,
    params: Tree,
    *,
    gguf_type: str = "f16",
    tokenizer: Tokenizer | None = None,
    chat_template: str | None = None,
    codes_from: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> list[str]:
    """Writes a model as a GGUF file, which appears whole or not at all. For example::

        save_gguf("out.gguf", model, lora_jax.merge(params), tokenizer=tokenizer, gguf_type="q8_0")

    Matrices are of the type; norms, biases and routers are fp32. With "q4_0" the embedding and the
    head are Q8_0. A matrix whose rows are no whole number of blocks is F16.

    Beside the parameters, the host holds one tensor and its codes at a time.

    Args:
      path: the file.
      model: the module that ``from_pretrained`` returned.
      params: the parameter tree: plain arrays, merged.
      gguf_type: "f32", "f16", "bf16", "q8_0" or "q4_0".
      tokenizer: a transformers tokenizer; None for the one of ``codes_from``.
      chat_template: template to render chats with, in the place of the tokenizer's own.
      codes_from: the GGUF file that ``from_pretrained`` read: its tensors that equal the tree's are
        copied, whatever ``gguf_type`` says, and so is its tokenizer if no other is given.
      overwrite: replace a file that is there. Without it, an existing file is an error.
      progress: called with the bytes that are written, and with those of all tensors.

    Returns:
      What a user of the file should know, a sentence each; mostly nothing.

    Raises:
      ConfigError: for a model that llama.cpp does not run, or a tokenizer that it has no name for.
      WeightsError: if the tree does not fit the model, is not merged, or has values that fp16
        cannot hold.
      FileExistsError: if the file exists.
    """
    path = local_path(path).absolute()
    if path.exists() and not overwrite:
        raise FileExistsError(
            f"{path} already exists. Name another file, or pass overwrite=True to replace it."
        )
    check_gguf_type(gguf_type)
    config = model.config
    notes = check_form(config)
    leaves = check_leaves(params, decoder_table(config))
    base = None if codes_from is None else open_gguf(local_path(codes_from))
    metadata = None if base is None else base.metadata
    words = _words(config, tokenizer, metadata)
    if chat_template is not None:
        words["tokenizer.chat_template"] = chat_template
    name = (metadata or {}).get("general.name", config.model_type)
    name, notes_on_spaces = model_name_for_llama_cpp(name, tokenizer, words)
    fields = {
        "general.architecture": config.family.gguf,
        "general.type": "model",
        "general.name": name,
        "general.file_type": FILE_TYPES[gguf_type],
        "general.quantization_version": 2,
        **metadata_of(config),
        **words,
    }
    stored = {} if base is None else {tensor.name: tensor for tensor in base.tensors}
    entries, more = _entries(config, leaves, gguf_type, stored)
    write_gguf(path, fields, entries, progress)
    return [*notes, *notes_on_spaces, *_notes_on_ends(config, words), *more]


def _notes_on_ends(config: Any, words: Mapping[str, Any]) -> list[str]:
    """Returns a note on the model's end tokens that the metadata of the tokenizer do not name."""
    named_tokens = [words.get(f"tokenizer.ggml.{role}_token_id") for role in END_ROLES]
    lacking = [token for token in end_token_ids(config) if token not in named_tokens]
    if not lacking:
        return []
    return [
        f"a GGUF file names {len(END_ROLES)} end tokens at most, and this one lacks the tokens "
        f"{', '.join(map(str, lacking))}: llama.cpp may not stop there"
    ]


def _entries(
    config: Any, leaves: Mapping[str, Leaf], gguf_type: str, stored: Mapping[str, Any]
) -> tuple[list[GGUFTensor], list[str]]:
    """Returns the tensors to write, and what to say of them.

    Args:
      config: the model's.
      leaves: its parameters, by path.
      gguf_type: the type of its matrices.
      stored: the tensors of the base's file, by name.
    """
    entries = [
        GGUFTensor(name, values.shape, "F32", partial(np.asarray, values))
        for name, values in facts_of(config).items()
    ]
    kept, halves = 0, []
    for piece in pieces(config):
        entry = _entry(piece, leaves[piece.row.path], gguf_type)
        tensor = stored.get(entry.name)
        if tensor is not None and _is_stored(tensor, entry):
            entry = _copy(tensor, entry)
            kept += 1
        elif entry.kind == "F16" != gguf_type.upper():
            halves.append(entry.name)
        entries.append(entry)
    notes = []
    if stored:
        notes.append(f"{kept} of {len(entries)} tensors are those of the base, byte for byte")
    if halves:
        more = f" and {len(halves) - _NAMED} more" if len(halves) > _NAMED else ""
        notes.append(
            f"{', '.join(halves[:_NAMED])}{more}: f16, because their rows are no whole number of "
            f"{gguf_type}'s blocks of 32"
        )
    return entries, notes


def _words(
    config: Any, tokenizer: Tokenizer | None, base: Mapping[str, Any] | None
) -> dict[str, Any]:
    """Returns the metadata of the tokenizer: the given one's, or the base file's own."""
    if tokenizer is not None:
        return tokenizer_metadata(tokenizer, config.vocab_size, end_token_ids(config))
    if base is None:
        raise WeightsError("a GGUF file holds its tokenizer: give one (tokenizer=)")
    if "tokenizer.ggml.model" not in base:
        raise WeightsError("the base's file holds no tokenizer: give one (tokenizer=)")
    return {name: value for name, value in base.items() if name.startswith("tokenizer.")}


def _entry(piece: Piece, leaf: Leaf, gguf_type: str) -> GGUFTensor:
    kind = gguf_type.upper()
    is_matrix = len(piece.shape) > 1 and piece.name.endswith(".weight")
    if not is_matrix or piece.name.endswith(_ROUTERS):
        kind = "F32"
    elif kind == "Q4_0" and piece.name in _OUTER:
        kind = "Q8_0"
    return GGUFTensor(
        piece.name, piece.shape, gguf_type_for_shape(kind, piece.shape), partial(piece.read, leaf)
    )


def _is_stored(tensor: Any, entry: GGUFTensor) -> bool:
    """Returns True if a base's tensor stands for these values, bit for bit."""
    from gguf import dequantize

    if tuple(reversed(tensor.shape.tolist())) != entry.shape:
        return False
    values = np.asarray(dequantize(tensor.data, tensor.tensor_type), np.float32)
    return np.array_equal(values.reshape(entry.shape), entry.read())


def _copy(tensor: Any, entry: GGUFTensor) -> GGUFTensor:
    return GGUFTensor(entry.name, entry.shape, tensor.tensor_type.name, lambda: tensor.data, True)
