"""Bodies that are no requests, to Tinker's endpoints: refused in words, and no failure."""

import asyncio
import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from starlette.requests import Request

from tests.train.serve.client import sampler
from train.serve.routes.errors import json_response
from train.serve.routes.tinker import bodies


@pytest.mark.parametrize("content", [b"", b"[]", b"\xff", b"null", b"{", b"[" * 99999, b"7" * 9999])
def test_bodies_that_are_no_objects(client, content):
    for path in (
        *("create_session", "session_heartbeat", "create_model", "get_info", "optim_step"),
        *("save_weights", "load_weights", "create_sampling_session", "asample", "retrieve_future"),
        *("weights_info", "unload_model", "forward_backward"),
    ):
        answer = client.http.post(f"/api/v1/{path}", content=content)
        assert 400 <= answer.status_code < 500, path
        assert isinstance(answer.json()["detail"], str)


def test_large_bodies_are_refused(client, monkeypatch):
    monkeypatch.setattr(bodies, "MOST_BYTES", 1000)
    for path in ("create_session", "forward_backward", "telemetry"):
        client.ask("POST", path, 413, content=b"x" * 1001)


def test_large_metadata_is_refused(client):
    overhead = len(json.dumps({"note": ""}))
    largest = {"note": "x" * (bodies.MOST_METADATA_BYTES - overhead)}
    too_large = {"note": largest["note"] + "x"}
    client.post("create_session", tags=[], user_metadata=largest)
    answer = client.post("create_session", 400, tags=[], user_metadata=too_large)
    assert "65537 bytes as JSON, but the server keeps at most 65536" in answer["detail"]


def test_unknown_paths_and_methods(client):
    for method, path in [("GET", "nothing"), ("GET", "asample"), ("PUT", "create_model")]:
        assert "there is no" in client.ask(method, path, 404)["detail"]
    for query in ("limit=-1", "limit=x", "offset=²", "limit=99999"):
        client.ask("GET", f"checkpoints?{query}", 400)


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(st.characters(), max_size=9)
    | st.sampled_from(["tiny/base", "tinker://a/weights/b"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=4,
)
NAMES = st.sampled_from(
    "session_id model_seq_id base_model lora_config model_id seq_id adam_params path optimizer "
    "user_metadata sampling_session_seq_id model_path prompt sampling_params tinker_path "
    "request_id overwrite ttl_seconds num_samples kind".split()
)
PATHS = st.sampled_from(
    "create_session session_heartbeat create_model get_info optim_step save_weights load_weights "
    "save_weights_for_sampler create_sampling_session asample retrieve_future weights_info".split()
)


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(path=PATHS, found=st.dictionaries(NAMES, VALUES, max_size=8), keep=st.booleans())
def test_malformed_requests_never_fail_the_server(client, path, found, keep):
    if not hasattr(client, "known"):
        session = client.session()
        client.known = {"session_id": session, "model_id": client.create(session)}
        client.known["sampling_session_id"] = sampler(client, session)
    content = json.dumps(found | client.known if keep else found)
    answer = client.http.post(f"/api/v1/{path}", content=content)
    assert answer.status_code < 500, answer.text
    answer.json()


def test_a_body_that_is_cut_off_is_no_failure():
    async def cut():
        return {"type": "http.disconnect"}

    async def endpoint(request, owner):
        return json_response(len(await bodies.read_bytes(request)))

    scope = {"type": "http", "method": "POST", "headers": [], "path": "/", "query_string": b""}
    answer = bodies.guard(endpoint, lambda _: "me")(Request(scope, cut))
    assert asyncio.run(answer).status_code == 400
