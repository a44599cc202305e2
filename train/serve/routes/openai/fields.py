"""The fields of a request for completions, read as a `SampleRequest` without its prompt."""

import dataclasses
import json
from collections.abc import Mapping
from typing import TypeGuard

from starlette.requests import Request

from lora_jax.training.data.rows import check_text
from lora_jax.training.data.turns import shown
from lora_jax.training.errors import TrainingError
from train.serve.protocol.engine import EngineFacts
from train.serve.protocol.requests import TOP, SampleRequest
from train.serve.routes.errors import HttpError, JsonObject
from train.serve.routes.openai.table import Field, nearest

_MAX_COMPLETIONS = 128  # of a prompt
_MAX_STOPS = 16
_MAX_SEED = 2**63


async def read_body(request: Request) -> JsonObject:
    """Returns the JSON object in a body; raises HttpError for any other body."""
    try:
        body = json.loads(await request.body())
    except (ValueError, RecursionError):
        raise HttpError(400, "the body is not valid JSON. Send a JSON object of fields.") from None
    if not isinstance(body, dict):
        raise HttpError(400, f"the body is {shown(body)}. Send a JSON object of fields.")
    return body


def field_error(name: str, value: object, instruction: str) -> HttpError:
    """Returns the error for a field with an invalid value."""
    return HttpError(400, f"`{name}` is {shown(value)}. {instruction}", param=name)


def read_text(body: Mapping[str, object], name: str) -> str:
    """Returns the value of a text field."""
    value = body.get(name)
    if not isinstance(value, str) or not value:
        raise field_error(name, value, "Pass a text.")
    return value


def read_flag(body: Mapping[str, object], name: str) -> bool:
    """Returns a boolean field; False if the field is missing."""
    value = body.get(name)
    if value is not None and not isinstance(value, bool):
        raise field_error(name, value, "Pass true or false.")
    return bool(value)


