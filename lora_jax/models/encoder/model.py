"""Encoders in Flax Linen: BERT (Devlin et al. 2018), RoBERTa (Liu et al. 2019), XLM-RoBERTa."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from lora_jax.models.encoder.config import EncoderConfig
from lora_jax.models.layers.attention import dot_wide, wide_dtype
from lora_jax.models.layers.blocks import (
    ACTIVATION,
    EmbeddingNoise,
    ModelPart,
    activate,
    add_noise,
    dense,
    embed,
    layer_norm,
)
from lora_jax.models.layers.encoder import LayerStack, SelfAttention, WrappedDense
from lora_jax.models.layers.masks import Mask, bidirectional_mask
from lora_jax.models.layers.trunk import name_layer_input


class Embeddings(ModelPart):
    """LayerNorm(word + token type + position)."""

    config: EncoderConfig

    def setup(self) -> None:
        self.word_embeddings = embed(self, self.config.vocab_size)
        self.token_type_embeddings = embed(self, self.config.type_vocab_size)
        self.position_embeddings = embed(self, self.config.max_position_embeddings)
        self.LayerNorm = layer_norm(self)

    def __call__(
        self,
        input_ids: jax.Array,
        token_type_ids: jax.Array,
        positions: jax.Array,
        embedding_noise: EmbeddingNoise | None,
    ) -> jax.Array:
        words = add_noise(self.word_embeddings(input_ids), embedding_noise)
        token_types = self.token_type_embeddings(token_type_ids)
        return self.LayerNorm(words + token_types + self.position_embeddings(positions))


def default_positions(input_ids: jax.Array, config: EncoderConfig) -> jax.Array:
    """Returns the indices into the position table, [batch, seq] int32."""
    if not config.family.after_padding or config.pad_token_id is None:
        slots = jnp.arange(input_ids.shape[1], dtype=jnp.int32)
        return jnp.broadcast_to(slots, input_ids.shape)
    is_token = (input_ids != config.pad_token_id).astype(jnp.int32)
    n_tokens = jnp.cumsum(is_token, axis=1, dtype=jnp.int32)
    return n_tokens * is_token + config.pad_token_id


def pool(hidden: jax.Array, attention_mask: jax.Array | None, config: EncoderConfig) -> jax.Array:
    """Pools hidden states as sentence-transformers does: [batch, d_model], in fp32 or wider."""
    hidden = hidden.astype(wide_dtype(hidden.dtype))
    if config.pooling == "cls":
        pooled = hidden[:, 0]
    elif attention_mask is None:
        pooled = jnp.mean(hidden, axis=1)
    else:
        weights = attention_mask.astype(bool).astype(hidden.dtype)[..., None]
        n_tokens = jnp.maximum(jnp.sum(weights, axis=1), 1e-9)
        pooled = jnp.sum(hidden * weights, axis=1) / n_tokens
    if not config.normalize:
        return pooled
    squared_norm = jnp.sum(pooled * pooled, axis=-1, keepdims=True)
    return pooled * jax.lax.rsqrt(jnp.maximum(squared_norm, 1e-24))


class EncoderOutput(NamedTuple):
    """The output of an encoder without a head.

    Attributes:
      hidden: [batch, seq, d_model], the final hidden states.
      pooled: [batch, d_model], the pooler's output: a layer and tanh over the first token.
    """

    hidden: jax.Array
    pooled: jax.Array


class Encoder(ModelPart):
    """A bidirectional encoder with its head. Layers are scanned.

    Parameters are a plain nested dict under Hugging Face's module names, less the layer number:
    ``bert/encoder/layer/attention/self/query/kernel`` is [layers, d_model, d_model].

    Attributes:
      config: the options of the forward pass, and the head.
      dtype: dtype of the computation. LayerNorm's statistics, softmax, logits and pooled
        embeddings are fp32 (or float64, where dtype is).
      param_dtype: dtype of the parameters that ``init`` makes.
      remat: see ``Decoder``.
      placement: see ``Decoder``.
      attention: see ``Decoder``.
    """

    config: EncoderConfig

    def setup(self) -> None:
        cfg = self.config
        is_bert = cfg.prefix == "bert"
        # The trunk's name is the family's, as in Hugging Face's files.
        setattr(self, cfg.prefix, _Trunk(*self.options))
        if cfg.head == "masked_lm" and is_bert:
            self.cls = _BertHead(*self.options)
        elif cfg.head == "masked_lm":
            self.lm_head = _RobertaHead(*self.options)
        elif cfg.head == "classification":
            self.classifier = _class_logits(self) if is_bert else _RobertaClassifier(*self.options)

    def __call__(
        self,
        input_ids: jax.Array,
        attention_mask: jax.Array | None = None,
        token_type_ids: jax.Array | None = None,
        positions: jax.Array | None = None,
        logits_at: jax.Array | None = None,
        return_hidden: bool = False,
        embedding_noise: EmbeddingNoise | None = None,
    ) -> EncoderOutput | jax.Array:
        """Encodes each row.

        Args:
          input_ids: [batch, seq], int. An id outside the vocabulary gives NaN.
          attention_mask: [batch, seq], 0 or False at padding; None for no padding.
          token_type_ids: [batch, seq], int: which sentence of a pair; 0 by default.
          positions: [batch, seq], int: rows of the table of positions. By default BERT counts
            slots from 0, and RoBERTa the tokens other than ``pad_token_id``, from the row after
            its own.
          logits_at: [batch, n], int: of a masked language model, compute logits at these indices
            of seq only.
          return_hidden: return the final hidden states, [batch, seq, d_model], instead of the
            head's output.
          embedding_noise: noise to add to the vectors of words, for training.

        Returns:
          The head's output: an ``EncoderOutput``; logits of tokens, [batch, seq, vocab] or
          [batch, n, vocab]; of classes, [batch, num_labels]; or embeddings, [batch, d_model].

        Raises:
          ValueError: for more tokens than there are positions, or logits_at with another head.
        """
        cfg = self.config
        if logits_at is not None and cfg.head != "masked_lm":
            raise ValueError(
                f"logits_at needs the head 'masked_lm', but the model has {cfg.head!r}. Remove "
                "logits_at."
            )
        if positions is None and input_ids.shape[1] > cfg.max_tokens:
            raise ValueError(
                f"{input_ids.shape[1]} tokens are more than the model's {cfg.max_tokens}. Truncate "
                "the text."
            )
        hidden = self._trunk(input_ids, attention_mask, token_type_ids, positions, embedding_noise)
        if logits_at is not None:
            hidden = jnp.take_along_axis(hidden, logits_at[..., None], axis=1)
        return hidden if return_hidden else self.head(hidden, attention_mask)

    def head(
        self, hidden: jax.Array, attention_mask: jax.Array | None = None
    ) -> EncoderOutput | jax.Array:
        """Computes the head's output for final hidden states.

        Args:
          hidden: [batch, seq, d_model].
          attention_mask: [batch, seq]: the tokens over which a mean embedding is taken.

        Returns:
          See ``__call__``.
        """
        cfg = self.config
        is_bert = cfg.prefix == "bert"
        if cfg.head == "none":
            return EncoderOutput(hidden, self._trunk.pool(hidden))
        if cfg.head == "embedding":
            return pool(hidden, attention_mask, cfg)
        if cfg.head == "classification":
            pooled = self._trunk.pool(hidden) if is_bert else hidden[:, 0]
            return self.classifier(pooled)
        word_table = self._trunk.embeddings.word_embeddings.embedding
        masked_lm_head = self.cls if is_bert else self.lm_head
        return masked_lm_head(hidden, word_table)

    @property
    def _trunk(self) -> "_Trunk":
        trunk: _Trunk = getattr(self, self.config.prefix)
        return trunk


class _EncoderPart(ModelPart):
    config: EncoderConfig


class _Trunk(_EncoderPart):
    """Embeddings, scanned layers, and the pooler if the head uses it."""

    def setup(self) -> None:
        self.embeddings = Embeddings(*self.options)
        self.encoder = LayerStack(*self.options, layer=_Layer)
        if self.config.has_pooler:
            self.pooler = WrappedDense(*self.options)

    def __call__(
        self,
        input_ids: jax.Array,
        attention_mask: jax.Array | None,
        token_type_ids: jax.Array | None,
        positions: jax.Array | None,
        embedding_noise: EmbeddingNoise | None,
    ) -> jax.Array:
        cfg = self.config
        if positions is None:
            positions = default_positions(input_ids, cfg)
        if token_type_ids is None:
            token_type_ids = jnp.zeros_like(input_ids)
        is_present = jnp.ones(input_ids.shape, bool)
        if attention_mask is not None:
            is_present = attention_mask.astype(bool)
        embeddings = self.embeddings(input_ids, token_type_ids, positions, embedding_noise)
        embeddings = self.placement.constrain(embeddings, "residual")
        hidden: jax.Array = self.encoder(embeddings, bidirectional_mask(is_present))
        return hidden

    def pool(self, hidden: jax.Array) -> jax.Array:
        """Returns [batch, d_model]: the first token's state, after a dense layer and tanh."""
        return jnp.tanh(self.pooler(hidden[:, 0]))


