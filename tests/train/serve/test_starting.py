"""Starts of a server: its page, and the refusal of all else until it is ready."""

import json
import threading
import time

import pytest

from tests.train.serve.command import Engine, ask, command, is_ready
from tests.train.serve.waiting import until

POSTS = ("/v1/chat/completions", "/api/v1/create_session", "/api/v1/client/config")
GETS = ("/healthz", "/status.json", "/metrics", "/v1/models", "/api/v1/healthz", "/nothing")


@pytest.mark.parametrize("line", ["", "--keys keys"])
def test_the_page_is_there_at_once_and_all_else_is_to_be_asked_again(monkeypatch, tmp_path, line):
    (tmp_path / "keys").write_text("anna tml-one\n")
    reached, go_on, early = threading.Event(), threading.Event(), []

    def made(seen):
        go_on.wait()
        go_on.clear()
        seen(31, 90)
        reached.set()
        go_on.wait()
        return Engine()

    def work(port):
        early.append(ask(port, path="/status.json"))
        go_on.set()
        reached.wait()
        page = ask(port, path="/")
        refused = [ask(port, path=path) for path in GETS]
        refused += [ask(port, "POST", path, "{}") for path in POSTS]
        rebound = ask(port, path="/", Host="example.org")
        go_on.set()
        until(lambda: is_ready(port), "the server is ready")
        return page, refused, rebound, ask(port, path="/"), ask(port, path="/healthz")

    page, refused, rebound, later, health = command(
        monkeypatch, tmp_path, line, work, made, ready=False
    )
    assert page[0] == 200 and b"<progress" in page[2] and page[2] == later[2]
    for status, headers, body in refused:
        assert status == 503 and int(headers["retry-after"]) > 0
        assert body["starting"] == {"model": "tiny", "compiled": 31, "parts": 90}
        assert "31 of 90" in body["error"]["message"]
    assert early[0][0] == 503 and early[0][2]["starting"]["parts"] == 0
    assert (rebound[0], health[0]) == (200 if line else 403, 200)


def test_names_owners_and_last_use_stand_beside_ids(monkeypatch, tmp_path):
    (tmp_path / "keys").write_text("anna tml-one\n")
    engine = Engine()

    def work(port):
        def post(path, **fields):
            return ask(port, "POST", f"/api/v1/{path}", json.dumps(fields), X_API_Key="tml-one")[2]

        def create(session, **fields):
            place = {"session_id": session, "model_seq_id": 0, "base_model": "tiny/base"}
            return post("create_model", **place, lora_config={"rank": 2}, **fields)["model_id"]

        recipe = {"recipe_name": "sl_loop"}
        sessions = [post("create_session"), post("create_session", display_name="Mine")]
        sessions += [post("create_session", user_metadata=recipe)]
        models = [create(one["session_id"]) for one in sessions]
        until(lambda: len(engine.tenants) == 3, "they are made")
        before, made = status(port), time.time()
        models.append(create(post("create_session")["session_id"]))  # there is no room for it
        until(lambda: status(port)[models[0]]["parked"], "another is parked")
        until(lambda: models[3] in status(port), "it has the room")
        parked = status(port)
        post("optim_step", model_id=models[0], seq_id=1, adam_params={})
        until(lambda: not status(port)[models[0]]["parked"], "it is back")
        return models, made, before, parked, status(port)

    def status(port):
        return ask(port, path="/status.json", X_API_Key="tml-one")[2]["tenants"]

    began = time.time()
    line = "--keys keys --tenants 3"
    models, made, before, parked, later = command(monkeypatch, tmp_path, line, work, engine)
    names = [before[model]["name"] for model in models[:3]]
    assert names == [None, "Mine", "sl_loop"]
    assert {told["owner"] for told in before.values()} == {"anna"}
    used = [before[model]["used"] for model in models[:3]]
    assert began < used[0] < used[1] < used[2] < made
    assert [parked[model]["used"] for model in models[:3]] == used, "parking is no use"
    assert later[models[0]]["used"] > parked[models[3]]["used"] > made
    assert [later[model]["used"] for model in models[1:3]] == used[1:]
