"""OpenAI's API, as the package `openai` sees it."""

import json
import math
import threading
import time

import numpy as np
import pytest

from tests.train.serve.scripted import (
    EOS,
    TOKENIZER,
    ScriptedEngine,
    ids,
    logprob,
    serving,
)
from tests.train.serve.waiting import until
from tests.train.tiny import CHATML, tokenizer
from train.serve.protocol.requests import RequestError
from train.serve.routes.openai.models import AdapterLookup

openai = pytest.importorskip("openai", reason="the extra 'serve-test' has the client")
pytestmark = pytest.mark.serving

SAID = "Grüße, ∑ of all. STOP and more"
QUESTION = [{"role": "user", "content": "How are you?"}]
PROMPT = "<|im_start|>user\nHow are you?<|im_end|>\n<|im_start|>assistant\n"
TOOL_TEMPLATE = "{% for t in tools or [] %}[{{ t.function.name }}]{% endfor %}" + CHATML
TOOLS = [
    {"type": "function", "function": {"name": name, "parameters": {"type": "object"}}}
    for name in ("look_up", "stop")
]
CALLS = (
    'I look.\n<tool_call>\n{"name": "look_up", "arguments": {"city": "Köln"}}\n</tool_call>\n'
    '<tool_call>{"name": "stop", "arguments": {}}</tool_call>'
)


def spoken(sample, index):
    """Says its own text for each index."""
    return ids(f"{SAID} {index}" if index else SAID)


@pytest.fixture(scope="module")
def engine():
    return ScriptedEngine(spoken)


@pytest.fixture(scope="module")
def client(engine):
    with serving(engine) as address, client_of(address) as made:
        yield made


def client_of(address):
    return openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0, timeout=20)


def ask(client, **fields):
    return client.chat.completions.create(model="tiny/base", messages=QUESTION, **fields)


def complete(client, prompt="once", **fields):
    return client.completions.create(model="tiny/base", prompt=prompt, **fields)


def test_a_stream_counts_as_it_grows(client):
    """vLLM's continuous_usage_stats, which guidellm asks for."""
    counts = {"include_usage": True, "continuous_usage_stats": True}
    parts = list(ask(client, stream=True, stream_options=counts, n=2, max_tokens=5))
    for i in range(2):
        mine = [p.usage for p in parts if p.choices and p.choices[0].index == i]
        assert [usage.completion_tokens for usage in mine][0] == 0
        assert [usage.completion_tokens for usage in mine][-1] == 5
        assert all(usage.prompt_tokens == len(ids(PROMPT, end=False)) for usage in mine)
    assert parts[-1].usage.completion_tokens == 10
    parts = list(ask(client, stream=True, stream_options={"include_usage": True}))
    assert [part.usage for part in parts[:-1]] == [None] * (len(parts) - 1)


def test_a_chat(client, engine):
    answer = ask(client)
    (choice,) = answer.choices
    assert (choice.message.role, choice.message.content) == ("assistant", SAID)
    assert (choice.finish_reason, choice.logprobs, choice.message.tool_calls) == (
        "stop",
        None,
        None,
    )
    assert answer.model == "tiny/base"
    sample = engine.drawn[-1]
    assert TOKENIZER.decode(sample.prompt) == PROMPT
    n = len(sample.prompt)
    assert answer.usage.prompt_tokens == n
    assert answer.usage.completion_tokens == len(ids(SAID))
    assert answer.usage.total_tokens == n + len(ids(SAID))
    assert answer.usage.prompt_tokens_details.cached_tokens == 3
    assert sample.stop_ids == {EOS} and sample.max_tokens is None and sample.adapter is None


def test_what_is_asked_reaches_the_engine(client, engine):
    extra = {"top_k": 7, "stop_token_ids": [5]}
    fields = {"temperature": 0.5, "top_p": 0.25, "seed": -1, "n": 2, "stop": ["x", "y"]}
    ask(client, max_completion_tokens=9, extra_body=extra, **fields)
    sample = engine.drawn[-1]
    assert (sample.temperature, sample.top_p, sample.top_k) == (0.5, 0.25, 7)
    assert (sample.seed, sample.n, sample.max_tokens) == (2**32 - 1, 2, 9)
    assert (sample.stop, sample.stop_ids) == (("x", "y"), {5, EOS})
    assert sample.client.owner == "local"