class _Layer(_EncoderPart):
    """Attention and MLP, each followed by a residual and a norm; the body of a scan."""

    @nn.compact
    def __call__(self, x: jax.Array, mask: Mask) -> tuple[jax.Array, None]:
        cfg = self.config
        x = name_layer_input(x, self.remat)
        x = _Attention(*self.options, name="attention")(x, mask)
        up_projection = WrappedDense(
            *self.options, features=cfg.intermediate_size, name="intermediate"
        )
        features = up_projection(self.placement.constrain(x, "inputs"))
        features = self.placement.constrain(activate(cfg.hidden_act, features), "features")
        x = _AddNorm(*self.options, name="output")(features, x)
        return self.placement.constrain(x, "residual"), None


class _Attention(_EncoderPart):
    @nn.compact
    def __call__(self, x: jax.Array, mask: Mask) -> jax.Array:
        attention = SelfAttention(*self.options, name="self")
        attention_out = attention(self.placement.constrain(x, "inputs"), mask)
        out: jax.Array = _AddNorm(*self.options, name="output")(attention_out, x)
        return out


class _AddNorm(_EncoderPart):
    """LayerNorm(dense(x) + residual)."""

    @nn.compact
    def __call__(self, x: jax.Array, residual: jax.Array) -> jax.Array:
        x = dense(self, self.config.hidden_size, name="dense")(x)
        return layer_norm(self, name="LayerNorm")(x + residual)


