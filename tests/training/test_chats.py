"""Chats, their templates, and which tokens the loss counts."""

import pytest

from lora_jax.training.data.chats import check_lengths, tokenize
from lora_jax.training.data.rows import conversation, question
from lora_jax.training.errors import TrainingError
from tests.train.tiny import FORGETFUL, tokenizer
from train.console.errors import flag

USER, ASSISTANT = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}


def refused(match):
    return pytest.raises(TrainingError, match=match)


def counted(row, template=None):
    """For each sequence of a row: (its text, the text of the tokens that count)."""
    made = tokenizer(template) if template else tokenizer()
    return [
        (made.decode(t.ids), made.decode(t.ids[t.counts])) for t in tokenize([row], made, "data")
    ]


@pytest.mark.parametrize(
    ("row", "text", "completion"),
    [
        (
            {"prompt": "2+2?", "completion": "4"},
            "<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n4<|im_end|>",
            "4<|im_end|>",
        ),
        (
            {"messages": [{"role": "system", "content": "Be <b>."}, USER, ASSISTANT]},
            "<|im_start|>system\nBe <b>.<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n"
            "<|im_start|>assistant\nyo<|im_end|>",
            "yo<|im_end|>",
        ),
        (  # every assistant turn counts, and what follows the last one is left out
            {"messages": [USER, ASSISTANT, USER, {**ASSISTANT, "content": " ü"}, USER]},
            "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nyo<|im_end|>\n"
            "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n ü<|im_end|>",
            "yo<|im_end|> ü<|im_end|>",
        ),
    ],
)
def test_the_loss_counts_what_the_assistant_says(row, text, completion):
    assert counted(row) == [(text, completion)]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "hi", "completion": "yo"},
        {"instruction": "hi", "output": "yo"},
        {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yo"}]},
        {"messages": [USER, ASSISTANT]},
        {"messages": [{"role": "system", "content": "Be."}, USER, ASSISTANT]},
    ],
)
def test_the_system_of_a_row_is_its_first_turn(row):
    said = [{"role": "system", "content": "Be."}, USER, ASSISTANT]
    assert counted({**row, "system": "Be."}) == counted({"messages": said})
    for nothing in ("", None):
        assert counted({**row, "system": nothing}) == counted(row)
    with refused("data, row 1: `system` is 3, but it must be a text"):
        counted({**row, "system": 3})
    if "messages" in row and len(row["messages"]) == 3:
        with refused("begins with another system turn. Remove one"):
            counted({**row, "system": "Be kind."})


def test_the_system_of_a_prompt_is_its_first_turn():
    said = question({"prompt": "hi", "system": "Be."}, "a row").messages
    assert said == [{"role": "system", "content": "Be."}, USER]


def test_a_template_that_rewrites_earlier_turns_gives_a_sequence_for_each_answer():
    said = [{**ASSISTANT, "content": "hm|a"}, {**ASSISTANT, "content": "so|b"}]
    row = {"messages": [USER, said[0], USER, said[1]]}
    first, second = counted(row, FORGETFUL)
    assert first == (
        "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nhm|a<|im_end|>",
        "hm|a<|im_end|>",
    )
    assert second[1] == "so|b<|im_end|>" and "hm|" not in second[0]


def test_without_a_template_a_pair_is_prompt_completion_end():
    made = tokenizer(None)
    (tokens,) = tokenize([{"prompt": "ab", "completion": "cd"}], made, "data")
    assert made.decode(tokens.ids) == "abcd<|im_end|>"
    assert tokens.counts.tolist() == [False, False, True, True, True]
    with refused("data, row 1 is a chat, but the model has no chat templ"):
        tokenize([{"messages": [USER, ASSISTANT, USER, ASSISTANT]}], made, "data")


def test_few_texts_meet_the_tokenizer_at_a_time(monkeypatch):
    """So that long texts' offsets are not all in memory; the tokens are the same."""
    rows = [{"prompt": "ab" * (1 + i % 4), "completion": f"c{i}"} for i in range(30)]
    whole = tokenize(rows, tokenizer(None), "data")
    made, asked = tokenizer(None), []
    call = type(made).__call__

    def counting(self, texts, **options):
        asked.append(sum(map(len, texts)))
        return call(self, texts, **options)

    monkeypatch.setattr("lora_jax.training.data.chats._AT_ONCE", 40)
    monkeypatch.setattr(type(made), "__call__", counting)
    found = tokenize(rows, made, "data")
    assert b"".join(found.as_bytes()) == b"".join(whole.as_bytes())
    assert len(asked) > 5 and max(asked) <= 50


def test_a_template_that_refuses_a_row_is_named_with_it():
    made = tokenizer("{{ raise_exception('only users') }}")
    with refused("data, row 1: the model's chat template refuses the chat .only"):
        tokenize([{"messages": [USER, ASSISTANT]}], made, "data")
    made = tokenizer("{{ messages | length }}{{ add_generation_prompt }}")
    with refused("row 1: the model's chat template renders an answer different"):
        tokenize([{"messages": [USER, ASSISTANT]}], made, "data")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": 1, "sql": 2}, "row 7 has `question`, `sql`; a row needs `messages`"),
        ({}, "row 7 has nothing; a row needs"),
        ({"prompt": "a"}, "row 7 has `prompt`; a row needs"),
        ({"prompt": "a", "completion": None}, "row 7: `completion` is null. Fill it in"),
        ({"prompt": "a", "completion": ""}, "row 7: `completion` is ''"),
        ({"prompt": 3, "completion": "b"}, "row 7: `prompt` is 3"),
        ({"messages": []}, r"row 7: `messages` is \[\]"),
        ({"messages": "hi"}, "row 7: `messages` is 'hi'"),
        ({"messages": ["hi"]}, "row 7: turn 0 is 'hi'"),
        ({"messages": [{"role": "user"}]}, "row 7: `content` of turn 0 is None"),
        ({"messages": [{"content": "x"}]}, "row 7: `role` of turn 0 is None"),
        ({"messages": [USER]}, "row 7 has no assistant turn to learn from, only user"),
        ({"messages": [ASSISTANT, USER]}, "row 7 begins with an assistant turn"),
    ],
)
def test_a_row_that_cannot_be_used_is_named_with_what_it_has(row, message):
    with refused(message):
        conversation(row, "row 7")


def test_rows_that_are_too_long_are_refused_or_cut():
    made = tokenizer(None)
    rows = [{"prompt": "a" * n, "completion": "b" * n} for n in (2, 4, 9)]
    sequences = tokenize(rows, made, "data")
    expected = "2 of 3 sequences are longer than --seq-len 8. The longest sequence has 19 tokens"
    with refused(
        "sequences are longer than seq_len=8. .*cut off their ends with truncate=True"
    ) as caught:
        check_lengths(sequences, 8, truncate=False)
    assert caught.value.said(flag).startswith(expected)
    assert caught.value.said(flag).endswith("cut off their ends with --truncate.")
    cut = check_lengths(sequences, 8, truncate=True)
    assert [len(tokens) for tokens in cut] == [5, 8]  # the third has no completion left
    with refused("seq_len=2 cuts off every row before its completion") as caught:
        check_lengths(sequences, 2, truncate=True)
    assert "--seq-len 2 cuts off every row before its completion" in caught.value.said(flag)
