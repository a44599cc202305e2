"""Decoder-only language models in Flax Linen, from Llama to Phi-3: see ``DecoderConfig``."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from lora_jax.models.decoder.blocks import norm
from lora_jax.models.decoder.config import DecoderConfig
from lora_jax.models.decoder.experts import Experts, check_experts
from lora_jax.models.decoder.layer import DecoderLayer, PerLayer, Step
from lora_jax.models.decoder.rope import rotations
from lora_jax.models.layers.attend import Attend
from lora_jax.models.layers.attention import dot_wide, soft_cap
from lora_jax.models.layers.cache import Cache
from lora_jax.models.layers.noise import EmbeddingNoise, with_noise
from lora_jax.models.layers.placement import UNPLACED, Placement
from lora_jax.models.layers.trunk import causal_mask, extend, place, rematerialised


class Decoder(nn.Module):
    """A causal language model whose layers are scanned, so compile time is flat in the depth.

    Parameters are a plain nested dict under Hugging Face's module names, less the layer number:
    ``model/layers/self_attn/q_proj/kernel`` is [layers, d_model, heads * head_dim].

    Attributes:
      config: the options of the forward pass.
      dtype: dtype of the computation. Norms' statistics, RoPE, routers, softmax and logits are
        fp32 (or float64, where dtype is).
      param_dtype: dtype of the parameters that ``init`` makes.
      remat: recompute each layer in the backward pass. True keeps nothing but the layer's input;
        a policy of ``jax.checkpoint_policies`` by name, such as "dots_saveable", keeps what it
        says.
      placement: the activations' place on a mesh; see ``Placement``.
      attention: the implementation of attention: "auto", another name, or a function; see
        ``lora_jax.models.layers.attend.implementation``.
      experts: the implementation of a mixture's products: "auto", "blocks", "ragged", or a
        function; see ``lora_jax.models.decoder.experts.implementation``. Anything but "auto" is an
        error for a model without experts.
    """

    config: DecoderConfig
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    remat: bool | str = False
    placement: Placement = UNPLACED
    attention: str | Attend = "auto"
    experts: str | Experts = "auto"

    def setup(self) -> None:
        check_experts(self.config, self.experts)
        args = (self.config, self.dtype, self.param_dtype, self.remat, self.placement)
        self.model = _Trunk(*args, self.attention, self.experts)
        if not self.config.tie_word_embeddings:
            self.lm_head = nn.Dense(
                self.config.vocab_size,
                use_bias=False,
                dtype=self.dtype,
                param_dtype=self.param_dtype,
                kernel_init=nn.initializers.normal(self.config.initializer_range),
                dot_general=dot_wide,
            )

    def __call__(
        self,
        input_ids: jax.Array,
        attention_mask: jax.Array | None = None,
        positions: jax.Array | None = None,
        cache: Cache | None = None,
        segment_ids: jax.Array | None = None,
        logits_at: jax.Array | None = None,
        return_hidden: bool = False,
        embedding_noise: EmbeddingNoise | None = None,
    ) -> Any:
        """Predicts each next token.

        Args:
          input_ids: [batch, seq], int. An id outside the vocabulary gives NaN.
          attention_mask: [batch, seq], 0 or False at padding, which may be left or right; None for
            no padding. With a cache it speaks of the new tokens only.
          positions: [batch, seq], int; by default counted over the tokens that are not padding,
            from the cache's length or from each segment's start.
          cache: keys and values so far, from ``init_cache`` or from the last call.
          segment_ids: [batch, seq], int, for several sequences packed in one row: a token sees
            those of its own (contiguous) segment only.
          logits_at: [batch, n], int: compute logits at these indices of seq only.
          return_hidden: return the final hidden states, [batch, seq, d_model], instead of logits;
            ``head`` turns them into logits.
          embedding_noise: noise to add to the table's vectors, for training.

        Returns:
          Logits, [batch, seq, vocab] or [batch, n, vocab], fp32; with a cache, a pair of that and
          the new cache.

        Raises:
          ValueError: for segment_ids together with a cache, or more tokens than a cache can hold.
        """
        hidden, new_cache = self.model(
            input_ids, attention_mask, positions, cache, segment_ids, embedding_noise
        )
        if logits_at is not None:
            hidden = jnp.take_along_axis(hidden, logits_at[..., None], axis=1)
        out = hidden if return_hidden else self.head(hidden)
        return out if new_cache is None else (out, new_cache)

    def head(self, hidden: jax.Array) -> jax.Array:
        """Returns the logits of final hidden states.

        For a loss that never holds all logits at once:
        ``model.apply({"params": params}, hidden_chunk, method="head")``.

        Args:
          hidden: [..., d_model].

        Returns:
          [..., vocab], fp32.
        """
        if self.config.tie_word_embeddings:
            embedding = self.model.embed_tokens.embedding.astype(self.dtype)
            contract = (((hidden.ndim - 1,), (1,)), ((), ()))
            logits = dot_wide(hidden.astype(self.dtype), embedding, contract)
        else:
            logits = self.lm_head(hidden)
        return soft_cap(logits, self.config.final_logit_softcapping)


class _Trunk(nn.Module):
    """Embedding, scanned layers and the final norm: everything but the head."""

    config: DecoderConfig
    dtype: Any
    param_dtype: Any
    remat: bool | str
    placement: Placement
    attention: str | Attend
    experts: str | Experts

    def setup(self) -> None:
        cfg = self.config
        self.embed_tokens = nn.Embed(
            cfg.vocab_size,
            cfg.hidden_size,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            embedding_init=nn.initializers.normal(cfg.initializer_range),
        )
        scanned = nn.scan(
            rematerialised(DecoderLayer, self.remat),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(nn.broadcast, 0),
            length=cfg.num_hidden_layers,
        )
        args = (cfg, self.dtype, self.param_dtype, self.placement)
        self.layers = scanned(*args, self.attention, self.experts)
        self.norm = norm(self)

    def __call__(
        self,
        input_ids: jax.Array,
        attention_mask: jax.Array | None,
        positions: jax.Array | None,
        cache: Cache | None,
        segment_ids: jax.Array | None,
        embedding_noise: EmbeddingNoise | None,
    ) -> tuple[jax.Array, Cache | None]:
        placed = place(input_ids, attention_mask, positions, cache, segment_ids)
        mask = causal_mask(placed, segment_ids, cache)
        positions = placed.positions
        length = jnp.max(positions) + 1 if cache is None else cache.max_len
        rope = rotations(positions, self.config, length)
        window_rope = None
        if self.config.rope_local_theta is not None:
            window_rope = rotations(positions, self.config, length, local=True)
        filled = None if cache is None else placed.first
        step = Step(rope, window_rope, mask, filled)

        x = with_noise(self.embed_tokens(input_ids), embedding_noise)
        if self.config.scale_embeddings:
            x = x * jnp.asarray(self.config.hidden_size**0.5, x.dtype)
        x = self.placement.constrain(x, "residual")
        windowed = np.zeros(self.config.num_hidden_layers, bool)
        windowed[list(self.config.windowed_layers)] = True
        per_layer = PerLayer(
            jnp.asarray(windowed),
            None if cache is None else cache.layers,
        )
        x, new = self.layers(x, step, per_layer)
        x = self.placement.constrain(self.norm(x), "inputs")
        return x, None if cache is None else extend(cache, placed, new)
