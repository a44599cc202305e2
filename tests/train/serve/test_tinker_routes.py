"""Tinker's endpoints over a fake engine: models, gradients, checkpoints, and whose they are."""

import json
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import pytest
import zstandard

from tests.train.serve import fakes
from tests.train.serve.client import Client, body, logprobs, sampler
from tests.train.serve.fakes import FACTS, FakeEngine
from train.serve.protocol.requests import AdapterSpec, Create


def test_what_is_served(client):
    models = client.ask("GET", "get_server_capabilities")["supported_models"]
    assert [one["model_name"] for one in models] == ["tiny/base", "other/name"]
    assert all(one["max_context_length"] == FACTS.max_length for one in models)
    assert client.ask("GET", "healthz", headers={"X-API-Key": "none"}) == {"status": "ok"}
    assert client.post("telemetry", events=[]) == {"status": "accepted"}
    assert client.post("client/config", sdk_version="9")["create_model_via_load_weights"] is True
    assert client.post("client/dynamic_config")["sample_cancel_enabled"] is False


def test_a_models_adapter(client):
    session = client.session()
    lora = {"rank": 7, "seed": 5, "train_mlp": False, "train_unembed": True, "unknown": 1}
    base = {"session_id": session, "model_seq_id": 4, "base_model": "other/name"}
    sent = client.post("create_model", **base, lora_config=lora, user_metadata={"a": "b"})
    model = f"{session}:train:4"
    assert client.result(sent) == {"type": "create_model", "model_id": model}
    spec = AdapterSpec(rank=7, seed=5, mlp=False)
    assert client.engine.executed == [(model, Create(spec))]
    info = client.post("get_info", model_id=model)
    assert (info["model_data"]["model_name"], info["lora_rank"]) == ("other/name", 7)
    run = client.ask("GET", f"training_runs/{model}")
    assert (run["training_run_id"], run["user_metadata"]) == (model, {"a": "b"})


@pytest.mark.parametrize(
    ("lora", "rest", "said"),
    [
        ({"rank": 33}, {}, "rank of lora_config is out of range. Pass a number from 1 to 32"),
        ({"rank": 0}, {}, "1 to 32"),
        ({"rank": "8"}, {}, "an integer"),
        ({}, {}, "lacks rank"),
        (None, {}, "lacks lora_config"),
        ({"rank": 2, "train_mlp": 0}, {}, "true or false"),
        (
            {"rank": 2, "train_mlp": False, "train_attn": False, "train_unembed": False},
            {},
            "selects no weights",
        ),
        ({"rank": 2}, {"base_model": "big/model"}, "Use tiny/base, other/name"),
        ({"rank": 2}, {"optimizer_config": {"type": "dimuon"}}, "Use adamw"),
        ({"rank": 2}, {"model_seq_id": -1}, "model_seq_id"),
        ({"rank": 2}, {"user_metadata": "text"}, "an object"),
    ],
)
def test_models_that_are_refused(client, lora, rest, said):
    base = {"session_id": client.session(), "model_seq_id": 0, "base_model": "tiny/base"}
    answer = client.post("create_model", 400, **base | {"lora_config": lora} | rest)
    assert said in answer["detail"]
    client.create(base["session_id"])  # the number is not used up


def test_gradients_come_back(client):
    model = client.create()
    found = client.result(client.gradient(model, 1, (1.0, -2.0)))
    expected = fakes.logprobs([5, 6], 0.0)
    assert np.array_equal(logprobs(found), expected)
    packed = zstandard.ZstdCompressor().compress(body(model, 2))
    headers = {"Content-Encoding": "zstd", "Content-Type": "application/x-protobuf"}
    sent = client.ask("POST", "forward_backward", content=packed, headers=headers)
    client.result(client.step(model, 3, 0.5))
    assert client.engine.tenants[model].number == pytest.approx(-0.5 * (-0.07 + 0.17))
    assert np.array_equal(logprobs(client.result(sent)), expected)
    after = client.result(client.gradient(model, 4))
    assert not np.array_equal(logprobs(after), expected)


def test_unknown_losses_say_what_there_is(client):
    model = client.create()
    said = client.gradient(model, 1, loss="stable_reinforce", status=400)["detail"]
    assert "importance_sampling" in said
    answer = client.result(client.step(model, 2))  # the next one does not wait
    assert answer == {"type": "optim_step", "metrics": {"step:max": 1.0}}


