"""Fields of chats and completions: what others' clients send, what is refused, what is unknown."""

import dataclasses
import json
import re
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from tests.train.serve.scripted import FACTS, ScriptedEngine, ids
from tests.train.tiny import CHATML, tokenizer
from train.serve.app import make_app
from train.serve.routes.openai.table import CHAT, COMPLETIONS, FIELDS

# As the packages openai, langchain-openai, litellm and instructor sent them to a server that
# answered whatever came.
SENT = json.loads(Path(__file__).with_name("bodies.json").read_text())["requests"]
TOOL_TEMPLATE = (
    "{% for t in tools or [] %}{{ t | tojson }}{% endfor %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content or '' }}"
    "{% for c in m.tool_calls or [] %}{{ c.function | tojson }}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ASKED = {CHAT: {"messages": [{"role": "user", "content": "hi"}]}, COMPLETIONS: {"prompt": "hi"}}


@pytest.fixture(scope="module")
def post():
    """Posts a body; returns the status and the answer, of JSON or a stream."""
    made = tokenizer(TOOL_TEMPLATE)
    engine = ScriptedEngine(lambda sample, index: ids("yes"))
    engine.facts = dataclasses.replace(FACTS, max_length=4096)
    with TestClient(make_app(engine, made), "http://localhost") as client:

        def sent(path, body):
            answer = client.post(path, content=json.dumps(body))
            is_json = answer.headers["content-type"] == "application/json"
            return answer.status_code, answer.json() if is_json else answer.text

        yield sent


def is_structured(body):
    """Returns True if a body asks for an answer of a form."""
    is_forced = isinstance(body.get("tool_choice"), dict) or body.get("tool_choice") == "required"
    return is_forced or body.get("response_format") not in (None, {"type": "text"})


@pytest.mark.parametrize("sent", SENT, ids=lambda sent: f"{sent['client']}: {sent['call']}")
def test_bodies_of_clients_pass(post, sent):
    if is_structured(sent["body"]):
        pytest.importorskip("llguidance", reason="the extra 'structured' has it")
    body = sent["body"] | {"model": "tiny/base", "max_tokens": 4}
    status, answer = post(sent["path"], body)
    assert status == 200, answer


def test_all_clients_are_there():
    clients = {"openai", "langchain", "litellm", "instructor"}
    assert {sent["client"] for sent in SENT} == clients and len(SENT) >= 30
    assert {sent["client"] for sent in SENT if is_structured(sent["body"])} >= {"instructor"}


IGNORED_ONCE = {
    "chat_template": "{{ messages }}",
    "documents": [{"text": "x"}],
    "grammar": 'root ::= "a"',
    "regex": "a+",
    "repeat_penalty": 1.3,
}
NEUTRAL = {
    "prompt_logprobs": None,
    "include_stop_str_in_output": False,
    "skip_special_tokens": True,
    "chat_template": None,
    "documents": [],
    "repeat_penalty": 1.0,
    "n": 1,
    "frequency_penalty": 0,
    "logit_bias": {},
    "user": "me",
    "metadata": {"a": "b"},
    "store": True,
    "stream_options": {"include_usage": True, "include_obfuscation": False},
}


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_what_would_change_the_answer_is_refused_by_name(post, path):
    asked = {"model": "tiny/base", **ASKED[path]}
    assert post(path, asked | NEUTRAL)[0] == 200
    for name, value in IGNORED_ONCE.items():
        status, answer = post(path, asked | {name: value})
        assert (status, name in answer["error"]["message"]) == (400, True), name


@pytest.mark.parametrize(
    ("path", "field", "said"),
    [
        (CHAT, {"temprature": 0.5}, "Did you mean `temperature`?"),
        (COMPLETIONS, {"max_token": 5}, "Did you mean `max_tokens`?"),
        (CHAT, {"maxTokens": None}, "Did you mean `max_tokens`?"),
        (CHAT, {"zzzz": 1}, "Remove it, or use one of model, "),
        (CHAT, {"\ud800" * 1000: 1}, "Remove it"),
        (CHAT, {"stream_options": {"include_usages": True}}, "Did you mean `include_usage`?"),
        (CHAT, {"prompt": "hi"}, "it belongs to /v1/completions"),
        (CHAT, {"echo": True}, "it belongs to /v1/completions"),
        (COMPLETIONS, {"tools": [{}]}, "it belongs to /v1/chat/completions"),
        (COMPLETIONS, {"top_logprobs": 3}, "Pass `logprobs`, the number of alternatives"),
        (COMPLETIONS, {"add_special_tokens": False}, "not supported"),
        (CHAT, {"n_predict": 5}, "Pass `max_tokens`"),
        (CHAT, {"tool_choice": "required"}, "Pass `tools` to choose from"),
        (CHAT, {"regex": "a"}, "Pass `response_format`, or `structured_outputs`"),
    ],
)
def test_a_field_that_is_unknown_or_elsewhere_is_named(post, path, field, said):
    status, answer = post(path, {"model": "tiny/base", **ASKED[path], **field})
    assert status == 400 and said in answer["error"]["message"], answer
    is_unknown = "is not a field of" in answer["error"]["message"]
    assert answer["error"]["code"] == ("unknown_parameter" if is_unknown else None)
    assert is_unknown == said.startswith(("Did you mean", "Remove it"))


def test_the_page_lists_the_fields():
    text = (Path(__file__).parents[3] / "train/serve/fields.md").read_text()
    rows = dict(re.findall(r"^\| (works|refused|no effect) \| (.*) \|$", text, re.M))
    for kind, row in rows.items():
        listed = [*re.findall(r"`(\w+)`", row.split(" but ")[0])]
        known = {n for fields in FIELDS.values() for n, f in fields.items() if f.kind == kind}
        if kind == "refused":  # elsewhere they work
            known -= {
                n for fields in FIELDS.values() for n, f in fields.items() if f.kind == "works"
            }
        assert sorted(listed) == sorted(known), kind
    assert len(rows) == 3


@pytest.mark.serving
def test_no_field_of_openais_client_is_unknown():
    pytest.importorskip("openai", reason="the extra 'serve-test' has the client")
    from openai.types import completion_create_params as of_completions
    from openai.types.chat import completion_create_params as of_chats

    for path, module in ((CHAT, of_chats), (COMPLETIONS, of_completions)):
        sent = {*module.CompletionCreateParamsBase.__annotations__, "stream"}
        assert sent > {"model", "temperature"} and sent <= FIELDS[path].keys()


def test_tools_that_a_template_does_not_show_are_refused_though_a_turn_names_them():
    engine = ScriptedEngine(lambda sample, index: ids("yes"))
    tool = {"type": "function", "function": {"name": "look_up", "parameters": {"type": "object"}}}
    turn = {"role": "user", "content": "Call look_up for Bonn, please."}
    body = {"model": "tiny/base", "messages": [turn], "tools": [tool]}
    shown = "{% for t in tools or [] %}[{{ t.function.name }}]{% endfor %}" + CHATML
    for template, status in ((CHATML, 400), (shown, 200), ("look_up" + CHATML, 400)):
        with TestClient(make_app(engine, tokenizer(template)), "http://localhost") as client:
            answer = client.post(CHAT, json=body)
            assert answer.status_code == status, answer.text
            assert status == 200 or "shows no tools: 'look_up'" in answer.text