@pytest.mark.parametrize(
    ("fields", "said", "finish"),
    [
        ({}, SAID, "stop"),
        ({"stop": "STOP"}, "Grüße, ∑ of all. ", "stop"),
        ({"stop": ["zzz", "üß", "all", "w"]}, "Gr", "stop"),
        ({"max_tokens": 4}, "Grü", "length"),
        ({"max_tokens": 3}, "Gr\ufffd", "length"),  # half of a character
    ],
)
def test_a_stream_says_what_the_whole_answer_says(client, fields, said, finish):
    whole = ask(client, **fields).choices[0]
    assert (whole.message.content, whole.finish_reason) == (said, finish)
    parts = list(ask(client, stream=True, stream_options={"include_usage": True}, **fields))
    *parts, last = parts
    assert last.choices == [] and last.usage == ask(client, **fields).usage
    assert all(part.usage is None for part in parts)
    assert parts[0].choices[0].delta.role == "assistant"
    assert "".join(part.choices[0].delta.content or "" for part in parts) == said
    assert [part.choices[0].finish_reason for part in parts if part.choices[0].finish_reason] == [
        finish
    ]
    assert len({part.id for part in parts}) == 1
    assert len(parts) > 3


def test_a_stream_comes_while_it_is_drawn():
    more = threading.Semaphore(4)
    with serving(ScriptedEngine(spoken, more.acquire)) as address, client_of(address) as client:
        parts = iter(ask(client, stream=True))
        seen = ""
        while seen != "Grü":
            seen += next(parts).choices[0].delta.content or ""
        more.release(1000)
        assert seen + "".join(part.choices[0].delta.content or "" for part in parts) == SAID


@pytest.mark.parametrize("stream", [False, True])
def test_who_leaves_ends_the_sample(stream):
    more = threading.Semaphore(5)
    engine = ScriptedEngine(spoken, more.acquire)
    with serving(engine) as address:
        if stream:
            with client_of(address) as client:
                parts = ask(client, stream=True)
                next(parts)
                parts.close()
        else:
            with pytest.raises(openai.APITimeoutError), client_of(address) as client:
                ask(client, timeout=0.5)
        until(lambda: engine.ended, "the sample is ended")
        more.release(1000)
    assert engine.ended == engine.drawn


def test_several_answers(client):
    answer = ask(client, n=3)
    said = [f"{SAID} {i}" if i else SAID for i in range(3)]
    assert [choice.message.content for choice in answer.choices] == said
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    parts = ["", "", ""]
    for part in ask(client, n=3, stream=True):
        for choice in part.choices:
            parts[choice.index] += choice.delta.content or ""
    assert parts == said


def test_log_probabilities_of_a_chat(client):
    whole = ask(client, logprobs=True, top_logprobs=2, stop="of").choices[0]
    found = whole.logprobs.content
    assert b"".join(bytes(one.bytes) for one in found).decode() == "Grüße, ∑ "
    for one, token in zip(found, ids(SAID), strict=False):
        assert math.isclose(one.logprob, logprob(token), rel_tol=1e-6)
        assert one.top_logprobs[0].token == one.token and len(one.top_logprobs) == 2
        assert one.top_logprobs[1].logprob < one.logprob
    assert [one.token for one in found[:3]] == ["G", "r", "\ufffd"]
    parts = list(ask(client, logprobs=True, top_logprobs=2, stop="of", stream=True))
    streamed = [part.choices[0].logprobs for part in parts if part.choices[0].logprobs]
    both = [
        [one.model_dump() for one in told]
        for told in (found, sum((s.content for s in streamed), []))
    ]
    for one, other in zip(*both, strict=True):
        assert one["bytes"] == other["bytes"]
        assert math.isclose(one["logprob"], other["logprob"], rel_tol=1e-6)


def test_completions_of_many_prompts(client, engine):
    answer = complete(client, ["one", "three"], n=2, max_tokens=50)
    assert [choice.text for choice in answer.choices] == [SAID, f"{SAID} 1"] * 2
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert [TOKENIZER.decode(one.prompt) for one in engine.drawn[-2:]] == ["one", "three"]
    assert answer.usage.prompt_tokens == len("onethree")
    parts = [""] * 4
    for part in complete(client, ["one", "three"], n=2, max_tokens=50, stream=True):
        parts[part.choices[0].index] += part.choices[0].text
    assert parts == [SAID, f"{SAID} 1"] * 2


@pytest.mark.parametrize(("prompt", "n"), [([5, 6, 7], 1), ([[5, 6], [7]], 2)])
def test_completions_of_tokens(client, engine, prompt, n):
    answer = complete(client, prompt)
    assert len(answer.choices) == n
    assert answer.choices[0].finish_reason == "length" and engine.drawn[-1].max_tokens == 16
    assert [one.prompt for one in engine.drawn[-n:]] == (prompt if n > 1 else [prompt])


