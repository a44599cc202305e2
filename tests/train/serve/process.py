"""A server in a process of its own, to be killed, and a client that asks until it is answered."""

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

from tests.surroundings import WITHOUT_TORCH
from tests.train.serve.waiting import until

SECONDS = 300  # a loaded machine starts slowly


class Server:
    """A process at a port of its own, the same after each start, as are its compiled programs."""

    def __init__(self, folder, command):
        """Starts it.

        Args:
            folder: Where it runs, and where its log is.
            command: Returns the arguments of Python at a port.
        """
        with socket.socket() as one:
            one.bind(("127.0.0.1", 0))
            self.port = one.getsockname()[1]
        self.folder, self.log = folder, folder / "server.log"
        self.command = [sys.executable, *command(self.port)]
        self.start()

    def start(self):
        kept = {
            "JAX_ENABLE_COMPILATION_CACHE": "true",
            "JAX_COMPILATION_CACHE_DIR": str(self.folder / "programs"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "0",
        }
        env = {**os.environ, "PYTHONPATH": WITHOUT_TORCH, "JAX_PLATFORMS": "cpu", **kept}
        how = {"cwd": self.folder, "env": env}
        with self.log.open("a") as log:
            self.process = subprocess.Popen(self.command, stdout=log, stderr=log, **how)

    def answers(self):
        """Returns whether it can be asked; it must not have ended."""
        assert self.process.poll() is None, self.log.read_text()
        try:
            return self.once("api/v1/healthz")
        except OSError:  # it does not listen, or compiles
            return False

    def ready(self):
        """Waits until it can be asked."""
        until(self.answers, "the server is ready", SECONDS)

    def kill(self):
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def restart(self):
        self.kill()
        self.start()

    def end(self):
        """Ends it as a user does."""
        self.process.terminate()
        assert self.process.wait(SECONDS) == 0, self.log.read_text()

    def memory(self):
        """The bytes of memory that it has now."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(status.split("VmRSS:")[1].split()[0]) * 1024

    def once(self, path, content=None):
        """The answer to a request."""
        url = f"http://127.0.0.1:{self.port}/{path}"
        request = urllib.request.Request(url, content, {"X-API-Key": "tml-a"})
        with urllib.request.urlopen(request, timeout=40) as answer:
            found = answer.read()
            is_json = answer.headers["Content-Type"] == "application/json"
            return json.loads(found) if is_json else found

    def post(self, path, content):
        """The answer to a request of Tinker's API, however often it must be sent."""
        content = content if isinstance(content, bytes) else json.dumps(content).encode()
        deadline = time.monotonic() + SECONDS
        while time.monotonic() < deadline:
            try:
                return self.once(f"api/v1/{path}", content)
            except urllib.error.HTTPError as error:
                if error.code not in (408, 429, 503):
                    raise AssertionError(error.read().decode()) from None
            except (OSError, http.client.HTTPException):  # it is down, or fell
                time.sleep(0.02)
        raise AssertionError(f"there is no answer to {path} after {SECONDS} s")

    def result(self, sent):
        """Returns the result of a request, which is no error."""
        found = self.post("retrieve_future", {"request_id": sent["request_id"]})
        assert isinstance(found, bytes) or "error" not in found, found
        return found

    def create(self, number=0, session=None, **lora):
        """The id of a new model."""
        session = session or self.post("create_session", {"tags": []})["session_id"]
        (base,) = self.once("api/v1/get_server_capabilities")["supported_models"]
        place = {"session_id": session, "model_seq_id": number, "base_model": base["model_name"]}
        return self.post("create_model", place | {"lora_config": lora})["model_id"]

    def step(self, model, seq, **adam):
        return self.post("optim_step", {"model_id": model, "seq_id": seq, "adam_params": adam})

    def save(self, model, seq, name):
        return self.post("save_weights", {"model_id": model, "seq_id": seq, "path": name})


def serve(folder, model, line=""):
    """A server of `python -m train.serve` over a model's folder; what lasts is in served."""

    given = ["-m", "train.serve", "--model", model, "--output", "served", *line.split()]
    return Server(folder, lambda port: [*given, "--port", str(port)])
