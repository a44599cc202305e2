"""What a decoder is: the options of its forward pass, read from Hugging Face's config.json."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from lora_jax.models.fields import ConfigError, refuse_unknown

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
ACTIVATIONS = ("silu", "swish", "gelu", "gelu_new", "gelu_fast", "gelu_pytorch_tanh", "relu")

_REQUIRED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
)

# transformers' defaults where a family's differ from Llama's.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"num_key_value_heads": 8, "sliding_window": 4096},
    "qwen2": {"num_key_value_heads": 32, "sliding_window": 4096},
    "qwen3": {"num_key_value_heads": 32, "sliding_window": 4096, "head_dim": 128},
}

# Options that a family's forward pass reads, beyond those that all families read.
_OWN: dict[str, frozenset[str]] = {
    "llama": frozenset({"attention_bias", "mlp_bias"}),
    "mistral": frozenset({"sliding_window"}),
    "qwen2": frozenset(
        {"use_sliding_window", "sliding_window", "max_window_layers", "layer_types"}
    ),
    "qwen3": frozenset(
        {
            "attention_bias",
            "use_sliding_window",
            "sliding_window",
            "max_window_layers",
            "layer_types",
        }
    ),
}

_COMMON = frozenset(_REQUIRED) | {
    "model_type",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "rms_norm_eps",
    "rope_theta",
    "rope_scaling",
    "rope_parameters",
    "max_position_embeddings",
    "tie_word_embeddings",
    "initializer_range",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
}

# Known options that would change the forward pass, and the only value that is supported.
_UNSUPPORTED: dict[str, Any] = {
    "attention_dropout": 0.0,
    "rope_interleaved": False,
    "partial_rotary_factor": 1.0,
    "is_encoder_decoder": False,
    "add_cross_attention": False,
    "quantization_config": None,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """A scaling of RoPE's frequencies: ``kind`` is "linear" or "llama3".

    "linear" divides every frequency by ``factor`` (position interpolation). "llama3" divides the
    low ones, keeps the high ones and blends between; see ``rope.inverse_frequencies``.
    """

    kind: str
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """A decoder of the Llama, SmolLM2, Mistral, Qwen2 and Qwen3 kind. Hashable.

    Sizes are in elements. ``qkv_bias``, ``o_bias`` and ``mlp_bias`` say which projections have a
    bias; ``qk_norm`` normalises each head's query and key (Qwen3). ``sliding_window`` is how many
    tokens, itself included, a token sees in the layers named by ``windowed_layers``.
    ``eos_token_ids`` are the tokens that end a text.

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
    max_position_embeddings: int = 2048
    tie_word_embeddings: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    sliding_window: int | None = None
    windowed_layers: tuple[int, ...] = ()
    initializer_range: float = 0.02
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    pad_token_id: int | None = None

    def __post_init__(self) -> None:
        if self.model_type not in FAMILIES:
            raise ConfigError(
                f"model_type {self.model_type!r} is not supported; supported are "
                f"{', '.join(FAMILIES)}"
            )
        if self.hidden_act not in ACTIVATIONS:
            raise ConfigError(
                f"hidden_act {self.hidden_act!r} is not supported; supported are "
                f"{', '.join(ACTIVATIONS)}"
            )
        if self.num_attention_heads % self.num_key_value_heads:
            raise ConfigError(
                f"num_attention_heads ({self.num_attention_heads}) is not a multiple of "
                f"num_key_value_heads ({self.num_key_value_heads})"
            )
        if self.head_dim % 2:
            raise ConfigError(f"RoPE needs an even head_dim, not {self.head_dim}")
        if bool(self.windowed_layers) != (self.sliding_window is not None):
            raise ConfigError(
                f"sliding_window ({self.sliding_window}) and windowed_layers "
                f"({self.windowed_layers}) go together"
            )
        if not all(0 <= i < self.num_hidden_layers for i in self.windowed_layers):
            raise ConfigError(
                f"windowed_layers {self.windowed_layers} names layers beyond the "
                f"{self.num_hidden_layers} there are"
            )

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> DecoderConfig:
        """Reads the dict of a config.json, as transformers 4 and 5 write it.

        Every field that changes the forward pass is honoured, or refused by name. A field that is
        not known is refused too (unless it is None or False), since nobody can tell what it does.

        Args:
          config: the parsed config.json.

        Returns:
          The configuration.

        Raises:
          ConfigError: names the fields that are missing, unsupported or unknown.
        """
        family = config.get("model_type")
        if family not in FAMILIES:
            raise ConfigError(
                f"model_type {family!r} is not supported; supported are {', '.join(FAMILIES)}"
            )
        missing = [name for name in _REQUIRED if config.get(name) is None]
        if missing:
            raise ConfigError(f"the configuration lacks {', '.join(missing)}")
        refuse_unknown(config, family, _COMMON | _OWN[family], _UNSUPPORTED)

        def get(name: str, default: Any = None) -> Any:
            return config.get(name, _DEFAULTS[family].get(name, default))

        heads = config["num_attention_heads"]
        head_dim = get("head_dim") or config["hidden_size"] // heads
        theta, scaling = _read_rope(config)
        window, windowed = _read_window(family, config["num_hidden_layers"], get)
        attention_bias = bool(get("attention_bias", False))
        eos = config.get("eos_token_id")
        return cls(
            model_type=family,
            **{name: config[name] for name in _REQUIRED},
            num_key_value_heads=get("num_key_value_heads") or heads,
            head_dim=head_dim,
            hidden_act=get("hidden_act", "silu"),
            rms_norm_eps=get("rms_norm_eps", 1e-6),
            rope_theta=theta,
            rope_scaling=scaling,
            max_position_embeddings=get("max_position_embeddings", 2048),
            tie_word_embeddings=bool(get("tie_word_embeddings", False)),
            qkv_bias=family == "qwen2" or attention_bias,
            o_bias=attention_bias,
            mlp_bias=bool(get("mlp_bias", False)),
            qk_norm=family == "qwen3",
            sliding_window=window,
            windowed_layers=windowed,
            initializer_range=get("initializer_range", 0.02),
            bos_token_id=config.get("bos_token_id"),
            eos_token_ids=() if eos is None else tuple(eos) if isinstance(eos, list) else (eos,),
            pad_token_id=config.get("pad_token_id"),
        )

    def to_hf(self) -> dict[str, Any]:
        """The config.json that ``from_hf`` reads back as this configuration.

        Returns:
          A dict of plain JSON values, as both transformers 4 and 5 read it.
        """
        same = """
            model_type num_key_value_heads head_dim hidden_act rms_norm_eps rope_theta
            max_position_embeddings tie_word_embeddings initializer_range bos_token_id pad_token_id
        """
        names = (*_REQUIRED, *same.split())
        out = {name: getattr(self, name) for name in names}
        out["architectures"] = [f"{self.model_type.capitalize()}ForCausalLM"]
        eos = self.eos_token_ids
        out["eos_token_id"] = list(eos) if len(eos) > 1 else eos[0] if eos else None
        own = _OWN[self.model_type]
        if "attention_bias" in own:
            out["attention_bias"] = self.o_bias
        if "mlp_bias" in own:
            out["mlp_bias"] = self.mlp_bias
        if "sliding_window" in own:
            out["sliding_window"] = self.sliding_window
        if "layer_types" in own:
            out["use_sliding_window"] = self.sliding_window is not None
            out["layer_types"] = [
                "sliding_attention" if i in self.windowed_layers else "full_attention"
                for i in range(self.num_hidden_layers)
            ]
        if self.rope_scaling is not None:
            fields = dataclasses.asdict(self.rope_scaling)
            kind = fields.pop("kind")
            if kind == "linear":
                fields = {"factor": fields["factor"]}
            out["rope_scaling"] = {"rope_type": kind, **fields}
        return out


