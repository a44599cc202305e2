"""Checks the fields of a config.json; an unknown field that has an effect is an error."""

import dataclasses
import json
import math
from collections.abc import Collection, Mapping, Set
from numbers import Integral, Real
from pathlib import Path
from types import NoneType
from typing import Any, TypeVar, cast, get_args

from lora_jax.core.types import Fields

KnownT = TypeVar("KnownT")

# Known fields without an effect on the logits.
FIELDS_WITHOUT_EFFECT = frozenset(
    """
    _attn_implementation _name_or_path architectures auto_map bad_words_ids begin_suppress_tokens
    cache_implementation chunk_size_feed_forward cross_attention_hidden_size decoder_start_token_id
    diversity_penalty do_sample dtype early_stopping encoder_no_repeat_ngram_size
    exponential_decay_length_penalty finetuning_task forced_bos_token_id forced_eos_token_id
    id2label is_decoder is_llama_config label2id length_penalty max_length max_window_layers
    min_length no_repeat_ngram_size num_beam_groups num_beams num_return_sequences
    output_attentions output_hidden_states output_router_logits output_scores prefix pretraining_tp
    problem_type pruned_heads remove_invalid_values repetition_penalty return_dict
    return_dict_in_generate router_aux_loss_coef sep_token_id suppress_tokens task_specific_params
    temperature tf_legacy_loss tie_encoder_decoder tokenizer_class top_k top_p torch_dtype
    torchscript transformers.js_config transformers_version typical_p unsloth_fixed unsloth_version
    use_bfloat16 use_cache
    """.split()
)


# Known fields that would change the forward pass, and the only value that is supported.
_ONLY_SUPPORTED_VALUES = {
    "add_cross_attention": False,
    "is_encoder_decoder": False,
    "quantization_config": None,
}


# Floats of configurations that must be above 0, and those that must be 0 at least.
_POSITIVE_FIELDS = frozenset(
    """
    rope_theta rope_local_theta partial_rotary_factor rotated_share factor low_freq_factor
    high_freq_factor attention_factor beta_fast beta_slow short_factor long_factor logits_scaling
    query_pre_attn_scalar attn_logit_softcapping final_logit_softcapping swiglu_limit
    """.split()
)
_NON_NEGATIVE_FIELDS = frozenset("rms_norm_eps layer_norm_eps initializer_range".split())


class ConfigError(ValueError):
    """A model configuration is not supported or not complete."""


class FieldTypeError(ConfigError):
    """A field of a configuration has a value of the wrong type, such as a text for a number."""


