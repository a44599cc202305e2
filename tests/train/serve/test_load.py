"""Many tenants at once, and bodies of garbage, against a server in a process of its own."""

import contextlib
import http.client
import json
import random
import threading
import time
from collections import Counter

import numpy as np
import pytest
import zstandard

from tests.support import THOROUGH
from tests.train.serve import protobuf
from tests.train.serve.process import SECONDS, serve
from tests.train.serve.protobuf import F32, I64, dense
from tests.train.serve.waiting import until
from tests.train.tiny import CONFIG, write_model

pytestmark = pytest.mark.slow
TENANTS, STEPS, SAMPLES = 8, 50, 12  # of each tenant 2 * 50 + 12 requests
BODIES, TOGETHER = 10_000 if THOROUGH else 300, 5  # so many have the same number
MIB = 2**20
BOMB = zstandard.compress(bytes(300 * MIB))


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("served")
    (folder / "tiny").mkdir()
    write_model(folder / "tiny")
    server = serve(folder, "tiny", "--max-length 64 --sequences 8 --slots 4 --max-rank 4")
    try:
        server.ready()
        yield server
        server.end()
    finally:
        server.kill()


def gradient(rng, model, seq, n, longest):
    """The body of a forward_backward of n sequences."""
    data = []
    for length in rng.integers(2, longest, n):
        tokens, targets = rng.integers(0, CONFIG["vocab_size"], (2, length))
        weights = dense(rng.normal(size=length), F32)
        data.append(protobuf.datum([tokens], target_tokens=dense(targets, I64), weights=weights))
    return protobuf.request(*data, model=model, seq=seq)


