"""Keys, limits, errors, and what the status tells whom."""

import json
import re
import socket
import threading
import time

import pytest
from starlette.responses import PlainTextResponse
from starlette.routing import Route
from starlette.testclient import TestClient

from tests.train.serve.scripted import TOKENIZER, ScriptedEngine, ids, serving, tenant
from tests.train.serve.waiting import until
from train.console.errors import UserError
from train.serve.app import make_app
from train.serve.routes.access import Access, GateLimits, owner_of, read_keys
from train.serve.routes.openai.models import AdapterLookup
from train.serve.routes.status import TenantLookup

KEYS = {"tml-one": "anna", "tml-two": "ben", "tml-three": "anna"}
CHAT = {"model": "tiny/base", "messages": [{"role": "user", "content": "hi"}]}


def engine_of(wait=lambda: None):
    return ScriptedEngine(lambda sample, index: ids("yes"), wait)


async def _whose(request):
    return PlainTextResponse(owner_of(request))


async def _broken(request):
    raise ValueError("the secret of the server")


async def _deep(request):
    raise RecursionError


async def _guarded(request):
    """Makes an answer of its own of whatever goes wrong."""
    try:
        return PlainTextResponse(str(len(await request.body())))
    except Exception:
        return PlainTextResponse("the route's own error", 500)


def client_of(engine=None, **options):
    if keys := options.pop("keys", None):
        options["access"] = Access(keys)
    routes = [Route("/whose", _whose), Route("/broken", _broken), Route("/deep", _deep)]
    routes += [
        Route(path, _guarded, methods=["POST"]) for path in ("/guarded", "/api/v1/files/1/x")
    ]
    app = make_app(engine or engine_of(), TOKENIZER, routes, **options)
    return TestClient(app, "http://localhost", raise_server_exceptions=False)


@pytest.mark.parametrize(
    ("headers", "owner"),
    [
        ({"Authorization": "Bearer tml-one"}, "anna"),
        ({"authorization": "bearer  tml-two"}, "ben"),
        ({"X-API-Key": "tml-three"}, "anna"),
        ({"X-API-Key": "tml-tw"}, None),
        ({"X-API-Key": "tml-one", "Authorization": "Bearer tml-two"}, "anna"),
        ({"Authorization": "Basic tml-one"}, None),
        ({"Authorization": "Bearer anna"}, None),
        ({}, None),
    ],
)
def test_a_key_tells_the_owner(headers, owner):
    with client_of(keys=KEYS) as client:
        answer = client.get("/whose", headers=headers)
        if owner is None:
            assert answer.status_code == 401
            assert answer.json()["error"]["code"] == "invalid_api_key"
            assert (
                client.post("/v1/chat/completions", json=CHAT, headers=headers).status_code == 401
            )
        else:
            assert (answer.status_code, answer.text) == (200, owner)


def test_signed_addresses_need_no_key():
    with client_of(keys=KEYS) as client:
        assert client.post("/api/v1/files/1/x", content=b"abc").text == "3"
        assert client.post("/guarded", content=b"abc").status_code == 401


def test_a_body_that_does_not_come_is_refused(monkeypatch):
    monkeypatch.setattr("train.serve.routes.access._READING", 0.3)
    with serving(engine_of()) as address:
        host, port = address.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port))) as slow:
            head = (
                "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\n12345"
            )
            slow.sendall(head.encode())
            slow.settimeout(10)
            assert slow.recv(1000).startswith(b"HTTP/1.1 408")


def test_without_keys_all_is_local():
    with client_of() as client:
        assert client.get("/whose", headers={"X-API-Key": "any"}).text == "local"


def test_a_file_of_keys(tmp_path):
    path = tmp_path / "keys"
    path.write_text("# ours\nanna tml-one\n\nben   tml-two\nanna tml-three\n")
    assert read_keys(path) == KEYS
    for text, named in {
        "anna tml-one\nben": "line 2",
        "anna a b": "line 1",
        "an/na key": "line 1",
        "anna key\nben key": "line 2",
        "# none": "no key",
    }.items():
        path.write_text(text)
        with pytest.raises(UserError, match=named):
            read_keys(path)
    with pytest.raises(UserError, match="missing"):
        read_keys(tmp_path / "missing")


def chunks(size, n):
    for _ in range(n):
        yield b"[" * size