def test_tokens_are_told_as_ids(client, engine):
    """All that was drawn, and as many log-probabilities, whatever of it the text shows."""
    want = [*ids(SAID, end=False), EOS]
    extra = {"extra_body": {"return_token_ids": True}}
    for stop, n in (
        ([], len(want)),
        (["STOP"], len(ids(SAID[: SAID.index("STOP") + 4], end=False))),
    ):
        drawing = {"max_tokens": 50, "logprobs": 1, "stop": stop, **extra}
        choices = complete(client, [[5, 6], [7]], **drawing).choices
        assert [choice.prompt_token_ids for choice in choices] == [[5, 6], [7]]
        for choice in choices:
            assert choice.token_ids == want[:n] and choice.finish_reason == "stop"
            told = choice.logprobs
            assert np.allclose(told.token_logprobs, [logprob(token) for token in want[:n]])
            assert len(told.top_logprobs) == len(told.text_offset) == n
            assert choice.text == (SAID if not stop else SAID[: SAID.index("STOP")])
    answer = ask(client, logprobs=True, **extra)
    assert answer.prompt_token_ids == [*engine.drawn[-1].prompt]
    assert answer.choices[0].token_ids == want
    assert len(answer.choices[0].logprobs.content) == len(want)
    assert not hasattr(complete(client, [5]).choices[0], "token_ids")
    with pytest.raises(openai.BadRequestError, match="They come whole. Remove `stream`"):
        complete(client, [5], stream=True, **extra)


def test_echo_scores_a_prompt(client, engine):
    text = "é of old"
    (choice,) = complete(client, text, echo=True, logprobs=2, max_tokens=0).choices
    told, tokens = choice.logprobs, ids(text, end=False)
    assert choice.text == text and choice.finish_reason == "length"
    assert told.tokens[:3] == ["\ufffd", "\ufffd", " "] and len(told.tokens) == len(tokens)
    assert told.text_offset == [0, 0, 1, 2, 3, 4, 5, 6, 7]
    assert told.token_logprobs[0] is None and told.top_logprobs[0] is None
    assert math.isclose(told.token_logprobs[4], logprob(tokens[4]), rel_tol=1e-6)
    assert told.top_logprobs[4].keys() == {"f", "g"}
    (choice,) = complete(client, text, echo=True, logprobs=0, max_tokens=4).choices
    assert choice.text == f"{text}Grü" and choice.logprobs.text_offset[-4:] == [8, 9, 10, 10]
    assert choice.logprobs.top_logprobs is None
    parts = list(complete(client, text, echo=True, max_tokens=4, stream=True))
    assert "".join(part.choices[0].text for part in parts) == f"{text}Grü"


@pytest.mark.parametrize("stream", [False, True])
def test_calls_of_tools(stream):
    engine = ScriptedEngine(lambda sample, index: ids(CALLS))
    options = {"tokenizer": tokenizer(TOOL_TEMPLATE)}
    with serving(engine, **options) as address, client_of(address) as client:
        if stream:
            parts = [part.choices[0] for part in ask(client, tools=TOOLS, stream=True)]
            content = "".join(part.delta.content or "" for part in parts)
            calls = [call for part in parts for call in part.delta.tool_calls or ()]
            assert [call.index for call in calls] == [0, 1]
            finish = parts[-1].finish_reason
        else:
            choice = ask(client, tools=TOOLS).choices[0]
            content, calls, finish = (
                choice.message.content,
                choice.message.tool_calls,
                choice.finish_reason,
            )
        assert (content, finish) == ("I look.", "tool_calls")
        assert [call.function.name for call in calls] == ["look_up", "stop"]
        assert json.loads(calls[0].function.arguments) == {"city": "Köln"}
        assert len({call.id for call in calls}) == 2
        second = len(ids(CALLS, end=False)) - 3
        for limit in (second, second + 3):  # within the second call, and before the end token
            options = {"tools": TOOLS, "max_tokens": limit, "stream": stream}
            answer = ask(client, **options)
            cut = [*answer][-1].choices[0] if stream else answer.choices[0]
            assert cut.finish_reason == "length"
            if not stream:
                assert len(cut.message.tool_calls) == (1 if limit == second else 2)
        assert TOKENIZER.decode(engine.drawn[-1].prompt) == f"[look_up][stop]{PROMPT}"
        plain = ask(client, tools=TOOLS, tool_choice="none").choices[0]
        assert (plain.message.content, plain.finish_reason) == (CALLS, "stop")
        assert TOKENIZER.decode(engine.drawn[-1].prompt) == PROMPT