@pytest.mark.parametrize(
    "params",
    [
        {"learning_rate": "1"},
        {"learning_rate": -1.0},
        {"learning_rate": float("nan")},
        {"learning_rate": None},
        {"beta1": 1.0},
        {"beta2": -0.1},
        {"eps": float("inf")},
        {"eps": None},
        {"weight_decay": True},
    ],
)
def test_steps_that_are_refused(client, params):
    model = client.create()
    content = json.dumps({"model_id": model, "seq_id": 1, "adam_params": params})
    refused = client.ask("POST", "optim_step", 400, content=content)
    assert next(iter(params)) in refused["detail"]
    muon = {"type": "dimuon", "learning_rate": 0.1}
    said = client.post("optim_step", 400, model_id=model, seq_id=2, optimizer_params=muon)
    assert "adamw" in said["detail"]
    client.result(client.step(model, 3))


def test_steps_that_were_taken_before_they_were_refused_are_executed_again(tmp_path):
    client = Client(FakeEngine(), tmp_path)
    model = client.create()
    client.result(f"{model}:0")
    content = json.dumps({"model_id": model, "seq_id": 1, "adam_params": {"learning_rate": None}})
    client.server.ledger.log(model, 1, "optim_step", content.encode())
    client.server.close()
    again = Client(FakeEngine(), tmp_path)
    assert again.result(f"{model}:1")["metrics"] == {"step:max": 1.0}


def test_checkpoints(client):
    model = client.create()
    client.gradient(model, 1)
    client.step(model, 2)
    first = client.result(client.save(model, 3, "a", user_metadata={"k": "v"}))
    root = f"training_runs/{model}/checkpoints"
    assert first["path"] == f"tinker://{model}/weights/a"
    sampler_path = client.result(client.save(model, 4, "a", "save_weights_for_sampler"))["path"]
    export = client.result(client.save(model, 5, "a", "save_weights_external", ttl_seconds=9))
    unnamed = client.result(client.post("save_weights", model_id=model, seq_id=6))
    listed = client.ask("GET", root)["checkpoints"]
    paths = [unnamed["path"], export["path"], sampler_path, first["path"]]
    assert [one["tinker_path"] for one in listed] == paths
    kinds = ["training", "external", "sampler", "training"]
    assert [one["checkpoint_type"] for one in listed] == kinds
    assert [one["expires_at"] is None for one in listed] == [True, False, True, True]
    assert listed[3]["user_metadata"] == {"k": "v"} and listed[3]["size_bytes"] > 100
    assert listed[0]["checkpoint_id"] == "weights/000006"
    page = client.ask("GET", "checkpoints?limit=2&offset=1")
    assert [one["tinker_path"] for one in page["checkpoints"]] == paths[1:3]
    assert page["cursor"] == {"limit": 2, "offset": 1, "total_count": 4}
    run = client.ask("GET", "training_runs")["training_runs"][0]
    assert run["last_checkpoint"]["tinker_path"] == unnamed["path"]
    assert run["last_sampler_checkpoint"]["tinker_path"] == sampler_path
    client.ask("PUT", f"{root}/weights/a/ttl", json={"ttl_seconds": 50})
    assert client.ask("GET", root)["checkpoints"][3]["expires_at"] is not None
    client.ask("DELETE", f"{root}/weights/a")
    assert len(client.ask("GET", root)["checkpoints"]) == 3
    client.ask("DELETE", f"{root}/weights/a", 404)
    info = client.post("weights_info", tinker_path=sampler_path)
    assert (info["base_model"], info["lora_rank"], info["train_mlp"]) == ("tiny/base", 3, True)
    client.post("weights_info", 400, tinker_path=first["path"])


def test_names_are_taken_once(client):
    model = client.create()
    one = client.result(client.save(model, 1, "a"))["path"]
    said = client.save(model, 2, "a", status=400)["detail"]
    assert "exists already" in said
    client.result(client.save(model, 3, "a", "save_weights_for_sampler"))  # another kind
    before = client.server.rows.weights(one, "alice")["folder"]
    assert client.result(client.save(model, 4, "a", overwrite=True))["path"] == one
    after = client.server.rows.weights(one, "alice")["folder"]
    assert before != after and not Path(before).exists() and Path(after).exists()
    client.ask("DELETE", f"training_runs/{model}/checkpoints/weights/a")
    client.result(client.save(model, 5, "a"))


