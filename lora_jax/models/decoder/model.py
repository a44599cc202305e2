"""Decoder-only language models in Flax Linen, from Llama to Phi-3: see ``DecoderConfig``."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from lora_jax.models.causal import CausalLM, output_head
from lora_jax.models.decoder.blocks import multiply, rms_norm
from lora_jax.models.decoder.config import DecoderConfig
from lora_jax.models.decoder.experts import Experts, check_experts
from lora_jax.models.decoder.layer import PerLayer, Step
from lora_jax.models.decoder.period import run_layers, stack_layers
from lora_jax.models.decoder.rope import RopeAngles, rotations
from lora_jax.models.layers.blocks import ModelPart, embed
from lora_jax.models.layers.cache import Cache
from lora_jax.models.layers.delta import RecurrentTokens
from lora_jax.models.layers.masks import Mask
from lora_jax.models.layers.noise import EmbeddingNoise, add_noise
from lora_jax.models.layers.patches import insert_vectors
from lora_jax.models.layers.trunk import TokenPlaces


class Decoder(CausalLM):
    """A causal language model whose layers are scanned, so compile time is flat in the depth.

    Parameters are a plain nested dict under Hugging Face's module names, less the layer number:
    ``model/layers/self_attn/q_proj/kernel`` is [layers, d_model, heads * head_dim].

    Attributes:
      config: the options of the forward pass.
      dtype: dtype of the computation. Norms' statistics, RoPE, routers, softmax and logits are
        fp32 (or float64, where dtype is).
      param_dtype: dtype of the parameters that ``init`` makes.
      remat: recompute each layer in the backward pass. True keeps nothing but the layer's input;
        "offload" keeps it in the host's memory; a policy of ``jax.checkpoint_policies`` by name,
        such as "dots_saveable", keeps what it says.
      placement: the activations' place on a mesh; see ``Placement``.
      attention: the implementation of attention: "auto", another name, or a function; see
        ``lora_jax.models.layers.attend.implementation``.
      experts: the implementation of a mixture's products: "auto", "blocks", "ragged", or a
        function; see ``lora_jax.models.decoder.experts.implementation``. Anything but "auto" is an
        error for a model without experts.
    """

    config: DecoderConfig
    experts: str | Experts = "auto"
    TRUNK = "model"

    def setup(self) -> None:
        check_experts(self.config, self.experts)
        self.model = Trunk(*self.options, experts=self.experts)
        self.lm_head = output_head(self)


class Trunk(ModelPart):
    """Embedding, scanned layers and the final norm: everything but the head.

    ``vectors`` stand in the places ``at`` of embedded tokens; see ``insert_vectors``.
    """

    config: DecoderConfig
    experts: str | Experts = "auto"
    n_positions = None

    def setup(self) -> None:
        cfg = self.config
        self.embed_tokens = embed(self, cfg.vocab_size)
        self.layers = stack_layers(self)
        self.norm = rms_norm(self)

    @property
    def words(self) -> nn.Embed:
        return self.embed_tokens

    def __call__(
        self,
        input_ids: jax.Array,
        placed: TokenPlaces,
        mask: Mask,
        cache: Cache | None,
        embedding_noise: EmbeddingNoise | None,
        at: jax.Array | None = None,
        vectors: jax.Array | None = None,
    ) -> tuple[jax.Array, Any]:
        positions = placed.positions
        length = jnp.max(positions) + 1 if cache is None else cache.max_len
        rope = rotations(positions, self.config, length)
        other_rope = None
        if self.config.rope_free_layers:
            other_rope = RopeAngles(jnp.ones_like(rope.cos), jnp.zeros_like(rope.sin))
        elif self.config.rope_local_theta is not None:
            other_rope = rotations(positions, self.config, length, local=True)
        tokens = RecurrentTokens(placed.present, mask.queries.segments)
        step = Step(rope, other_rope, mask, placed.first, tokens)

        x = add_noise(self.embed_tokens(input_ids), embedding_noise)
        if self.config.scale_embeddings:
            x = x * jnp.asarray(self.config.hidden_size**0.5, x.dtype)
        x = self.placement.constrain(
            insert_vectors(multiply(x, self.config.embedding_multiplier), at, vectors), "residual"
        )
        windowed, apart = (
            jnp.asarray(np.isin(np.arange(self.config.num_hidden_layers), some))
            for some in (self.config.windowed_layers, self.config.layers_rotated_apart)
        )
        each = PerLayer(windowed, apart, cache and cache.layers, cache and cache.recurrent)
        x, new = run_layers(self.layers, self.config, x, step, each)
        return self.placement.constrain(self.norm(x), "inputs"), new
