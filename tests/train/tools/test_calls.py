"""Calls of tools, as models write them: whole and in pieces, malformed ones, and TRL's parser."""

import json
import os

import pytest

from tests.train.tiny import tokenizer
from train.tools.calls import CallReader, call_format, opens_thinking, read_turn, turn_text
from train.tools.contract import ToolCall
from train.tools.formats import FORMATS
from train.tools.forms import call_form


def _schema(name, **types):
    parameters = {"type": "object", "properties": {k: {"type": v} for k, v in types.items()}}
    function = {"name": name, "description": "A tool.", "parameters": parameters}
    return {"type": "function", "function": function}


TOOLS = [
    _schema("look_up", city="string", n="integer", x="number", deep="boolean", tags="array"),
    _schema("stop"),
]
ARGUMENTS = {"city": 'Zürich "x"', "n": 7, "x": 1.5, "deep": True, "tags": ["a", "b"]}
JSON = json.dumps(ARGUMENTS, ensure_ascii=False)
XML = "".join(
    f"<parameter={k}>\n{v if isinstance(v, str) else json.dumps(v)}\n</parameter>\n"
    for k, v in ARGUMENTS.items()
)
GLM = "".join(
    f"<arg_key>{k}</arg_key>\n<arg_value>{v if isinstance(v, str) else json.dumps(v)}</arg_value>\n"
    for k, v in ARGUMENTS.items()
)
# A text, a call with all kinds of arguments, one without, and what else is said and thought.
WRITTEN = {
    "hermes": (
        f'I look.\n<tool_call>\n{{"name": "look_up", "arguments": {JSON}}}\n</tool_call>\n'
        '<tool_call>{"name": "stop"}</tool_call>'
    ),
    "qwen3-coder": (
        f"I look.\n\n<tool_call>\n<function=look_up>\n{XML}</function>\n</tool_call>\n"
        "<function=stop>\n</function>"
    ),
    "glm4": f"I look.\n<tool_call>look_up\n{GLM}</tool_call>\n<tool_call>stop\n</tool_call>",
    "llama3": (
        f'I look.<|python_tag|>{{"name": "look_up", "parameters": {JSON}}}; '
        '{"name": "stop", "parameters": {}}'
    ),
    "gpt-oss": (
        "<|channel|>commentary<|message|>I look.<|end|><|start|>assistant<|channel|>commentary "
        f"to=functions.look_up <|constrain|>json<|message|>{JSON}<|call|><|start|>assistant "
        "to=functions.stop<|channel|>commentary json<|message|>{}"
    ),
    "lfm2": (
        "I look.<|tool_call_start|>[look_up(city='Zürich \"x\"', n=7, x=1.5, deep=True, "
        'tags=["a", "b"]), stop()]<|tool_call_end|>'
    ),
    "gemma4": (
        'I look.<|tool_call>call:look_up{city:<|"|>Zürich "x"<|"|>,n:7,x:1.5,deep:true,'
        'tags:[<|"|>a<|"|>,<|"|>b<|"|>]}<tool_call|><|tool_call>call:stop{}<tool_call|>'
    ),
    "mistral": (
        f'I look.[TOOL_CALLS][{{"name": "look_up", "arguments": {JSON}}}, '
        '{"name": "stop", "arguments": {}}]'
    ),
}


def test_each_format_has_a_sample():
    assert WRITTEN.keys() == FORMATS.keys()


@pytest.mark.parametrize("name", WRITTEN)
@pytest.mark.parametrize("size", [1, 3, 1000])
def test_calls_are_read_however_the_text_comes(name, size):
    text, reader = WRITTEN[name], CallReader(FORMATS[name], TOOLS)
    parts = [reader.add(text[at : at + size]) for at in range(0, len(text), size)]
    parts.append(reader.add("", last=True))
    assert "".join(part.text for part in parts).strip() == "I look."
    calls = [written.call for part in parts for written in part.calls]
    assert calls == [ToolCall("look_up", ARGUMENTS), ToolCall("stop", {})]
    assert read_turn(text, FORMATS[name], TOOLS).calls == calls


