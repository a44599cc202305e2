"""Writes a full model as a GGUF file, for llama.cpp, Ollama and LM Studio."""

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
from lora_jax.models.decoder.gguf_form import (
    Piece,
    check_form,
    metadata_of,
    pieces,
    rope_factor_tensors,
)
from lora_jax.models.decoder.keys import decoder_table

_ROUTERS = "ffn_gate_inp.weight"  # stay fp32, as llama.cpp's converter has them
_EMBEDDING_AND_HEAD = ("token_embd.weight", "output.weight")
_MAX_NAMES = 3  # tensors that a note names


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
    """Writes a model as a GGUF file, completely or not at all. For example::

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
    words = _tokenizer_metadata(config, tokenizer, metadata)
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
    entries, notes_on_tensors = _make_entries(config, leaves, gguf_type, stored)
    write_gguf(path, fields, entries, progress)
    return [*notes, *notes_on_spaces, *_notes_on_ends(config, words), *notes_on_tensors]


def _notes_on_ends(config: Any, words: Mapping[str, Any]) -> list[str]:
    """Returns a note on the model's end tokens that the tokenizer's metadata lacks."""
    named_tokens = [words.get(f"tokenizer.ggml.{role}_token_id") for role in END_ROLES]
    unnamed_tokens = [token for token in end_token_ids(config) if token not in named_tokens]
    if not unnamed_tokens:
        return []
    return [
        f"A GGUF file names at most {len(END_ROLES)} end tokens, and this one lacks the tokens "
        f"{', '.join(map(str, unnamed_tokens))}. llama.cpp may not stop at these tokens"
    ]


def _make_entries(
    config: Any, leaves: Mapping[str, Leaf], gguf_type: str, stored: Mapping[str, Any]
) -> tuple[list[GGUFTensor], list[str]]:
    """Returns the tensors to write, and notes for the user.

    Args:
      config: the model's.
      leaves: its parameters, by path.
      gguf_type: the type of its matrices.
      stored: the tensors of the base's file, by name.
    """
    entries = [
        GGUFTensor(name, values.shape, "F32", partial(np.asarray, values))
        for name, values in rope_factor_tensors(config).items()
    ]
    n_copied = 0
    fp16_names = []  # matrices that are fp16 because their rows do not fill blocks
    for piece in pieces(config):
        entry = _make_entry(piece, leaves[piece.row.path], gguf_type)
        tensor = stored.get(entry.name)
        if tensor is not None and _is_stored(tensor, entry):
            entry = _stored_entry(tensor, entry)
            n_copied += 1
        elif entry.kind == "F16" and gguf_type.upper() != "F16":
            fp16_names.append(entry.name)
        entries.append(entry)
    notes = []
    if stored:
        notes.append(
            f"{n_copied} of {len(entries)} tensors are copied from the base, byte for byte"
        )
    if fp16_names:
        names = ", ".join(fp16_names[:_MAX_NAMES])
        if len(fp16_names) > _MAX_NAMES:
            names += f" and {len(fp16_names) - _MAX_NAMES} more"
        notes.append(
            f"{names} are f16, because their rows are not a whole number of {gguf_type}'s blocks "
            "of 32"
        )
    return entries, notes


def _tokenizer_metadata(
    config: Any, tokenizer: Tokenizer | None, base: Mapping[str, Any] | None
) -> dict[str, Any]:
    """Returns the metadata of the given tokenizer, or of the base file's."""
    if tokenizer is not None:
        return tokenizer_metadata(tokenizer, config.vocab_size, end_token_ids(config))
    if base is None:
        raise WeightsError("A GGUF file contains a tokenizer, but none is given. Pass tokenizer=.")
    if "tokenizer.ggml.model" not in base:
        raise WeightsError("The GGUF file of codes_from has no tokenizer. Pass tokenizer=.")
    return {name: value for name, value in base.items() if name.startswith("tokenizer.")}


def _make_entry(piece: Piece, leaf: Leaf, gguf_type: str) -> GGUFTensor:
    """Returns a file's tensor, with a type that its name and shape allow."""
    kind = gguf_type.upper()
    is_matrix = len(piece.shape) > 1 and piece.name.endswith(".weight")
    if not is_matrix or piece.name.endswith(_ROUTERS):
        kind = "F32"
    elif kind == "Q4_0" and piece.name in _EMBEDDING_AND_HEAD:
        kind = "Q8_0"
    return GGUFTensor(
        piece.name, piece.shape, gguf_type_for_shape(kind, piece.shape), partial(piece.read, leaf)
    )


def _is_stored(tensor: Any, entry: GGUFTensor) -> bool:
    """Returns True if a stored tensor of the base has exactly these values."""
    from gguf import dequantize

    if tuple(reversed(tensor.shape.tolist())) != entry.shape:
        return False
    values = np.asarray(dequantize(tensor.data, tensor.tensor_type), np.float32)
    return np.array_equal(values.reshape(entry.shape), entry.read())


def _stored_entry(tensor: Any, entry: GGUFTensor) -> GGUFTensor:
    """Returns an entry that copies a tensor of the base's file."""
    return GGUFTensor(entry.name, entry.shape, tensor.tensor_type.name, lambda: tensor.data, True)
