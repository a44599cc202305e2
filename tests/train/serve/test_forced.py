"""Calls that a request asks for come in the form in which the chat template writes them."""

import importlib.util
import json
import re

import pytest
from jsonschema import Draft202012Validator
from starlette.testclient import TestClient

from lora_jax.models.sampling.grammar import GrammarCompiler
from tests.support import over
from tests.train.serve.asking import TEMPLATE
from tests.train.serve.scripted import EOS, ScriptedEngine
from tests.train.serve.walking import walk
from tests.train.tiny import tokenizer
from train.serve.app import make_app
from train.serve.routes.openai.forced import CallGrammar, has_form
from train.serve.routes.openai.table import CHAT
from train.tools.forms import call_form

if importlib.util.find_spec("llguidance") is None:
    pytest.skip("the extra 'structured' has llguidance", allow_module_level=True)

PLACE = {
    "type": "object",
    "properties": {
        "city": {"$ref": "#/$defs/city"},
        "zip": {"type": "string", "pattern": "^[0-9]{2}$"},
        "days": {"type": "integer", "minimum": 1, "maximum": 9},
        "note": {"anyOf": [{"type": "string", "maxLength": 2}, {"type": "null"}]},
        "exact": {"type": "boolean"},
        "part": {"$ref": "#/$defs/part"},
    },
    "required": ["city", "days", "part"],
    "additionalProperties": False,
    "$defs": {
        "city": {"enum": ["Köln", "Bonn"]},
        "part": {"type": "object", "properties": {"x": {"enum": [1, 2]}}, "required": ["x"]},
    },
}
PLACE["$defs"]["part"]["additionalProperties"] = False
STOP = {"type": "object", "properties": {}, "additionalProperties": False}
SCHEMAS = {"look_up": PLACE, "stop": STOP}
TOOLS = [
    {"type": "function", "function": {"name": name, "parameters": schema}}
    for name, schema in SCHEMAS.items()
]
# A text of the template by which its format is known, and what each answer looks like.
FORMS = {
    "<tool_call>": r'<tool_call>\n\{"name": "(look_up|stop)", "arguments": \{.*\}\n</tool_call>',
    "<function=": r"<tool_call>\n<function=\w+>\n(<parameter=\w+>\n.*\n</parameter>\n)*"
    r"</function>\n</tool_call>",
    "<arg_key>": r"<tool_call>\w+\n(<arg_key>\w+</arg_key>\n<arg_value>.*</arg_value>\n)*"
    r"</tool_call>",
    "<|python_tag|>": r'\{"name": "(look_up|stop)", "parameters": \{.*\}\}',
    "[TOOL_CALLS]": r'\[TOOL_CALLS\]\[\{"name": "(look_up|stop)", "arguments": \{.*\}\}\]',
    "[TOOL_CALLS] [": r'\[TOOL_CALLS\] \[\{"name": "(look_up|stop)", "arguments": \{.*\}\}\]',
    "[TOOL_CALLS][ARGS]": r"\[TOOL_CALLS\](look_up|stop)\[ARGS\]\{.*\}",
    "<|tool_call_start|>": r"<\|tool_call_start\|>\[(look_up|stop)\(.*\)\]<\|tool_call_end\|>",
    "<|tool_call>call:": r"<\|tool_call>call:(look_up|stop)\{.*\}<tool_call\|>",
    "<|channel|>commentary": r"<\|channel\|>commentary to=functions\.(look_up|stop) "
    r"<\|constrain\|>json<\|message\|>\{.*\}",
}
ONE_CALL = ("<|python_tag|>", "<|channel|>commentary")


@pytest.fixture(scope="module")
def engine():
    return ScriptedEngine(walk)