@pytest.mark.parametrize(
    "name", ["", "..", ".", "a/b", "../../x", "/etc/passwd", "a\\b", ".hidden", "a" * 129, "a\n", 7]
)
def test_names_cannot_leave_their_folder(client, tmp_path, name):
    model = client.create()
    before = {str(one) for one in tmp_path.rglob("*")}
    kinds = ("save_weights", "save_weights_for_sampler", "save_weights_external")
    for seq, kind in enumerate(kinds, 1):
        client.save(model, seq, name, kind, status=400)
    after = {str(one) for one in tmp_path.rglob("*")} - before
    assert all("ledger" in one for one in after)


def test_training_goes_on_from_a_checkpoint(client):
    model = client.create(rank=6)
    client.gradient(model, 1)
    client.step(model, 2)
    path = client.result(client.save(model, 3, "a"))["path"]
    other = client.session()
    for number, optimizer in enumerate([True, False]):
        place = {"session_id": other, "model_seq_id": number}
        sent = client.post("load_weights", path=path, optimizer=optimizer, **place)
        loaded = client.result(sent)["model_id"]
        assert loaded == f"{other}:train:{number}"
        assert client.post("get_info", model_id=loaded)["lora_rank"] == 6
        old, new = client.engine.tenants[model], client.engine.tenants[loaded]
        assert new.number == old.number != 0
        assert (new.momentum == old.momentum != 0) == optimizer
        client.result(client.step(loaded, 1))
    third = client.create(other, number=2)
    legacy = {"model_id": third, "seq_id": 1}
    client.result(client.post("load_weights", path=path, optimizer=True, **legacy))
    assert client.engine.tenants[third].number == old.number
    snapshot = client.result(client.save(model, 4, "s", "save_weights_for_sampler"))["path"]
    legacy = {"model_id": third, "seq_id": 2, "path": snapshot}
    said = client.post("load_weights", 400, optimizer=True, **legacy)["detail"]
    assert "no state of an optimizer" in said
    missing = {"model_id": third, "seq_id": 3, "path": "tinker://x/weights/y"}
    client.post("load_weights", 400, optimizer=True, **missing)
    client.result(client.step(third, 4))  # the numbers of the refused ones are used up


def test_exports_are_downloaded(client):
    model = client.create()
    path = client.result(client.save(model, 1, "a", "save_weights_external"))["path"]
    root = f"training_runs/{model}/checkpoints"
    urls = client.ask("GET", f"{root}/external_weights/a/external_weights_urls")["urls"]
    assert set(urls) == {"adapter_config.json", "adapter_model.safetensors"}
    folder = Path(client.server.rows.weights(path, "alice")["folder"])
    for name, url in urls.items():
        parts = urlsplit(url)
        answer = client.http.get(f"{parts.path}?{parts.query}", headers={"X-API-Key": ""})
        assert answer.status_code == 200 and answer.content == (folder / name).read_bytes()
        for wrong in (
            f"{parts.path}?{parts.query}x",
            f"{parts.path}?{parts.query.replace(name, '../' + name)}",
            f"{parts.path[:-1]}?{parts.query}",
            f"{parts.path.replace('/files/', '/files/9')}?{parts.query}",
            parts.path,
        ):
            assert client.http.get(wrong).status_code == 403
    client.result(client.save(model, 2, "a"))
    client.ask("GET", f"{root}/weights/a/external_weights_urls", 400)


def test_exports_are_encrypted_for_whom_they_are(client):
    pyrage = pytest.importorskip("pyrage")
    model, identity = client.create(), pyrage.x25519.Identity.generate()
    own, kind = [str(identity.to_public())], "save_weights_external"
    for seq, wrong in enumerate((["age1x"], ["nobody"], [7], own * 11), 1):
        client.save(model, seq, "a", kind, status=400, age_encryption_recipients=wrong)
    # A checkpoint that the server has to read again is not encrypted.
    for seq, other in enumerate(("save_weights", "save_weights_for_sampler"), 5):
        client.save(model, seq, "a", other, status=400, age_encryption_recipients=own)
    plain, sealed = (
        Path(client.server.rows.weights(client.result(saved)["path"], "alice")["folder"])
        for saved in (
            client.save(model, 7, "a", kind),
            client.save(model, 8, "b", kind, age_encryption_recipients=own),
        )
    )
    assert {one.name for one in sealed.iterdir()} == {f"{one.name}.age" for one in plain.iterdir()}
    for one in plain.iterdir():
        content = (sealed / f"{one.name}.age").read_bytes()
        assert one.read_bytes() not in content
        assert pyrage.decrypt(content, [identity]) == one.read_bytes()


