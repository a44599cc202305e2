"""The options of train.serve, and the end of a server."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from train.console.errors import UserError
from train.serve.options import check, parse

httpx = pytest.importorskip("httpx2")


def test_options_that_make_sense(tmp_path):
    keys = tmp_path / "keys"
    keys.write_text("anna tml-one\n")
    assert check(parse(["--port", "0", "--mesh", "fsdp=2", "--host", "::1"])) is None
    assert check(parse(["--keys", str(keys), "--host", "0.0.0.0"])) == {"tml-one": "anna"}
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
        ("--mesh tensor=two", "--mesh"),
    ],
)
def test_options_that_make_none_are_refused(given, named, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pyproject.toml").touch()
    with pytest.raises(UserError, match=named):
        check(parse(given.split()))


SERVER = """
import sys, time
from tests.train.serve.scripted import TOKENIZER, ScriptedEngine, ids
from train.serve.app import make_app, serve

engine = ScriptedEngine(lambda sample, index: ids("x" * 390), lambda: time.sleep(0.1))
serve(make_app(engine, TOKENIZER), "127.0.0.1", 0, lambda: print("stopped", flush=True))
print("after", flush=True)
"""


def start():
    command = [sys.executable, "-c", SERVER]
    environment = {
        **os.environ,
        "PYTHONPATH": str(Path(__file__).parents[3]),
        "JAX_PLATFORMS": "cpu",
    }
    pipe = subprocess.PIPE
    process = subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=environment)
    said = process.stderr.readline()
    assert "http://127" in said, said + process.communicate()[1]
    return process, said.split()[2]


def ask(address, found, n):
    body = {"model": "tiny/base", "prompt": "x", "max_tokens": n}
    found.append(httpx.post(f"{address}/v1/completions", json=body, timeout=60).json())


def wait_for_it(address):
    """Waits until the engine has the request."""
    while httpx.get(f"{address}/status.json").json()["drawing"] < 1:
        time.sleep(0.02)


def test_sigterm_finishes_what_runs_and_refuses_the_rest():
    process, address = start()
    found = []
    work = threading.Thread(target=ask, args=(address, found, 30))
    work.start()
    wait_for_it(address)
    process.send_signal(signal.SIGTERM)
    time.sleep(0.5)
    assert httpx.get(f"{address}/healthz").json() == {"status": "draining"}
    refused = httpx.post(f"{address}/v1/completions", json={})
    assert refused.status_code == 503 and int(refused.headers["retry-after"]) > 0
    work.join()
    assert found[0]["choices"][0]["text"] == "x" * 30
    out, error = process.communicate(timeout=20)
    assert (process.returncode, out) == (0, "stopped\nafter\n")
    assert "Traceback" not in error


def test_a_second_signal_ends_at_once():
    process, address = start()
    found = []

    def cut_off():
        with contextlib.suppress(httpx.HTTPError, ValueError):
            ask(address, found, 300)

    work = threading.Thread(target=cut_off)
    work.start()
    wait_for_it(address)
    for _ in range(2):
        process.send_signal(signal.SIGINT)
        time.sleep(0.3)
    begin = time.monotonic()
    out, _ = process.communicate(timeout=20)
    assert time.monotonic() - begin < 10 and process.returncode == 0 and "stopped" in out
    work.join()
    assert found == []


def test_a_port_that_is_taken_is_named():
    import socket

    from train.serve.app import serve

    with socket.create_server(("127.0.0.1", 0)) as taken:
        with pytest.raises(UserError, match=f"--port {taken.getsockname()[1]}"):
            serve(None, "127.0.0.1", taken.getsockname()[1], lambda: None)
