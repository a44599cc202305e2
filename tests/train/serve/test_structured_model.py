"""Structured answers of a model over HTTP, beside free ones: what ends is what was asked for."""

import json
from concurrent.futures import ThreadPoolExecutor

import pytest
from jsonschema import Draft202012Validator
from starlette.testclient import TestClient

from tests.train.tiny import decoder, tokenizer
from train.serve.app import make_app
from train.serve.local import EngineLimits, make_engine
from train.serve.routes.openai.table import CHAT

pytest.importorskip("llguidance", reason="the extra 'structured' has it")
pytestmark = pytest.mark.slow
SCHEMAS = [
    {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 9}, "maxItems": 3},
    {
        "type": "object",
        "properties": {"a": {"enum": ["x", "y"]}, "b": {"type": "boolean"}},
        "required": ["a", "b"],
        "additionalProperties": False,
    },
    {"anyOf": [{"const": "none"}, {"type": "string", "pattern": "^[a-f]{2,5}$"}]},
]


@pytest.fixture(scope="module")
def client():
    model, params = decoder()
    made, limits = tokenizer(), EngineLimits(max_length=128, sequences=8, slots=1, max_rank=8)
    text = lambda ids: made.decode(ids)  # noqa: E731
    engine = make_engine(model, params, "tiny", eos=[258], text_of=text, limits=limits)
    engine.warm_up()
    engine.start()
    try:
        with TestClient(make_app(engine, made), "http://localhost") as client:
            client.compiled = lambda: engine.status().compiled
            yield client
    finally:
        engine.close()


def ask(client, i):
    """Asks for an answer: of a schema, or of every fourth number a free one."""
    body = {"model": "tiny", "messages": [{"role": "user", "content": str(i)}], "seed": i, "n": 2}
    body |= {"temperature": (0.0, 1.0, 1.6)[i % 3], "max_tokens": 60}
    if i % 4:
        schema = {"name": "x", "schema": SCHEMAS[i % 3]}
        body["response_format"] = {"type": "json_schema", "json_schema": schema}
    answer = client.post(CHAT, json=body)
    assert answer.status_code == 200, answer.text
    return [(x["message"]["content"], x["finish_reason"]) for x in answer.json()["choices"]]


def test_answers_that_end_are_what_was_asked_for(client):
    numbers, ended = range(24), 0
    alone = [ask(client, i) for i in numbers]
    before = client.compiled()
    with ThreadPoolExecutor(24) as pool:
        together = [*pool.map(lambda i: ask(client, i), numbers)]
    assert client.compiled() == before, "nothing compiles"
    assert together == alone, "neighbours change nothing"
    for i in numbers:
        for text, finish in alone[i] if i % 4 else ():
            if finish == "stop":
                Draft202012Validator(SCHEMAS[i % 3]).validate(json.loads(text))
                ended += 1
    assert ended > 5
