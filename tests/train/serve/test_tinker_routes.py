"""Tinker's endpoints over a fake engine: what they answer, whom, and what they refuse."""

import asyncio
import json
import threading
import time
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from starlette.requests import Request

from tests.train.serve import fakes
from tests.train.serve.client import Client, body, logprobs
from tests.train.serve.fakes import FACTS, FakeEngine
from tests.train.serve.protobuf import fields
from train.serve.requests import AdapterSpec, Create, Sample
from train.serve.routes.tinker import bodies


@pytest.fixture
def client(tmp_path):
    found = Client(FakeEngine(), tmp_path)
    yield found
    found.engine.stop()


def prompt(*tokens):
    return {"chunks": [{"type": "encoded_text", "tokens": list(tokens)}]}


def sampler(client, session=None, number=0, **source):
    place = {"session_id": session or client.session(), "sampling_session_seq_id": number}
    source = source or {"base_model": "tiny/base"}
    answer = client.post("create_sampling_session", **place, **source)
    return answer["sampling_session_id"]


def drawn(client, name, seq=0, **rest):
    """A sample: its sequences as (tokens, logprobs, whether a stop ended them), and the message."""
    asked = {"prompt": prompt(5, 6), "sampling_params": {"max_tokens": 4}} | rest
    answer = client.post("asample", sampling_session_id=name, seq_id=seq, **asked)
    message = fields(client.result(answer))
    sequences = [fields(one) for one in message[1]]
    assert len(answer["sample_sequence_ids"]) == len(set(answer["sample_sequence_ids"]))
    assert len(answer["sample_sequence_ids"]) == len(sequences)
    found = [
        (
            np.frombuffer(one.get(2, [b""])[0], "<i4").tolist(),
            np.frombuffer(one[3][0], "<f4"),
            1 not in one,
        )
        for one in sequences
    ]
    return found, message


def test_what_is_served(client):
    models = client.ask("GET", "get_server_capabilities")["supported_models"]
    assert [one["model_name"] for one in models] == ["tiny/base", "other/name"]
    assert all(one["max_context_length"] == FACTS.max_length for one in models)
    assert client.ask("GET", "healthz", headers={"X-API-Key": "none"}) == {"status": "ok"}
    assert client.post("telemetry", events=[]) == {"status": "accepted"}
    assert client.post("client/config", sdk_version="9")["create_model_via_load_weights"] is True


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
        ({"rank": 33}, {}, "rank of lora_config is to be 1 to 32"),
        ({"rank": 0}, {}, "1 to 32"),
        ({"rank": "8"}, {}, "an integer"),
        ({}, {}, "lacks rank"),
        (None, {}, "lacks lora_config"),
        ({"rank": 2, "train_mlp": 0}, {}, "true or false"),
        (
            {"rank": 2, "train_mlp": False, "train_attn": False, "train_unembed": False},
            {},
            "trains nothing",
        ),
        ({"rank": 2}, {"base_model": "big/model"}, "there is tiny/base, other/name"),
        ({"rank": 2}, {"optimizer_config": {"type": "dimuon"}}, "there is adamw"),
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
        {"beta1": 1.0},
        {"beta2": -0.1},
        {"eps": float("inf")},
        {"weight_decay": True},
    ],
)
def test_steps_that_are_refused(client, params):
    model = client.create()
    content = json.dumps({"model_id": model, "seq_id": 1, "adam_params": params})
    client.ask("POST", "optim_step", 400, content=content)
    muon = {"type": "dimuon", "learning_rate": 0.1}
    said = client.post("optim_step", 400, model_id=model, seq_id=2, optimizer_params=muon)
    assert "adamw" in said["detail"]
    client.result(client.step(model, 3))


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
    before = client.server.owned.weights(one, "alice")["folder"]
    assert client.result(client.save(model, 4, "a", overwrite=True))["path"] == one
    after = client.server.owned.weights(one, "alice")["folder"]
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
    assert "no optimiser's state" in said
    missing = {"model_id": third, "seq_id": 3, "path": "tinker://x/weights/y"}
    client.post("load_weights", 400, optimizer=True, **missing)
    client.result(client.step(third, 4))  # the numbers of the refused ones are used up


