"""A field that a chat template drops is an error; where it drops it of some turns, a report."""

import re

import pytest

from lora_jax import training
from lora_jax.training.data.chats import tokenize
from lora_jax.training.data.rows import PlacedRow, conversation
from lora_jax.training.errors import TrainingError
from tests.train.tiny import CHATML, tokenizer

USER, ASSISTANT = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}
AGAIN = {"role": "user", "content": "and?"}
THOUGHT = {**ASSISTANT, "reasoning_content": "a rather long chain of thoughts"}
# Shows thoughts up to the turn of the last question, as Qwen3 and gpt-oss do.
THINKING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' %}{% generation %}"
    "{% if m.reasoning_content and loop.last %}<think>{{ m.reasoning_content }}</think>{% endif %}"
    "{{ m.content }}<|im_end|>{% endgeneration %}"
    "{% else %}{{ m.content }}<|im_end|>{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
BY_TEXT = THINKING.replace("{% generation %}", "").replace("{% endgeneration %}", "")
NO_SYSTEM = CHATML.replace("in messages", "in messages if m.role != 'system'")
OPTIONS = "{% if documents %}{{ documents[0].text }}{% endif %}{{ mood }}" + CHATML


def placed(row):
    made = PlacedRow(row)
    made.place = ("rows.jsonl", "line 7")
    return made


def learned(row, template, **how):
    """The text of the tokens that count in each sequence of a row."""
    made = tokenizer(template)
    return [made.decode(t.ids[t.counts]) for t in tokenize([row], made, "data", **how)]


@pytest.mark.parametrize("marked", [False, True])
@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"messages": [{"role": "system", "content": "hi"}, USER, ASSISTANT]},
            "line 7: .* does not show this turn of the role 'system': 'hi' is .*first user turn",
        ),
        (
            {"messages": [{"role": "system", "content": "Answer as a pirate."}, USER, ASSISTANT]},
            "line 7: .* does not show this turn of the role 'system'",
        ),
        (
            {"messages": [{**USER, "name": "u"}, ASSISTANT]},
            r"line 7: .* does not show `name` \(of turn 0: 'u'\): leave .* or write|write it into",
        ),
        (
            {"messages": [USER, {**ASSISTANT, "thinking": "hm"}]},
            r"line 7: .* does not show `thinking` of turn 1 \('hm'\). .*write it into `content`",
        ),
        (
            {"messages": [USER, ASSISTANT], "documents": [{"text": "x"}]},
            "line 7: .* does not read `documents`. Write the documents into a turn",
        ),
        (
            {"messages": [USER, ASSISTANT], "chat_template_kwargs": {"moood": 1}},
            "line 7: .* does not read `moood` of `chat_template_kwargs`. Correct",
        ),
        (
            {"messages": [USER, ASSISTANT], "chat_template_kwargs": {"tools": []}},
            "line 7: `chat_template_kwargs` has `tools`, which comes from the row itself",
        ),
    ],
)
def test_what_is_shown_in_no_turn_is_an_error(row, message, marked):
    template = NO_SYSTEM
    if marked:
        template = template.replace(
            "{{ m.content }}",
            "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}"
            "{% else %}{{ m.content }}{% endif %}",
        )
    with pytest.raises(TrainingError, match=message):
        tokenize([placed(row)], tokenizer(template), "data")


def test_what_the_template_shows_is_no_error():
    named = CHATML.replace("{{ m.role }}", "{{ m.role }}{{ ' ' ~ m.name if m.name }}")
    assert learned({"messages": [{**USER, "name": "u"}, ASSISTANT]}, named) == ["yo<|im_end|>"]
    row = {
        "messages": [{"role": "system", "content": "hi"}, USER, ASSISTANT],
        "documents": '[{"text": "x"}]',
        "chat_template_kwargs": {"mood": "glad", "absent": None},
    }
    assert learned(row, OPTIONS) == ["yo<|im_end|>"]
    (whole,) = learned(row, OPTIONS, train_on="all")
    assert whole.startswith("xglad<|im_start|>system\nhi<|im_end|>")
    row = {"messages": [USER, THOUGHT]}
    thought = "<think>a rather long chain of thoughts</think>yo<|im_end|>"
    assert learned(row, BY_TEXT) == learned(row, THINKING) == [thought]


