"""Structured answers over HTTP, drawn at random from the masks that requests ask for."""

import importlib.util
import json
import re

import pytest
from starlette.testclient import TestClient

from tests.train.serve.scripted import ScriptedEngine
from tests.train.serve.walking import walk
from tests.train.tiny import CHATML, tokenizer
from train.serve.app import make_app
from train.serve.routes.openai.table import CHAT, COMPLETIONS

if importlib.util.find_spec("llguidance") is None:
    pytest.skip("the extra 'structured' has llguidance", allow_module_level=True)

TURNS = [{"role": "user", "content": "hi"}]
WEATHER = {
    "type": "object",
    "properties": {
        "place": {"$ref": "#/$defs/place"},
        "days": {"type": "integer", "maximum": 9},
        "note": {"type": "string", "format": "password", "maxLength": 2},  # a format not known
    },
    "required": ["place"],
    "additionalProperties": False,
    "$defs": {"place": {"enum": ["Köln", "Bonn"]}},
}
TOOLS = [
    {"type": "function", "function": {"name": name, "parameters": parameters}}
    for name, parameters in (("weather", WEATHER), ("stop", {"type": "object", "maxProperties": 0}))
]
TEMPLATE = "{% for t in tools or [] %}[{{ t.function.name }}]{% endfor %}" + CHATML


@pytest.fixture(scope="module")
def post():
    """Posts a body; returns the status and the answer."""
    engine = ScriptedEngine(walk)
    with TestClient(make_app(engine, tokenizer(TEMPLATE)), "http://localhost") as client:

        def sent(path=CHAT, **fields):
            usual = {"messages": TURNS} if path == CHAT else {"prompt": "hi", "max_tokens": 300}
            answer = client.post(path, json={"model": "tiny/base", **usual, **fields})
            return answer.status_code, answer.json()

        yield sent


def texts(answer):
    status, body = answer
    assert status == 200, body
    return [x["message"]["content"] if "message" in x else x["text"] for x in body["choices"]]


def schema_of(schema):
    return {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, "strict": True}}


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_forms_of_answers(post, path):
    assert texts(post(path, response_format={"type": "text"})) == ["free"]
    for fields in (
        {"response_format": schema_of(WEATHER)},
        {"guided_json": WEATHER},
        {"guided_json": json.dumps(WEATHER)},
        {"structured_outputs": {"json": WEATHER}},
    ):
        for text in texts(post(path, n=3, **fields)):
            assert json.loads(text)["place"] in ("Köln", "Bonn")
    for fields in (
        {"response_format": {"type": "json_object"}},
        {"structured_outputs": {"json_object": True}},
    ):
        assert isinstance(json.loads(texts(post(path, **fields))[0]), dict)
    for fields in ({"guided_regex": "[ab]{3}"}, {"structured_outputs": {"regex": "[ab]{3}"}}):
        assert all(re.fullmatch("[ab]{3}", text) for text in texts(post(path, n=4, **fields)))
    for fields in ({"guided_choice": ["no", "yes"]}, {"structured_outputs": {"choice": ["no"]}}):
        assert {*texts(post(path, n=8, **fields))} <= {"no", "yes"}
    grammar = 'root ::= "x" [0-9] "y"'
    for fields in ({"guided_grammar": grammar}, {"structured_outputs": {"grammar": grammar}}):
        assert all(re.fullmatch(r"x\dy", text) for text in texts(post(path, n=4, **fields)))


def test_calls_that_are_asked_for(post):
    status, body = post(tools=TOOLS, tool_choice="required", n=12)
    assert status == 200, body
    names = set()
    for choice in body["choices"]:
        calls = choice["message"]["tool_calls"]
        assert choice["finish_reason"] == "tool_calls" and choice["message"]["content"] is None
        names |= {call["function"]["name"] for call in calls}
        for call in calls:
            given = json.loads(call["function"]["arguments"])
            is_weather = call["function"]["name"] == "weather"
            assert given["place"] in ("Köln", "Bonn") if is_weather else given == {}
    assert names == {"weather", "stop"}
    counts = [len(choice["message"]["tool_calls"]) for choice in body["choices"]]
    assert min(counts) == 1 < max(counts)
    status, body = post(tools=TOOLS, tool_choice="required", n=12, parallel_tool_calls=False)
    assert {len(choice["message"]["tool_calls"]) for choice in body["choices"]} == {1}
    named = {"type": "function", "function": {"name": "weather"}}
    status, body = post(tools=TOOLS, tool_choice=named, n=6)
    for choice in body["choices"]:
        (call,) = choice["message"]["tool_calls"]
        assert call["function"]["name"] == "weather"
    assert texts(post(tools=TOOLS)) == ["free"]
    for none in ({}, {"parameters": None}, {"parameters": {}}):
        bare = [{"type": "function", "function": {"name": "now", **none}}]
        choice = {"type": "function", "function": {"name": "now"}}
        status, body = post(tools=bare, tool_choice=choice, n=4)
        assert status == 200, body
        for answer in body["choices"]:
            (call,) = answer["message"]["tool_calls"]
            assert call["function"] == {"name": "now", "arguments": "{}"}


@pytest.mark.parametrize(
    ("fields", "param", "problem"),
    [
        (
            {"response_format": schema_of({"properties": {"a": {"not": {}}}})},
            "response_format.json_schema.schema.properties.a",
            "not",
        ),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", "schema"),
        (
            {"response_format": schema_of({"items": {"enum": [1176432598712345678]}})},
            "response_format.json_schema.schema.items.enum",
            "1176432598712345678 cannot be represented exactly",
        ),
        ({"guided_json": "{"}, "guided_json", "Pass a JSON schema"),
        ({"guided_regex": "("}, "guided_regex", "unclosed group"),
        ({"guided_choice": []}, "guided_choice", "a list of texts"),
        ({"structured_outputs": {"json": {}, "regex": "a"}}, "structured_outputs", "exactly one"),
        ({"structured_outputs": {"jsn": {}}}, "jsn", "Did you mean `json`"),
        ({"guided_regex": "a", "guided_json": {}}, None, "both define the form of the answer"),
        (
            {
                "tools": [{**TOOLS[0], "function": {"name": "f", "parameters": {"not": {}}}}],
                "tool_choice": "required",
            },
            "tools[0].function.parameters",
            "not",
        ),
        (
            {
                "tools": [{"type": "function", "function": {"name": "f", "parameters": [1]}}],
                "tool_choice": "required",
            },
            "tools[0].function.parameters",
            "Pass a JSON schema as an object",
        ),
    ],
)
def test_what_cannot_be_is_named_by_its_path(post, fields, param, problem):
    status, body = post(**fields)
    assert status == 400, body
    assert body["error"]["param"] == param and problem in body["error"]["message"]