def test_exports_are_downloaded(client):
    model = client.create()
    path = client.result(client.save(model, 1, "a", "save_weights_external"))["path"]
    root = f"training_runs/{model}/checkpoints"
    urls = client.ask("GET", f"{root}/external_weights/a/external_weights_urls")["urls"]
    assert set(urls) == {"adapter_config.json", "adapter_model.safetensors"}
    folder = Path(client.server.owned.weights(path, "alice")["folder"])
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
    encrypted = {"age_encryption_recipients": ["age1x"]}
    client.save(model, 3, "b", "save_weights_external", status=400, **encrypted)


def test_samples_of_the_base(client):
    name = sampler(client)
    found, message = drawn(client, name, num_samples=3, prompt_logprobs=True)
    assert [one[0] for one in found] == [[11 + 5 * n + 3 * k for k in range(4)] for n in range(3)]
    assert not any(one[2] for one in found)
    scores = np.frombuffer(message[2][0], "<f4")
    assert np.isnan(scores[0]) and scores[1] == fakes.logprobs([5, 6], 0.0)[1]
    again, _ = drawn(client, name, num_samples=3)  # a duplicate: drawn once
    assert [one[0] for one in again] == [one[0] for one in found]
    assert len(client.engine.drawn) == 1
    told = client.ask("GET", f"samplers/{name}")
    assert told == {"sampler_id": name, "base_model": "tiny/base", "model_path": None}


def test_snapshots_stay_as_they_are(client):
    session = client.session()
    model = client.create(session)
    client.gradient(model, 1)
    client.step(model, 2)
    base = {"model_id": model, "seq_id": 3, "sampling_session_seq_id": 5, "kind": "snapshot"}
    answer = client.result(client.post("save_weights_for_sampler", **base))
    assert answer["sampling_session_id"] == f"{session}:sample:5"
    path = client.result(client.save(model, 4, "p", "save_weights_for_sampler"))["path"]
    named = sampler(client, session, 6, model_path=path)
    first = [drawn(client, one)[0][0] for one in (f"{session}:sample:5", named)]
    client.gradient(model, 5, (50.0, 1.0))
    client.result(client.step(model, 6, 3.0))
    second = [drawn(client, one, 1)[0][0] for one in (f"{session}:sample:5", named)]
    for one, two in zip(first, second, strict=True):
        assert one[0] == two[0] and np.array_equal(one[1], two[1])
    base_tokens = drawn(client, sampler(client, session, 7))[0][0][0]
    assert first[0][0] == first[1][0] != base_tokens
    assert client.ask("GET", f"samplers/{named}")["model_path"] == path
    listed = client.ask("GET", f"sessions/{session}")
    assert listed["training_run_ids"] == [model] and len(listed["sampler_ids"]) == 3
    again = Client(FakeEngine(), client.server.turns.folder)  # and after a restart
    third = [drawn(again, one, 2)[0][0] for one in (f"{session}:sample:5", named)]
    for one, three in zip(first, third, strict=True):
        assert one[0] == three[0] and np.array_equal(one[1], three[1])
    again.ask("DELETE", f"training_runs/{model}/checkpoints/sampler_weights/p")
    asked = {"prompt": prompt(1), "sampling_params": {}}
    said = again.post("asample", 400, sampling_session_id=named, seq_id=9, **asked)["detail"]
    assert "was deleted" in said


def test_many_samples_adopt_an_adapter_once(tmp_path):
    client = Client(FakeEngine(held=True), tmp_path)
    session = client.session()
    model = client.create(session)
    saved = client.save(model, 1, "p", "save_weights_for_sampler")
    client.engine.step(2)
    name = sampler(client, session, model_path=client.result(saved)["path"])
    asked = {"prompt": prompt(5), "sampling_params": {"max_tokens": 2}}
    sent = [client.post("asample", sampling_session_id=name, seq_id=n, **asked) for n in range(3)]
    assert client.engine.step(99) == 4  # one adoption, three samples
    for one in sent:
        client.result(one)


