"""A decoder's configuration: the options of its forward pass."""

import dataclasses
import math

from lora_jax.core.types import Fields
from lora_jax.hf.fields import ConfigError, check_field_values, check_multiple, check_supported
from lora_jax.hf.generation import Generation
from lora_jax.models.decoder.families.family import DecoderFamily
from lora_jax.models.decoder.families.registry import FAMILIES
from lora_jax.models.decoder.fields import read_fields, write_fields
from lora_jax.models.decoder.rope_fields import RopeScaling
from lora_jax.models.decoder.runs import LayerKind, runs_of

ACTIVATIONS = ("silu", "swish", "gelu", "gelu_new", "gelu_fast", "gelu_pytorch_tanh", "relu")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """A decoder: Llama, SmolLM2, Mistral, Mixtral, Ministral 3, Qwen2 and 3 (MoE), Qwen3-Next,
    Qwen3.5 (MoE), Gemma 2 to 4, Phi-3, SmolLM3, OLMo 2 and 3, Granite 3, gpt-oss, GLM-4.5 (MoE),
    DeepSeek-V3.

    Hashable. Sizes are in elements.

    Attributes:
      rope_local_theta: RoPE's base in layers with a sliding window, where it is another or where
        only the other layers scale it (Gemma 3, OLMo 3).
      rope_free_layers: the layers without RoPE (SmolLM3).
      partial_rotary_factor: the part of each head's dimensions that RoPE rotates.
      qkv_bias, o_bias, mlp_bias: True if these projections have a bias.
      qk_norm: normalise each head's query and key; with ``qk_norm_joins_heads`` those of all heads
        together (OLMo).
      fused_projections: q, k, v are one kernel, and so are gate and up (Phi-3).
      norm_adds_one: norms scale by 1 + scale (Gemma).
      norm_multiplies_wide: norms scale in fp32, before they round (OLMo).
      pre_norms, post_norms: norms precede attention and MLP, and norms follow them, before the
        residual sum: both in Gemma, the latter alone in OLMo.
      scale_embeddings: embeddings are multiplied by sqrt(hidden_size) (Gemma).
      sliding_window: the number of tokens, itself included, that a token sees in
        ``windowed_layers``.
      query_pre_attn_scalar: scores are divided by its root; if None, by the root of head_dim.
      attention_multiplier: multiplies scores in place of that; None for that.
      embedding_multiplier, residual_multiplier, logits_scaling: embeddings, and what a layer's
        attention and MLP add to the stream, are multiplied, and logits divided (Granite).
      attn_logit_softcapping, final_logit_softcapping: c in c tanh(x / c), for scores and logits.
      num_experts: 0 for a dense MLP; else each token is sent to ``num_experts_per_tok`` of them,
        of inner size ``moe_intermediate_size``. ``norm_topk_prob``: their weights add up to 1.
      expert_biases: the router and the experts have biases.
      first_k_dense_replace: the number of layers, the first ones, that have an MLP in the place of
        experts (GLM-4.5, DeepSeek).
      sigmoid_router: the weights of experts are sigmoids, and each expert has a bias by which alone
        it is chosen (GLM-4.5, DeepSeek). ``n_group``: experts lie in so many groups, and a token's
        come from ``topk_group`` of them. ``routed_scaling_factor`` multiplies their weights.
      shared_expert_intermediate_size: the inner size of an MLP that each token goes through beside
        its experts; 0 without one. Where the family says so, a sigmoid of the token weighs it.
      swiglu_limit, swiglu_alpha: experts compute (up + 1) gate sigmoid(alpha gate), of up clipped
        to ±limit and gate to at most limit (gpt-oss); without a limit act(gate) up.
      sinks: each head has a number of its own in the softmax's sum; see ``attend`` (gpt-oss).
      attn_output_gate: q_proj makes a gate beside each query, whose sigmoid multiplies what
        attention returns (Qwen3.5).
      kv_lora_rank: keys and values come from a vector of this size that all heads share, and a key
        of ``qk_rope_head_dim`` that alone is rotated (MLA; DeepSeek-V2, section 2.1); 0 for
        projections of their own. ``head_dim`` is ``qk_nope_head_dim + qk_rope_head_dim``, that of
        values ``v_head_dim``. ``q_lora_rank``: queries come from a vector of this size; None for
        a projection. ``rope_interleave``: RoPE pairs neighbouring dimensions.
      global_head_dim: the size of heads in layers without a window, of which they have
        ``num_global_key_value_heads`` for keys; 0 for the same as in others (Gemma 4).
        ``attention_k_eq_v``: there, keys before their norm are the values as well.
      num_kv_shared_layers: the number of layers, the last ones, that attend to the keys and values
        of the last layer before them with, or without, a window. ``use_double_wide_mlp``: their
        MLPs are twice as wide.
      value_norm: values are normalised, without a scale.
      hidden_size_per_layer_input: the size of a vector that a table of
        ``vocab_size_per_layer_input`` has of a token for each layer; 0 without one.
      layer_scalars: each layer's output is multiplied by a number of its own.
      linear_layers: the layers with a ``GatedDeltaNet`` in the place of attention (Qwen3.5).
      linear_num_key_heads, linear_num_value_heads, linear_key_head_dim, linear_value_head_dim,
        linear_conv_kernel_dim: their heads, the heads' sizes, and the tokens that the convolution
        sees.
      linear_projections_joined: q, k, v, z are one kernel, and so are b and a, with what belongs to
        a head of keys side by side (Qwen3-Next).
      eos_token_ids: the tokens that end a text.
      generation: what the model's generation_config.json says; None without one.

    Raises:
      ConfigError: if the fields contradict each other.
    """

    model_type: str = "llama"
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    hidden_act: str = "silu"
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    rope_local_theta: float | None = None
    rope_free_layers: tuple[int, ...] = ()
    partial_rotary_factor: float = 1.0
    max_position_embeddings: int = 2048
    tie_word_embeddings: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    qk_norm_joins_heads: bool = False
    fused_projections: bool = False
    norm_adds_one: bool = False
    norm_multiplies_wide: bool = False
    pre_norms: bool = True
    post_norms: bool = False
    scale_embeddings: bool = False
    sliding_window: int | None = None
    windowed_layers: tuple[int, ...] = ()
    query_pre_attn_scalar: float | None = None
    attention_multiplier: float | None = None
    embedding_multiplier: float = 1.0
    residual_multiplier: float = 1.0
    logits_scaling: float = 1.0
    attn_logit_softcapping: float | None = None
    final_logit_softcapping: float | None = None
    num_experts: int = 0
    num_experts_per_tok: int = 0
    moe_intermediate_size: int = 0
    norm_topk_prob: bool = False
    first_k_dense_replace: int = 0
    sigmoid_router: bool = False
    n_group: int = 1
    topk_group: int = 1
    routed_scaling_factor: float = 1.0
    shared_expert_intermediate_size: int = 0
    expert_biases: bool = False
    swiglu_limit: float | None = None
    swiglu_alpha: float = 1.702
    sinks: bool = False
    attn_output_gate: bool = False
    q_lora_rank: int | None = None
    kv_lora_rank: int = 0
    qk_nope_head_dim: int = 0
    qk_rope_head_dim: int = 0
    v_head_dim: int = 0
    rope_interleave: bool = False
    global_head_dim: int = 0
    num_global_key_value_heads: int | None = None
    attention_k_eq_v: bool = False
    num_kv_shared_layers: int = 0
    use_double_wide_mlp: bool = False
    value_norm: bool = False
    hidden_size_per_layer_input: int = 0
    vocab_size_per_layer_input: int = 0
    layer_scalars: bool = False
    linear_layers: tuple[int, ...] = ()
    linear_num_key_heads: int = 0
    linear_num_value_heads: int = 0
    linear_key_head_dim: int = 0
    linear_value_head_dim: int = 0
    linear_conv_kernel_dim: int = 0
    linear_projections_joined: bool = False
    initializer_range: float = 0.02
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    pad_token_id: int | None = None
    generation: Generation | None = None

    def __post_init__(self) -> None:
        check_field_values(self)
        check_supported("model_type", self.model_type, FAMILIES)
        check_supported("hidden_act", self.hidden_act, ACTIVATIONS)
        check_multiple(
            num_attention_heads=self.num_attention_heads,
            num_key_value_heads=self.num_key_value_heads,
        )
        self._check_rope()
        if bool(self.windowed_layers) != (self.sliding_window is not None):
            raise ConfigError(
                f"sliding_window ({self.sliding_window}) and windowed_layers "
                f"({self.windowed_layers}) need each other. Set both, or neither."
            )
        self._check_linear()
        for name in ("windowed_layers", "rope_free_layers", "linear_layers"):
            if not all(0 <= i < self.num_hidden_layers for i in getattr(self, name)):
                raise ConfigError(
                    f"{name} {getattr(self, name)} contains layers that do not exist: the model "
                    f"has {self.num_hidden_layers}. Use indices from 0 to "
                    f"{self.num_hidden_layers - 1}."
                )
        if self.num_experts:
            self._check_experts()
        if self.kv_lora_rank and self.num_key_value_heads != self.num_attention_heads:
            raise ConfigError(
                f"num_key_value_heads ({self.num_key_value_heads}) differs from "
                f"num_attention_heads ({self.num_attention_heads}). With kv_lora_rank, each head "
                "has its own keys. Set both to the same number."
            )
        if self.global_head_dim:
            self._check_whole_layers()

    def _check_whole_layers(self) -> None:
        """Raises a ConfigError for invalid fields of heads or of reused keys."""
        check_multiple(global_head_dim=self.global_head_dim, head_dim=self.head_dim)
        check_multiple(
            num_attention_heads=self.num_attention_heads,
            num_global_key_value_heads=self.num_global_key_value_heads or self.num_key_value_heads,
        )
        # A layer that reuses keys needs an earlier layer of its own kind, with or without a window.
        kinds = [self.kind_of(layer) for layer in range(self.num_hidden_layers)]
        needed = {kind.has_global_heads for kind in kinds if kind.reuses_keys}
        available = {kind.has_global_heads for kind in kinds if not kind.reuses_keys}
        missing = needed - available
        if missing:
            raise ConfigError(
                f"num_kv_shared_layers ({self.num_kv_shared_layers}) leaves no layer "
                f"{'without' if True in missing else 'with'} a window whose keys the last layers "
                "can reuse. Use a smaller num_kv_shared_layers."
            )

    def _check_experts(self) -> None:
        """Raises a ConfigError for invalid fields of experts."""
        group_size, remainder = divmod(self.num_experts, self.n_group)
        has_tiny_groups = self.n_group > 1 and group_size < 2
        if remainder or has_tiny_groups:
            raise ConfigError(
                f"num_experts ({self.num_experts}) cannot be divided into n_group "
                f"({self.n_group}) equal groups of two or more experts. Check both fields."
            )
        if not 1 <= self.topk_group <= self.n_group:
            raise ConfigError(
                f"topk_group is {self.topk_group}, but it must be between 1 and n_group "
                f"({self.n_group}). Check both fields."
            )
        max_experts = self.topk_group * group_size
        if not 1 <= self.num_experts_per_tok <= max_experts:
            raise ConfigError(
                f"num_experts_per_tok is {self.num_experts_per_tok}, but a token can choose from 1 "
                f"to {max_experts} experts. Check num_experts_per_tok and num_experts."
            )
        if self.moe_intermediate_size < 1:
            raise ConfigError("num_experts needs the size of an expert. Set moe_intermediate_size.")
        if self.first_k_dense_replace and self.linear_layers:
            raise ConfigError(
                "first_k_dense_replace and linear_layers cannot be used together. Remove one of "
                "them."
            )

    def _check_rope(self) -> None:
        """Raises a ConfigError for invalid fields of RoPE."""
        if self.rope_free_layers and self.rope_local_theta is not None:
            raise ConfigError(
                "rope_free_layers and rope_local_theta cannot be used together. Remove one of them."
            )
        name = "qk_rope_head_dim" if self.kv_lora_rank else "head_dim"
        if getattr(self, name) % 2:
            raise ConfigError(
                f"{name} is {getattr(self, name)}, but RoPE rotates pairs of dimensions. Use an "
                f"even {name}."
            )
        pairs = (self.rotary_dim + 1) // 2
        if not 1 <= pairs <= self.head_dim // 2:
            raise ConfigError(
                f"partial_rotary_factor={self.partial_rotary_factor} rotates {self.rotary_dim} of "
                f"the {self.head_dim} dimensions of a head. Use a factor that rotates from 2 "
                "dimensions to all."
            )
        scaling = self.rope_scaling
        if scaling is None or scaling.kind != "longrope":
            return
        for name in ("short_factor", "long_factor"):
            if len(getattr(scaling, name)) != pairs:
                raise ConfigError(
                    f"{name} has {len(getattr(scaling, name))} numbers, but RoPE rotates {pairs} "
                    f"pairs. Give one number for each pair."
                )

    def _check_linear(self) -> None:
        """Raises a ConfigError for invalid fields of linear layers."""
        if not self.linear_layers:
            return
        if len(self.linear_layers) == self.num_hidden_layers:
            raise ConfigError(
                "All layers are linear. Remove a layer from linear_layers: one with attention is "
                "needed."
            )
        for name in (
            "linear_num_key_heads",
            "linear_num_value_heads",
            "linear_key_head_dim",
            "linear_value_head_dim",
            "linear_conv_kernel_dim",
        ):
            if getattr(self, name) < 1:
                raise ConfigError(f"Linear layers need a {name} of at least 1. Set {name}.")
        check_multiple(
            linear_num_value_heads=self.linear_num_value_heads,
            linear_num_key_heads=self.linear_num_key_heads,
        )

    def kind_of(self, layer: int) -> LayerKind:
        """Returns the kind of a layer."""
        return LayerKind(
            linear=layer in self.linear_layers,
            sparse=self.num_experts > 0 and layer >= self.first_k_dense_replace,
            has_global_heads=self.global_head_dim > 0 and layer not in self.windowed_layers,
            reuses_keys=layer >= self.num_hidden_layers - self.num_kv_shared_layers,
        )

    @property
    def runs(self) -> dict[str, dict[str, range]]:
        """The layers, grouped into runs and stacks; see ``runs_of``."""
        n_first = self.first_k_dense_replace
        names = ("dense", "sparse")
        if self.num_kv_shared_layers:
            n_first = self.num_hidden_layers - self.num_kv_shared_layers
            names = ("own", "reusing")
        kinds = [self.kind_of(layer) for layer in range(self.num_hidden_layers)]
        return runs_of(kinds, n_first, names)

    def heads_of(self, kind: LayerKind) -> tuple[int, int]:
        """Returns the number of a layer's key/value heads, and their size."""
        if not kind.has_global_heads:
            return self.num_key_value_heads, self.head_dim
        return self.num_global_key_value_heads or self.num_key_value_heads, self.global_head_dim

    @property
    def cache_heads(self) -> tuple[int, int]:
        """The number of key/value heads in a cache, and their size."""
        n_global_heads = self.num_global_key_value_heads or self.num_key_value_heads
        # A wide head lies in the cache as several heads of the smaller size.
        heads_per_global_head = self.global_head_dim // self.head_dim
        n_heads = max(self.num_key_value_heads, n_global_heads * heads_per_global_head)
        return n_heads, self.head_dim

    @property
    def stacks(self) -> dict[str, range]:
        """The layer indices of each stack, by the stack's path below ``model/layers``."""
        stacks = {}
        for run, layers_of_place in self.runs.items():
            for place, layer_indices in layers_of_place.items():
                path = f"{run}/{place}" if run and place else run or place
                stacks[path] = layer_indices
        return stacks

    def place_of(self, layer: int) -> tuple[str, int]:
        """Returns the path of a layer's stack, and the layer's index in it."""
        for path, layer_indices in self.stacks.items():
            if layer in layer_indices:
                stack_path = f"model/layers/{path}" if path else "model/layers"
                return stack_path, layer_indices.index(layer)
        raise ValueError(f"The model has no layer {layer}. Use one of its layers.")

    @property
    def linear_sizes(self) -> dict[str, int]:
        """The output sizes of a linear layer's projections: q, k, v, z, b and a."""
        n_value_heads = self.linear_num_value_heads
        key_size = self.linear_num_key_heads * self.linear_key_head_dim
        value_size = n_value_heads * self.linear_value_head_dim
        return {
            "q": key_size,
            "k": key_size,
            "v": value_size,
            "z": value_size,
            "b": n_value_heads,
            "a": n_value_heads,
        }

    @property
    def linear_projections(self) -> tuple[str, ...]:
        """The linear layer's projections, each named by its outputs' letters."""
        return ("qkvz", "ba") if self.linear_projections_joined else ("qkv", "z", "b", "a")

    @property
    def recurrent_shapes(self) -> tuple[tuple[int, int], tuple[int, int, int]]:
        """The shapes of one row's tail and state; see ``cache.Recurrent``."""
        n_channels = sum(self.linear_sizes[letter] for letter in "qkv")
        tail_shape = (self.linear_conv_kernel_dim - 1, n_channels)
        state_shape = (
            self.linear_num_value_heads,
            self.linear_key_head_dim,
            self.linear_value_head_dim,
        )
        return tail_shape, state_shape

    @property
    def rotary_dim(self) -> int:
        """The number of head dimensions that RoPE rotates, rounded up to an even number."""
        if self.kv_lora_rank:
            return self.qk_rope_head_dim
        return int(self.head_dim * self.partial_rotary_factor)

    @property
    def layers_rotated_apart(self) -> tuple[int, ...]:
        """The layers with another RoPE than most layers, or without RoPE."""
        return self.rope_free_layers if self.rope_local_theta is None else self.windowed_layers

    @property
    def expert_shapes(self) -> dict[str, tuple[int, int]]:
        """The shapes of an expert's kernels by name: gate and up, perhaps fused, and down."""
        *up_names, down_name = self.family.expert_names
        d_expert = self.moe_intermediate_size
        d_model = self.hidden_size
        # Gate and up are two kernels, or one kernel of twice the size.
        shapes = {name: (d_model, 2 * d_expert // len(up_names)) for name in up_names}
        shapes[down_name] = (d_expert, d_model)
        return shapes

    @property
    def score_scale(self) -> float:
        """The factor that multiplies attention's scores."""
        if self.attention_multiplier is not None:
            return self.attention_multiplier
        scale = float((self.query_pre_attn_scalar or self.head_dim) ** -0.5)
        scaling = self.rope_scaling
        if self.kv_lora_rank and scaling is not None and scaling.factor > 1:
            scale *= (0.1 * scaling.mscale_all_dim * math.log(scaling.factor) + 1) ** 2
        return scale

    @property
    def family(self) -> DecoderFamily:
        """The declaration of the model's family."""
        return FAMILIES[self.model_type]

    @classmethod
    def from_hf(cls, config: Fields) -> "DecoderConfig":
        """Reads a config.json of transformers 4 or 5.

        Every field that changes the forward pass is honoured, or refused by name. An unknown field
        is refused too, unless it is None or False: it might change the forward pass.

        Args:
          config: the parsed config.json.

        Returns:
          The configuration.

        Raises:
          ConfigError: names the fields that are missing, unsupported or unknown.
        """
        defaults = {field.name: field.default for field in dataclasses.fields(cls)}
        return cls(**read_fields(config, defaults))

    def to_hf(self) -> dict[str, object]:
        """Returns the config.json that ``from_hf`` reads back as this configuration.

        Returns:
          A dict of plain JSON values, as both transformers 4 and 5 read it.
        """
        return write_fields({f.name: getattr(self, f.name) for f in dataclasses.fields(self)})
