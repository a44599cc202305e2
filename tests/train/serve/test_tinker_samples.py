"""Tinker's samples over a fake engine: what is drawn, what is refused, and who waits."""

import threading
import time
from pathlib import Path

import numpy as np
import pytest

from tests.train.serve import fakes
from tests.train.serve.client import Client, drawn, prompt, sampler
from tests.train.serve.fakes import FACTS, FakeEngine
from tests.train.serve.protobuf import fields
from train.serve.protocol import requests
from train.serve.protocol.requests import SampleRequest


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
    again = Client(FakeEngine(), client.server.log.folder)  # and after a restart
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
    rest["client"] = found.client
    assert found == SampleRequest(adapter=None, prompt=[5, 6], stop_ids=eos, **rest)
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
        *(
            {"target_prompt_logprobs": {"data": [1], "dtype": "int64", "shape": [1, 1]} | wrong}
            for wrong in (
                {"dtype": "float32"},
                {"shape": None},
                {"shape": [1, 2]},
                {"shape": [1, -1]},
                {"shape": [2**30, 2**30], "sparse_crow_indices": [0]},
                {"data": [1.0]},
                {"data": [-2]},
                {"sparse_crow_indices": [0, 1]},
                {"sparse_crow_indices": [0, 1], "sparse_col_indices": [1]},
            )
        ),
        {"record_stability_info": True},
        {"prompt_logprobs_last_n": 2},
        *(
            {"sampling_params": params}
            for params in (
                {"temperature": -1},
                {"temperature": None},
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


def test_results_are_waited_for(tmp_path):
    client = Client(FakeEngine(held=True), tmp_path)
    model = client.create()
    sent = client.step(model, 1)["request_id"]
    began = time.monotonic()
    answer = client.poll(sent)
    assert answer.status_code == 408 and time.monotonic() - began >= 0.05
    told = {"type": "try_again", "request_id": sent, "queue_state": "active"}
    assert answer.json() == told
    client.server.futures._hold_seconds = 30.0
    timer = threading.Timer(0.2, client.engine.step, [9])
    timer.start()
    assert client.poll(sent).status_code == 200 and time.monotonic() - began < 10
    timer.join()
    for unknown in (f"{model}:77", "nothing", f"{model}:x", f"{model}:{'9' * 30}", ":1", ""):
        assert client.poll(unknown).status_code == 410
    client.post("retrieve_future", 400)


def test_old_samples_are_forgotten(client):
    client.server.futures._keep_seconds = 0.0
    name = sampler(client)
    drawn(client, name, 0)
    drawn(client, name, 1)
    assert client.poll(f"{name}:0").status_code == 410
    assert list(client.server.futures._promises) == [f"{name}:1"]


def test_too_many_samples_are_busy(tmp_path):
    client = Client(FakeEngine(held=True), tmp_path)
    client.server.futures._max_pending = 2
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
    folder = Path(client.server.rows.weights(path, "alice")["folder"])
    (folder / "adapter_model.safetensors").unlink()
    name = sampler(client, session, model_path=path)
    asked = {"sampling_session_id": name, "prompt": prompt(1), "sampling_params": {}}
    answer = client.result(client.post("asample", seq_id=0, **asked))
    assert answer["category"] == "user" and "holds no adapter" in answer["error"]


def test_the_engine_knows_who_asks(client):
    session = client.session()
    model = client.create(session)
    name = sampler(client, session)
    drawn(client, name)
    bob = client.other("tml-b")
    drawn(bob, sampler(bob))
    asker = requests.Client("alice", session)
    mine, other = (one.client for one in client.engine.drawn)
    assert mine == client.engine.status().tenants[model].client == asker
    assert other.owner == "bob" and other.session not in ("", session)
