"""Measures what each of several streams waits at the server, beside llama.cpp's on the same file.

    python -m tests.benchmarks.streams --streams 1 8 32

Writes a GGUF file in Q4_0 of SmolLM2-135M's shape with random weights, so that nothing is
downloaded, and serves it by `train.serve --quantize stored` and, from the package `xllamacpp`, by
llama.cpp's server: on the same cores, one after the other. Each stream asks for one completion
after the other, by prompts that no two have in common. Prints the median and the 99th percentile
of the time to the first token, and between two tokens, and their ratios.

With `--guidellm PYTHON`, that Python's guidellm asks in the place of the client here, and its
report has the numbers (of a request's mean time between two tokens, as guidellm counts it).
"""

import argparse
import contextlib
import http.client
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax import models
from tests.benchmarks.masks import SHAPE, made_tokenizer

_READY = 900  # seconds in which a server has to be there


def write_model(path: Path, layers: int) -> None:
    """Writes a model of random weights."""
    shape = SHAPE | {"num_hidden_layers": layers, "max_position_embeddings": 2048}
    model = models.Decoder(models.read_config(shape))
    params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]
    models.save_gguf(path, model, params, gguf_type="q4_0", tokenizer=made_tokenizer())


def run_llama(path: str, streams: int, length: int, threads: int) -> None:
    """Serves a file by llama.cpp, and prints the address."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path, params.n_gpu_layers = path, 0
    params.n_ctx, params.n_parallel = length * streams, streams
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    params.verbosity, params.warmup = -1, True
    server = xllamacpp.Server(params)
    print(server.listening_address, flush=True)
    sys.stdin.read()


@contextlib.contextmanager
def llama(path: Path, streams: int, given: argparse.Namespace) -> Iterator[str]:
    """Yields the address of llama.cpp's server."""
    numbers = map(str, (streams, given.length, given.threads))
    command = [sys.executable, "-m", "tests.benchmarks.streams", "--run-llama", str(path), *numbers]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as process:
        assert process.stdout is not None
        yield next(line.strip() for line in process.stdout if line.startswith("http"))
        process.terminate()


@contextlib.contextmanager
def ours(path: Path, streams: int, given: argparse.Namespace) -> Iterator[str]:
    """Yields the address of the server of this project."""
    with tempfile.TemporaryDirectory() as folder:
        options = {
            "--model": path,
            "--quantize": "stored",
            "--sequences": streams,
            "--max-length": given.length,
            "--slots": 1,
            "--max-rank": 8,
            "--output": f"{folder}/state",
            "--port": given.port,
        }
        command = [sys.executable, "-m", "train.serve", *given.options.split()]
        command += [str(x) for option in options.items() for x in option]
        with subprocess.Popen(command) as process:
            address, end = f"http://127.0.0.1:{given.port}", time.monotonic() + _READY
            while not _is_ready(address):
                assert process.poll() is None and time.monotonic() < end, "no server came"
                time.sleep(1)
            yield address
            process.terminate()


def _is_ready(address: str) -> bool:
    try:
        return _post(address, "GET", "/healthz").status == 200
    except OSError:
        return False


def _post(address: str, method: str, path: str, body: Any = None) -> http.client.HTTPResponse:
    connection = http.client.HTTPConnection(urllib.parse.urlsplit(address).netloc, timeout=_READY)
    head = {"Content-Type": "application/json"}
    connection.request(method, path, None if body is None else json.dumps(body), head)
    return connection.getresponse()


def times_of(address: str, body: dict[str, Any]) -> list[float]:
    """Returns the seconds until each part of a completion's text."""
    began, times = time.perf_counter(), []
    answer = _post(address, "POST", "/v1/completions", body)
    assert answer.status == 200, answer.read()
    for line in answer:
        choices = json.loads(line[6:])["choices"] if line.startswith(b"data: {") else ()
        if any(choice["text"] for choice in choices):
            times.append(time.perf_counter() - began)
    return times