def asked_of_engine(client, seq=0, **params):
    name = sampler(client, number=seq)
    drawn(client, name, seq, sampling_params={"max_tokens": 1} | params)
    return client.engine.drawn[-1]


def test_what_stops_a_completion(client):
    eos = frozenset(FACTS.eos)
    assert asked_of_engine(client).stop_ids == eos
    assert asked_of_engine(client, stop=None).stop_ids == eos
    assert asked_of_engine(client, stop=[]).stop_ids == frozenset()
    ids = asked_of_engine(client, stop=[3, 4])
    assert (ids.stop_ids, ids.stop) == (eos | {3, 4}, ())
    for stop in ("\n\nUser:", ["\n\nUser:"]):
        text = asked_of_engine(client, stop=stop)
        assert (text.stop_ids, text.stop) == (eos, ("\n\nUser:",))
    name = sampler(client)
    found, _ = drawn(client, name, sampling_params={"max_tokens": 9, "stop": [17]})
    assert found[0][0] == [11, 14, 17] and found[0][2] and len(found[0][1]) == 3


def test_what_the_engine_is_asked_for(client):
    params = {"temperature": 0, "top_k": 5, "top_p": 0.5, "seed": 9, "max_tokens": 3}
    found = asked_of_engine(client, **params)
    eos = frozenset(FACTS.eos)
    rest = {"max_tokens": 3, "temperature": 0.0, "top_k": 5, "top_p": 0.5, "seed": 9}
    assert found == Sample(adapter=None, prompt=[5, 6], stop_ids=eos, **rest)
    assert asked_of_engine(client, max_tokens=None).max_tokens == FACTS.max_length - 2
    assert asked_of_engine(client, max_tokens=10**6).max_tokens == FACTS.max_length - 2
    name = sampler(client, number=8)
    tops = {"topk_prompt_logprobs": 2, "topk_sample_logprobs": 3, "prompt_logprobs": True}
    _, message = drawn(client, name, **tops, prompt_logprobs_last_n=1)
    assert np.isnan(np.frombuffer(message[2][0], "<f4")).tolist() == [True, False]
    best = fields(message[3][0])
    assert (best[3], best[4]) == ([2], [2])
    assert fields(fields(message[1][0])[4][0])[3] == [3]


def test_a_prompt_that_fills_the_context_is_scored(client):
    full = prompt(*range(FACTS.max_length))
    asked = {"prompt": full, "sampling_params": {"max_tokens": 1}, "prompt_logprobs": True}
    found, message = drawn(client, sampler(client), **asked)
    assert found[0][0] == [] and not found[0][2]
    assert len(message[2][0]) == 4 * FACTS.max_length