def _is_integer(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def read_integer(
    body: Mapping[str, object], name: str, min_value: int, max_value: int
) -> int | None:
    """Returns an integer field within a range, or None if the field is missing."""
    value = body.get(name)
    if value is None:
        return None
    if not (_is_integer(value) and min_value <= value <= max_value):
        raise field_error(name, value, f"Pass a whole number from {min_value} to {max_value}.")
    return value


def read_number(
    body: Mapping[str, object],
    name: str,
    default: float,
    max_value: float,
    min_value: float = 0.0,
) -> float:
    """Returns a numeric field within a range, by default from 0."""
    value = body.get(name)
    if value is None:
        return default
    if not ((isinstance(value, float) or _is_integer(value)) and min_value <= value <= max_value):
        raise field_error(name, value, f"Pass a number from {min_value:g} to {max_value:g}.")
    return float(value)


def check_fields(body: Mapping[str, object], fields: Mapping[str, Field], owner: str) -> None:
    """Raises HttpError for a field that is unknown, or whose value is not supported.

    Args:
      body: the fields that were sent.
      fields: the known fields, of `table`.
      owner: the name of what was sent, for the message.
    """
    for name, value in body.items():
        field = fields.get(name)
        if field is None:
            raise _unknown_field_error(name, fields, owner)
        if value is not None and field.values is not None and value not in field.values:
            raise field_error(name, value, f"This is not supported. {field.instead}.")


def _unknown_field_error(name: str, fields: Mapping[str, Field], owner: str) -> HttpError:
    """Returns the error for an unknown field, with the nearest known name."""
    similar_name = nearest(name, fields)
    if similar_name is not None:
        remedy = f"Did you mean `{similar_name}`?"
    else:
        working_names = [
            field_name for field_name, field in fields.items() if field.kind == "works"
        ]
        remedy = f"Remove it, or use one of {', '.join(working_names)}."
    problem = f"{shown(name)} is not a field of {owner}. {remedy}"
    return HttpError(400, problem, param=name[:100], code="unknown_parameter")


def read_sample(
    body: Mapping[str, object], facts: EngineFacts, *, max_tokens: int | None, min_tokens: int
) -> SampleRequest:
    """Returns a request's sample for the base, with an empty prompt.

    Args:
      body: the fields that chats and plain completions share; see `check_fields`.
      facts: the engine's.
      max_tokens: default of the number of tokens.
      min_tokens: smallest number of tokens; 0 where the prompt itself is scored.

    Raises:
      HttpError: a field is wrong.
    """
    # Both fields are checked; the first one that is there counts.
    max_tokens_fields = [
        read_integer(body, name, min_tokens, 1 << 30)
        for name in ("max_completion_tokens", "max_tokens")
    ]
    for field_tokens in reversed(max_tokens_fields):
        if field_tokens is not None:
            max_tokens = field_tokens
    n_completions = read_integer(body, "n", 1, _MAX_COMPLETIONS) or 1
    best_of = read_integer(body, "best_of", 1, _MAX_COMPLETIONS)
    if best_of not in (None, n_completions):
        raise field_error(
            "best_of",
            best_of,
            "Completions are not compared here. Pass the value of `n`, or remove `best_of`.",
        )
    top_p = read_number(body, "top_p", 1.0, 1.0)
    if top_p == 0:
        raise field_error(
            "top_p", 0, "Pass a number above 0. For greedy decoding, pass `temperature` 0."
        )
    seed = read_integer(body, "seed", -_MAX_SEED, _MAX_SEED)
    stop_ids = set(read_ids(body, "stop_token_ids", facts) or [])
    if not read_flag(body, "ignore_eos"):
        stop_ids |= {*facts.eos}
    return SampleRequest(
        adapter=None,
        prompt=(),
        n=n_completions,
        max_tokens=max_tokens,
        temperature=read_number(body, "temperature", 1.0, 2.0),
        top_k=read_integer(body, "top_k", -1, facts.vocab_size) or -1,
        top_p=top_p,
        seed=None if seed is None else seed % 2**32,
        stop_ids=frozenset(stop_ids),
        stop=_read_stops(body.get("stop")),
    )


def read_max_prompt_tokens(
    body: Mapping[str, object], sample: SampleRequest, facts: EngineFacts
) -> int | None:
    """Returns the number of tokens to which a longer prompt is cut; None for no cut."""
    max_prompt_tokens = read_integer(body, "truncate_prompt_tokens", -1, facts.max_length)
    if max_prompt_tokens == 0:
        raise field_error(
            "truncate_prompt_tokens", 0, "Pass 1 or more, or -1 for as many tokens as fit."
        )
    if max_prompt_tokens != -1:
        return max_prompt_tokens
    completion_tokens = 1 if sample.max_tokens is None else sample.max_tokens
    return max(1, facts.max_length - completion_tokens)


def add_prompt(
    sample: SampleRequest, prompt: list[int], facts: EngineFacts, max_prompt_tokens: int | None
) -> SampleRequest:
    """Returns the sample with a prompt; raises HttpError if the prompt is empty or too long.

    Args:
      sample: the sample.
      prompt: its tokens.
      facts: the engine's.
      max_prompt_tokens: the number of last tokens that are left of a longer prompt; see
        `read_max_prompt_tokens`.
    """
    if max_prompt_tokens is not None:
        prompt = prompt[-max_prompt_tokens:]
    if not prompt:
        raise HttpError(
            400, "the prompt has no tokens. Pass a text that is not empty.", param="prompt"
        )
    n_tokens = len(prompt)
    completion_tokens = 1 if sample.max_tokens is None else sample.max_tokens
    if n_tokens + completion_tokens > facts.max_length:
        drawn = "" if sample.max_tokens is None else f" and {sample.max_tokens:,} are to be drawn"
        raise HttpError(
            400,
            f"the prompt has {n_tokens:,} tokens{drawn}, but this server allows at most "
            f"{facts.max_length:,} for prompt and completion. Pass a shorter prompt, or a "
            "smaller `max_tokens`.",
            param="max_tokens" if n_tokens < facts.max_length else "prompt",
            code="context_length_exceeded",
        )
    return dataclasses.replace(sample, prompt=prompt)


def read_prompts(body: Mapping[str, object], facts: EngineFacts) -> list[str | list[int]]:
    """Returns the prompts of the field `prompt`: texts or lists of token ids."""
    value = body.get("prompt")
    if isinstance(value, str):
        return [value]
    requirement = "Pass a text, a list of token ids, or a list of such prompts."
    if not isinstance(value, list) or not value:
        raise field_error("prompt", value, requirement)
    is_one_prompt = all(isinstance(item, int) for item in value)
    if is_one_prompt:
        return [_check_ids(value, "prompt", facts)]
    for prompt in value:
        if not isinstance(prompt, str | list):
            raise field_error("prompt", value, requirement)
    return [
        prompt if isinstance(prompt, str) else _check_ids(prompt, "prompt", facts)
        for prompt in value
    ]


def read_top(body: Mapping[str, object]) -> int | None:
    """Returns the number of alternatives per token; None if log-probabilities are not requested."""
    n_top = read_integer(body, "top_logprobs", 0, TOP)
    if read_flag(body, "logprobs"):
        return n_top or 0
    if n_top is not None:
        raise field_error("top_logprobs", n_top, "Set `logprobs` to true, too.")
    return None


def read_ids(body: Mapping[str, object], name: str, facts: EngineFacts) -> list[int] | None:
    """Returns a field that is a list of token ids, or None."""
    value = body.get(name)
    return None if value is None else _check_ids(value, name, facts)


def _check_ids(value: object, name: str, facts: EngineFacts) -> list[int]:
    """Returns a field's value if it is a list of token ids; raises HttpError otherwise."""
    if not isinstance(value, list):
        raise field_error(name, value, "Pass a list of token ids.")
    for token in value:
        if not (_is_integer(token) and 0 <= token < facts.vocab_size):
            raise field_error(name, token, f"Pass ids from 0 to {facts.vocab_size - 1}.")
    return value


def _read_stops(value: object) -> tuple[str, ...]:
    """Returns the stop texts in the field `stop`, which is a text or a list of texts."""
    stops = [value] if isinstance(value, str) else value or []
    if not isinstance(stops, list) or len(stops) > _MAX_STOPS:
        raise field_error("stop", value, f"Pass a text, or a list of at most {_MAX_STOPS} texts.")
    for stop in stops:
        if not isinstance(stop, str) or not stop:
            raise field_error("stop", stop, "Pass texts that are not empty.")
    try:
        check_text("".join(stops), "`stop`")
    except TrainingError as error:
        raise HttpError(400, str(error), param="stop") from None
    return tuple(stops)
