"""A server's routes over a fake engine, and a client that speaks to them in process."""

import json

import numpy as np
from starlette.applications import Starlette
from starlette.testclient import TestClient

from tests.train.serve import protobuf
from tests.train.serve.protobuf import F32, I64, datum, dense, fields
from train.serve.routes.tinker.api import Tinker, TinkerLimits

KEYS = {"tml-a": "alice", "tml-b": "bob"}


def key_owner(request):
    """Whose key a request has."""
    return KEYS.get(request.headers.get("x-api-key"))


def body(model, seq, weights=(1.0, 2.0), **rest):
    """A forward_backward of two tokens."""
    one = datum([[4, 5]], target_tokens=dense([5, 6], I64), weights=dense(weights, F32))
    return protobuf.request(one, model=model, seq=seq, **rest)


class Client:
    """Speaks with a key; answers are checked to be JSON, and refusals to say why."""

    def __init__(self, engine, folder, key="tml-a", server=None, **rest):
        self.engine = engine
        limits = TinkerLimits(**{"hold": 0.05, **rest})
        self.server = server or Tinker(engine, folder, key_owner, ["other/name"], limits)
        if server is None:
            self.server.start()
        app = Starlette(routes=self.server.routes())
        self.http = TestClient(app, headers={"X-API-Key": key})

    def other(self, key):
        """Returns a client of the same server, with another key."""
        return Client(self.engine, None, key, self.server)

    def later(self, seconds):
        """Has the server see a later time."""
        clock = self.server.ledger._clock
        self.server.ledger._clock = self.server.log._clock = lambda: clock() + seconds

    def ask(self, method, path, status=200, **what):
        answer = self.http.request(method, f"/api/v1/{path}", **what)
        assert answer.status_code == status, answer.text
        if status >= 400 and status != 408:
            assert isinstance(answer.json()["detail"], str)
        return answer.json()

    def post(self, path, status=200, /, **fields):
        return self.ask("POST", path, status, content=json.dumps(fields))

    def session(self):
        self.post("client/config", sdk_version="0.38.0")
        return self.post("create_session", tags=[], user_metadata=None)["session_id"]

    def create(self, session=None, number=0, rank=3, **rest):
        """Makes a model; returns its id."""
        session = session or self.session()
        lora = {"rank": rank}
        base = {"session_id": session, "model_seq_id": number, "base_model": "tiny/base"}
        return self.post("create_model", **base, lora_config=lora, **rest)["model_id"]

    def gradient(self, model, seq, weights=(1.0, 2.0), status=200, **rest):
        content = body(model, seq, weights, **rest)
        return self.ask("POST", "forward_backward", status, content=content)

    def step(self, model, seq, rate=0.5, status=200, **rest):
        params = {"learning_rate": rate, **rest}
        return self.post("optim_step", status, model_id=model, seq_id=seq, adam_params=params)

    def save(self, model, seq, name, kind="save_weights", status=200, **rest):
        return self.post(kind, status, model_id=model, seq_id=seq, path=name, **rest)

    def poll(self, request):
        """The answer of HTTP to a request for a result."""
        return self.http.post("/api/v1/retrieve_future", json={"request_id": request})

    def result(self, submitted):
        """The result, in JSON, of what was submitted; waits for it."""
        request = submitted if isinstance(submitted, str) else submitted["request_id"]
        for _ in range(200):
            answer = self.poll(request)
            if answer.status_code != 408:
                break
            assert answer.json()["type"] == "try_again"
        assert answer.status_code == 200, answer.text
        if answer.headers["content-type"] == "application/x-protobuf":
            return answer.content
        return answer.json()


def logprobs(content):
    """The log-probabilities in the body of a ForwardBackwardOutput of one datum."""
    record = protobuf.fields(protobuf.fields(content)[2][0])
    tensor = protobuf.fields(protobuf.fields(record[2][0])[2][0])
    return np.frombuffer(tensor[1][0], "<f4")


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
