"""GPT-2's configuration: the options of its forward pass, and its config.json."""

from __future__ import annotations

import dataclasses
from typing import Any

from lora_jax.core.types import Fields
from lora_jax.hf.fields import ConfigError, check_known, refuse_unknown
from lora_jax.models.layers.activations import ACTIVATION

# Our field -> GPT-2's own name for it, and transformers' default.
_FIELDS: dict[str, tuple[str, Any]] = {
    "vocab_size": ("vocab_size", 50257),
    "hidden_size": ("n_embd", 768),
    "intermediate_size": ("n_inner", None),
    "num_hidden_layers": ("n_layer", 12),
    "num_attention_heads": ("n_head", 12),
    "max_position_embeddings": ("n_positions", 1024),
    "hidden_act": ("activation_function", "gelu_new"),
    "layer_norm_eps": ("layer_norm_epsilon", 1e-5),
    "initializer_range": ("initializer_range", 0.02),
    "tie_word_embeddings": ("tie_word_embeddings", True),
    "scale_attn_weights": ("scale_attn_weights", True),
    "scale_attn_by_inverse_layer_idx": ("scale_attn_by_inverse_layer_idx", False),
    "bos_token_id": ("bos_token_id", 50256),
    "pad_token_id": ("pad_token_id", None),
}

# Without an effect on the logits: dropout is for training; scores and softmax are always fp32 or
# wider, which is all that reorder_and_upcast_attn asks for; the summary is another head's.
_NO_EFFECT = frozenset(
    """
    model_type eos_token_id reorder_and_upcast_attn attn_pdrop embd_pdrop resid_pdrop n_ctx
    summary_activation summary_first_dropout summary_proj_to_labels summary_type summary_use_proj
    _num_labels gradient_checkpointing
    """.split()
)

# Known options that would change the forward pass, and the only value that is supported.
_UNSUPPORTED: dict[str, Any] = {
    "add_cross_attention": False,
    "is_encoder_decoder": False,
    "quantization_config": None,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class GPT2Config:
    """A GPT-2 (Radford et al. 2019). Hashable; sizes are in elements.

    ``scale_attn_weights`` divides attention's scores by the root of head_dim, and
    ``scale_attn_by_inverse_layer_idx`` divides the i-th layer's scores by i (counted from 1).
    ``eos_token_ids`` are the tokens that end a text.

    Raises:
      ConfigError: if the fields contradict each other.
    """

    model_type: str = "gpt2"
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    max_position_embeddings: int = 1024
    hidden_act: str = "gelu_new"
    layer_norm_eps: float = 1e-5
    initializer_range: float = 0.02
    tie_word_embeddings: bool = True
    scale_attn_weights: bool = True
    scale_attn_by_inverse_layer_idx: bool = False
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    pad_token_id: int | None = None

    def __post_init__(self) -> None:
        if self.model_type != "gpt2":
            raise ConfigError(f"model_type {self.model_type!r} is not gpt2")
        check_known("activation_function", self.hidden_act, ACTIVATION)
        if self.hidden_size % self.num_attention_heads:
            raise ConfigError(
                f"n_embd ({self.hidden_size}) is not a multiple of n_head "
                f"({self.num_attention_heads})"
            )

    @property
    def head_dim(self) -> int:
        """The width of one head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def num_key_value_heads(self) -> int:
        """The number of heads: each has keys and values of its own."""
        return self.num_attention_heads

    @classmethod
    def from_hf(cls, config: Fields) -> GPT2Config:
        """Reads the dict of a config.json; an absent field has transformers' default.

        Args:
          config: the parsed config.json.

        Returns:
          The configuration.

        Raises:
          ConfigError: names the fields that are unsupported or unknown.
        """
        known = _NO_EFFECT | {name for name, _ in _FIELDS.values()}
        refuse_unknown(config, "gpt2", known, _UNSUPPORTED)
        values = {ours: config.get(name, default) for ours, (name, default) in _FIELDS.items()}
        if values["intermediate_size"] is None:
            values["intermediate_size"] = 4 * values["hidden_size"]
        eos = config.get("eos_token_id", 50256)
        eos_ids = () if eos is None else tuple(eos) if isinstance(eos, list) else (eos,)
        return cls(
            model_type=config.get("model_type", "gpt2"),
            eos_token_ids=eos_ids,
            **values,
        )

    def to_hf(self) -> dict[str, Any]:
        """Returns the config.json that ``from_hf`` reads back as this configuration."""
        out = {name: getattr(self, ours) for ours, (name, _) in _FIELDS.items()}
        eos = self.eos_token_ids
        out["eos_token_id"] = list(eos) if len(eos) > 1 else eos[0] if eos else None
        return {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], **out}