def test_a_body_is_counted_while_it_is_read():
    with client_of(limits=GateLimits(body=1000)) as client:
        padded = {**CHAT, "user": "x" * (998 - len(json.dumps({**CHAT, "user": ""})))}
        whole = json.dumps(padded).encode()
        assert len(whole) == 998
        assert client.post("/v1/chat/completions", content=whole).status_code == 200
        for content in (b"x" * 1001, chunks(400, 3)):  # with a length, and without
            answer = client.post("/v1/chat/completions", content=content)
            assert answer.status_code == 413
            assert "1,000 bytes" in answer.json()["error"]["message"]
        assert client.post("/guarded", content=chunks(250, 4)).text == "1000"
        answer = client.post("/guarded", content=chunks(251, 4))
        assert answer.status_code == 413 and "1,000 bytes" in answer.json()["error"]["message"]


def test_an_owner_who_waits_too_much_waits_alone():
    more = threading.Semaphore(0)
    engine = engine_of(more.acquire)
    with client_of(engine, keys=KEYS, limits=GateLimits(waiting=2)) as client:

        def ask(key, found):
            headers = {"X-API-Key": key}
            found.append(client.post("/v1/chat/completions", json=CHAT, headers=headers))

        found = []
        threads = [threading.Thread(target=ask, args=("tml-one", found)) for _ in range(2)]
        for thread in threads:
            thread.start()
        until(lambda: len(engine.drawn) == 2, "the engine has both requests")
        third = []
        ask("tml-three", third)
        assert third[0].status_code == 429 and int(third[0].headers["retry-after"]) > 0
        more.release(100)
        ask("tml-two", third)
        assert third[1].status_code == 200
        for thread in threads:
            thread.join()
        ask("tml-three", third)
        assert [one.status_code for one in (*found, third[2])] == [200] * 3


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/nothing", 404),
        ("GET", "/v1/chat/completions", 405),
        ("GET", "/broken", 500),
        ("GET", "/deep", 400),
        ("GET", "/v1/models/nobody", 404),
    ],
)
def test_errors_are_json(method, path, status):
    with client_of() as client:
        answer = client.request(method, path)
        assert answer.status_code == status
        assert answer.json()["error"].keys() == {"message", "type", "param", "code"}
        assert "secret" not in answer.text and "Traceback" not in answer.text


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[]", b"3", b"\xff\xfe", b"[" * 100_000, b'{"n": ' + b"9" * 5000 + b"}", b"null"]
    + [json.dumps({**CHAT, "messages": bad}).encode() for bad in (3, {}, [3], [[]], [{"role": 3}])],
)
def test_garbage_is_refused(body):
    with client_of() as client:
        for path in ("/v1/chat/completions", "/v1/completions", "/v1/load_lora_adapter"):
            answer = client.post(path, content=body)
            assert answer.status_code == 400, answer.text


def test_a_text_that_no_tokenizer_need_see_is_refused():
    with client_of() as client:
        for path, field in (
            ("chat/completions", {"messages": [{"role": "user", "content": "x" * 30_000_000}]}),
            ("completions", {"prompt": "x" * 30_000_000}),
        ):
            begin = time.process_time()
            answer = client.post(f"/v1/{path}", json={"model": "tiny/base", **field})
            assert answer.status_code == 400 and "characters" in answer.text
            assert time.process_time() - begin < 5


def test_lists_in_lists_are_refused():
    with client_of() as client:
        for depth in range(850, 1010, 9):
            for field in ("messages", "tools", "logit_bias", "chat_template_kwargs"):
                nested = "[" * depth + "]" * depth
                body = json.dumps(CHAT | {field: "HERE"}).replace('"HERE"', nested)
                answer = client.post("/v1/chat/completions", content=body)
                assert answer.status_code == 400, (depth, field, answer.text)


@pytest.mark.slow
def test_random_fields_never_break_the_server():
    import random

    rng = random.Random(7)
    values = [None, True, -1, 0, 1, 3.5, 1e300, "", "x", "\ud800", [], ["x"], [1, 2], {}, {"a": 1}]
    values += [
        [[]],
        [["x"]],
        [{"role": "user", "content": "x"}],
        [{"type": "function"}],
        "tiny/base",
    ]
    names = [
        "model",
        "messages",
        "prompt",
        "tools",
        "n",
        "stop",
        "logprobs",
        "top_logprobs",
        "echo",
    ]
    names += [
        "max_tokens",
        "temperature",
        "top_p",
        "top_k",
        "seed",
        "stream_options",
        "tool_choice",
    ]
    names += ["chat_template_kwargs", "stop_token_ids", "logit_bias", "best_of", "lora_name"]
    seen = set()
    with client_of() as client:
        for _ in range(400):
            body = {name: rng.choice(values) for name in rng.sample(names, rng.randrange(6))}
            for path, good in (("chat/completions", CHAT), ("completions", {"prompt": "x"})):
                sent = {"model": "tiny/base", **good, **body}
                answer = client.post(f"/v1/{path}", content=json.dumps(sent))
                assert answer.status_code in (200, 400, 404), (sent, answer.text)
                seen.add(answer.status_code)
    assert seen == {200, 400, 404}