@pytest.mark.parametrize("stream", [False, True])
def test_calls_are_read_in_the_format_of_the_template(stream):
    said = (
        "<|channel|>analysis<|message|>Where is it?<|end|><|start|>assistant<|channel|>commentary "
        'to=functions.look_up <|constrain|>json<|message|>{"city": "Köln"}<|call|>'
    )
    engine = ScriptedEngine(lambda sample, index: ids(said))
    template = TOOL_TEMPLATE + "{# <|channel|>commentary #}"
    with serving(engine, tokenizer=tokenizer(template)) as address, client_of(address) as client:
        if stream:
            parts = [part.choices[0] for part in ask(client, tools=TOOLS, stream=True)]
            deltas = [part.delta.model_dump() for part in parts]
            assert "".join(delta["content"] or "" for delta in deltas) == ""
            thought = "".join(delta.get("reasoning_content") or "" for delta in deltas)
            (call,), finish = (
                [call for part in parts for call in part.delta.tool_calls or ()],
                parts[-1].finish_reason,
            )
        else:
            choice = ask(client, tools=TOOLS).choices[0]
            assert choice.message.content is None
            thought, finish = choice.message.reasoning_content, choice.finish_reason
            (call,) = choice.message.tool_calls
    assert (thought, finish) == ("Where is it?", "tool_calls")
    assert call.function.name == "look_up" and json.loads(call.function.arguments) == {
        "city": "Köln"
    }


def test_a_model_without_a_template_has_no_chat(engine):
    with serving(engine, tokenizer=tokenizer(None)) as address, client_of(address) as client:
        with pytest.raises(openai.BadRequestError, match="/v1/completions"):
            ask(client)
        assert complete(client, max_tokens=50).choices[0].text == SAID