def measure(address: str, streams: int, given: argparse.Namespace, **extra: Any) -> list[float]:
    """Returns p50 and p99 of the first token, and of the time between two, in milliseconds."""
    rng, all_times, lock = np.random.default_rng(streams), list[list[float]](), threading.Lock()
    prompts = rng.integers(300, 40_000, (streams, given.requests, given.prompt)).tolist()

    def stream(mine: Sequence[Sequence[int]]) -> None:
        for prompt in mine:
            body = {"model": extra["model"], "prompt": prompt, "max_tokens": given.tokens}
            body |= {"stream": True, "temperature": 1.0, "ignore_eos": True, **extra}
            times = times_of(address, body)
            with lock:
                all_times.append(times)

    times_of(address, {"max_tokens": 4, "prompt": [5, 6], "stream": True, **extra})
    threads = [threading.Thread(target=stream, args=(mine,)) for mine in prompts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(all_times) == streams * given.requests, "a stream failed"
    n_events = sum(map(len, all_times))
    n_tokens = streams * given.requests * given.tokens
    print(f"  {n_events} parts of the text of {n_tokens} tokens", flush=True)
    first = [times[0] for times in all_times]
    between = [gap for times in all_times for gap in np.diff(times)]
    return [float(1e3 * np.percentile(x, p)) for x in (first, between) for p in (50, 99)]


def run_guidellm(
    address: str, streams: int, given: argparse.Namespace, folder: Path, **extra: Any
) -> list[float]:
    """Returns the latencies that guidellm measures, in the form of `measure`."""
    path, report = folder / "run.json", folder / "report.json"
    model, body = extra.pop("model"), {"temperature": 1.0, "ignore_eos": True, **extra}
    backend = {"kind": "openai_http", "target": address, "model": model, "http2": False}
    backend |= {"request_format": "/v1/completions", "extras": {"body": body}, "timeout": _READY}
    data = {"kind": "synthetic_text", "prompt_tokens": given.prompt, "output_tokens": given.tokens}
    spec = {
        "backend": backend | {"validate_backend": False},
        "profile": {"kind": "concurrent", "streams": [streams]},
        "constraints": [{"kind": "max_requests", "count": streams * given.requests}],
        "tokenizer": {"kind": "huggingface_auto", "model": str(folder / "tokenizer")},
        "data": [data],
        "outputs": [{"kind": "json", "path": str(report)}],
    }
    path.write_text(json.dumps({"metadata": {"name": "streams"}, "spec": spec}))
    report.unlink(missing_ok=True)
    command = [given.guidellm, "-m", "guidellm", "run", "-c", str(path), "--disable-console"]
    subprocess.run(command, check=True, env=_without(os.environ, "PYTHONPATH"))
    (benchmark,) = json.loads(report.read_text())["benchmarks"]
    metrics = benchmark["metrics"]
    n = metrics["request_totals"]["successful"]
    assert n == streams * given.requests, f"{n} requests were answered"
    names = ("time_to_first_token_ms", "inter_token_latency_ms")
    return [metrics[x]["successful"]["percentiles"][p] for x in names for p in ("p50", "p99")]


def _without(environ: Mapping[str, str], name: str) -> dict[str, str]:
    return {key: value for key, value in environ.items() if key != name}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--requests", type=int, default=4, help="completions of a stream")
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--port", type=int, default=8123)
    parser.add_argument("--options", default="", help='of train.serve, as "--fast-prompts"')
    parser.add_argument("--guidellm", help="a Python that has guidellm, which asks then")
    parser.add_argument("--run-llama", nargs=4, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.run_llama:
        return run_llama(given.run_llama[0], *map(int, given.run_llama[1:]))
    columns = ("first token", "between two")
    head = "".join(f" {x}, {p} |" for x in columns for p in ("p50", "p99"))
    lines = [f"| streams | server |{head}", f"|---|---|{'---|' * 4}"]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.gguf"
        write_model(path, given.layers)
        ask: Callable[..., list[float]] = measure
        if given.guidellm:
            models.load_tokenizer(path).save_pretrained(Path(folder) / "tokenizer")
            ask = partial(run_guidellm, folder=Path(folder))
        for streams in given.streams:
            with ours(path, streams, given) as address:
                mine = ask(address, streams, given, model=str(path))
            with llama(path, streams, given) as address:
                theirs = ask(address, streams, given, model="m", cache_prompt=False)
            for name, row in (("lora_jax", mine), ("llama.cpp", theirs)):
                cells = "".join(f" {x:.1f} ms |" for x in row)
                lines.append(f"| {streams} | {name} |{cells}")
            ratios = "".join(f" {x / y:.2f} |" for x, y in zip(mine, theirs, strict=True))
            lines.append(f"| {streams} | ratio |{ratios}")
            print(*lines, sep="\n", flush=True)
    return None


if __name__ == "__main__":
    main()
