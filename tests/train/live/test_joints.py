"""The tokens between a turn that called tools and the next one are those of the template."""

import pytest

from tests.train.tiny import tokenizer
from train.console.errors import UserError
from train.live.turns.joints import TurnJoints
from train.live.turns.use import rows_with_tools
from train.tools.contract import ToolAnswer

END, BEGIN = 258, 257  # <|im_end|>, <|im_start|>
CALLS = "{% for c in m.tool_calls or [] %}[{{ c.function.name }} {{ c.function.arguments }}]"
TURNS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}" + CALLS + "{% endfor %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Thinks aloud in the last turn alone, as Qwen3's.
FORGETFUL = TURNS.replace("{{ m.content }}", "{{ '(hm)' if loop.last }}{{ m.content }}", 1)
# The token that ends a turn is the one that begins the next, as GLM's.
JOINED = TURNS.replace("<|im_end|>\n", "")
ANSWERS = [ToolAnswer("look", "a star"), ToolAnswer("add", "7")]
WANTED = "<|im_start|>tool\na star<|im_end|>\n<|im_start|>tool\n7<|im_end|>\n"
WANTED += "<|im_start|>assistant\n"


def joints(template, ends=(END,), most=50):
    return TurnJoints(tokenizer(template), ends, most)


@pytest.mark.parametrize("template", [TURNS, FORGETFUL])
def test_answers_follow_the_end_of_a_turn(template):
    made = joints(template)
    text = tokenizer().decode(made.render(ANSWERS, {}, END))
    hint = "(hm)" if template == FORGETFUL else ""
    assert text == "\n" + WANTED.replace("tool\n7", f"tool\n{hint}7")
    assert made.keeps_history == (template == TURNS)


def test_a_token_that_ends_a_turn_and_begins_the_next_stands_once():
    made, text = joints(JOINED, (BEGIN,)), WANTED.replace("<|im_end|>\n", "")
    assert tokenizer().decode(made.render(ANSWERS, {}, END)) == text
    assert tokenizer().decode(made.render(ANSWERS, {}, BEGIN)) == text.removeprefix("<|im_start|>")


def test_a_long_answer_says_where_it_was_cut():
    made = joints(TURNS, most=6)
    whole, cut = (made.cut(ToolAnswer("f", text, True)) for text in ("x" * 6, "ab" * 4000))
    assert whole.content == "x" * 6
    assert cut == ToolAnswer("f", "ababab\n[cut after 6 tokens, of 8,000 characters]", True)


def test_arguments_may_have_to_be_a_text():
    wants_text = TURNS.replace("{{ c.function.arguments }}", "{{ c.function.arguments + '' }}")
    assert tokenizer().decode(joints(wants_text).render(ANSWERS, {}, END)) == "\n" + WANTED


def test_what_a_template_cannot_say_is_refused_before_training():
    refusing = "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools') }}"
    with pytest.raises(UserError, match="does not render a chat with a tool's answer.*no tools"):
        joints(refusing + "{% endif %}{{ m.content }}{% endfor %}")
    with pytest.raises(UserError, match="rows.jsonl, row 1 has a field `tools`"):
        rows_with_tools([{"prompt": "a", "tools": [{}]}], [], "rows.jsonl")