def owns(owner, name):
    return name.startswith(f"{owner}-")


def test_the_status_shows_what_is_ones_own():
    engine = engine_of()
    engine.tenants = {"anna-1": tenant(), 'ben-"2"\n': tenant(steps=4)}
    shown = TenantLookup(display_name={"anna-1": "mine"}.get)
    with client_of(engine, keys=KEYS, lookup=AdapterLookup(owns=owns), tenants=shown) as client:
        assert client.get("/status.json").status_code == 401
        assert client.get("/metrics").status_code == 401
        assert client.get("/healthz").json() == {"status": "ok"}
        page = client.get("/")
        assert page.status_code == 200 and "anna" not in page.text
        anna, ben = ({"X-API-Key": key} for key in ("tml-one", "tml-two"))
        found = client.get("/status.json", headers=anna).json()
        assert [*found["tenants"]] == ["anna-1"]
        assert found["tenants"]["anna-1"] == {
            "name": "mine",
            "rank": 6,
            "losses": [[0, 3.5], [1, None], [2, 1.25]],
            "steps": 2,
            "seconds": 0.5,
            "size": 29,
            "queued": 31,
            "owner": "anna",
            "session": "one",
            "used": 5.0,
            "parked": True,
        }
        assert found["waiting"] == 5 and found["drawn_tokens"] == 13 and found["base_size"] == 23
        text = client.get("/metrics", headers=ben).text
        assert "anna" not in text
        assert read_metrics(text)["lora_jax_tenant_steps_total"] == {'tenant="ben-\\"2\\"\\n"': 4}
        assert read_metrics(text)["lora_jax_drawn_tokens_total"] == {"": 13}


def read_metrics(text):
    """Prometheus' text format: each sample, after the type of its metric."""
    found, typed = {}, set()
    for line in text.splitlines():
        if line.startswith("#"):
            _, kind, name, rest = line.split(" ", 3)
            typed |= {name} if kind == "TYPE" and rest in ("counter", "gauge") else set()
            continue
        name, labels, value = re.fullmatch(r"(\w+)(?:\{(.*)\})? (\S+)", line).groups()
        assert name in typed
        found.setdefault(name, {})[labels or ""] = float(value)
    assert text.endswith("\n")
    return found


def test_owners_share_no_adapters(tmp_path):
    for name in ("inside", "../beyond"):
        (tmp_path / "all" / name).mkdir(parents=True)
        (tmp_path / "all" / name / "adapter_config.json").write_text("{}")
    engine = engine_of()
    engine.adapters = {"anna-snapshot": tmp_path}
    lookup = AdapterLookup(tmp_path / "all", owns=owns)
    with client_of(engine, keys=KEYS, lookup=lookup) as client:

        def post(key, route, **body):
            answer = client.post(f"/v1/{route}", json=body, headers={"X-API-Key": key})
            return answer.status_code

        def names(key):
            answer = client.get("/v1/models", headers={"X-API-Key": key}).json()
            return {one["id"] for one in answer["data"]}

        for path in ("../beyond", str(tmp_path / "beyond"), "/", "~", "gs://bucket/a"):
            assert post("tml-one", "load_lora_adapter", lora_name="x", lora_path=path) == 400
        asked = {"lora_name": "x", "lora_path": "gs://bucket/a"}
        headers = {"X-API-Key": "tml-one"}
        said = client.post("/v1/load_lora_adapter", json=asked, headers=headers).json()
        assert "this is no path of this machine. Mount the bucket" in said["error"]["message"]
        assert post("tml-one", "load_lora_adapter", lora_name="mine", lora_path="inside") == 200
        assert names("tml-one") == {"tiny/base", "inside", "mine", "anna-snapshot"}
        assert names("tml-two") == {"tiny/base", "inside"}
        for model in ("mine", "anna:mine", "anna-snapshot"):
            assert post("tml-two", "chat/completions", **{**CHAT, "model": model}) == 404
            assert (
                client.get(f"/v1/models/{model}", headers={"X-API-Key": "tml-two"}).status_code
                == 404
            )
        assert post("tml-two", "unload_lora_adapter", lora_name="mine") == 404
        assert post("tml-two", "load_lora_adapter", lora_name="mine", lora_path="inside") == 200
        assert post("tml-two", "chat/completions", **{**CHAT, "model": "mine"}) == 200
        assert engine.drawn[-1].adapter == "ben:mine"
        assert post("tml-one", "unload_lora_adapter", lora_name="inside") == 404
        assert post("tml-one", "unload_lora_adapter", lora_name="mine") == 200
        assert names("tml-two") == {"tiny/base", "inside", "mine"}