def test_tenants_see_their_own_alone(client):
    session = client.session()
    model = client.create(session)
    path = client.result(client.save(model, 1, "a"))["path"]
    name = sampler(client, session)
    request = client.step(model, 2)["request_id"]
    client.result(request)
    other = client.other("tml-b")
    place = {"session_id": session, "model_seq_id": 0, "base_model": "tiny/base"}
    lora = {"rank": 2}
    root = f"training_runs/{model}"
    for method, where, status, what in [
        ("POST", "session_heartbeat", 404, {"session_id": session}),
        ("POST", f"sessions/{session}/finish", 404, {}),
        ("POST", "create_model", 404, {**place, "lora_config": lora}),
        ("POST", "get_info", 404, {"model_id": model}),
        ("POST", "optim_step", 404, {"model_id": model, "seq_id": 3, "adam_params": {}}),
        ("POST", "save_weights", 404, {"model_id": model, "seq_id": 3, "path": "b"}),
        ("POST", "unload_model", 404, {"model_id": model}),
        ("POST", "retrieve_future", 410, {"request_id": request}),
        ("POST", "weights_info", 400, {"tinker_path": path}),
        ("GET", f"samplers/{name}", 404, None),
        ("GET", root, 404, None),
        ("GET", f"{root}/checkpoints", 404, None),
        ("GET", f"sessions/{session}", 404, None),
        ("DELETE", f"{root}/checkpoints/weights/a", 404, None),
        ("POST", f"{root}/checkpoints/weights/a/publish", 404, None),
        ("PUT", f"{root}/checkpoints/weights/a/ttl", 404, {"ttl_seconds": 1}),
    ]:
        other.ask(method, where, status, json=what)
    other.ask("POST", "forward_backward", 404, content=body(model, 3))
    mine = other.session()
    load = {"session_id": mine, "model_seq_id": 0, "path": path, "optimizer": True}
    other.post("load_weights", 400, **load)
    assert other.ask("GET", "sessions")["sessions"] == [mine]
    assert other.ask("GET", "checkpoints")["checkpoints"] == []
    assert other.ask("GET", "training_runs")["cursor"]["total_count"] == 0
    client.ask("POST", f"{root}/checkpoints/weights/a/publish")
    other.result(other.post("load_weights", **load))
    client.ask("DELETE", f"{root}/checkpoints/weights/a/publish")
    other.post("load_weights", 400, **load | {"model_seq_id": 1})
    client.other("tml-c").post("create_session", 401, tags=[])


def test_models_are_unloaded(client):
    model = client.create()
    client.gradient(model, 1)
    answer = client.result(client.post("unload_model", model_id=model))
    assert answer == {"type": "unload_model", "model_id": model}
    client.engine.wait()
    assert client.engine.tenants == {}
    assert "is unloaded" in client.step(model, 2, status=400)["detail"]


def test_a_key_has_room_for_so_many_models(tmp_path):
    """In memory: others are parked."""
    client = Client(FakeEngine(), tmp_path, own_room=2)
    session, bob = client.session(), client.other("tml-b")
    of_bob = bob.create(bob.session())
    models = [client.create(session, number) for number in range(2)]
    assert client.create(session, 1) == models[1]  # a duplicate
    path = client.result(client.save(models[0], 1, "a"))["path"]
    client.result(f"{models[1]}:0")
    place = {"session_id": session, "model_seq_id": 2}
    models.append(client.result(client.post("load_weights", path=path, **place))["model_id"])
    assert client.engine.tenants.keys() == {of_bob, models[0], models[2]}, "used last"
    client.result(client.step(models[1], 1))
    assert client.engine.tenants.keys() == {of_bob, *models[1:]}
    client.ask("POST", f"sessions/{session}/finish", content=b"{}")
    client.engine.wait()
    assert client.engine.tenants.keys() == {of_bob}
