"""Causal language models: the call and the head that decoders and GPT-2 share."""

from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn

from lora_jax.models.layers.attention import dot_wide, soft_cap
from lora_jax.models.layers.blocks import EmbeddingNoise, ModelPart, dense
from lora_jax.models.layers.cache import Cache
from lora_jax.models.layers.trunk import TokenPlaces, causal_mask, extend_cache, place_tokens


class CausalLM(ModelPart):
    """Predicts each next token. A family's module creates the trunk in its ``setup``."""

    TRUNK: ClassVar[str]  # the trunk's name, as in Hugging Face's files

    @property
    def trunk(self) -> Any:
        """The module without the head.

        Its ``words`` is the table of tokens, and its ``n_positions`` the length of its table of
        positions, None without one. It takes the tokens, their places, the mask, the cache and the
        noise, and returns final hidden states, and the new keys and values of all layers.
        """
        return getattr(self, self.TRUNK)

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
        branches: jax.Array | None = None,
        **inputs: jax.Array,
    ) -> Any:
        """Predicts each next token.

        Args:
          input_ids: [batch, seq], int. An id outside the vocabulary, or a position beyond a table
            of positions, gives NaN.
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
          branches: [batch, seq], int, for prompts that several completions share: in a segment, 0
            at the prompt, which comes first, and another number at each completion, which sees the
            prompt and itself. ``positions`` are needed, too: each completion's go on from the end
            of its prompt.
          **inputs: other inputs of a family's trunk: ``pixel_values`` of ``SmolVLM``, with
            ``image_grids`` of ``QwenVL``, and ``routing`` of a ``Decoder`` with experts.

        Returns:
          Logits, [batch, seq, vocab] or [batch, n, vocab], fp32; with a cache, a pair of that and
          the new cache.

        Raises:
          ValueError: for segment_ids together with a cache, more tokens than a cache can hold, or
            a sequence or cache longer than a table of positions; for branches together with a
            cache, without positions, or in a model with linear layers.
        """
        # Packed segments count from 0 again, and a caller's own positions may do so too.
        is_counted = segment_ids is None and positions is None
        if is_counted:
            self._check_length(input_ids, cache)
        if branches is not None:
            self._check_branches(positions, cache)
        places = self.find_token_places(
            input_ids, attention_mask, positions, cache, segment_ids, **inputs
        )
        mask = causal_mask(places, segment_ids, cache, branches)
        hidden, entries = self.trunk(input_ids, places, mask, cache, embedding_noise, **inputs)
        if logits_at is not None:  # [batch, n, d_model]
            hidden = jnp.take_along_axis(hidden, logits_at[..., None], axis=1)
        out = hidden if return_hidden else self.head(hidden)
        if cache is None:
            return out
        return out, extend_cache(cache, places, entries)

    @nn.nowrap
    def find_token_places(self, *tokens: Any, **inputs: Any) -> TokenPlaces:
        """Returns the positions of a call's tokens.

        Args:
          tokens: see ``place_tokens``.
          inputs: other inputs of the call; see ``__call__``.
        """
        return place_tokens(*tokens)

    @nn.nowrap
    def tokens_of_call(
        self, input_ids: jax.Array, *others: Any, **options: Any
    ) -> tuple[jax.Array, jax.Array | None] | None:
        """Returns the token ids and segments of a call, or None for partial rows.

        An activated LoRA finds its invocation in them; see `lora_jax.adapt.activate`.

        Args:
          input_ids, others, options: arguments of a call, or of a call of another method.
        """
        names = ("attention_mask", "positions", "cache", "segment_ids", "logits_at")
        arguments = dict(zip(names, others, strict=False)) | options
        for name in ("cache", "branches", "method"):
            if arguments.get(name) is not None:
                return None
        attention_mask = arguments.get("attention_mask")
        if attention_mask is not None:
            input_ids = jnp.where(jnp.asarray(attention_mask, bool), input_ids, -1)
        return input_ids, arguments.get("segment_ids")

    @nn.nowrap
    def _check_length(self, input_ids: jax.Array, cache: Cache | None) -> None:
        """Raises a ValueError for more tokens or cache slots than there are positions."""
        n_positions = self.trunk.n_positions
        if not n_positions:
            return
        n_tokens = input_ids.shape[1]
        if cache is None and n_tokens > n_positions:
            raise ValueError(
                f"{n_tokens} tokens are more than the model's {n_positions} positions. Use a "
                "shorter row, or a model with more positions."
            )
        if cache is not None and cache.max_len > n_positions:
            raise ValueError(
                f"{cache.max_len} slots of a cache are more than the model's {n_positions} "
                f"positions. Make a cache of at most {n_positions} slots."
            )

    def _check_branches(self, positions: jax.Array | None, cache: Cache | None) -> None:
        """Raises a ValueError for branches in a call that does not support them."""
        if cache is not None:
            raise ValueError(
                "branches cannot be used together with a cache, which holds one sequence per row. "
                "Remove branches, or call the model without cache=."
            )
        if positions is None:
            raise ValueError(
                "branches need positions. Pass positions in which each completion continues from "
                "the end of its prompt."
            )
        if getattr(self.config, "linear_layers", ()):
            raise ValueError(
                "Linear layers read a row from its beginning to its end, and do not support "
                "branches. Give each completion its own row or segment, with its own prompt."
            )

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
            table = self.trunk.words.embedding.astype(self.dtype)
            last_axes = (((hidden.ndim - 1,), (1,)), ((), ()))  # d_model of both, no batch axes
            logits = dot_wide(hidden.astype(self.dtype), table, last_axes)
        else:
            logits = self.lm_head(hidden)
        divisor = getattr(self.config, "logits_scaling", 1.0)
        if divisor != 1:
            logits = logits / divisor
        return soft_cap(logits, getattr(self.config, "final_logit_softcapping", None))


def output_head(module: CausalLM) -> nn.Dense | None:
    """Creates the logits layer; None if the token table is also the head."""
    if module.config.tie_word_embeddings:
        return None
    return dense(module, module.config.vocab_size, use_bias=False, dot_general=dot_wide)
