"""litellm on the server, unmodified, as OpenAI's and as vLLM's."""

import asyncio
import json

import pytest

from tests.train.serve.asking import IMPOSSIBLE, MODEL, SAID, Day, Weather, served

litellm = pytest.importorskip("litellm", reason="the extra 'serve-test' has the client")
pytest.importorskip("llguidance", reason="the extra 'structured' has it")
pytestmark = [pytest.mark.serving, pytest.mark.filterwarnings("ignore")]
QUESTION = [{"role": "user", "content": "Where?"}]
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": name,
            "description": name,
            "parameters": {
                "type": "object",
                "properties": {"city": {"enum": ["Köln", "Bonn"]}},
                "required": ["city"],
                "additionalProperties": False,
            },
        },
    }
    for name in ("look_up", "other")
]


@pytest.fixture(scope="module", params=["openai", "hosted_vllm"])
def asked(request):
    """The arguments of a request, as for each of two providers."""
    with served() as address:
        yield {
            "model": f"{request.param}/{MODEL}",
            "api_base": f"{address}/v1",
            "api_key": "none",
            "messages": QUESTION,
            "num_retries": 0,
            "timeout": 20,
        }


def said(answer):
    return answer.choices[0].message.content


def test_a_chat(asked):
    answer = litellm.completion(**asked, temperature=0.5, top_p=0.9, seed=3)
    assert said(answer) == SAID and answer.choices[0].finish_reason == "stop"
    assert answer.usage.completion_tokens == len(SAID.encode()) + 1


def test_a_stream(asked):
    parts = list(litellm.completion(**asked, stream=True, stream_options={"include_usage": True}))
    assert len(parts) > 3
    whole = litellm.stream_chunk_builder(parts, messages=QUESTION)
    assert said(whole) == SAID and whole.usage.completion_tokens == len(SAID.encode()) + 1


def test_from_a_loop(asked):
    async def both():
        stream = await litellm.acompletion(**asked, stream=True)
        texts = [part.choices[0].delta.content or "" async for part in stream]
        return said(await litellm.acompletion(**asked)), "".join(texts)

    assert asyncio.run(both()) == (SAID, SAID)


def test_many_at_once(asked):
    fields = asked | {"messages": [QUESTION, QUESTION]}
    assert [said(answer) for answer in litellm.batch_completion(**fields)] == [SAID] * 2
    assert len(litellm.completion(**asked, n=3).choices) == 3


def test_a_plain_completion(asked):
    fields = {name: value for name, value in asked.items() if name != "messages"}
    answer = litellm.text_completion(prompt="once", max_tokens=60, **fields)
    assert answer.choices[0].text == SAID


def test_limits_and_log_probabilities(asked):
    answer = litellm.completion(**asked, stop=["∑"], logprobs=True, top_logprobs=2)
    assert said(answer) == "Grüße, "
    assert len(answer.choices[0].logprobs.content[0].top_logprobs) == 2
    extra = {"top_k": 3, "min_p": 0.1, "repetition_penalty": 1.1}
    answer = litellm.completion(**asked, max_tokens=2, extra_body=extra)
    assert (said(answer), answer.choices[0].finish_reason) == ("Gr", "length")


def test_an_answer_as_a_model(asked):
    for kind in (Weather, Day):
        kind.model_validate_json(said(litellm.completion(**asked, response_format=kind)))
    fields = {"type": "json_schema", "json_schema": {"name": "d", "schema": {"enum": ["x"]}}}
    assert json.loads(said(litellm.completion(**asked, response_format=fields))) == "x"


def test_an_answer_as_json(asked):
    answer = litellm.completion(**asked, response_format={"type": "json_object"})
    assert isinstance(json.loads(said(answer)), dict)


def test_a_call_that_is_asked_for(asked):
    for choice in ("required", {"type": "function", "function": {"name": "look_up"}}):
        answer = litellm.completion(**asked, tools=TOOLS, tool_choice=choice)
        for call in answer.choices[0].message.tool_calls:
            assert json.loads(call.function.arguments)["city"] in ("Köln", "Bonn")
        parts = list(litellm.completion(**asked, tools=TOOLS, tool_choice=choice, stream=True))
        whole = litellm.stream_chunk_builder(parts).choices[0].message
        assert json.loads(whole.tool_calls[0].function.arguments)["city"] in ("Köln", "Bonn")


def test_a_tool_is_called_and_its_answer_told(asked):
    turns = [{"role": "user", "content": "CALL it."}]
    message = litellm.completion(**asked | {"messages": turns}, tools=TOOLS).choices[0].message
    (call,) = message.tool_calls
    assert json.loads(call.function.arguments) == {"city": "Köln"}
    turns += [message, {"role": "tool", "tool_call_id": call.id, "content": "22 degrees"}]
    assert said(litellm.completion(**asked | {"messages": turns}, tools=TOOLS)) == SAID


def test_what_cannot_be_is_a_fault_of_the_request(asked):
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": IMPOSSIBLE}}
    with pytest.raises(litellm.BadRequestError, match=r"properties\.a.*uniqueItems"):
        litellm.completion(**asked, response_format=form)
    with pytest.raises(litellm.NotFoundError, match="nobody"):
        litellm.completion(**asked | {"model": asked["model"].replace("tiny/base", "nobody")})
