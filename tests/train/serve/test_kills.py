"""A server that is killed again and again loses no acknowledged command, and repeats none."""

import random
import threading

import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.support import THOROUGH
from tests.train.serve import protobuf
from tests.train.serve.client import body
from tests.train.serve.fakes import Tenant
from tests.train.serve.process import Server, serve
from tests.train.serve.protobuf import F32, I64, dense
from tests.train.tiny import CONFIG, write_model

pytestmark = pytest.mark.slow
SERVER = """
import sys
from pathlib import Path
import uvicorn
from starlette.applications import Starlette
from tests.train.serve.client import key_owner
from tests.train.serve.fakes import FakeEngine
from train.serve.routes.tinker.api import Tinker, TinkerLimits

tinker = Tinker(FakeEngine(), Path("served"), key_owner, limits=TinkerLimits(every=5))
tinker.start()
uvicorn.run(Starlette(routes=tinker.routes()), port=int(sys.argv[1]), log_level="error")
"""


def killed(server, rng, times, seconds, step):
    """Calls `step` all the time while a server is killed and started again.

    Args:
        server: The server; all its answers come in the end, from the next start if need be.
        rng: Draws when it is killed: more often soon after it listens, when it still replays.
        times: The number of kills.
        seconds: For which it lives at most.
        step: Is called once at least for each kill.
    """
    for _ in range(times):
        server.ready()
        timer = threading.Timer(seconds * rng.random() ** 2, server.restart)
        timer.start()
        step()
        while timer.is_alive():
            step()
        timer.join()


def test_kills_over_a_number(tmp_path):
    rng, kills = random.Random(5), 20 if THOROUGH else 2
    server = Server(tmp_path, lambda port: ["-c", SERVER, str(port)])
    model, last = server.create(rank=2), None
    number = momentum = 0.0
    steps = 0

    def step():
        nonlocal number, momentum, steps, last
        weights = [float(rng.randrange(-8, 8)) for _ in range(2)]
        content = body(model, 2 * steps + 1, weights)
        sent = server.post("forward_backward", content)
        if rng.random() < 0.2:
            assert server.post("forward_backward", content) == sent
        last = server.step(model, 2 * steps + 2, learning_rate=0.25)
        momentum = 0.9 * momentum + (weights[0] * 5 + weights[1] * 6) / 100
        number, steps = number - 0.25 * momentum, steps + 1

    try:
        killed(server, rng, kills, 1.0, step)
        assert server.result(last)["metrics"] == {"step:max": steps}
        server.result(server.save(model, 2 * steps + 1, "end"))
    finally:
        server.kill()
    (folder,) = tmp_path.glob("served/checkpoints/*/weights/end@*")
    found = Tenant.read(folder, True)
    assert found.steps == steps > 5 * kills
    assert (found.number, found.momentum) == pytest.approx((number, momentum), rel=1e-9)


class Run:
    """A tenant whose commands depend on their numbers alone; it remembers what was promised."""

    def __init__(self, server):
        self.server, self.model = server, server.create(rank=3, seed=7)
        self.steps, self.seq, self.saved, self.sampler = 0, 0, [], None

    def next(self):
        self.seq += 1
        return self.seq

    def step(self):
        """Sends a gradient, sometimes twice, and an update; at times, waits, and saves."""
        rng, server = np.random.default_rng(self.steps), self.server
        data = []
        for length in rng.integers(2, 40, rng.integers(1, 4)):
            tokens, targets = rng.integers(0, CONFIG["vocab_size"], (2, length))
            weights = dense(rng.normal(size=length), F32)
            data.append(
                protobuf.datum([tokens], target_tokens=dense(targets, I64), weights=weights)
            )
        content = protobuf.request(*data, model=self.model, seq=self.next())
        sent = server.post("forward_backward", content)
        if rng.random() < 0.2:
            assert server.post("forward_backward", content) == sent
        how = {"learning_rate": 1e-2, "eps": 1e-8, "weight_decay": 0.1, "grad_clip_norm": 2.0}
        sent = server.step(self.model, self.next(), **how)
        self.steps += 1
        if self.steps % 7 == 3:
            metrics = server.result(sent)["metrics"]
            assert metrics["step:max"] == self.steps and metrics["grad_norm:max"] > 0
        if self.steps % 10 == 5:
            self.saved.append(f"{self.steps:06d}")
            server.save(self.model, self.next(), self.saved[-1])
        if self.steps == 8:
            what = {"model_id": self.model, "seq_id": self.next(), "sampling_session_seq_id": 0}
            self.sampler = server.post("save_weights_for_sampler", what)

    def end(self):
        """Returns all checkpoints, and the snapshot's log-probabilities of a prompt."""
        self.saved.append("end")
        self.server.result(self.server.save(self.model, self.next(), "end"))
        (root,) = self.server.folder.glob(f"served/checkpoints/{self.model.replace(':', '-')}")
        folders = {name: next(root.glob(f"weights/{name}@*")) for name in self.saved}
        arrays = {
            (name, file.name): {key: x.tobytes() for key, x in load_file(file).items()}
            for name, folder in folders.items()
            for file in folder.glob("*.safetensors")
        }
        sampler = self.server.result(self.sampler)["sampling_session_id"]
        prompt = {"chunks": [{"type": "encoded_text", "tokens": [*range(5, 35)]}]}
        asked = {"sampling_session_id": sampler, "seq_id": 0, "prompt": prompt}
        how = {"prompt_logprobs": True, "sampling_params": {"max_tokens": 0}}
        drawn = self.server.result(self.server.post("asample", asked | how))
        return arrays, protobuf.fields(drawn)[2]


def test_kills_over_the_engine(tmp_path):
    (tmp_path / "tiny").mkdir()
    write_model(tmp_path / "tiny")
    sizes = "--max-length 64 --sequences 4 --slots 2 --max-rank 4"
    server, kills = serve(tmp_path, "tiny", sizes), 20 if THOROUGH else 1
    try:
        server.ready()
        run = Run(server)
        killed(server, random.Random(3), kills, 3.0, run.step)
        while run.steps < 12:
            run.step()
        arrays, scores = run.end()
        whole = Run(server)
        for _ in range(run.steps):
            whole.step()
        expected, expected_scores = whole.end()
        server.end()
    finally:
        server.kill()
    print(f"{kills} kills, {run.steps} steps, {len(run.saved)} checkpoints")
    assert len(arrays) == 2 * len(run.saved) and arrays == expected
    assert len(scores[0]) == 30 * 4 and scores == expected_scores