REFUSED = [
    ({"presence_penalty": 2.5}, "presence_penalty"),
    ({"frequency_penalty": -3}, "frequency_penalty"),
    ({"repetition_penalty": 0}, "repetition_penalty"),
    ({"min_p": 1.5}, "min_p"),
    ({"min_tokens": 9, "max_tokens": 8}, "min_tokens"),
    ({"logit_bias": {"5000": 3}}, "logit_bias"),
    ({"logit_bias": {"5": "x"}}, "logit_bias"),
    ({"logit_bias": {"5" * 5000: 1}}, "logit_bias"),
    ({"allowed_token_ids": []}, "allowed_token_ids"),
    ({"allowed_token_ids": [259]}, "allowed_token_ids"),
    ({"bad_words": [" "]}, "bad_words"),
    ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens"),
    ({"prompt_logprobs": 21}, "prompt_logprobs"),
    ({"chat_template": "{{ 1 }}"}, "--trust-request-chat-template"),
    ({"response_format": {"type": "xml"}}, "response_format"),
    ({"extra_body": {"functions": [{"name": "f"}]}}, "functions"),
    ({"tool_choice": "required"}, "tool_choice"),
    (
        {"tool_choice": {"type": "function", "function": {"name": "g"}}, "tools": TOOLS},
        "tool_choice",
    ),
    ({"n": 0}, "`n`"),
    ({"n": 1000}, "`n`"),
    ({"temperature": 2.5}, "temperature"),
    ({"temperature": float("nan")}, "temperature"),
    ({"temperature": "hot"}, "temperature"),
    ({"top_p": 0}, "top_p"),
    ({"top_logprobs": 2}, "logprobs"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    ({"max_tokens": -1}, "max_tokens"),
    ({"max_completion_tokens": 0}, "max_completion_tokens"),
    ({"max_tokens": 390}, "context_length_exceeded"),
    ({"stop": [""]}, "stop"),
    ({"stop": ["a\ud800"]}, "surrogate"),
    ({"stream_options": 3, "stream": True}, "stream_options"),
    ({"messages": []}, "messages"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "image_url"),
    ({"messages": [{"role": "user", "content": "x\udc00y"}]}, "surrogate"),
    ({"messages": [{"role": "user"}]}, "content"),
    ({"messages": [{"role": "user", "content": "x" * 500}]}, "context_length_exceeded"),
    ({"tools": TOOLS}, "template shows no tools"),
    ({"model": "nobody"}, "nobody"),
    ({"model": "../secret"}, "secret"),
]


@pytest.mark.parametrize(("fields", "names"), REFUSED)
@pytest.mark.parametrize("stream", [False, True])
def test_what_is_refused_is_named(client, engine, fields, names, stream):
    before = len(engine.drawn)
    body = {"model": "tiny/base", "messages": QUESTION, "stream": stream, **fields}
    body |= body.pop("extra_body", {})
    answer = client._client.post(f"{client.base_url}chat/completions", content=json.dumps(body))
    assert answer.status_code == (404 if "model" in fields else 400)
    error = answer.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert names in error["message"] or names == error["code"]
    assert len(engine.drawn) == before


def refuses_the_longer(sample, index):
    """Refuses one prompt while another is under way."""
    if len(sample.prompt) == len("one"):
        return ids("x" * 20)
    time.sleep(0.2)
    return RequestError("no room for this")


def test_the_engine_refuses_in_words():
    engine = ScriptedEngine(lambda sample, index: RequestError("no room for this"))
    with serving(engine) as address, client_of(address) as client:
        for stream in (False, True):
            with pytest.raises(openai.BadRequestError, match="no room for this"):
                ask(client, stream=stream)
    engine = ScriptedEngine(refuses_the_longer)
    with serving(engine) as address, client_of(address) as client:
        parts = complete(client, ["one", "three"], stream=True)
        with pytest.raises(openai.APIError, match="no room for this"):
            assert "".join(part.choices[0].text for part in parts)
    engine = ScriptedEngine(lambda sample, index: ValueError("/secret/place"))
    with serving(engine) as address, client_of(address) as client:
        with pytest.raises(openai.InternalServerError) as caught:
            ask(client)
        assert "secret" not in str(caught.value)


TINKER = "tinker://m/sampler_weights/1"


def test_models(tmp_path):
    for name in ("run", "other", "empty", ".hidden"):
        (tmp_path / "all" / name).mkdir(parents=True)
    for place in ("all/run", "all/other", "all/.hidden", "beyond"):
        (tmp_path / place).mkdir(exist_ok=True)
        (tmp_path / place / "adapter_config.json").write_text("{}")
    engine = ScriptedEngine(spoken)
    places = {TINKER: ("of/tinker", tmp_path / "beyond")}
    lookup = AdapterLookup(tmp_path / "all", lambda path, owner: places.get(path))
    engine.adapters["snapshot"] = tmp_path
    with serving(engine, lookup=lookup) as address, client_of(address) as client:
        listed = {one.id: one.parent for one in client.models.list()}
        assert listed == {"tiny/base": None, "run": "tiny/base"} | dict.fromkeys(
            ("other", "snapshot"), "tiny/base"
        )
        assert client.models.retrieve("tiny/base").id == "tiny/base"
        assert client.models.retrieve("run").parent == "tiny/base"
        for name, adapter in {
            "run": "run",
            TINKER: "of/tinker",
            f"tiny/base;{TINKER}": "of/tinker",
        }.items():
            client.chat.completions.create(model=name, messages=QUESTION)
            assert engine.drawn[-1].adapter == adapter
        assert engine.adapters["run"] == tmp_path / "all" / "run"
        assert engine.adapters["of/tinker"] == tmp_path / "beyond"
        assert client.models.retrieve(TINKER).parent == "tiny/base"
        for name in ("empty", ".hidden", "../beyond", "..", "tinker://m/sampler_weights/2"):
            with pytest.raises(openai.NotFoundError):
                client.chat.completions.create(model=name, messages=QUESTION)

        def post(route, **body):
            return client._client.post(f"{client.base_url}{route}", json=body).status_code

        beyond = str(tmp_path / "beyond")
        assert post("load_lora_adapter", lora_name="mine", lora_path=beyond) == 200
        assert post("load_lora_adapter", lora_name="mine", lora_path=beyond) == 400
        assert post("load_lora_adapter", lora_name="run", lora_path=beyond) == 400
        assert post("load_lora_adapter", lora_name="a/b", lora_path=beyond) == 400
        assert post("load_lora_adapter", lora_name="new", lora_path=str(tmp_path / "no")) == 400
        client.chat.completions.create(model="mine", messages=QUESTION)
        assert engine.drawn[-1].adapter == "mine"
        assert client.models.retrieve("mine").parent == "tiny/base"
        assert post("unload_lora_adapter", lora_name="mine") == 200
        assert post("unload_lora_adapter", lora_name="mine") == 404
        assert engine.dropped == ["mine"]