MALFORMED = [
    ("hermes", "<tool_call>{'name': 'f'}</tool_call> then", "not JSON", "then"),
    ("hermes", '<tool_call>{"name": "f", "arguments": [1]}</tool_call>', "an object", ""),
    ("hermes", '<tool_call>{"arguments": {}}</tool_call>', "`name`", ""),
    ("hermes", '<tool_call>{"name": "f"', "not JSON", ""),
    ("hermes", "<tool_call>" + "[" * 100_000, "nested", ""),
    ("qwen3-coder", "<tool_call>f(1)</tool_call>", "<function=NAME>", ""),
    ("qwen3-coder", "<tool_call><function=f><parameter=a>1</tool_call>", "</function>", ""),
    ("glm4", "<tool_call>f\n<arg_key>a</arg_key>1</tool_call>", "</tool_call> is missing", ""),
    ("llama3", '{"name": "f", "parameters": {"a": }}', "not JSON", ""),
    ("llama3", "<|python_tag|>print(1)", "'=' is missing", ""),
    ("gpt-oss", "<|channel|>commentary to=functions.f<|message|>{1}<|call|>", "not JSON", ""),
    ("lfm2", "<|tool_call_start|>[f(a=b)]<|tool_call_end|>", "in quotes", ""),
    ("gemma4", "<|tool_call>f{}<tool_call|>", "call:NAME{", ""),
    ("mistral", "[TOOL_CALLS]f", "not JSON", ""),
]


@pytest.mark.parametrize(("name", "text", "names", "content"), MALFORMED)
def test_a_malformed_call_says_its_problem(name, text, names, content):
    turn = read_turn(text, FORMATS[name], TOOLS)
    assert len(turn.calls) == 1 and turn.content == content
    assert turn.calls[0].arguments is None and names in turn.calls[0].problem


def test_an_object_that_is_no_call_is_said():
    said = 'Here: {"name": "Bern", "size": 3} is it.'
    assert read_turn(said, FORMATS["llama3"]) == (said, [], "")


def test_thoughts_are_no_calls():
    call, hermes = '<tool_call>{"name": "stop"}</tool_call>', FORMATS["hermes"]
    thought = f"Maybe {call}?"
    assert read_turn(f"<think>\n{thought}\n</think>\n\n{call}", hermes) == (
        *("", [ToolCall("stop", {})]),
        thought,
    )
    assert read_turn(f"{thought}</think>{call}", hermes, thinking=True).thinking == thought
    assert read_turn(f"<think>{thought}", hermes) == ("", [], thought)
    assert opens_thinking("<|im_start|>assistant\n<think>\n")
    assert not opens_thinking("<think>\n\n</think>\n\n")
    harmony = (
        "<|channel|>analysis<|message|>to=functions.f<|end|><|start|>assistant<|channel|>final"
    )
    assert read_turn(f"{harmony}<|message|>Done.", FORMATS["gpt-oss"]) == (
        *("Done.", []),
        "to=functions.f",
    )


def test_types_are_those_of_the_schema():
    text = "<tool_call>look_up\n<arg_key>{}</arg_key>\n<arg_value>{}</arg_value>\n</tool_call>"
    cases = [("city", "8001", "8001"), ("n", "8001", 8001), ("n", "3.0", 3), ("n", "x", "x")]
    cases += [("x", "2", 2), ("x", "nan", "nan"), ("deep", "False", False), ("other", "1", "1")]
    cases += [("tags", "[1]", [1]), ("tags", "{}", "{}")]
    for key, written, value in cases:
        (call,) = read_turn(text.format(key, written), FORMATS["glm4"], TOOLS).calls
        assert call.arguments == {key: value} and type(call.arguments[key]) is type(value)


