"""Structured answers, as the package `openai` asks for them and reads them."""

import enum
import json

import pydantic
import pytest

from tests.train.serve.scripted import ScriptedEngine, serving
from tests.train.serve.walking import walk
from tests.train.tiny import CHATML, tokenizer

openai = pytest.importorskip("openai", reason="the extra 'serve-test' has the client")
pytest.importorskip("llguidance", reason="the extra 'structured' has it")
pytestmark = pytest.mark.serving

QUESTION = [{"role": "user", "content": "Where?"}]
TEMPLATE = "{% for t in tools or [] %}[{{ t.function.name }}]{% endfor %}" + CHATML


class Unit(enum.Enum):
    DEGREES = "°C"
    KELVIN = "K"


class Day(pydantic.BaseModel):
    name: str = pydantic.Field(max_length=5)
    unit: Unit
    high: int | None


class Weather(pydantic.BaseModel):
    """The weather at a place."""

    place: str = pydantic.Field(max_length=4)
    days: list[Day] = pydantic.Field(max_length=2)
    kind: Day | Unit


@pytest.fixture(scope="module")
def client():
    with serving(ScriptedEngine(walk), tokenizer=tokenizer(TEMPLATE)) as address:
        with openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as made:
            yield made


def asked(**fields):
    return {"model": "tiny/base", "messages": QUESTION, **fields}


def test_an_answer_is_parsed_as_a_model(client):
    answer = client.chat.completions.parse(**asked(response_format=Weather, n=4))
    for choice in answer.choices:
        assert isinstance(choice.message.parsed, Weather) and choice.finish_reason == "stop"
    assert len({choice.message.content for choice in answer.choices}) > 1


def test_a_stream_is_parsed_as_a_model(client):
    with client.chat.completions.stream(**asked(response_format=Weather)) as stream:
        deltas = [event.delta for event in stream if event.type == "content.delta"]
        final = stream.get_final_completion().choices[0].message
    assert isinstance(final.parsed, Weather) and "".join(deltas) == final.content


def test_calls_are_parsed_as_models(client):
    tools = [openai.pydantic_function_tool(Weather), openai.pydantic_function_tool(Day)]
    for choice in ("required", {"type": "function", "function": {"name": "Day"}}):
        answer = client.chat.completions.parse(**asked(tools=tools, tool_choice=choice, n=4))
        for message in (each.message for each in answer.choices):
            for call in message.tool_calls:
                kind = {"Weather": Weather, "Day": Day}[call.function.name]
                assert isinstance(call.function.parsed_arguments, kind)
    with client.chat.completions.stream(**asked(tools=tools, tool_choice="required")) as stream:
        (*_, last) = [e for e in stream if e.type == "tool_calls.function.arguments.done"]
    assert isinstance(last.parsed_arguments, Weather | Day)


def test_json_and_vllms_forms(client):
    answer = client.chat.completions.create(**asked(response_format={"type": "json_object"}))
    assert isinstance(json.loads(answer.choices[0].message.content), dict)
    extra = {"structured_outputs": {"choice": ["yes", "no"]}}
    answer = client.chat.completions.create(**asked(extra_body=extra))
    assert answer.choices[0].message.content in ("yes", "no")


def test_what_cannot_be_is_a_fault_of_the_request(client):
    schema = {"name": "x", "schema": {"properties": {"a": {"type": "array", "uniqueItems": True}}}}
    form = {"type": "json_schema", "json_schema": schema}
    with pytest.raises(openai.BadRequestError, match=r"schema\.properties\.a.*uniqueItems"):
        client.chat.completions.create(**asked(response_format=form))