def answers(engine, sign, tools=TOOLS, **fields):
    """Returns the choices of a server whose template has a text."""
    made = tokenizer(f"{{# {sign} #}}{TEMPLATE}")
    with TestClient(make_app(engine, made), "http://localhost") as client:
        body = {"model": "tiny/base", "messages": [{"role": "user", "content": "hi"}], "n": 12}
        answer = client.post(CHAT, json=body | {"tools": tools, "return_token_ids": True, **fields})
        assert answer.status_code == 200, answer.text
    ended = [x for x in answer.json()["choices"] if x["token_ids"][-1] == EOS]
    texts = [made.decode(x["token_ids"], skip_special_tokens=True) for x in ended]
    return [x["message"] for x in ended], texts


@over("sign", FORMS, often=("<function=", "<|channel|>commentary"))
def test_calls_are_in_the_form_of_the_template(engine, sign):
    messages, texts = answers(engine, sign, tool_choice="required")
    assert len(messages) > 2
    names = set()
    for message, text in zip(messages, texts, strict=True):
        assert re.match(FORMS[sign], text, re.DOTALL), text
        assert message["content"] is None, text
        for call in (each["function"] for each in message["tool_calls"]):
            names.add(call["name"])
            Draft202012Validator(SCHEMAS[call["name"]]).validate(json.loads(call["arguments"]))
    assert names == {*SCHEMAS}
    short, _ = answers(engine, sign, TOOLS[1:], tool_choice="required")
    counts = {len(message["tool_calls"]) for message in short}
    assert min(counts) == 1 and (max(counts) > 1) != (sign in ONE_CALL)
    named = {"type": "function", "function": {"name": "look_up"}}
    for message in answers(engine, sign, tool_choice=named)[0]:
        (call,) = message["tool_calls"]
        assert call["function"]["name"] == "look_up"


@pytest.mark.slow
def test_what_a_form_has_no_texts_for_is_written_as_hermes(engine):
    odd = {"type": "object", "properties": {"a b": {"type": "integer", "maximum": 9}}}
    odd |= {"required": ["a b"], "additionalProperties": False}
    tools = [{"type": "function", "function": {"name": "f", "parameters": odd}}]
    for sign in ("<function=", "<|tool_call>call:"):
        messages, texts = answers(engine, sign, tools, tool_choice="required")
        assert all(text.startswith("<tool_call>\n{") for text in texts) and texts
        for message in messages:
            for call in message["tool_calls"]:
                Draft202012Validator(odd).validate(json.loads(call["function"]["arguments"]))


def test_a_form_needs_names_that_can_stand_in_it():
    form = call_form("qwen3-coder", "")
    for odd in ({"required": ["a b"]}, {"properties": 5}, {"properties": {"</parameter>": {}}}):
        assert not has_form(form, SCHEMAS | {"f": odd}), odd
    assert has_form(form, {"f": {"properties": {"a": {}}, "required": ["b"]}})


@pytest.mark.parametrize("written", ["hermes", "gemma4"])
def test_no_text_of_a_request_is_a_special_token(written, monkeypatch):
    made = tokenizer()
    compiler, end = GrammarCompiler(made, len(made), [EOS]), made.decode([EOS])
    assert compiler.literal(end) == f"<[{EOS}]>"
    monkeypatch.setattr(compiler, "lark", str)
    name = end if written == "hermes" else "f"
    schema = {"properties": {"a": {"enum": [end]}, "b": {"const": end}}}
    grammar = CallGrammar(call_form(written, ""), compiler).compiled({name: schema}, 1)
    assert end in grammar and f"<[{EOS}]>" not in grammar


def test_arguments_have_the_types_that_definitions_say():
    from train.tools.schemas import convert_arguments

    texts = {"city": "Köln", "days": "7", "part": '{"x": 1}', "note": "7"}
    want = {"city": "Köln", "days": 7, "part": {"x": 1}, "note": "7"}
    assert convert_arguments("look_up", texts, TOOLS) == want
    numbers = {"a": {"enum": [1, "x"]}, "b": {"const": True}, "c": {"$ref": "#/none"}}
    tool = {"name": "f", "parameters": {"properties": numbers}}
    got = convert_arguments("f", {"a": "1", "b": "true", "c": "1"}, [tool])
    assert got == {"a": 1, "b": True, "c": "1"}
