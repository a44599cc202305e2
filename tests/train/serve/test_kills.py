"""A server that is killed again and again loses no acknowledged command, and repeats none."""

import http.client
import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from tests.train.serve.client import body
from tests.train.serve.fakes import Tenant

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[3]
KILLS = 20 if os.environ.get("THOROUGH") else 6
SERVER = """
import sys
from pathlib import Path
import uvicorn
from starlette.applications import Starlette
from tests.train.serve.client import key_owner
from tests.train.serve.fakes import FakeEngine
from train.serve.routes.tinker.api import Tinker

tinker = Tinker(FakeEngine(), Path(sys.argv[1]), key_owner, every=5)
tinker.start()
uvicorn.run(Starlette(routes=tinker.routes()), port=int(sys.argv[2]), log_level="error")
"""


class Server:
    """A process, and a client that comes again until it is answered."""

    def __init__(self, folder):
        with socket.socket() as one:
            one.bind(("127.0.0.1", 0))
            self.port = one.getsockname()[1]
        self.folder = folder
        self.start()

    def start(self):
        command = [sys.executable, "-c", SERVER, str(self.folder), str(self.port)]
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        self.process = subprocess.Popen(command, env=environment)

    def kill(self):
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def restart(self):
        self.kill()
        self.start()

    def once(self, path, content):
        url = f"http://127.0.0.1:{self.port}/api/v1/{path}"
        request = urllib.request.Request(url, content, {"X-API-Key": "tml-a"})
        with urllib.request.urlopen(request, timeout=40) as answer:
            return json.load(answer)

    def post(self, path, content):
        content = content if isinstance(content, bytes) else json.dumps(content).encode()
        deadline = time.monotonic() + 60
        while True:
            try:
                return self.once(path, content)
            except urllib.error.HTTPError as error:
                if error.code != 408:
                    raise
            except (OSError, http.client.HTTPException):  # it is down, or fell
                time.sleep(0.02)
            assert time.monotonic() < deadline, f"no answer to {path} for a minute"


@pytest.fixture
def server(tmp_path):
    found = Server(tmp_path)
    yield found
    found.kill()


def test_kills(tmp_path, server):
    rng = random.Random(5)
    session = server.post("create_session", {"tags": []})["session_id"]
    model = f"{session}:train:0"
    place = {"session_id": session, "model_seq_id": 0, "base_model": "tiny/base"}
    server.post("create_model", place | {"lora_config": {"rank": 2}})
    number = momentum = 0.0
    seq = steps = 0
    for _ in range(KILLS):
        timer = threading.Timer(rng.uniform(0.1, 0.6), server.restart)
        timer.start()
        while timer.is_alive():  # requests are cut off, and sent again
            weights = [float(rng.randrange(-8, 8)) for _ in range(2)]
            content = body(model, seq + 1, weights)
            sent = server.post("forward_backward", content)
            if rng.random() < 0.2:
                assert server.post("forward_backward", content) == sent
            step = {"model_id": model, "seq_id": seq + 2, "adam_params": {"learning_rate": 0.25}}
            last = server.post("optim_step", step)["request_id"]
            momentum = 0.9 * momentum + (weights[0] * 5 + weights[1] * 6) / 100
            number, seq, steps = number - 0.25 * momentum, seq + 2, steps + 1
        answer = server.post("retrieve_future", {"request_id": last})
        assert answer["metrics"] == {"step:max": steps}
    seq += 1
    saved = server.post("save_weights", {"model_id": model, "seq_id": seq, "path": "end"})
    server.post("retrieve_future", saved)
    server.kill()
    (folder,) = tmp_path.glob("checkpoints/*/weights/end@*")
    found = Tenant.read(folder, True)
    assert found.steps == steps > 5 * KILLS
    assert (found.number, found.momentum) == pytest.approx((number, momentum), rel=1e-9)