@pytest.mark.parametrize(
    "asked",
    [
        {"prompt": prompt()},
        {"prompt": prompt(97)},
        {"prompt": prompt(-1)},
        {"prompt": prompt(1.5)},
        {"prompt": prompt(2**40)},
        {"prompt": prompt(*[1] * 65)},
        {"prompt": {"chunks": [{"type": "image", "data": "", "format": "png"}]}},
        {"prompt": {"chunks": [3]}},
        {"prompt": {}},
        {"prompt": None},
        {"num_samples": 0},
        {"num_samples": 10**9},
        {"topk_prompt_logprobs": 21},
        {"prompt_alt_tokens_k": 1},
        {"target_prompt_logprobs": {"data": [1], "dtype": "int64"}},
        {"record_stability_info": True},
        {"prompt_logprobs_last_n": 2},
        *(
            {"sampling_params": params}
            for params in (
                {"temperature": -1},
                {"temperature": "hot"},
                {"top_p": 0},
                {"top_p": 2},
                {"top_k": -2},
                {"seed": 2**64},
                {"max_tokens": -1},
                {"stop": 5},
                {"stop": [1.5]},
                {"stop": ["a", 1]},
                {"stop": [97]},
                {"stop": [""]},
                {"stop": ["\ud800"]},
            )
        ),
    ],
)
def test_samples_that_are_refused(client, asked):
    name = sampler(client)
    usual = {"prompt": prompt(5, 6), "sampling_params": {"max_tokens": 4}, "seq_id": 0}
    client.post("asample", 400, **usual | asked, sampling_session_id=name)
    assert client.engine.drawn == []
    drawn(client, name)  # the number is not used up


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
    client = Client(FakeEngine(), tmp_path, tenants=2)
    session = client.session()
    first, second = (client.create(session, number) for number in range(2))
    assert client.create(session, 1) == second  # a duplicate
    path = client.result(client.save(first, 1, "a"))["path"]
    lora = {"base_model": "tiny/base", "lora_config": {"rank": 2}}
    place = {"session_id": session, "model_seq_id": 2}
    for refused in ({"path": path, "optimizer": True}, lora):
        kind = "load_weights" if "path" in refused else "create_model"
        assert "2 of your models" in client.post(kind, 400, **place, **refused)["detail"]
    bob = client.other("tml-b")
    bob.create(bob.session())
    client.result(client.post("unload_model", model_id=second))
    client.result(client.post("load_weights", **place, path=path, optimizer=True))
    client.post("create_model", 400, **lora | place | {"model_seq_id": 3})
    client.ask("POST", f"sessions/{session}/finish", content=b"{}")
    client.create()


def test_results_are_waited_for(tmp_path):
    client = Client(FakeEngine(held=True), tmp_path)
    model = client.create()
    sent = client.step(model, 1)["request_id"]
    began = time.monotonic()
    answer = client.poll(sent)
    assert answer.status_code == 408 and time.monotonic() - began >= 0.05
    told = {"type": "try_again", "request_id": sent, "queue_state": "active"}
    assert answer.json() == told
    client.server.futures._hold = 30.0
    timer = threading.Timer(0.2, client.engine.step, [9])
    timer.start()
    assert client.poll(sent).status_code == 200 and time.monotonic() - began < 10
    timer.join()
    for unknown in (f"{model}:77", "nothing", f"{model}:x", f"{model}:{'9' * 30}", ":1", ""):
        assert client.poll(unknown).status_code == 410
    client.post("retrieve_future", 400)


def test_old_samples_are_forgotten(client):
    client.server.futures._keep = 0.0
    name = sampler(client)
    drawn(client, name, 0)
    drawn(client, name, 1)
    assert client.poll(f"{name}:0").status_code == 410
    assert list(client.server.futures._promises) == [f"{name}:1"]


def test_too_many_samples_are_busy(tmp_path):
    client = Client(FakeEngine(held=True), tmp_path)
    client.server.futures._most = 2
    name = sampler(client)
    asked = {"sampling_session_id": name, "prompt": prompt(1), "sampling_params": {}}
    for seq in range(2):
        client.post("asample", seq_id=seq, **asked)
    client.post("asample", 429, seq_id=2, **asked)
    client.post("asample", seq_id=1, **asked)  # a duplicate
    sampler(client.other("tml-b"))
    client.engine.step(2)
    client.post("asample", seq_id=2, **asked)


def test_failed_samples_say_why(tmp_path):
    client = Client(FakeEngine(), tmp_path)
    session = client.session()
    model = client.create(session)
    path = client.result(client.save(model, 1, "p", "save_weights_for_sampler"))["path"]
    folder = Path(client.server.owned.weights(path, "alice")["folder"])
    (folder / "adapter_model.safetensors").unlink()
    name = sampler(client, session, model_path=path)
    asked = {"sampling_session_id": name, "prompt": prompt(1), "sampling_params": {}}
    answer = client.result(client.post("asample", seq_id=0, **asked))
    assert answer["category"] == "user" and "holds no adapter" in answer["error"]


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
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
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
        return bodies.say(len(await bodies.body_of(request)))

    scope = {"type": "http", "method": "POST", "headers": [], "path": "/", "query_string": b""}
    answer = bodies.guarded(endpoint, lambda _: "me")(Request(scope, cut))
    assert asyncio.run(answer).status_code == 400
