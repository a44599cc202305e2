"""Reads the fields that limit drawn tokens, with vLLM's meaning: penalties, biases, bad words."""

import dataclasses
from collections.abc import Mapping

from train.serve.protocol.engine import EngineFacts
from train.serve.protocol.limits import MOST_BAD, MOST_BIASES, Penalties, TokenLimits
from train.serve.protocol.requests import SampleRequest
from train.serve.routes.openai.fields import field_error, read_ids, read_integer, read_number
from train.serve.routes.openai.text import ServedTokenizer

_MAX_BIAS = 100.0  # biases beyond it are cut, as at vLLM
_MAX_DIGITS = 9  # of a token's id
_MAX_WORD_TOKENS = 1 << 20


def add_limits(
    sample: SampleRequest, body: Mapping[str, object], facts: EngineFacts, tokens: ServedTokenizer
) -> SampleRequest:
    """Returns a sample with the limits of a request.

    Args:
      sample: the sample.
      body: the fields of the request.
      facts: the engine's.
      tokens: tokenizer of the model.

    Raises:
      HttpError: a field is wrong.
    """
    repetition = read_number(body, "repetition_penalty", 1.0, 100.0)
    if repetition == 0:
        raise field_error(
            "repetition_penalty", 0, "Pass a number above 0. The value 1 changes nothing."
        )
    penalties = Penalties(
        repetition=repetition,
        frequency=read_number(body, "frequency_penalty", 0.0, 2.0, -2.0),
        presence=read_number(body, "presence_penalty", 0.0, 2.0, -2.0),
    )
    allowed = read_ids(body, "allowed_token_ids", facts)
    if allowed == []:
        raise field_error("allowed_token_ids", [], "Pass at least one token.")
    limits = TokenLimits(
        allowed=None if allowed is None else tuple(sorted({*allowed})),
        bad=_read_bad_words(body, tokens),
        biases=_read_biases(body.get("logit_bias"), facts),
        min_tokens=_read_min_tokens(body, sample.max_tokens),
        ends=sample.stop_ids | {*facts.eos},
    )
    min_p = read_number(body, "min_p", 0.0, 1.0)
    return dataclasses.replace(sample, penalties=penalties, min_p=min_p, limits=limits)


def _read_min_tokens(body: Mapping[str, object], max_tokens: int | None) -> int:
    """Returns the minimum number of tokens of a completion."""
    min_tokens = read_integer(body, "min_tokens", 0, 1 << 30) or 0
    if max_tokens is not None and min_tokens > max_tokens:
        raise field_error(
            "min_tokens", min_tokens, f"Pass at most `max_tokens`, which is {max_tokens}."
        )
    return min_tokens


def _read_biases(value: object, facts: EngineFacts) -> dict[int, float]:
    """Returns the biases by token id, clipped to the range from -100 to 100."""
    if not value:
        return {}
    requirement = f"Pass an object of at most {MOST_BIASES} numbers by token ids."
    if not isinstance(value, dict) or len(value) > MOST_BIASES:
        raise field_error("logit_bias", value, requirement)
    biases: dict[int, float] = {}
    for key, bias in value.items():
        is_id = key.isdecimal() and len(key) <= _MAX_DIGITS and int(key) < facts.vocab_size
        if not is_id:
            raise field_error("logit_bias", key, f"Pass ids from 0 to {facts.vocab_size - 1}.")
        is_number = isinstance(bias, int | float) and not isinstance(bias, bool)
        is_nan = bias != bias
        if not is_number or is_nan:
            raise field_error("logit_bias", bias, requirement)
        biases[int(key)] = float(min(_MAX_BIAS, max(-_MAX_BIAS, bias)))
    return biases


def _read_bad_words(
    body: Mapping[str, object], tokens: ServedTokenizer
) -> tuple[tuple[int, ...], ...]:
    """Returns the token sequences of forbidden words, at the start of a text and within it.

    Within a text, a word may have another first token, and as many of them: vLLM's rule.
    """
    words = body.get("bad_words") or []
    if not isinstance(words, list) or len(words) > MOST_BAD // 2:
        raise field_error("bad_words", words, f"Pass a list of at most {MOST_BAD // 2} texts.")
    bad_ids: list[tuple[int, ...]] = []
    for word in dict.fromkeys(map(str, words)):
        if word not in words or not word.strip():
            raise field_error("bad_words", word, "Pass texts that are not empty.")
        stripped = word.lstrip()
        ids_at_start = tuple(tokens.ids(stripped, _MAX_WORD_TOKENS, special=False))
        ids_within = tuple(tokens.ids(f" {stripped}", _MAX_WORD_TOKENS, special=False))
        bad_ids.append(ids_at_start)
        has_equal_length = 0 < len(ids_within) == len(ids_at_start)
        if has_equal_length and ids_within[0] != ids_at_start[0]:
            bad_ids.append(ids_within)
    return tuple(bad_ids)