def test_the_end_of_a_turn_is_no_text():
    made = tokenizer()
    ids = made("a<|im_end|>")["input_ids"]
    assert turn_text(made, ids, [ids[-1]]) == turn_text(made, ids[:-1], [ids[-1]]) == "a"
    assert turn_text(made, [], [ids[-1]]) == ""


def test_a_template_that_renders_answers_alone_has_a_format():
    assert call_format("{{ '<|tool_response_start|>' + m.content }}").name == "lfm2"
    assert call_format("{{ m.content }}") is call_format(None) is None


def test_a_call_that_is_asked_for_begins_as_the_template_writes_it():
    """A model that must call a tool would else begin by tokens that it never saw."""
    for begin in ("[TOOL_CALLS][", "[TOOL_CALLS] ["):  # Mistral's templates until 2025 have both
        assert call_form("mistral", f"{{{{ '{begin}' + calls + ']' }}}}").begin == begin
    newest = "{{ '[TOOL_CALLS]' + call.name + '[ARGS]' + call.arguments }}"
    assert call_form("mistral", newest).head.format(name="f") == "[TOOL_CALLS]f[ARGS]"


# Of TRL's templates: all that write calls, and for which it has a parser.
WITH_CALLS = """qwen2_5 qwen3 qwen3_instruct_2507 qwen3_vl qwen3_5_think qwen3_6 qwen3_8 llama3_1
    llama3_2 gptoss glm4moe lfm2_v2 lfm2_2_5 nemotron_3_nano nemotron_3_ultra gemma4_v5""".split()
# What TRL reads otherwise than the templates write it: white space at the ends, quotes and escapes.
OURS_ALONE = [{"city": " x, y) "}, {"city": "it's"}, {"city": "a\nb", "deep": False}]
ALIKE = [ARGUMENTS, {"city": "8001"}, {"city": "null", "n": -1}, {"city": "a: {b}, [c] < d"}]


@pytest.mark.parity
@pytest.mark.parametrize("name", WITH_CALLS)
def test_templates_calls_are_read_as_trl_reads_them(name):
    trl = pytest.importorskip("trl.chat_template_utils")
    made = tokenizer((trl._CHAT_TEMPLATES_DIR / f"{name}.jinja").read_text())
    form = call_format(made.chat_template)
    trl.add_response_schema(made)
    single = name in ("llama3_1", "llama3_2", "gptoss")  # a call a turn
    turns = [[("look_up", arguments)] for arguments in (*ALIKE, *OURS_ALONE)] + [[("stop", {})]]
    turns += [] if single else [[("look_up", ALIKE[1]), ("stop", {})]]
    for calls in turns:
        for said in ("",) if single else ("", "I look."):
            turn = {"role": "assistant", "content": said}
            turn["tool_calls"] = [
                {"type": "function", "function": {"name": n, "arguments": a}} for n, a in calls
            ]
            chat = [{"role": "user", "content": "Where?"}, turn]
            whole = made.apply_chat_template(chat, tools=TOOLS, tokenize=False)
            asked = made.apply_chat_template(
                chat[:1], tools=TOOLS, tokenize=False, add_generation_prompt=True
            )
            asked = os.path.commonprefix([whole, asked])
            text = whole[len(asked) :]
            ours = read_turn(text, form, TOOLS, thinking=opens_thinking(asked))
            assert ours.calls == [ToolCall(*call) for call in calls], text
            if calls[0][1] in OURS_ALONE:
                continue
            ids, before = (made(x, add_special_tokens=False)["input_ids"] for x in (text, asked))
            theirs = trl.parse_response(made, ids, prefix=before, tools=TOOLS)
            functions = [call["function"] for call in theirs["tool_calls"]]
            assert [(x["name"], x["arguments"]) for x in functions] == calls
            for end in ("<|im_end|>", "<turn|>", "<|tool_response>", "<|eot_id|>"):
                ours = ours._replace(content=ours.content.removesuffix(end).strip())
            assert ours.content == theirs["content"] == said
