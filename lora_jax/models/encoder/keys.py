"""The encoder's key table, and alternative names in files."""

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
    """Returns the table's name of a stored tensor.

    A bare encoder's file has no prefix ("bert."), that of a model with a head has it; either loads
    as the other. Norms that came from TensorFlow are called gamma and beta.
    """
    stem, _, leaf = name.rpartition(".")
    if stem.endswith("LayerNorm"):
        name = f"{stem}.{_TENSORFLOW.get(leaf, leaf)}"
    match = _ENCODER.fullmatch(name)
    return _prefix(config) + match[1] if match else name


def _prefix(config: EncoderConfig) -> str:
    """Returns the encoder's name prefix in files; "" for bare encoders, as in transformers."""
    return "" if config.head in ("none", "embedding") else f"{config.prefix}."


def encoder_table(config: EncoderConfig) -> list[Row]:
    """Returns every parameter of the encoder and its head, in the order of the forward pass.

    The pooler and each head are optional parts: a file without them still loads.
    """
    layer = f"{config.prefix}/encoder/layer"
    rows = KeyTable(layer, config.num_hidden_layers)
    _add_embeddings(rows, config)
    _add_layer(rows, config, layer)
    _add_head(rows, config)
    return with_prefix(rows, f"{config.prefix}.", _prefix(config))


def _lm_head_path(config: EncoderConfig) -> str:
    """Returns the path of the masked language model's head."""
    return "cls/predictions" if config.prefix == "bert" else "lm_head"


def _decoder_name(config: EncoderConfig) -> str:
    """Returns the name by which files store the word table and its bias again."""
    return _lm_head_path(config).replace("/", ".") + ".decoder"


def _add_embeddings(rows: KeyTable, config: EncoderConfig) -> None:
    """Adds the word, position and token type tables, and their norm."""
    d_model = config.hidden_size
    path = f"{config.prefix}/embeddings"

    def add_table(kind: Kind, name: str, n_rows: int, spec: PartitionSpec, **options: Any) -> None:
        table_path = f"{path}/{name}_embeddings"
        rows.add(kind, table_path, "embedding", (n_rows, d_model), spec, **options)

    tied_names: tuple[str, ...] = ()
    if config.head == "masked_lm":
        tied_names = (f"{_decoder_name(config)}.weight",)
    add_table("embedding", "word", config.vocab_size, ROWS, aliases=tied_names)
    add_table("positions", "position", config.max_position_embeddings, POSITIONS)
    add_table("positions", "token_type", config.type_vocab_size, REPLICATED)
    rows.layer_norm(f"{path}/LayerNorm", d_model)


def _add_layer(rows: KeyTable, config: EncoderConfig, layer: str) -> None:
    """Adds the attention and the MLP of the stack of layers at a path."""
    d_model = config.hidden_size
    d_mlp = config.intermediate_size
    for name in ("query", "key", "value"):
        rows.linear("attention", f"{layer}/attention/self/{name}", (d_model, d_model), COLUMNS)
    rows.linear("attention", f"{layer}/attention/output/dense", (d_model, d_model), ROWS)
    rows.layer_norm(f"{layer}/attention/output/LayerNorm", d_model)
    rows.linear("mlp", f"{layer}/intermediate/dense", (d_model, d_mlp), COLUMNS)
    rows.linear("mlp", f"{layer}/output/dense", (d_mlp, d_model), ROWS)
    rows.layer_norm(f"{layer}/output/LayerNorm", d_model)


def _add_head(rows: KeyTable, config: EncoderConfig) -> None:
    """Adds the pooler and the head, each as an optional part."""
    d_model = config.hidden_size
    is_bert = config.prefix == "bert"

    def add_linear(kind: Kind, path: str, n_out: int, part: str) -> None:
        rows.linear(kind, path, (d_model, n_out), REPLICATED, part=part)

    if config.has_pooler:
        add_linear("pooler", f"{config.prefix}/pooler/dense", d_model, "pooler")
    if config.head == "masked_lm":
        head = _lm_head_path(config)
        dense = "transform/dense" if is_bert else "dense"
        norm = "transform/LayerNorm" if is_bert else "layer_norm"
        add_linear("transform", f"{head}/{dense}", d_model, _LM_HEAD)
        rows.layer_norm(f"{head}/{norm}", d_model, part=_LM_HEAD)
        bias_shape = (config.vocab_size,)
        aliases = (f"{_decoder_name(config)}.bias",)
        rows.add("head", head, "bias", bias_shape, part=_LM_HEAD, aliases=aliases)
    elif config.head == "classification" and is_bert:
        add_linear("classifier", "classifier", config.num_labels, "classifier")
    elif config.head == "classification":
        add_linear("classifier", "classifier/dense", d_model, "classifier")
        add_linear("classifier", "classifier/out_proj", config.num_labels, "classifier")