class _BertHead(_EncoderPart):
    """A masked language model's head: ``cls/predictions``."""

    @nn.compact
    def __call__(self, hidden: jax.Array, word_table: jax.Array) -> jax.Array:
        logits: jax.Array = _BertPredictions(*self.options, name="predictions")(hidden, word_table)
        return logits


class _BertPredictions(_EncoderPart):
    @nn.compact
    def __call__(self, hidden: jax.Array, word_table: jax.Array) -> jax.Array:
        x = _BertTransform(*self.options, name="transform")(hidden)
        return _tied_logits(self, x, word_table)


class _BertTransform(_EncoderPart):
    @nn.compact
    def __call__(self, hidden: jax.Array) -> jax.Array:
        x = dense(self, self.config.hidden_size, name="dense")(hidden)
        return layer_norm(self, name="LayerNorm")(ACTIVATION[self.config.hidden_act](x))


class _RobertaHead(_EncoderPart):
    """A masked language model's head, whose activation is always GELU."""

    @nn.compact
    def __call__(self, hidden: jax.Array, word_table: jax.Array) -> jax.Array:
        x = dense(self, self.config.hidden_size, name="dense")(hidden)
        x = layer_norm(self, name="layer_norm")(ACTIVATION["gelu"](x))
        return _tied_logits(self, x, word_table)


class _RobertaClassifier(_EncoderPart):
    """A dense layer with tanh, then the classes."""

    @nn.compact
    def __call__(self, first_hidden: jax.Array) -> jax.Array:
        x = jnp.tanh(dense(self, self.config.hidden_size, name="dense")(first_hidden))
        return _class_logits(self, name="out_proj")(x)


def _class_logits(module: ModelPart, name: str | None = None) -> nn.Dense:
    """Creates the layer of the class logits, in fp32 or wider."""
    return dense(module, module.config.num_labels, dtype=wide_dtype(module.dtype), name=name)


def _tied_logits(module: ModelPart, x: jax.Array, word_table: jax.Array) -> jax.Array:
    """Returns x Eᵀ + bias in fp32 or wider; E is the word table, [vocab, d_model]."""
    bias_shape = (module.config.vocab_size,)
    bias: jax.Array = module.param("bias", nn.initializers.zeros, bias_shape, module.param_dtype)
    last_axes = (((x.ndim - 1,), (1,)), ((), ()))  # d_model of both, and no batch axes
    logits = dot_wide(x, word_table.astype(x.dtype), last_axes)
    return logits + bias.astype(logits.dtype)
