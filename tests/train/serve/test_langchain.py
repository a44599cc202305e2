"""LangChain's ChatOpenAI on the server, unmodified."""

import asyncio

import pytest

from tests.train.serve.asking import IMPOSSIBLE, MODEL, SAID, Day, Weather, served

langchain = pytest.importorskip("langchain_openai", reason="the extra 'serve-test' has the client")
pytest.importorskip("llguidance", reason="the extra 'structured' has it")
pytestmark = [pytest.mark.serving, pytest.mark.filterwarnings("ignore")]


@pytest.fixture(scope="module")
def chat():
    with served() as address:
        options = {"base_url": f"{address}/v1", "api_key": "none", "max_retries": 0}
        yield langchain.ChatOpenAI(model=MODEL, timeout=20, **options)


@pytest.fixture(scope="module")
def look_up():
    from langchain_core.tools import tool

    @tool
    def look_up(city: str) -> str:
        """Looks the weather of a city up."""
        return f"22 degrees in {city}"

    return look_up


def test_a_chat(chat):
    answer = chat.invoke([("system", "Be brief."), ("human", "Where?")])
    assert answer.content == SAID and answer.response_metadata["finish_reason"] == "stop"
    assert answer.usage_metadata["output_tokens"] == len(SAID.encode()) + 1
    assert answer.usage_metadata["input_token_details"]["cache_read"] == 3


def test_a_stream(chat):
    parts = list(chat.stream("Where?", stream_usage=True))
    assert "".join(part.content for part in parts) == SAID and len(parts) > 3
    assert sum(part.usage_metadata["output_tokens"] for part in parts if part.usage_metadata) > 3


def test_many_at_once(chat):
    assert [x.content for x in chat.batch(["Where?", "When?", "Who?"])] == [SAID] * 3


def test_from_a_loop(chat):
    async def both():
        whole = await chat.ainvoke("Where?")
        return whole.content, "".join([part.content async for part in chat.astream("Where?")])

    assert asyncio.run(both()) == (SAID, SAID)


def test_limits_and_log_probabilities(chat):
    bound = chat.bind(stop=["∑"], logprobs=True, top_logprobs=2, seed=3, temperature=0.5)
    answer = bound.invoke("Where?")
    assert answer.content == "Grüße, "
    assert len(answer.response_metadata["logprobs"]["content"][0]["top_logprobs"]) == 2
    cut = chat.bind(max_tokens=2, frequency_penalty=0.5, presence_penalty=0.5).invoke("Where?")
    assert (cut.content, cut.response_metadata["finish_reason"]) == ("Gr", "length")


@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
def test_an_answer_as_a_model(chat, method):
    asked = chat.with_structured_output(Weather, method=method)
    assert isinstance(asked.invoke("Where?"), Weather)
    asked = chat.with_structured_output(Weather, method=method, strict=True, include_raw=True)
    got = asked.invoke("Where?")
    assert isinstance(got["parsed"], Weather) and got["parsing_error"] is None
    *_, last = chat.with_structured_output(Weather, method=method).stream("Where?")
    assert isinstance(last, Weather)


def test_an_answer_as_json(chat):
    assert isinstance(chat.with_structured_output(None, method="json_mode").invoke("JSON?"), dict)
    schema = {"title": "day", "description": "A day.", **Day.model_json_schema()}
    assert {*chat.with_structured_output(schema).invoke("Where?")} == {"name", "unit", "high"}


@pytest.mark.parametrize("choice", ["any", "required", True, "look_up"])
def test_a_call_that_is_asked_for(chat, look_up, choice):
    tools = [look_up] if choice is True else [look_up, Weather]
    answer = chat.bind_tools(tools, tool_choice=choice).invoke("Where?")
    assert answer.tool_calls and not answer.invalid_tool_calls
    assert {call["name"] for call in answer.tool_calls} <= {"look_up", "Weather"}
    parts = chat.bind_tools(tools, tool_choice=choice).stream("Where?")
    whole = next(parts)
    for part in parts:
        whole += part
    assert whole.tool_calls and not whole.invalid_tool_calls


def test_a_tool_is_called_and_its_answer_told(chat, look_up):
    from langchain_core.messages import HumanMessage

    agent, turns = chat.bind_tools([look_up]), [HumanMessage("CALL it.")]
    turns.append(agent.invoke(turns))
    (call,) = turns[-1].tool_calls
    assert (call["name"], call["args"]) == ("look_up", {"city": "Köln"})
    turns.append(look_up.invoke(call))
    assert turns[-1].content == "22 degrees in Köln"
    assert agent.invoke(turns).content == SAID


def test_what_cannot_be_is_a_fault_of_the_request(chat):
    import openai

    schema = {"title": "x", "description": "x", **IMPOSSIBLE}
    with pytest.raises(openai.BadRequestError, match=r"schema\.properties\.a.*uniqueItems"):
        chat.with_structured_output(schema, method="json_schema").invoke("Where?")