def _read_rope(config: Mapping[str, Any]) -> tuple[float, RopeScaling | None]:
    """RoPE's base and scaling, from transformers 4's or transformers 5's fields."""
    fields = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    nested = [name for name, value in fields.items() if isinstance(value, Mapping)]
    if nested:
        raise ConfigError(f"RoPE parameters per layer type ({', '.join(nested)}) are not supported")
    legacy = fields.pop("type", "default")
    kind = fields.pop("rope_type", legacy)
    theta = float(fields.pop("rope_theta", None) or config.get("rope_theta") or 10000.0)
    if (fields.pop("partial_rotary_factor", None) or 1.0) != 1.0:
        raise ConfigError("a partial_rotary_factor other than 1 is not supported")
    if kind in ("default", None):
        return theta, None
    if kind not in ("linear", "llama3"):
        raise ConfigError(f"RoPE type {kind!r} is not supported; linear and llama3 are")
    names = {"factor"}
    if kind == "llama3":
        names |= {"low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}
        fields.setdefault(
            "original_max_position_embeddings", config.get("max_position_embeddings", 2048)
        )
    if missing := sorted(names - set(fields)):
        raise ConfigError(f"RoPE type {kind!r} lacks {', '.join(missing)}")
    return theta, RopeScaling(kind=kind, **{name: fields[name] for name in names})


def _read_window(family: str, layers: int, get: Any) -> tuple[int | None, tuple[int, ...]]:
    """The sliding window and the layers that use it."""
    if family == "llama":
        return None, ()
    window = get("sliding_window")
    if family == "mistral":
        return window, () if window is None else tuple(range(layers))
    if not get("use_sliding_window", False):
        window = None
    types = get("layer_types")
    if types is None:
        first = get("max_window_layers", 28)
        windowed = tuple(range(first, layers)) if window is not None else ()
    else:
        unknown = sorted(set(types) - {"full_attention", "sliding_attention"})
        if unknown or len(types) != layers:
            raise ConfigError(f"layer_types {list(types)} do not describe {layers} layers")
        windowed = tuple(i for i, kind in enumerate(types) if kind == "sliding_attention")
        if windowed and window is None:
            raise ConfigError("layer_types has sliding_attention, but no sliding_window is in use")
    return (window, windowed) if windowed else (None, ())
