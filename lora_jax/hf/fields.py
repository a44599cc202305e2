"""The fields of Hugging Face's config.json; one that is neither read nor harmless is an error."""

import json
from collections.abc import Collection, Mapping, Set
from pathlib import Path
from typing import Any, TypeVar, cast

from lora_jax.core.types import Fields

KnownT = TypeVar("KnownT")

# Known fields without an effect on the logits.
HARMLESS = frozenset(
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
_UNSUPPORTED = {
    "add_cross_attention": False,
    "is_encoder_decoder": False,
    "quantization_config": None,
}


class ConfigError(ValueError):
    """A model configuration that is not supported, or not complete."""


def read_file(path: Path, kind: str, error: type[ValueError]) -> dict[str, Any]:
    """Reads a JSON file of fields.

    Args:
      path: the file.
      kind: the thing that it belongs to, for messages: "a model".
      error: the class of errors.

    Raises:
      ValueError: the file is missing, or holds no fields; its class is `error`.
    """
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise error(f"{path} is missing: the folder of {kind} holds {path.name}") from None
    except (OSError, ValueError, RecursionError) as why:
        raise error(f"{path} cannot be read: {why}") from None
    if not isinstance(fields, dict):
        raise error(f"{path} holds a {type(fields).__name__}, not the fields of {kind}")
    return fields


def check_known(name: str, value: object, known: Collection[KnownT]) -> KnownT:
    """Returns a value that is known; raises a ConfigError that lists the known ones for others."""
    if value not in known:
        listed = ", ".join(map(str, known))
        raise ConfigError(f"{name} {value!r} is not supported; supported are {listed}")
    return cast(KnownT, value)


def check_multiple(**sizes: int) -> None:
    """Raises a ConfigError unless the first of two sizes is a multiple of the second."""
    (name, size), (other, part) = sizes.items()
    if size % part:
        raise ConfigError(f"{name} ({size}) is not a multiple of {other} ({part})")


def read_eos(config: Fields) -> tuple[int, ...]:
    """Returns the tokens that end a text: config.json has one, several or none."""
    eos = config.get("eos_token_id")
    return () if eos is None else tuple(eos) if isinstance(eos, list) else (eos,)


def write_eos(tokens: tuple[int, ...]) -> list[int] | int | None:
    """Returns the inverse of `read_eos`, the field."""
    return list(tokens) if len(tokens) > 1 else tokens[0] if tokens else None


def refuse_unknown(
    config: Fields, family: str, known: Set[str], unsupported: Mapping[str, object] | None = None
) -> None:
    """Refuses fields that are not read, and values that are not supported.

    Args:
      config: the parsed config.json.
      family: its model_type.
      known: the fields that the family's configuration reads.
      unsupported: further fields that would change the forward pass, each with the only value that
        is supported (None is allowed as well).

    Raises:
      ConfigError: there are such fields; names each of them.
    """
    problems = []
    unsupported = {**_UNSUPPORTED, **(unsupported or {})}
    for name, value in config.items():
        if name in unsupported:
            if value is not None and value != unsupported[name]:
                problems.append(f"{name}={value!r} is not supported")
        elif name not in known | HARMLESS and value is not None and value is not False:
            problems.append(f"{name}={value!r} is not known for {family}")
    if problems:
        raise ConfigError(
            "; ".join(problems)
            + " (a field that does not change the logits can be removed from config.json)"
        )
