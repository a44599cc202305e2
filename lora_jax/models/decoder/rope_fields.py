"""RoPE's fields in a config.json: its base, and the scalings for long contexts."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from lora_jax.core.types import Fields
from lora_jax.hf.fields import ConfigError, check_field_values
from lora_jax.models.decoder.families.family import DecoderFamily, Get

_ORIGINAL = "original_max_position_embeddings"
# How a rotation is split over an image's three positions, a text's being the same; and a copy.
_WITHOUT_EFFECT = ("mrope_section", "mrope_interleaved", "max_position_embeddings")
_BETA = "llama_4_scaling_beta"
_ALL_DIM = "mscale_all_dim"
_PARTIAL = "partial_rotary_factor"
_PROPORTIONAL = "proportional"

# For each kind: the fields that it needs, and those that it may have.
_KINDS: dict[str, tuple[list[str], list[str]]] = {
    kind: (needed.split(), optional.split())
    for kind, needed, optional in (
        ("linear", "factor", ""),
        ("llama3", "factor low_freq_factor high_freq_factor", _ORIGINAL),
        (
            "yarn",
            "factor",
            f"{_ORIGINAL} attention_factor beta_fast beta_slow mscale mscale_all_dim truncate"
            f" {_BETA}",
        ),
        ("longrope", "short_factor long_factor", f"{_ORIGINAL} attention_factor factor"),
        (_PROPORTIONAL, "", "factor rotated_share"),
    )
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """A scaling of RoPE's frequencies for contexts longer than in pretraining.

    ``kind`` is "linear", "llama3", "yarn", "longrope" or "proportional"; the formula of
    each is in ``rope.compute_frequencies``. ``rotated_share`` is the part of the pairs that
    "proportional" rotates. ``original_max_position_embeddings`` is the context trained on;
    ``attention_factor`` multiplies queries and keys; ``short_factor`` and ``long_factor`` have one
    number for each rotated pair. Queries beyond that context are multiplied by
    1 + ``llama_4_scaling_beta`` log(1 + floor(position / context)). ``mscale_all_dim`` scales
    the scores of MLA; see ``DecoderConfig.score_scale``.
    """

    kind: str
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192
    attention_factor: float = 1.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    llama_4_scaling_beta: float = 0.0
    mscale_all_dim: float = 0.0
    rotated_share: float = 1.0
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        check_field_values(self)


def read_rope(family: DecoderFamily, config: Fields, get: Get) -> Fields:
    """Reads RoPE's fields of a config.json of transformers 4 or 5.

    Args:
      family: the model's family.
      config: the parsed config.json.
      get: reads a field of it, with the family's default.

    Returns:
      rope_theta, rope_scaling, rope_local_theta and partial_rotary_factor.

    Raises:
      ConfigError: names what is missing or not supported.
    """
    name = family.model_type
    fields = dict(config.get("rope_parameters") or family.defaults.get("rope_parameters") or {})
    local_theta = None
    if family.windows_rotate_apart:
        local_theta = _take_local_theta(fields)
        fields |= fields.pop("full_attention", None) or {}
        fields |= config.get("rope_scaling") or {}
    else:
        fields = fields or dict(get("rope_scaling") or {})
    nested = [name for name, value in fields.items() if isinstance(value, Mapping)]
    if nested:
        raise ConfigError(
            f"RoPE parameters per layer type ({', '.join(nested)}) are not supported for {name}. "
            "Use one set of rope_parameters for all layers."
        )
    fields = {field: value for field, value in fields.items() if field not in _WITHOUT_EFFECT}
    legacy_kind = fields.pop("type", "default")
    kind = fields.pop("rope_type", legacy_kind) or "default"
    theta = float(_first_not_none(fields.pop("rope_theta", None), get("rope_theta", 10000.0)))
    if family.windows_rotate_apart:
        local_theta = float(_first_not_none(local_theta, get("rope_local_base_freq", theta)))
    partial = _first_not_none(fields.pop(_PARTIAL, None), get(_PARTIAL), 1.0)
    if kind == _PROPORTIONAL:
        fields["rotated_share"], partial = float(partial), 1.0
    if _PARTIAL not in family.reads and partial != 1:
        raise ConfigError(
            f"partial_rotary_factor={partial} is not supported for {name}. Only 1 is: remove the "
            "field, or use another model."
        )
    if fields.get(_BETA) and _BETA not in family.reads:
        raise ConfigError(
            f"{_BETA}={fields[_BETA]} is not supported for {name}. Remove the field, or use "
            "another model."
        )
    # The kind of scaling that the family supports.
    kind = family.rope_aliases.get(kind, kind)
    kinds = family.rope_kinds or tuple(name for name in _KINDS if name != _PROPORTIONAL)
    if kind == "default" and family.rope_kinds == (_PROPORTIONAL,):  # it then rotates all pairs
        kind = _PROPORTIONAL
    if kind == "default":
        scaling = None
    elif kind in kinds:
        context = get("max_position_embeddings", 2048)
        outside = get(_ORIGINAL) if _ORIGINAL in family.reads else None
        scaling = _read_scaling(kind, fields, context, outside)
    else:
        raise ConfigError(
            f"RoPE type {kind!r} is not supported for {name}. Use {', '.join(kinds)} or default."
        )
    return {
        "rope_theta": theta,
        "rope_scaling": scaling,
        "rope_local_theta": local_theta,
        "partial_rotary_factor": float(partial),
    }


def _first_not_none(*values: Any) -> Any:
    """Returns the first value that is not None; a 0 counts, and is rejected later."""
    for value in values:
        if value is not None:
            return value
    return None


def _take_local_theta(fields: dict[str, Any]) -> float | None:
    """Removes the fields of windowed layers, and returns their RoPE base."""
    local_fields = dict(fields.pop("sliding_attention", None) or {})
    theta: float | None = local_fields.pop("rope_theta", None)
    kind = local_fields.pop("rope_type", "default")
    if kind != "default" or any(local_fields.values()):
        raise ConfigError(
            f"RoPE type {kind!r} of sliding_attention ({local_fields}) is not supported. Use "
            "'default' there."
        )
    return theta


def _read_scaling(kind: str, fields: Fields, context: int, original: int | None) -> RopeScaling:
    """Reads a scaling; `original` has priority over original_max_position_embeddings."""
    fields = {name: value for name, value in fields.items() if value is not None}
    # Every needed field must be there, and no unknown one.
    needed_names, optional_names = _KINDS[kind]
    missing_names = sorted(set(needed_names) - set(fields))
    if missing_names:
        raise ConfigError(
            f"The RoPE scaling of type {kind!r} lacks {', '.join(missing_names)}. Add these fields."
        )
    known_names = {*needed_names, *optional_names}
    unknown_names = sorted(
        name for name, value in fields.items() if name not in known_names and value is not False
    )
    if unknown_names:
        raise ConfigError(
            f"RoPE type {kind!r} with {', '.join(unknown_names)} is not supported. Remove these "
            "fields, or use another type."
        )
    scaling = {name: value for name, value in fields.items() if name in known_names}
    if kind in ("linear", _PROPORTIONAL):
        return RopeScaling(kind=kind, **scaling)
    scaling[_ORIGINAL] = original or scaling.get(_ORIGINAL, context)
    if kind in ("yarn", "longrope"):
        scaling["attention_factor"] = _attention_factor(kind, scaling, context)
        scaling.pop("mscale", None)
    if kind == "longrope":
        scaling.pop("factor", None)  # the attention factor has it
        for name in ("short_factor", "long_factor"):
            scaling[name] = tuple(float(factor) for factor in scaling[name])
    return RopeScaling(kind=kind, **scaling)


def _attention_factor(kind: str, fields: Fields, context: int) -> float:
    """Returns the scale of queries and keys, given or by the YaRN or LongRoPE paper."""
    if "attention_factor" in fields:
        return float(fields["attention_factor"])
    original_context = fields[_ORIGINAL]
    factor = _first_not_none(fields.get("factor"), context / original_context)
    if factor <= 1:
        return 1.0
    if kind == "longrope":
        return math.sqrt(1 + math.log(factor) / math.log(original_context))
    # YaRN: the ratio of two factors, by default that of the paper over 1.
    numerator_scale = fields.get("mscale")
    denominator_scale = fields.get("mscale_all_dim")
    if not (numerator_scale and denominator_scale):
        numerator_scale = 1.0
        denominator_scale = 0.0
    numerator = 0.1 * numerator_scale * math.log(factor) + 1
    denominator = 0.1 * denominator_scale * math.log(factor) + 1
    return numerator / denominator


def write_rope(family: DecoderFamily, fields: Fields) -> dict[str, object]:
    """Writes config.json's fields on RoPE for transformers 4 and 5; see ``read_rope``."""
    out: dict[str, Any] = {"rope_theta": fields["rope_theta"]}
    if family.windows_rotate_apart and "rope_local_base_freq" not in family.reads:
        # transformers 5 alone has a base for each; it adds rope_scaling to full_attention's fields.
        bases = {"full_attention": "rope_theta", "sliding_attention": "rope_local_theta"}
        out["rope_parameters"] = {
            kind: {"rope_type": "default", "rope_theta": fields[base]}
            for kind, base in bases.items()
        }
    elif fields["rope_local_theta"] is not None:
        out["rope_local_base_freq"] = fields["rope_local_theta"]
    if "partial_rotary_factor" in family.reads:
        out["partial_rotary_factor"] = fields["partial_rotary_factor"]
    scaling = fields["rope_scaling"]
    if scaling is None:
        has_default_scaling = "rope_scaling" in family.defaults  # which would be read
        if has_default_scaling:
            out["rope_scaling"] = {"rope_type": "default"}
        return out
    if scaling.kind == _PROPORTIONAL:
        out["rope_parameters"]["full_attention"] |= {
            "rope_type": scaling.kind,
            "factor": scaling.factor,
            "partial_rotary_factor": scaling.rotated_share,
        }
        return out
    if _ORIGINAL in family.reads:
        out[_ORIGINAL] = scaling.original_max_position_embeddings
    out["rope_scaling"] = {"rope_type": scaling.kind, **_scaling_fields(scaling)}
    return out


def _scaling_fields(scaling: RopeScaling) -> dict[str, Any]:
    """Returns config.json's fields of a scaling of any kind but "proportional"."""
    needed_names, optional_names = _KINDS[scaling.kind]
    values = dataclasses.asdict(scaling)
    fields: dict[str, Any] = {}
    for name in (*needed_names, *optional_names):
        is_omitted = name in (_BETA, _ALL_DIM) and not values[name]
        if name in values and not is_omitted:
            fields[name] = values[name]
    if scaling.kind == "longrope":
        del fields["factor"]  # the attention factor has it
        for name in needed_names:
            fields[name] = list(fields[name])
    return fields
