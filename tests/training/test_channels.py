"""gpt-oss's template as it is published: what the loss counts of its channels, and its date."""

import datetime
import importlib.util
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken

from lora_jax.training.data.chats import tokenize
from lora_jax.training.data.templates import tells_today, with_date
from tests.train.tiny import tokenizer

pytestmark = pytest.mark.parity  # TRL has the template

SPECIAL = "start end return call channel message constrain".split()
USER = {"role": "user", "content": "hi"}
THINKS = {"role": "assistant", "thinking": "Greet.", "content": "Hello."}
CALL = {"function": {"name": "clock", "arguments": {"zone": "UTC"}}}
CALLS = {"role": "assistant", "thinking": "Look.", "tool_calls": [CALL]}
TOLD = {"role": "tool", "content": "noon"}
TOOLS = [{"type": "function", "function": {"name": "clock", "description": "Tells the time."}}]
FINAL = "<|channel|>final<|message|>"
ANALYSIS = "<|channel|>analysis<|message|>Greet.<|end|><|start|>assistant"


def harmony() -> Any:
    """A tokenizer of bytes with Harmony's special tokens, and the template on a fixed day."""
    found = importlib.util.find_spec("trl")
    assert found is not None and found.origin is not None
    made = tokenizer()
    made.add_special_tokens(
        {"additional_special_tokens": [AddedToken(f"<|{x}|>", special=True) for x in SPECIAL]}
    )
    template = Path(found.origin).with_name("chat_templates") / "gptoss.jinja"
    made.chat_template = with_date(template.read_text(), datetime.date(2025, 8, 5))
    return made


def counted(*turns: Any, **row: Any) -> list[tuple[str, str]]:
    """For each sequence of a chat: (its text, the text of the tokens that count)."""
    made = harmony()
    return [
        (made.decode(t.ids), made.decode(t.ids[t.counts]))
        for t in tokenize([{"messages": [*turns], **row}], made, "data")
    ]


def test_both_channels_count_through_the_closing_token() -> None:
    ((text, counts),) = counted(USER, THINKS)
    assert "Current date: 2025-08-05\n" in text
    assert counts == f"{ANALYSIS}{FINAL}Hello.<|return|>"
    assert text.endswith(f"<|start|>user<|message|>hi<|end|><|start|>assistant{counts}")


def test_each_turn_is_learned_with_its_thoughts() -> None:
    """Earlier turns lose them, and end otherwise, once others follow."""
    again = {**THINKS, "content": "Yes?"}
    (_, first), (text, second) = counted(USER, THINKS, USER, again)
    assert first == f"{ANALYSIS}{FINAL}Hello.<|return|>"
    assert second == f"{ANALYSIS}{FINAL}Yes?<|return|>"
    assert f"<|start|>assistant{FINAL}Hello.<|end|><|start|>user" in text
    assert text.count("Greet.") == 1


def test_a_call_counts_through_its_closing_token() -> None:
    ((text, counts),) = counted(USER, CALLS, TOLD, THINKS, tools=TOOLS)
    call = "<|channel|>analysis<|message|>Look.<|end|><|start|>assistant to=functions.clock"
    call += '<|channel|>commentary json<|message|>{"zone": "UTC"}<|call|>'
    assert counts == f"{call}{ANALYSIS}{FINAL}Hello.<|return|>"
    # What the model sees when it answers: its thoughts before the call, which the template drops
    # once an answer follows.
    made = harmony()
    asked = made.apply_chat_template(
        [USER, CALLS, TOLD], tools=TOOLS, tokenize=False, add_generation_prompt=True
    )
    assert text == f"{asked}{ANALYSIS}{FINAL}Hello.<|return|>" and "Look." in asked


def test_the_date_is_pinned() -> None:
    made = harmony()
    template = made.chat_template
    assert not tells_today(template)
    other = with_date(template, datetime.date(2031, 1, 2))
    assert other.count("macro strftime_now") == 1
    made.chat_template = other
    shown = made.apply_chat_template([USER], tokenize=False, add_generation_prompt=True)
    assert "Current date: 2031-01-02\n" in shown and shown.endswith("<|start|>assistant")
