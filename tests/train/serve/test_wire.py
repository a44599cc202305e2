"""Bodies in protobuf, held to bytes that are written here by hand."""

import re
import struct
import subprocess
import sys

import numpy as np
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support import THOROUGH
from tests.train.serve.fakes import FACTS
from tests.train.serve.protobuf import (
    BF16,
    F32,
    I32,
    I64,
    datum,
    dense,
    field,
    fields,
    request,
    sparse,
)
from train.serve.protocol.requests import (
    Completion,
    Gradient,
    GradientResult,
    RequestError,
    SampleResult,
    Top,
)
from train.serve.routes.tinker import wire


def decoded(body):
    return wire.gradient_of(wire.parse(body)[1], FACTS)


def refusal(body):
    with pytest.raises(RequestError) as caught:
        decoded(body)
    return str(caught.value)


def test_a_datum_in_chunks():
    weights = np.array([0.5, -2.0, 1e-3], np.float32)
    one = datum([[4, 96], [7]], target_tokens=dense([5, 6, 7], I64), weights=dense(weights, F32))
    _, message = wire.parse(request(one, only=1))
    assert (message.model_id, message.seq_id) == ("s:train:0", 3)
    found = wire.gradient_of(message, FACTS)
    assert (found.loss, found.forward_only, dict(found.config)) == ("cross_entropy", True, {})
    (only,) = found.data
    assert only.tokens.dtype == np.int32 and only.tokens.tolist() == [4, 96, 7]
    assert only.inputs["target_tokens"].dtype == np.int32
    assert only.inputs["target_tokens"].tolist() == [5, 6, 7]
    assert np.array_equal(only.inputs["weights"], weights)


def test_weights_are_ones_where_there_are_none():
    one = datum([[4, 9]], target_tokens=dense([[5, 6, 0], [1, 2, 3]], I32))
    found = decoded(request(one)).data[0].inputs
    assert np.array_equal(found["weights"], np.ones((2, 3), np.float32))


def test_sparse_targets_and_weights():
    targets = np.array([[0, 0, 5, 0], [0, 0, 0, 0], [3, 0, 0, 96]])
    weights = np.array([[0, 0, 0.25, 0], [0, 0, 0, 0], [-1.5, 0, 0, 2.0]], np.float32)
    inputs = {"target_tokens": sparse(targets, I64), "weights": sparse(weights, F32)}
    found = decoded(request(datum([[1, 2, 3]], **inputs))).data[0].inputs
    assert np.array_equal(found["target_tokens"], targets)
    assert np.array_equal(found["weights"], weights)


def test_bf16_is_read_as_the_upper_half_of_fp32():
    bits = np.array([0x3FC0, 0xC000], "<u2")  # 1.5 and -2
    weights = field(1, bits.tobytes()) + field(3, BF16)
    one = datum([[1, 2]], target_tokens=dense([3, 4], I64), weights=weights)
    assert decoded(request(one)).data[0].inputs["weights"].tolist() == [1.5, -2.0]


def test_the_numbers_of_a_loss_come_from_the_newer_map():
    inputs = {name: dense([0.5], F32) for name in ("logprobs", "advantages")}
    one = datum([[1]], target_tokens=dense([3], I64), **inputs)
    body = request(one, loss="ppo", config=[("clip_low_threshold", 0.7)])
    body += field(5, field(1, "clip_low_threshold") + field(2, 0.1))
    body += field(5, field(1, "clip_high_threshold") + field(2, 1.3))
    found = decoded(body)
    assert found.config == {"clip_low_threshold": 0.7, "clip_high_threshold": 1.3}
    assert set(found.data[0].inputs) == {"target_tokens", "logprobs", "advantages"}


