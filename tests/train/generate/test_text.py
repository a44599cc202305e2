"""An answer as it grows: what is shown is the whole text, piece by piece, and nothing too early."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_jax.models.sampling.text import StopTexts
from tests.train.tiny import SPECIAL, tokenizer
from train.generate.answers import GeneratedAnswer

TOKENIZER = tokenizer()
END = TOKENIZER.convert_tokens_to_ids(SPECIAL[2])


def answer(stops=(), most=1000):
    return GeneratedAnswer(TOKENIZER, ends=(END,), stops=stops, most=most)


def tokens_of(text):
    return TOKENIZER(text)["input_ids"]


def shown(made, tokens, size=1):
    pieces = []
    for at in range(0, len(tokens), size):
        made.add(tokens[at : at + size])
        pieces.append(made.take_new_text())
    return pieces


def test_a_character_is_shown_once_all_its_bytes_are_there():
    pieces = shown(answer(), tokens_of("aé€ 🙂b"))
    assert pieces == ["a", "", "é", "", "", "€", "", "", "", "", " 🙂", "b"]


def test_white_space_waits_for_a_word():
    pieces = shown(answer(), [*tokens_of("\n a b \n"), END])
    assert pieces == ["", "", "a", "", " b", "", "", ""]


@pytest.mark.parametrize("size", [1, 3, 40])
def test_a_stop_text_ends_the_answer_and_is_no_part_of_it(size):
    made = answer(stops=("STOP", "never"))
    pieces = shown(made, tokens_of("one STO two SSTOP three never"), size)
    assert "".join(pieces) == made.text == "one STO two S" and made.ended == "stop"
    assert len(made.tokens) == len("one STO two SSTOP")  # a token a byte
    if size == 1:
        assert pieces[4:9] == ["", "", "", " STO", " t"]


@pytest.mark.parametrize("size", [1, 3, 40])
def test_a_special_token_is_a_stop_text_and_is_not_shown_otherwise(size):
    pad, begin, _ = SPECIAL
    said = tokens_of(f"a{pad}b{begin}c\n{begin}d")
    for stops, text, n in (
        ((begin,), "ab", 4),
        ((f"\n{begin}",), "abc", 7),
        ((f"{begin}x", "d"), "abc\n", 8),
        ((f"{pad}z",), "abc\nd", None),
    ):
        made = answer(stops, most=len(said))
        assert "".join(shown(made, said, size)) == made.text == text.strip()
        assert (made.ended, len(made.tokens)) == (("stop", n) if n else ("length", 8))
        assert StopTexts(TOKENIZER, stops).cut(said) == (text, n)


def test_how_it_ends():
    by_end, by_length, both = answer(), answer(most=3), answer(most=3)
    by_end.add([*tokens_of("ab"), END, *tokens_of("c")])
    by_length.add(tokens_of("abcd"))
    both.add([*tokens_of("ab"), END])
    assert [one.ended for one in (by_end, by_length, both)] == ["eos", "length", "eos"]
    assert [one.text for one in (by_end, by_length, both)] == ["ab", "abc", "ab"]
    assert [len(one.tokens) for one in (by_end, by_length, both)] == [3, 3, 3]


@given(
    st.lists(st.one_of(st.integers(0, 258), st.sampled_from(tokens_of("a b\n"))), max_size=30),
    st.integers(1, 7),
    st.lists(
        st.one_of(st.text("ab \n", min_size=1, max_size=3), st.sampled_from(SPECIAL)), max_size=2
    ),
)
@settings(max_examples=200, deadline=None)
def test_the_pieces_are_the_text(tokens, size, stops):
    """For any tokens, valid UTF-8 or not; and it does not matter how many come at once."""
    made, at_once = answer(stops), answer(stops)
    pieces = shown(made, tokens, size)
    made.ended = made.ended or "length"
    assert "".join([*pieces, made.take_new_text()]) == made.text
    at_once.add(tokens)
    assert at_once.tokens == made.tokens and at_once.text == made.text
