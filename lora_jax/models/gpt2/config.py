"""GPT-2's configuration and its config.json."""

import dataclasses

from lora_jax.core.types import Fields
from lora_jax.hf.fields import ConfigError, check_no_unknown_fields, read_eos, write_eos
from lora_jax.hf.generation import Generation
from lora_jax.models.fields import FieldTable, check_transformer

# GPT-2's own names of some of our fields.
_NAMES = {
    "hidden_size": "n_embd",
    "intermediate_size": "n_inner",
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
    "max_position_embeddings": "n_positions",
    "hidden_act": "activation_function",
    "layer_norm_eps": "layer_norm_epsilon",
}

# Without an effect on the logits: dropout is for training; scores and softmax are always fp32 or
# wider, which is all that reorder_and_upcast_attn asks for; the summary is another head's.
_NO_EFFECT = frozenset(
    """
    eos_token_id reorder_and_upcast_attn attn_pdrop embd_pdrop resid_pdrop n_ctx
    summary_activation summary_first_dropout summary_proj_to_labels summary_type summary_use_proj
    _num_labels gradient_checkpointing
    """.split()
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class GPT2Config:
    """A GPT-2 (Radford et al. 2019), by default the smallest. Hashable; sizes are in elements.

    ``scale_attn_weights`` divides attention's scores by the root of head_dim, and
    ``scale_attn_by_inverse_layer_idx`` divides the i-th layer's scores by i (counted from 1).
    ``eos_token_ids`` are the tokens that end a text. ``generation`` is what generation_config.json
    says; None without one.

    Raises:
      ConfigError: if the fields contradict each other.
    """

    model_type: str = "gpt2"
    vocab_size: int = 50257
    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    max_position_embeddings: int = 1024
    hidden_act: str = "gelu_new"
    layer_norm_eps: float = 1e-5
    initializer_range: float = 0.02
    tie_word_embeddings: bool = True
    scale_attn_weights: bool = True
    scale_attn_by_inverse_layer_idx: bool = False
    bos_token_id: int | None = 50256
    eos_token_ids: tuple[int, ...] = (50256,)
    generation: Generation | None = None
    pad_token_id: int | None = None

    def __post_init__(self) -> None:
        if self.model_type != "gpt2":
            raise ConfigError(
                f"model_type is {self.model_type!r}, but a GPT2Config describes gpt2. Use "
                "lora_jax.models.read_config for other models."
            )
        check_transformer(self, _NAMES)

    @property
    def head_dim(self) -> int:
        """The width of one head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def num_key_value_heads(self) -> int:
        """The number of heads, each with its own keys and values."""
        return self.num_attention_heads

    @classmethod
    def from_hf(cls, config: Fields) -> "GPT2Config":
        """Reads a config.json; absent fields get transformers' defaults.

        Args:
          config: the parsed config.json.

        Returns:
          The configuration.

        Raises:
          ConfigError: names the fields that are unsupported or unknown.
        """
        check_no_unknown_fields(config, "gpt2", _NO_EFFECT | _FIELDS.file_names)
        values = _FIELDS.read(config)
        if values.get("intermediate_size") is None:
            values["intermediate_size"] = 4 * values.get("hidden_size", cls.hidden_size)
        if "eos_token_id" in config:
            values["eos_token_ids"] = read_eos(config)
        return cls(**values)

    def to_hf(self) -> dict[str, object]:
        """Returns the config.json that ``from_hf`` reads back as this configuration."""
        eos = write_eos(self.eos_token_ids)
        out = {"architectures": ["GPT2LMHeadModel"], "eos_token_id": eos}
        return out | _FIELDS.write(self)


_FIELDS = FieldTable(GPT2Config, excluded=("eos_token_ids", "generation"), renamed=_NAMES)