GOOD = {"target_tokens": dense([5, 6], I64), "weights": dense([1.0, 2.0], F32)}


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (request(), "data is empty"),
        (request(datum([[1, 2]], **GOOD), loss="stable_reinforce"), "cross_entropy, imp"),
        (
            request(field(1, field(2, field(1, b"png"))) + datum([], **GOOD)),
            "chunks of encoded_text",
        ),
        (request(field(1, field(3, field(1, b"x"))) + datum([], **GOOD)), "chunks of encoded_text"),
        (request(datum([], **GOOD)), "0 tokens"),
        (request(datum([range(65)], **GOOD)), "65 tokens"),
        (request(datum([[1, 97]], **GOOD)), "97 is not a token .* 0 to 96"),
        (request(datum([[-1, 9]], **GOOD)), "-1 is not a token"),
        (request(datum([[1, 2]])), "lacks target_tokens"),
        (request(datum([[1, 2]], **GOOD), loss="ppo"), "ppo takes target_tokens, logprobs, adv"),
        (request(datum([[1, 2, 3]], **GOOD)), r"shape \(2,\), .*has 3 tokens"),
        (request(datum([[1, 2]], target_tokens=dense([5, 97], I64))), "97 is not a token"),
        (request(datum([[1, 2]], target_tokens=dense([5, 9], F32))), "not integers"),
        (request(datum([[1, 2]], **GOOD | {"weights": dense([1, 2, 3], F32)})), "the same shape"),
        (request(datum([[1, 2]], **GOOD | {"weights": dense([1, np.nan], F32)})), "not finite"),
        (request(datum([[1, 2]], **GOOD | {"weights": dense([1, np.inf], F32)})), "not finite"),
        (request(datum([[1, 2]], **GOOD | {"weights": dense([1], F32, [2])})), "1 elements"),
        (request(datum([[1, 2]], **GOOD | {"weights": dense([1], F32, [-1])})), "has the shape"),
        (request(datum([[1, 2]], **GOOD | {"weights": field(1, b"abc") + field(3, F32)})), "3 byt"),
        (request(datum([[1, 2]], **GOOD | {"weights": field(3, 9)})), "unknown type 9"),
        (request(datum([[1, 2]], **GOOD), config=[("beta", 0.5)]), "beta.*has no settings"),
        (request(datum([[1, 2]], **GOOD), loss="dro"), "lacks logprobs"),
        (
            request(datum([[1, 2]], **GOOD, clip_low_threshold=dense([1, 1], F32))),
            "number in loss_fn_config",
        ),
    ],
)
def test_what_is_refused(body, said):
    assert re.search(said, refusal(body))


@pytest.mark.parametrize("rows", [[0, 1], [0, 2, 1, 2], [1, 1, 2, 2], [0, 1, 1, 3]])
def test_broken_rows_of_a_sparse_tensor(rows):
    csr = field(1, np.ones(2, "<f4").tobytes()) + field(2, np.array(rows, "<i8").tobytes())
    csr += field(3, np.array([0, 1], "<i8").tobytes())
    weights = field(2, csr) + field(3, F32) + field(4, 3) + field(4, 2)
    targets = dense([[1, 2]] * 3, I64)
    said = refusal(request(datum([[1, 2, 3]], target_tokens=targets, weights=weights)))
    assert "not a valid CSR tensor" in said


def test_a_small_sparse_tensor_cannot_stand_for_a_large_one():
    csr = field(2, np.zeros(3, "<i8").tobytes())
    huge = field(2, csr) + field(3, I64) + field(4, 2) + field(4, 2**25)
    assert "have more than" in refusal(request(datum([[1, 2]], target_tokens=huge)))


def test_bodies_in_zstd():
    body = request(datum([[1, 2]], **GOOD))
    packed = zstandard.ZstdCompressor().compress(body)
    assert wire.parse(packed, "zstd") == wire.parse(body) == (body, wire.parse(body)[1])
    stream = zstandard.ZstdCompressor().compressobj()  # does not say how long it is
    assert wire.parse(stream.compress(body) + stream.flush(), "zstd")[0] == body
    bomb = zstandard.ZstdCompressor().compress(bytes(wire.MOST_BYTES + 1))
    for wrong, encoding in [(bomb, "zstd"), (b"garbage", "zstd"), (body, "gzip")]:
        with pytest.raises(RequestError):
            wire.parse(wrong, encoding)


