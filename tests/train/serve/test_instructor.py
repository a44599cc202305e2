"""instructor on the server, unmodified."""

import asyncio
import enum
import json
from collections.abc import Iterable
from typing import Literal

import pytest

from tests.train.serve.asking import IMPOSSIBLE, MODEL, Day, Unit, Weather, served

openai = pytest.importorskip("openai", reason="the extra 'serve-test' has the client")
pydantic = pytest.importorskip("pydantic", reason="the extra 'serve-test' has it")
instructor = pytest.importorskip("instructor", reason="the extra 'serve-test' has the client")
pytest.importorskip("llguidance", reason="the extra 'structured' has it")
pytestmark = [pytest.mark.serving, pytest.mark.filterwarnings("ignore")]
ASKED = {"model": MODEL, "messages": [{"role": "user", "content": "Where?"}], "max_retries": 0}
MODES = ["TOOLS", "TOOLS_STRICT", "JSON", "JSON_SCHEMA"]


@pytest.fixture(scope="module")
def options():
    with served() as address:
        yield {"base_url": f"{address}/v1", "api_key": "none", "max_retries": 0, "timeout": 20}


@pytest.fixture(scope="module")
def client(options):
    return instructor.from_openai(openai.OpenAI(**options))


@pytest.mark.parametrize("mode", MODES)
def test_an_answer_as_a_model(options, mode):
    client = instructor.from_openai(openai.OpenAI(**options), mode=instructor.Mode[mode])
    # json_object knows no schema: any object is an answer.
    kind = pydantic.create_model("Anything") if mode == "JSON" else Weather
    got = client.create(response_model=kind, **ASKED)
    assert isinstance(got, kind)


def test_an_answer_with_the_whole_completion(client):
    got, whole = client.create_with_completion(response_model=Day, **ASKED)
    assert isinstance(got, Day) and whole.usage.completion_tokens > 5


class Place(pydantic.BaseModel):
    """A place."""

    name: str = pydantic.Field(max_length=5)
    high: int | None


@pytest.mark.parametrize("mode", ["TOOLS", "JSON_SCHEMA"])
def test_a_model_while_it_grows(options, mode):
    client = instructor.from_openai(openai.OpenAI(**options), mode=instructor.Mode[mode])
    *_, last = client.create_partial(response_model=Place, **ASKED)
    assert Place.model_validate(last.model_dump())


def saying(*calls):
    """A question that is answered by calls of tools, and the arguments of instructor for it."""
    texts = [
        f'<tool_call>\n{{"name": "{name}", "arguments": {json.dumps(given)}}}\n</tool_call>'
        for name, given in calls
    ]
    turn = {"role": "user", "content": "SAY " + "\n".join(texts) + " END"}
    return ASKED | {"messages": [turn]}


def test_several_models(client):
    days = [{"name": name, "unit": "K", "high": None} for name in ("Mon", "Tue")]
    asked = saying(("IterableDay", {"tasks": days}))
    for got in (
        client.create_iterable(response_model=Day, **asked),
        client.create(response_model=list[Day], **asked),
    ):
        assert [day.name for day in got] == ["Mon", "Tue"]


def test_parallel_calls(options):
    """instructor leaves it to the model whether to call: `auto`."""
    mode = instructor.Mode.PARALLEL_TOOLS
    client = instructor.from_openai(openai.OpenAI(**options), mode=mode)
    day = {"name": "Mon", "unit": "K", "high": 3}
    asked = saying(("Day", day), ("Weather", {"place": "Bonn", "days": [day], "kind": "K"}))
    got = client.create(response_model=Iterable[Weather | Day], **asked)
    assert [type(each) for each in got] == [Day, Weather]


class Label(enum.Enum):
    SPAM = "spam"
    HAM = "ham"


@pytest.mark.parametrize("kind", [bool, int, Label, Literal["a", "b"], Unit])
def test_simple_answers(client, kind):
    got = client.create(response_model=kind, **ASKED)
    assert got in ("a", "b") if kind == Literal["a", "b"] else isinstance(got, kind)


def test_what_may_be_missing(client):
    assert client.create(response_model=instructor.Maybe(Place), **ASKED) is not None


def test_an_answer_that_a_validator_refuses_is_asked_for_again(client):
    seen = []

    class Picky(pydantic.BaseModel):
        unit: Unit

        @pydantic.field_validator("unit")
        @classmethod
        def check(cls, value):
            seen.append(value)
            if len(seen) < 3:
                raise ValueError("again")
            return value

    assert client.create(response_model=Picky, **ASKED | {"max_retries": 4}).unit is seen[-1]
    assert len(seen) == 3


def test_from_a_loop(options):
    client = instructor.from_openai(openai.AsyncOpenAI(**options))

    async def both():
        return await asyncio.gather(
            *(client.create(response_model=kind, **ASKED) for kind in (Weather, Day))
        )

    weather, day = asyncio.run(both())
    assert isinstance(weather, Weather) and isinstance(day, Day)


def test_what_cannot_be_is_a_fault_of_the_request(options):
    client = instructor.from_openai(openai.OpenAI(**options))

    class Impossible(Day):
        model_config = pydantic.ConfigDict(json_schema_extra=IMPOSSIBLE)

    with pytest.raises(Exception, match="uniqueItems"):
        client.create(response_model=Impossible, **ASKED)
