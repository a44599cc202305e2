"""The command `python -m train.serve` in this process, over an engine that computes nothing."""

import functools
import http.client
import json
import os
import signal
import socket
import threading

from tests.train.serve.fakes import FakeEngine
from tests.train.serve.waiting import until
from tests.train.tiny import write_model
from train.serve import __main__
from train.serve.routes.tinker.api import TinkerLimits


class Engine(FakeEngine):
    """A fake engine that the command can start and end."""

    def start(self):
        pass

    close = FakeEngine.stop


def free_port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def ask(port, method="GET", path="/healthz", content=None, **headers):
    """Returns the status, the headers and the body of an answer.

    Args:
        port: The server's.
        method, path, content: What is asked.
        **headers: With _ for -; a Host takes the place of the usual one.
    """
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    names = {name.replace("_", "-"): value for name, value in headers.items()}
    connection.request(method, path, content, names)
    answer = connection.getresponse()
    body = answer.read()
    connection.close()
    is_json = answer.headers.get("content-type") == "application/json"
    return answer.status, answer.headers, json.loads(body) if is_json else body


def listens(port):
    with socket.socket() as one:
        return one.connect_ex(("127.0.0.1", port)) == 0


def is_ready(port):
    return listens(port) and ask(port)[0] != 503


def command(monkeypatch, folder, line, work, engine=None, *, ready=True):
    """Runs the command until some work is done; returns what the work returned.

    Args:
        monkeypatch: Puts the engine in its place.
        folder: Where it runs.
        line: More options.
        work: Gets the port, in a thread.
        engine: The engine; or a function that makes it, and is told how to show its progress.
        ready: Whether the work begins once all routes answer, or as soon as the port is open.
    """
    monkeypatch.chdir(folder)
    (folder / "tiny").mkdir(exist_ok=True)
    write_model(folder / "tiny")
    engine, port, found = engine or Engine(), free_port(), []
    made = engine if callable(engine) else lambda seen: engine
    monkeypatch.setattr(__main__, "_engine", lambda *given: made(given[-1]))
    monkeypatch.setattr(__main__, "TinkerLimits", functools.partial(TinkerLimits, hold=0.2))

    def worked():
        try:
            until(lambda: (is_ready if ready else listens)(port), "the server answers")
            found.append(work(port))
        finally:
            os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=worked)
    thread.start()
    given = ["--model", "tiny", "--output", "served", "--port", str(port), *line.split()]
    __main__.main([*given, "--compilation-cache", "off"])
    thread.join()
    return found[0]