_BOMBS = """
import sys, threading, zstandard
from train.serve.protocol.requests import RequestError
from train.serve.routes.tinker import wire

def most_memory():
    lines = open("/proc/self/status").read().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) / 1024

n_unpacked = int(sys.argv[1])
wire._UNPACKING = threading.BoundedSemaphore(n_unpacked)
packer = zstandard.ZstdCompressor().compressobj()  # does not write the size of the content
bomb = packer.compress(bytes(wire.MOST_BYTES)) + packer.compress(b"over") + packer.flush()
start = threading.Barrier(32)
refusals = []

def send():
    start.wait()
    with wire.unpacking_turn("zstd"):
        try:
            wire.parse(bomb, "zstd")
        except RequestError as error:
            refusals.append(error)

before = most_memory()
threads = [threading.Thread(target=send) for _ in range(32)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
assert len(refusals) == 32
print(most_memory() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("n_unpacked, is_bounded", [(wire.MOST_UNPACKED, True), (32, False)])
def test_many_bombs_take_the_memory_of_four(n_unpacked, is_bounded):
    command = [sys.executable, "-c", _BOMBS, str(n_unpacked)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert run.returncode == 0, run.stderr
    megabytes = float(run.stdout)
    bound = 2 * wire.MOST_UNPACKED * wire.MOST_BYTES / 2**20
    assert (megabytes < bound) == is_bounded, megabytes


BODY = request(
    datum([[1, 2, 3]], target_tokens=sparse(np.eye(3, 5, dtype=int), I64)),
    datum([[4], [5]], **GOOD),
    config=[],
)


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=200))
def test_garbage_is_a_request_error(body):
    with pytest.raises(RequestError):
        decoded(body)


@settings(max_examples=1000 if THOROUGH else 300, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, len(BODY) - 1), st.integers(0, 255)), min_size=1, max_size=9),
    st.integers(0, len(BODY)),
)
def test_damaged_bodies_are_read_or_refused(changes, end):
    body = bytearray(BODY)
    for place, byte in changes:
        body[place] = byte
    for one in (bytes(body), bytes(body[:end])):
        try:
            assert isinstance(decoded(one), Gradient)
        except RequestError as error:
            assert len(str(error)) < 300


def test_outputs_are_ragged_records():
    arrays = [np.array(one, np.float32) for one in ([-1, -2], [-3], [[-4, -5, -6]], [-7, -8])]
    message = fields(wire.encode_gradient(GradientResult(arrays, {"loss:sum": 2.5})))
    assert message[1] == [b"ArrayRecord"]
    metric = fields(message[3][0])
    assert metric[1] == [b"loss:sum"] and struct.unpack("<d", metric[2][0]) == (2.5,)
    read = []
    for record in map(fields, message[2]):
        entry = fields(record[2][0])
        assert entry[1] == [b"logprobs"]
        tensor = fields(entry[2][0])
        ends = np.frombuffer(tensor[2][0], "<i8")
        assert tensor[3] == [F32] and record[3] == [len(ends) - 1]
        trailing = list(tensor.get(4, [b""])[0])
        for start, end in zip(ends[:-1], ends[1:], strict=True):
            read.append(np.frombuffer(tensor[1][0][start:end], "<f4").reshape([-1, *trailing]))
    assert [one.tolist() for one in read] == [one.tolist() for one in arrays]


def test_completions():
    top = Top(np.array([[0, 0], [5, 6], [7, 8]], np.int32), -np.arange(6.0).reshape(3, 2))
    short = Completion(np.array([9, 1], np.int32), np.array([-1, -2], np.float32), True, None)
    long = Completion(np.array([3], np.int32), np.array([-0.5], np.float32), False, top)
    prompt = np.array([np.nan, -1, -2], np.float32)
    message = fields(wire.encode_samples(SampleResult([short, long], prompt, top, 2)))
    first, second = map(fields, message[1])
    assert 1 not in first and second[1] == [1]  # stop is the enum's zero
    assert np.frombuffer(first[2][0], "<i4").tolist() == [9, 1] and 4 not in first
    assert np.frombuffer(first[3][0], "<f4").tolist() == [-1, -2]
    best = fields(second[4][0])
    assert (best[3], best[4]) == ([2], [3])
    assert np.frombuffer(best[1][0], "<i4").tolist() == [0, 0, 5, 6, 7, 8]
    assert np.array_equal(np.frombuffer(message[2][0], "<f4"), prompt, equal_nan=True)
    assert np.frombuffer(fields(message[3][0])[2][0], "<f4").tolist() == [0, -1, -2, -3, -4, -5]
    assert message[4] == [2]


def test_the_last_tokens_of_a_prompt_alone():
    top = Top(np.ones((3, 1), np.int32), np.ones((3, 1), np.float32))
    drawn = SampleResult([], np.array([np.nan, -1, -2], np.float32), top)
    message = fields(wire.encode_samples(drawn, n_scored=1))
    found = np.frombuffer(message[2][0], "<f4")
    assert np.isnan(found[:2]).all() and found[2] == -2
    best = fields(message[3][0])
    assert np.frombuffer(best[1][0], "<i4").tolist() == [0, 0, 1]
    assert np.frombuffer(best[2][0], "<f4").tolist() == [-99999, -99999, 1]
    assert drawn.top_prompt.ids.min() == 1  # the engine's arrays stay as they are
