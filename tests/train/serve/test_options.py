"""The options of train.serve, and the end of a server."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from tests.train.serve.waiting import until
from train.console.errors import UserError
from train.serve.options import check, parse

httpx = pytest.importorskip("httpx2")


def test_options_that_make_sense(tmp_path):
    keys = tmp_path / "keys"
    keys.write_text("anna tml-one\n")
    assert check(parse(["--port", "0", "--mesh", "fsdp=2", "--host", "::1"])) is None
    assert check(parse(["--keys", str(keys), "--host", "0.0.0.0"])) == {"tml-one": "anna"}
    check(parse(["--keys", str(keys), "--tenants", "9", "--tenants-per-key", "9"]))
    found = parse([])
    assert (found.slots, found.max_rank, found.sequences, found.port) == (8, 32, 32, 8000)
    assert (found.host, found.output, found.max_length) == ("127.0.0.1", "runs/serve", None)


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ("--host 0.0.0.0", "--keys"),
        ("--host example.org", "--keys"),
        ("--keys nowhere", "--keys nowhere"),
        ("--adapters nowhere", "--adapters nowhere"),
        ("--output pyproject.toml", "--output"),
        ("--slots 0", "--slots 0"),
        ("--max-rank 0", "--max-rank 0"),
        ("--sequences -1", "--sequences -1"),
        ("--max-length 1", "--max-length 1"),
        ("--port 70000", "--port 70000"),
        ("--tenants-per-key 0", "--tenants-per-key 0"),
        ("--tenants-per-key 2", "--tenants-per-key 2 has no effect"),
        ("--session-idle 5", "--session-idle 5"),
        ("--missing-timeout 5", "--missing-timeout 5"),
        ("--mesh tensor=two", "--mesh"),
    ],
)
def test_options_that_make_none_are_refused(given, named, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pyproject.toml").touch()
    with pytest.raises(UserError, match=named):
        check(parse(given.split()))


# Each token is drawn once the standard input has a byte, or is closed; nothing but the end of
# requests, or a second signal, ends the server.
SERVER = """
import os
from tests.train.serve.scripted import TOKENIZER, ScriptedEngine, ids
from train.serve import app, server

server._DRAIN = 1e9
engine = ScriptedEngine(lambda sample, index: ids("x" * 390), lambda: os.read(0, 1))
made = app.make_app(engine, TOKENIZER)
with server.HttpServer(made, "127.0.0.1", 0) as site:
    site.serve(made.state.access, lambda: print("stopped", flush=True))
print("after", flush=True)
"""


@pytest.fixture
def server():
    """A process and its address, with a request that is under way, and what is found of it."""
    command = [sys.executable, "-c", SERVER]
    environment = {
        **os.environ,
        "PYTHONPATH": str(Path(__file__).parents[3]),
        "JAX_PLATFORMS": "cpu",
    }
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    with subprocess.Popen(command, text=True, env=environment, **pipes) as process:
        try:
            said = [""]
            while "http://127" not in said[-1]:  # other packages' warnings may come first
                said.append(process.stderr.readline())
                assert said[-1], "".join(said)
            address, found = said[-1].split()[2], []
            work = threading.Thread(target=ask, args=(address, found), daemon=True)
            work.start()
            until(lambda: status(address)["drawing"] == 1, "the engine has the request")
            yield process, address, work, found
        finally:
            process.kill()


def ask(address, found):
    body = {"model": "tiny/base", "prompt": "x", "max_tokens": 30}
    with contextlib.suppress(httpx.HTTPError, ValueError):
        found.append(httpx.post(f"{address}/v1/completions", json=body, timeout=None).json())


def status(address, page="status.json"):
    return httpx.get(f"{address}/{page}", timeout=60).json()


def is_draining(address):
    return lambda: status(address, "healthz") == {"status": "draining"}


@pytest.mark.slow
def test_sigterm_finishes_what_runs_and_refuses_the_rest(server):
    process, address, work, found = server
    process.send_signal(signal.SIGTERM)
    until(is_draining(address), "the server drains")
    refused = httpx.post(f"{address}/v1/completions", json={}, timeout=60)
    assert refused.status_code == 503 and int(refused.headers["retry-after"]) > 0
    assert found == [] and process.poll() is None
    out, error = process.communicate()  # closes its standard input: all tokens come
    assert (process.returncode, out) == (0, "stopped\nafter\n")
    work.join()
    assert found[0]["choices"][0]["text"] == "x" * 30
    assert "Traceback" not in error


@pytest.mark.slow
def test_a_second_signal_ends_at_once(server):
    process, address, work, found = server
    process.send_signal(signal.SIGINT)
    until(is_draining(address), "the server drains")
    process.send_signal(signal.SIGINT)
    assert process.wait() == 0 and process.stdout.read() == "stopped\nafter\n"
    work.join()
    assert found == []


def test_a_port_that_is_taken_is_named():
    import socket

    from train.serve.server import HttpServer

    with socket.create_server(("127.0.0.1", 0)) as taken:
        with pytest.raises(UserError, match=f"--port {taken.getsockname()[1]}"):
            HttpServer(None, "127.0.0.1", taken.getsockname()[1])
