"""The table of request fields: which ones work, are refused, or have no effect on the answer.

A field stands here once, whoever knows it: OpenAI, vLLM, SGLang or llama.cpp. Any other is unknown.
"""

import dataclasses
import difflib
from collections.abc import Mapping
from typing import Literal

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
Kind = Literal["works", "refused", "no effect"]


@dataclasses.dataclass(frozen=True)
class Field:
    """The way in which the server treats a field.

    Attributes:
      kind: "works"; "refused", as it would change the answer; or "no effect" on the answer.
      values: the values that it may have besides null; None for any that its reader takes.
      instead: what to do instead of another value.
    """

    kind: Kind
    values: tuple[object, ...] | None = None
    instead: str = "Remove it"


def _refused(names: str, *neutral: object, instead: str = "Remove it") -> dict[str, Field]:
    """Returns fields that are refused unless their value has no effect."""
    return dict.fromkeys(names.split(), Field("refused", neutral, instead))


def _fields(kind: Kind, names: str) -> dict[str, Field]:
    """Returns fields of one kind that accept any value."""
    return dict.fromkeys(names.split(), Field(kind))


_VARIABLE = "Pass what the chat template reads as `chat_template_kwargs`"
_COMMON = {
    **_fields(
        "works",
        "model max_tokens max_completion_tokens n best_of temperature top_p top_k seed stop "
        "stop_token_ids ignore_eos logprobs stream stream_options presence_penalty "
        "frequency_penalty repetition_penalty min_p min_tokens logit_bias bad_words "
        "allowed_token_ids skip_special_tokens include_stop_str_in_output truncate_prompt_tokens "
        "prompt_logprobs return_token_ids response_format structured_outputs guided_json "
        "guided_regex guided_choice guided_grammar",
    ),
    **_fields(
        "no effect",
        "user metadata store service_tier safety_identifier prompt_cache_key prompt_cache_options "
        "prompt_cache_retention prediction request_id rid cache_salt cache_prompt keep_alive "
        "guided_decoding_backend mm_processor_kwargs "
        "spaces_between_special_tokens repeat_last_n priority",
    ),
    **_refused("mirostat xtc_probability dry_multiplier dynatemp_range", 0),
    **_refused("repeat_penalty", 1, instead="Pass `repetition_penalty`"),
    **_refused("length_penalty typical_p tfs_z", 1),
    **_refused("stop_regex", []),
    **_refused(
        "guided_decoding guided_whitespace_pattern structural_tag json_schema grammar regex ebnf "
        "format",
        instead="Pass `response_format`, or `structured_outputs` as vLLM has it",
    ),
    **_refused("logits_processors custom_logit_processor session_params", []),
    **_refused("functions", [], instead="Pass `tools`"),
    **_refused("function_call", "none", "auto", instead="Pass `tools`"),
    **_refused("documents", [], instead=_VARIABLE),
    **_refused("reasoning_effort reasoning thinking enable_thinking", instead=_VARIABLE),
    **_refused(
        "include_reasoning", True, instead="Remove it, because reasoning is part of the text"
    ),
    **_refused("verbosity web_search_options audio moderation prompt_embeds"),
    **_refused("kv_transfer_params vllm_xargs thinking_token_budget"),
    **_refused("modalities", ["text"]),
    **_refused("suffix", ""),
    **_refused("add_generation_prompt", True),
    **_refused("do_sample", True, instead="Pass `temperature` 0"),
    **_refused("use_beam_search continue_final_message no_stop_trim", False),
    **_refused("return_hidden_states", False),
    **_refused("return_tokens_as_token_ids", False),
    **_refused("n_predict num_predict max_new_tokens", instead="Pass `max_tokens`"),
    **_refused("lora_path", instead="Name the adapter as `model`"),
    **_refused("options extra_body", {}, instead="Pass its fields themselves"),
}
_CHAT_FIELDS = _fields(
    "works",
    "messages tools tool_choice parallel_tool_calls chat_template chat_template_kwargs "
    "top_logprobs",
)
_COMPLETION_FIELDS = _fields("works", "prompt echo")


def _elsewhere(fields: Mapping[str, Field], path: str, **instead: str) -> dict[str, Field]:
    """Returns fields that belong to another path and are refused here."""
    default_remedy = f"Remove it, because it belongs to {path}"
    neutral_values: tuple[object, ...] = ([], {}, False, "none", "auto")
    return {
        name: Field("refused", neutral_values, instead.get(name, default_remedy)) for name in fields
    }


FIELDS: dict[str, Mapping[str, Field]] = {
    CHAT: _COMMON
    | _elsewhere(_COMPLETION_FIELDS, COMPLETIONS)
    | _CHAT_FIELDS
    | _refused("add_special_tokens", False),
    COMPLETIONS: _COMMON
    | _elsewhere(_CHAT_FIELDS, CHAT, top_logprobs="Pass `logprobs`, the number of alternatives")
    | _COMPLETION_FIELDS
    | _refused("add_special_tokens", True),
}
STREAM_OPTIONS: Mapping[str, Field] = {
    **_fields("works", "include_usage continuous_usage_stats"),
    **_fields("no effect", "include_obfuscation"),
}
STRUCTURED_OUTPUTS: Mapping[str, Field] = {
    **_fields("works", "json regex choice grammar json_object"),
    **_refused("disable_fallback disable_any_whitespace disable_additional_properties", False),
    **_refused("whitespace_pattern structural_tag"),
}
# Of /tokenize and /detokenize, which are vLLM's.
TOKENIZE: Mapping[str, Field] = {
    **_fields("works", "model prompt messages tools chat_template chat_template_kwargs"),
    **_fields("works", "add_special_tokens return_token_strs"),
    **_refused("add_generation_prompt", True),
    **_refused("continue_final_message", False),
}
DETOKENIZE: Mapping[str, Field] = _fields("works", "model tokens")


def nearest(name: str, fields: Mapping[str, Field]) -> str | None:
    """Returns the most similar known field name; None if no name is similar."""
    matches = difflib.get_close_matches(name[:64], fields, n=1, cutoff=0.7)
    return matches[0] if matches else None