def all_at_once(call, n):
    """Returns what a call for each number up to n returns, in n threads."""
    found = {}

    def work(i):
        found[i] = call(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(n)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == n, "a thread failed"
    return [found[i] for i in range(n)]


def test_tenants_share_alike(server):
    """They differ in the sizes of their batches, and in their ranks; all wait for the engine."""
    models = [server.create(rank=1 + i % 4) for i in range(TENANTS)]
    for model in models:
        server.result({"request_id": f"{model}:0"})

    def ask(i):
        """Sends all but the first command, which the others wait for."""
        rng, model, sent = np.random.default_rng(i), models[i], []
        for step in range(STEPS):
            content = gradient(rng, model, 2 * step + 1, 2 + i, 60)
            if step == 0:
                first = content
            else:
                sent.append(server.post("forward_backward", content))
            sent.append(server.step(model, 2 * step + 2, learning_rate=1e-3, eps=1e-8))
        return first, sent

    asked = all_at_once(ask, TENANTS)
    began = time.monotonic()
    firsts = [server.post("forward_backward", first) for first, _ in reversed(asked)]
    sent = [[one, *more] for one, (_, more) in zip(reversed(firsts), asked, strict=True)]
    slowest = 0.0

    def all_busy():
        """The tenants, while each has something to do."""
        nonlocal slowest
        start = time.monotonic()
        tenants = server.once("status.json")["tenants"]
        slowest = max(slowest, time.monotonic() - start)
        return min(tenants[model]["queued"] for model in models) > 0 and tenants

    seen = [until(all_busy, "all are busy")]
    while found := all_busy():
        seen.append(found)
        time.sleep(0.05)
    assert len(seen) > 9, "they are busy together for a while"

    def end(i):
        prompt = {"chunks": [{"type": "encoded_text", "tokens": [5 + i, 6, 7]}]}
        what = {"base_model": "tiny", "prompt": prompt, "sampling_params": {"max_tokens": 8}}
        drawn = [server.result(server.post("asample", what)) for _ in range(SAMPLES)]
        return [server.result(one) for one in sent[i]], drawn

    results = all_at_once(end, TENANTS)
    took = time.monotonic() - began
    assert all(len(drawn) == SAMPLES and all(drawn) for _, drawn in results)
    for done, _ in results:
        steps = [one["metrics"]["step:max"] for one in done if isinstance(one, dict)]
        assert len(done) == 2 * STEPS and sorted(steps) == [*range(1, STEPS + 1)]
    begin, *_, busy = seen
    seconds = np.array([busy[model]["seconds"] - begin[model]["seconds"] for model in models])
    steps = [busy[model]["steps"] for model in models]
    shares = seconds / seconds.mean()
    print(f"\n{TENANTS} x {2 * STEPS + SAMPLES} requests in {took:.1f} s; shares {shares.round(2)}")
    print(f"of {seconds.sum():.1f} s, after steps {steps}; slowest status {slowest:.2f} s")
    assert np.abs(shares - 1).max() < 0.2
    assert steps[0] > 2 * steps[-1], "it took no longer to do more"


def flipped(rng, body):
    body = bytearray(body)
    for _ in range(rng.choice((1, 1, 2, 8))):
        body[rng.randrange(len(body))] ^= 1 << rng.randrange(8)
    return bytes(body)


def spliced(rng, body):
    """A part of it twice, elsewhere, or left out."""
    a, b, c = sorted(rng.randrange(len(body) + 1) for _ in range(3))
    return rng.choice((body[:a] + body[b:], body[:b] + body[a:], body[:a] + body[b:c] + body[a:]))


def mutated(rng, body):
    """A body that is broken, or is not, and its Content-Encoding."""
    kind = rng.randrange(20)
    if kind < 8:
        return flipped(rng, body), "identity"
    if kind < 11:
        return body[: rng.randrange(len(body))], "identity"
    if kind < 15:
        return spliced(rng, body), "identity"
    if kind == 15:
        return rng.randbytes(rng.randrange(400)), rng.choice(("identity", "zstd", "gzip"))
    if kind == 16:
        return BOMB, "zstd"
    packed = zstandard.compress(rng.choice((body, flipped(rng, body), spliced(rng, body))))
    return rng.choice((packed, flipped(rng, packed), spliced(rng, packed))), "zstd"


@pytest.fixture
def connection(server):
    """A connection that is kept."""
    with contextlib.closing(
        http.client.HTTPConnection("127.0.0.1", server.port, timeout=SECONDS)
    ) as found:
        yield found


def test_bodies_of_garbage(server, connection):
    """Each is refused, or does no harm: the server goes on, and so does their model."""
    rng, numbers = random.Random(9), np.random.default_rng(9)
    model = server.create(rank=2)
    statuses, good, taken, memory = Counter(), 0, set(), {}

    def send(content, encoding="identity"):
        """The status, and what is said."""
        headers = {"X-API-Key": "tml-a", "Content-Encoding": encoding}
        connection.request("POST", "/api/v1/forward_backward", content, headers)
        answer = connection.getresponse()
        return answer.status, json.loads(answer.read())

    began = time.monotonic()
    for number in range(BODIES // TOGETHER):
        seq = 2 * number + 1
        body = gradient(numbers, model, seq, 1 + number % 3, 12)
        for _ in range(TOGETHER):
            status, said = send(*mutated(rng, body))
            statuses[status] += 1
            assert status == 200 or 400 <= status < 500 and isinstance(said["detail"], str), said
            if status == 200:
                taken.add(said["request_id"])
        status, said = send(body)  # unless a broken one has taken its number
        assert status in (200, 400), said
        good += status == 200
        last = server.step(model, seq + 1, learning_rate=1e-3, eps=1e-8)
        if number % 20 == 19:  # so the engine is never far behind
            server.result(last)
            memory[(number + 1) * TOGETHER] = server.memory() / MIB
    took = time.monotonic() - began
    print(f"\n{BODIES} bodies in {took:.0f} s: {dict(statuses)}; {good} good ones were taken")
    print("MiB:", {n: round(memory[n]) for n in [*memory][:: max(1, len(memory) // 10)]})
    assert statuses[200] > BODIES / 30 and statuses[400] > BODIES / 3 and statuses[404] > 0
    for request in taken:
        if int(request.split(":")[-1]) <= seq:  # else it waits for those before it
            found = server.post("retrieve_future", {"request_id": request})
            assert isinstance(found, bytes) or found["category"] == "user", found
    last = server.result(server.step(model, seq + 2))
    assert last["metrics"]["step:max"] == BODIES // TOGETHER + 1
    first, *_, end = memory.values()
    assert end < first + 64, "memory grows"
