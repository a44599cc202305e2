"""The encoder's key table, and the names that files use beside it."""

import re
from typing import Any

from jax.sharding import PartitionSpec

from lora_jax.hf.keys import Kind, Row
from lora_jax.models.encoder.config import EncoderConfig
from lora_jax.models.key_rows import KeyTable, with_prefix
from lora_jax.models.specs import COLUMNS, POSITIONS, REPLICATED, ROWS

_ENCODER = re.compile(r"(?:(?:bert|roberta)\.)?((?:embeddings|encoder|pooler)\..+)")
_LM_HEAD = "masked language model head"
_TENSORFLOW = {"gamma": "weight", "beta": "bias"}

# Tensors of heads that are not in use, which a file may hold: pooler, masked language model, next
# sentence, classifiers of texts and of tokens, and spans.
OTHER_HEADS = re.compile(
    r"((bert|roberta)\.)?pooler\.dense\.(weight|bias)"
    r"|cls\.predictions\.(bias|(decoder|transform\.dense|transform\.LayerNorm)\.(weight|bias))"
    r"|lm_head\.(bias|(dense|layer_norm|decoder)\.(weight|bias))"
    r"|cls\.seq_relationship\.(weight|bias)"
    r"|classifier\.((dense|out_proj)\.)?(weight|bias)"
    r"|qa_outputs\.(weight|bias)"
)


def encoder_name(name: str, config: EncoderConfig) -> str:
    """Returns the table's name of a file's tensor.

    A bare encoder's file has no prefix ("bert."), that of a model with a head has it; either loads
    as the other. Norms that came from TensorFlow are called gamma and beta.
    """
    stem, _, leaf = name.rpartition(".")
    if stem.endswith("LayerNorm"):
        name = f"{stem}.{_TENSORFLOW.get(leaf, leaf)}"
    match = _ENCODER.fullmatch(name)
    return _prefix(config) + match[1] if match else name


def _prefix(config: EncoderConfig) -> str:
    """Returns the encoder's name in files: none for bare encoders, as transformers writes them."""
    return "" if config.head in ("none", "embedding") else f"{config.prefix}."


def encoder_table(config: EncoderConfig) -> list[Row]:
    """Returns every parameter of the encoder and its head, in the order of the forward pass.

    The pooler and each head are optional parts: a file without them still loads.
    """
    trunk, width, inner = config.prefix, config.hidden_size, config.intermediate_size
    layer, embeddings = f"{trunk}/encoder/layer", f"{trunk}/embeddings"
    rows = KeyTable(layer, config.num_hidden_layers)

    def table(kind: Kind, name: str, n: int, spec: PartitionSpec, **more: Any) -> None:
        path = f"{embeddings}/{name}_embeddings"
        rows.add(kind, path, "embedding", (n, width), spec, **more)

    lm = "cls/predictions" if trunk == "bert" else "lm_head"
    decoder = lm.replace("/", ".") + ".decoder"
    tied = (f"{decoder}.weight",) if config.head == "masked_lm" else ()
    table("embedding", "word", config.vocab_size, ROWS, aliases=tied)
    table("positions", "position", config.max_position_embeddings, POSITIONS)
    table("positions", "token_type", config.type_vocab_size, REPLICATED)
    rows.layer_norm(f"{embeddings}/LayerNorm", width)
    for name in ("query", "key", "value"):
        rows.linear("attention", f"{layer}/attention/self/{name}", (width, width), COLUMNS)
    rows.linear("attention", f"{layer}/attention/output/dense", (width, width), ROWS)
    rows.layer_norm(f"{layer}/attention/output/LayerNorm", width)
    rows.linear("mlp", f"{layer}/intermediate/dense", (width, inner), COLUMNS)
    rows.linear("mlp", f"{layer}/output/dense", (inner, width), ROWS)
    rows.layer_norm(f"{layer}/output/LayerNorm", width)

    def beside(kind: Kind, path: str, n: int, part: str) -> None:
        rows.linear(kind, path, (width, n), REPLICATED, part=part)

    if config.has_pooler:
        beside("pooler", f"{trunk}/pooler/dense", width, "pooler")
    if config.head == "masked_lm":
        dense, norm = ("dense", "layer_norm")
        if trunk == "bert":
            dense, norm = ("transform/dense", "transform/LayerNorm")
        beside("transform", f"{lm}/{dense}", width, _LM_HEAD)
        rows.layer_norm(f"{lm}/{norm}", width, part=_LM_HEAD)
        aliases = (f"{decoder}.bias",)
        rows.add("head", lm, "bias", (config.vocab_size,), part=_LM_HEAD, aliases=aliases)
    if config.head == "classification":
        last = "classifier"
        if trunk != "bert":
            beside("classifier", "classifier/dense", width, "classifier")
            last = "classifier/out_proj"
        beside("classifier", last, config.num_labels, "classifier")
    return with_prefix(rows, f"{trunk}.", _prefix(config))