def test_a_model_without_a_template_shows_no_field():
    for answer, field in ((THOUGHT, "reasoning_content"), ({**ASSISTANT, "name": "b"}, "name")):
        with pytest.raises(TrainingError, match=f"line 7 has `{field}`, but the model has no"):
            tokenize([placed({"messages": [USER, answer]})], tokenizer(None), "data")


@pytest.mark.parametrize(
    ("template", "train_on", "line"),
    [
        (BY_TEXT, "assistant", "of 2 of 4 turns once others follow; each .* in a sequence that"),
        (BY_TEXT, "last", "of 2 of 4 turns, and it is not learned there"),
        (THINKING, "assistant", "of 2 of 4 turns, and it is not learned there"),
    ],
)
def test_thoughts_of_earlier_turns_are_reported_once_with_a_count(template, train_on, line):
    row = {"messages": [USER, THOUGHT, AGAIN, {**THOUGHT, "reasoning_content": "s"}]}
    said = []
    made = tokenizer(template)
    tokenize([row, row], made, "data", train_on=train_on, say=said.extend)
    (one,) = said
    assert one.startswith("data: the model's chat template leaves out `reasoning_content` of ")
    assert re.search(line, one)
    tokenize([{"messages": [USER, THOUGHT]}], made, "data", say=said.extend)
    assert len(said) == 1


def test_the_library_warns_of_thoughts_that_are_left_out():
    row = {"messages": [USER, THOUGHT, AGAIN, THOUGHT]}
    with pytest.warns(UserWarning, match="leaves out `reasoning_content` of 1 of 2 turns"):
        training.chats([row], tokenizer(THINKING), seq_len=512)


MUTED = {"messages": [USER, {**ASSISTANT, "weight": 0}, AGAIN, {**ASSISTANT, "content": "so"}]}


@pytest.mark.parametrize("template", [CHATML, BY_TEXT, THINKING])
def test_a_turn_of_the_weight_0_is_seen_and_not_learned(template):
    both = "".join(learned({"messages": [USER, ASSISTANT, AGAIN, MUTED["messages"][3]]}, template))
    assert "yo" in both and "so" in both
    assert learned(MUTED, template) == ["so<|im_end|>"]
    made = tokenizer(template)
    (seen,) = tokenize([MUTED], made, "data")
    assert "yo" in made.decode(seen.ids)
    (every,) = tokenize([MUTED], made, "data", train_on="all")
    unseen = made.decode(every.ids[~every.counts])
    assert unseen == "yo<|im_end|>"
    last = {"messages": [USER, {**ASSISTANT, "weight": 1}, AGAIN, {**ASSISTANT, "weight": 0}]}
    assert learned(last, template, train_on="last") == ["yo<|im_end|>"]


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([USER, {**ASSISTANT, "weight": 0}], "all assistant turns have the weight 0"),
        (
            [USER, {**ASSISTANT, "weight": 0.5}],
            "`weight` of turn 1 is 0.5, but it must be 0 .not learned. or 1",
        ),
        ([{**USER, "weight": 1}, ASSISTANT], "`weight` of turn 0 belongs to the role 'user'"),
        ([{**USER, "role": "human"}, ASSISTANT], "`role` of turn 0 is 'human', which .* 'user'"),
        ([USER, {**ASSISTANT, "role": "Assistant"}], "turn 1 is 'Assistant', which .*'assistant'"),
    ],
)
def test_a_weight_or_a_role_that_means_nothing_is_refused(messages, message):
    with pytest.raises(TrainingError, match=f"row 7.*{message}"):
        conversation({"messages": messages}, "row 7")


def test_half_a_character_names_its_row():
    for row in ({"prompt": "a \ud83d b", "completion": "c"}, {"text": "\udc00"}):
        with pytest.raises(TrainingError, match=r"line 7 has \\ud.*half of a surrogate pair"):
            tokenize([placed(row)], tokenizer(), "data")
