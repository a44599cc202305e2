"""The fields that limit what is drawn, with vLLM's meaning: penalties, biases, tokens and words."""

import dataclasses
from collections.abc import Mapping

from train.serve.protocol.engine import EngineFacts
from train.serve.protocol.limits import MOST_BAD, MOST_BIASES, Penalties, TokenLimits
from train.serve.protocol.requests import SampleRequest
from train.serve.routes.openai.fields import field_error, read_ids, read_integer, read_number
from train.serve.routes.openai.text import ServedTokenizer

_BIAS = 100.0  # biases beyond it are cut, as at vLLM
_DIGITS = 9  # of a token's id, at most


def add_limits(
    sample: SampleRequest, body: Mapping[str, object], facts: EngineFacts, tokens: ServedTokenizer
) -> SampleRequest:
    """Returns a sample with the limits that a request asks for.

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
        raise field_error("repetition_penalty", 0, "a number above 0 is needed; 1 changes nothing")
    penalties = Penalties(
        repetition=repetition,
        frequency=read_number(body, "frequency_penalty", 0.0, 2.0, -2.0),
        presence=read_number(body, "presence_penalty", 0.0, 2.0, -2.0),
    )
    allowed = read_ids(body, "allowed_token_ids", facts)
    if allowed == []:
        raise field_error("allowed_token_ids", [], "one token at least is needed")
    limits = TokenLimits(
        allowed=None if allowed is None else tuple(sorted({*allowed})),
        bad=_read_bad_words(body, tokens),
        biases=_read_biases(body.get("logit_bias"), facts),
        min_tokens=_read_min_tokens(body, sample.max_tokens),
        ends=sample.stop_ids | {*facts.eos},
    )
    min_p = read_number(body, "min_p", 0.0, 1.0)
    return dataclasses.replace(sample, penalties=penalties, min_p=min_p, limits=limits)


def _read_min_tokens(body: Mapping[str, object], most: int | None) -> int:
    least = read_integer(body, "min_tokens", 0, 1 << 30) or 0
    if most is not None and least > most:
        raise field_error("min_tokens", least, f"at most `max_tokens`, {most}, are possible")
    return least


def _read_biases(given: object, facts: EngineFacts) -> dict[int, float]:
    """Returns the biases of tokens, from -100 to 100."""
    if not given:
        return {}
    needed = f"an object of {MOST_BIASES} numbers at most by token ids is needed"
    if not isinstance(given, dict) or len(given) > MOST_BIASES:
        raise field_error("logit_bias", given, needed)
    biases: dict[int, float] = {}
    for key, bias in given.items():
        if not key.isdecimal() or len(key) > _DIGITS or int(key) >= facts.vocab_size:
            known = f"ids from 0 to {facts.vocab_size - 1} are needed"
            raise field_error("logit_bias", key, known)
        if isinstance(bias, bool) or not isinstance(bias, int | float) or bias != bias:
            raise field_error("logit_bias", bias, needed)
        biases[int(key)] = float(min(_BIAS, max(-_BIAS, bias)))
    return biases


def _read_bad_words(
    body: Mapping[str, object], tokens: ServedTokenizer
) -> tuple[tuple[int, ...], ...]:
    """Returns the tokens of words that are not to come, as they begin a text and within one.

    Within a text, a word may have another first token, and as many of them: vLLM's rule.
    """
    given = body.get("bad_words") or []
    if not isinstance(given, list) or len(given) > MOST_BAD // 2:
        raise field_error("bad_words", given, f"a list of {MOST_BAD // 2} texts at most is needed")
    runs: list[tuple[int, ...]] = []
    for word in dict.fromkeys(map(str, given)):
        if word not in given or not word.strip():
            raise field_error("bad_words", word, "texts that are not empty are needed")
        first, within = (
            tuple(tokens.ids(space + word.lstrip(), 1 << 20, special=False)) for space in ("", " ")
        )
        runs.append(first)
        if 0 < len(within) == len(first) and within[0] != first[0]:
            runs.append(within)
    return tuple(runs)
