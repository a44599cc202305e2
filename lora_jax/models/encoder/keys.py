"""The encoder's key table, and the names that files use beside it."""

from __future__ import annotations

import re

from lora_jax.hf.keys import Kind, Row
from lora_jax.models.encoder.config import EncoderConfig

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
    found = _ENCODER.fullmatch(name)
    return _prefix(config) + found[1] if found else name


def _prefix(config: EncoderConfig) -> str:
    """Returns the encoder's name in files: none for bare encoders, as transformers writes them."""
    return "" if config.head in ("none", "embedding") else f"{config.prefix}."


def encoder_table(config: EncoderConfig) -> list[Row]:
    """Returns every parameter of the encoder and its head, in the order of the forward pass.

    The pooler and each head are optional parts: a file without them still loads.
    """
    rows: list[Row] = []
    trunk = config.prefix

    def add(
        path: str,
        leaf: str,
        shape: tuple[int, ...],
        kind: Kind,
        part: str | None = None,
        aliases: tuple[str, ...] = (),
    ) -> None:
        stacked = path.startswith(f"{trunk}/encoder/layer/")
        hf = path.replace("encoder/layer/", "encoder/layer/{}/").replace("/", ".")
        if path.startswith(f"{trunk}/"):
            hf = _prefix(config) + hf.removeprefix(f"{trunk}.")
        rows.append(
            Row(
                path=f"{path}/{leaf}",
                hf=f"{hf}.{'bias' if leaf == 'bias' else 'weight'}",
                shape=shape,
                stack=(config.num_hidden_layers,) if stacked else (),
                transpose=leaf == "kernel",
                aliases=aliases,
                part=part,
                kind=kind,
            )
        )

    def linear(kind: Kind, path: str, d_in: int, d_out: int, part: str | None = None) -> None:
        add(path, "kernel", (d_in, d_out), kind, part)
        add(path, "bias", (d_out,), kind, part)

    def layer_norm(path: str, part: str | None = None) -> None:
        add(path, "scale", (width,), "norm", part)
        add(path, "bias", (width,), "norm", part)

    def table(name: str, rows: int, aliases: tuple[str, ...] = ()) -> None:
        path = f"{trunk}/embeddings/{name}_embeddings"
        kind: Kind = "embedding" if name == "word" else "positions"
        add(path, "embedding", (rows, width), kind, aliases=aliases)

    width, inner = config.hidden_size, config.intermediate_size
    lm = "cls/predictions" if trunk == "bert" else "lm_head"
    decoder = lm.replace("/", ".") + ".decoder"
    tied = (f"{decoder}.weight",) if config.head == "masked_lm" else ()
    table("word", config.vocab_size, tied)
    table("position", config.max_position_embeddings)
    table("token_type", config.type_vocab_size)
    layer_norm(f"{trunk}/embeddings/LayerNorm")
    layer = f"{trunk}/encoder/layer"
    for name in ("query", "key", "value"):
        linear("attention", f"{layer}/attention/self/{name}", width, width)
    linear("attention", f"{layer}/attention/output/dense", width, width)
    layer_norm(f"{layer}/attention/output/LayerNorm")
    linear("mlp", f"{layer}/intermediate/dense", width, inner)
    linear("mlp", f"{layer}/output/dense", inner, width)
    layer_norm(f"{layer}/output/LayerNorm")
    if config.has_pooler:
        linear("pooler", f"{trunk}/pooler/dense", width, width, "pooler")
    if config.head == "masked_lm":
        if trunk == "bert":
            linear("transform", f"{lm}/transform/dense", width, width, _LM_HEAD)
            layer_norm(f"{lm}/transform/LayerNorm", _LM_HEAD)
        else:
            linear("transform", f"{lm}/dense", width, width, _LM_HEAD)
            layer_norm(f"{lm}/layer_norm", _LM_HEAD)
        add(lm, "bias", (config.vocab_size,), "head", _LM_HEAD, (f"{decoder}.bias",))
    if config.head == "classification":
        if trunk == "bert":
            linear("classifier", "classifier", width, config.num_labels, "classifier")
        else:
            linear("classifier", "classifier/dense", width, width, "classifier")
            linear("classifier", "classifier/out_proj", width, config.num_labels, "classifier")
    return rows