def read_json_fields(path: Path, owner: str, error_class: type[ValueError]) -> dict[str, Any]:
    """Reads a JSON file of fields.

    Args:
      path: the file.
      owner: the thing that it belongs to, for messages: "a model".
      error_class: the class of errors.

    Raises:
      ValueError: the file is missing, or holds no fields; its class is `error_class`.
    """
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise error_class(
            f"{path} is missing. The folder of {owner} must hold {path.name}. Check the path, or "
            "copy the file."
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise error_class(
            f"{path} cannot be read: {error}. Copy or download the file again."
        ) from None
    if not isinstance(fields, dict):
        raise error_class(
            f"{path} holds a {type(fields).__name__}, not the fields of {owner}. Copy or download "
            "the file again."
        )
    return fields


def check_supported(name: str, value: object, known: Collection[KnownT]) -> KnownT:
    """Returns a supported value; raises a ConfigError for any other value."""
    if value not in known:
        listing = ", ".join(map(str, known))
        raise ConfigError(f"{name} {value!r} is not supported. Supported values are {listing}.")
    return cast(KnownT, value)


def check_multiple(**sizes: int) -> None:
    """Raises a ConfigError unless the first of two sizes is a multiple of the second."""
    (name, size), (divisor_name, divisor) = sizes.items()
    if size % divisor:
        raise ConfigError(
            f"{name} ({size}) must be a multiple of {divisor_name} ({divisor}). Correct the "
            "configuration."
        )


def read_boolean(name: str, value: object) -> bool:
    """Returns a field that must be true or false; None counts as false.

    Raises:
      KindError: for any other value, such as the text "false".
    """
    if value is None:
        return False
    if not isinstance(value, bool):
        raise FieldTypeError(
            f"{name} ({value!r}) must be true or false. Correct the configuration."
        )
    return value


def check_field_values(config: Any, names: Mapping[str, str] | None = None) -> None:
    """Checks the types and ranges of a configuration's numbers and booleans.

    A whole number must be at least 1, or at least 0 if the default is 0, which stands for none. Ids
    of tokens may be any whole numbers.

    Args:
      config: a dataclass. Fields with other values than numbers and switches are not checked.
      names: the names of fields in config.json, where they are not the dataclass's.

    Raises:
      KindError: a field holds a value of another kind.
      ConfigError: a number is out of range, or is not finite.
    """
    json_names = names or {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        kinds = get_args(field.type) or (field.type,)  # such as of `int | None`
        is_absent = value is None and NoneType in kinds
        if is_absent:
            continue
        json_name = json_names.get(field.name, field.name)
        if kinds[0] is bool:
            read_boolean(json_name, value)
        elif kinds[0] in (int, float):
            numbers = value if isinstance(value, tuple) else (value,)
            for number in numbers:
                _check_number(json_name, number, field, kinds[0])


def _check_number(name: str, value: Any, field: "dataclasses.Field[Any]", kind: object) -> None:
    """Raises a ConfigError for a number of the wrong type, or outside its field's range."""
    is_integer = kind is int
    is_number = isinstance(value, Integral if is_integer else Real)
    if isinstance(value, bool) or not is_number:
        kind_name = "a whole number" if is_integer else "a number"
        raise FieldTypeError(f"{name} ({value!r}) must be {kind_name}. Correct the configuration.")
    is_token_id = field.name.endswith(("_id", "_ids"))
    requirement = "finite"
    is_in_range = True
    if field.name in _POSITIVE_FIELDS:
        requirement = "finite and above 0"
        is_in_range = value > 0
    elif field.name in _NON_NEGATIVE_FIELDS:
        requirement = "finite and at least 0"
        is_in_range = value >= 0
    elif is_integer and not is_token_id:
        minimum = 0 if field.default in (0, ()) else 1
        requirement = f"at least {minimum}"
        is_in_range = value >= minimum
    if not (is_in_range and math.isfinite(value)):
        raise ConfigError(f"{name} ({value!r}) must be {requirement}. Correct the configuration.")


def read_eos(config: Fields) -> tuple[int, ...]:
    """Returns the end tokens of a config.json as a tuple."""
    eos = config.get("eos_token_id")
    if eos is None:
        return ()
    return tuple(eos) if isinstance(eos, list | tuple) else (eos,)


def write_eos(tokens: tuple[int, ...]) -> list[int] | int | None:
    """Returns the config.json field for these end tokens, as `read_eos` reads it."""
    if not tokens:
        return None
    return list(tokens) if len(tokens) > 1 else tokens[0]


def check_no_unknown_fields(
    config: Fields, family: str, known: Set[str], unsupported: Mapping[str, object] | None = None
) -> None:
    """Raises a ConfigError for unknown fields and unsupported values.

    Args:
      config: the parsed config.json.
      family: its model_type.
      known: the fields that the family's configuration reads.
      unsupported: further fields that would change the forward pass, each with the only value that
        is supported (None is allowed as well).

    Raises:
      ConfigError: there are such fields; names each of them.
    """
    supported_values = {**_ONLY_SUPPORTED_VALUES, **(unsupported or {})}
    problems = []
    for name, value in config.items():
        if name in supported_values:
            is_supported = value is None or value == supported_values[name]
            if not is_supported:
                problems.append(f"{name}={value!r} is not supported.")
            continue
        is_known = name in known or name in FIELDS_WITHOUT_EFFECT
        is_off = value is None or value is False
        if not is_known and not is_off:
            problems.append(f"{name}={value!r} is not known for {family}.")
    if problems:
        raise ConfigError(
            " ".join(problems)
            + " If a field does not change the logits, remove it from config.json."
        )
