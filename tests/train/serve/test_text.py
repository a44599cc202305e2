"""Text while it grows: stops, characters of several bytes, and calls of tools."""

import json
import random

import numpy as np
import pytest

from tests.train.serve.scripted import EOS, TOKENIZER, TOKENS, ids
from tests.train.tiny import SPECIAL
from train.serve.routes.openai.chat import ToolCalls
from train.serve.routes.openai.text import CompletionText

ALPHABET = ["a", "b", "ab", "é", "€", "𝄞", "c", " "]


def parts_of(text, tokens):
    parts = [text.add(token, -1.0) for token in tokens]
    return [*parts, text.end()]


def cut(text, stops):
    """Returns the text before the stop that is whole first, the earliest, by brute force."""
    for n in range(len(text) + 1):
        places = [text[:n].find(stop) for stop in stops if stop in text[:n]]
        if places:
            return text[: min(places)], True
    return text, False


def test_text_comes_whole_and_is_never_retracted():
    for seed in range(200):
        comes_whole(random.Random(seed))


def comes_whole(rng):
    said = "".join(rng.choices(ALPHABET, k=rng.randrange(1, 15)))
    stops = ["".join(rng.choices(ALPHABET, k=rng.randrange(1, 4))) for _ in range(rng.randrange(4))]
    stops = [stop for stop in stops if not any(one != stop and one in stop for one in stops)]
    text = CompletionText(TOKENS, stops)
    parts = parts_of(text, ids(said, end=False))
    expected, stopped = cut(said, stops)
    assert "".join(part for part, _ in parts) == expected
    assert text.stopped == stopped
    entries = [entry for _, found in parts for entry in found]
    known = b"".join(TOKENS.of(entry.token) for entry in entries)
    assert known.decode() == expected  # the tokens that are told are those of the text
    assert all(
        expected[entry.start :].startswith(_char(entries, i)) for i, entry in enumerate(entries)
    )


def _char(entries, i):
    """The character that begins at a token, if one does."""
    rest = b"".join(TOKENS.of(entry.token) for entry in entries[i:])
    return "" if 0x80 <= rest[0] < 0xC0 else rest.decode()[0]


def test_a_special_token_is_a_stop_text_and_is_not_shown_otherwise():
    pad, begin, _ = SPECIAL
    said = ids(f"a{pad}b{begin}c {begin}d", end=False)
    for stops, expected in (
        ([begin], "ab"),
        ([f" {begin}"], "abc"),
        ([f"{begin}x", "d"], "abc "),
        ([f"{pad}z"], "abc d"),
    ):
        text = CompletionText(TOKENS, stops)
        parts = parts_of(text, said)
        assert "".join(part for part, _ in parts) == expected
        assert text.stopped == (expected != "abc d") and text.length == len(expected)


@pytest.mark.parametrize("stops", [["b", "ab"], ["ab", "b"]])
def test_of_stops_that_end_together_the_first_to_begin_counts(stops):
    text = CompletionText(TOKENS, stops)
    assert "".join(part for part, _ in parts_of(text, ids("xabc", end=False))) == "x"


def test_text_comes_as_soon_as_it_is_sure():
    text = CompletionText(TOKENS, ["END"])
    parts = [text.add(token)[0] for token in ids("aEx€EN.ENDz", end=False)]
    assert parts == ["a", "", "Ex", "", "", "€", "", "", "EN.", "", "", "", ""]


def test_bytes_that_are_no_text_are_replaced():
    rng = np.random.default_rng(0)
    for _ in range(50):
        tokens = rng.integers(0, 256, rng.integers(1, 60)).tolist()
        whole = "".join(part for part, _ in parts_of(CompletionText(TOKENS), tokens))
        assert len(whole) > 0
        if len(tokens) < 30:  # beyond, a character may be given up
            assert whole == TOKENIZER.decode(tokens)


def test_tokens_stand_for_their_bytes():
    assert sorted(TOKENS.of(token) for token in range(256)) == [bytes([i]) for i in range(256)]
    assert TOKENS.of(EOS) == b"<|im_end|>"
    assert b"".join(map(TOKENS.of, ids("naïve €", end=False))).decode() == "naïve €"


CALL = {"name": "look_up", "arguments": {"city": "Zürich </tool_call>", "n": [1, 2]}}
WRAPPED = f"<tool_call>\n{json.dumps(CALL)}\n</tool_call>"
OTHER = '<tool_call>{"name": "stop", "arguments": {}}</tool_call>'
CASES = [
    ("no call < at all", "no call < at all", []),
    (f"first \n{WRAPPED}\n{OTHER}\n", "first", ["look_up", "stop"]),
    (f"{OTHER}\nand then", "and then", ["stop"]),
    (f"{OTHER[:-12]}", "", ["stop"]),  # the model ended without the tag
    ("<tool_call>no JSON</tool_call> x", "<tool_call>no JSON</tool_call> x", []),
    (f"<tool_call>[1]</tool_call>{OTHER}", "<tool_call>[1]</tool_call>", ["stop"]),
    ("an open <tool_call>{", "an open <tool_call>{", []),
    ("a tail <tool_c", "a tail <tool_c", []),
]


@pytest.mark.parametrize(("text", "content", "names"), CASES)
@pytest.mark.parametrize("size", [1, 2, 7, 1000])
def test_calls_are_found_however_the_text_comes(text, content, names, size):
    calls = ToolCalls()
    pieces = [text[i : i + size] for i in range(0, len(text), size)]
    parts = [calls.add(piece) for piece in pieces] + [calls.add("", last=True)]
    assert "".join(part for part, _, _ in parts) == content
    found = [call for _, some, _ in parts for call in some]
    assert [call["function"]["name"] for call in found] == names
    assert [call["index"] for call in found] == [*range(len(names))]
    for call in found:
        if call["function"]["name"] == "look_up":
            assert json.loads(call["function"]["arguments"]) == CALL["arguments"]
