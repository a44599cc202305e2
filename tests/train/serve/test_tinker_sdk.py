"""Tinker's own SDK against the routes, over HTTP; its codec against ours."""

import os
import subprocess
import sys
import threading
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import uvicorn
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from starlette.applications import Starlette

from tests.support import thorough
from tests.train.serve.client import key_owner
from tests.train.serve.fakes import FACTS, FakeEngine, logprobs
from tests.train.serve.waiting import until
from train.serve.protocol.requests import Completion, GradientResult, SampleResult, Top
from train.serve.routes.tinker import api as routes
from train.serve.routes.tinker import wire

tinker = pytest.importorskip("tinker", reason="the extra 'serve-test' has the SDK")
from tinker import types  # noqa: E402
from tinker.proto import request_conv, response_conv  # noqa: E402

pytestmark = [
    pytest.mark.serving,
    pytest.mark.filterwarnings("ignore"),  # the SDK's own
]

NEWEST = hasattr(tinker.TrainingClient, "save_weights_external")
OLD = Path(os.environ.get("TINKER_OLD", Path(sys.prefix) / "tinker-0.27"))


class Served:
    """A server in a thread, which can be stopped and started again on the same port."""

    def __init__(self, folder, **rest):
        self.folder, self.port, self.rest = folder, 0, {"hold": 2.0} | rest
        self.start()

    def start(self):
        self.engine = FakeEngine()
        self.tinker = routes.Tinker(
            *(self.engine, self.folder, key_owner, ["other/name"]),
            routes.TinkerLimits(**self.rest),
        )
        self.tinker.start()
        app = Starlette(routes=self.tinker.routes())
        config = uvicorn.Config(app, port=self.port, log_level="warning")
        self.server = uvicorn.Server(config)
        self.thread = threading.Thread(target=self.server.run)
        self.thread.start()
        until(lambda: self.server.started, "the server listens")
        self.port = self.server.servers[0].sockets[0].getsockname()[1]

    @property
    def url(self):
        return f"http://127.0.0.1:{self.port}"

    def stop(self):
        self.server.should_exit = self.server.force_exit = True
        self.thread.join()
        self.engine.stop()
        self.tinker.log.close()


@pytest.fixture
def served(tmp_path, monkeypatch):
    monkeypatch.setenv("TINKER_API_KEY", "tml-a")
    monkeypatch.setenv("TINKER_TELEMETRY", "0")
    found = Served(tmp_path)
    yield found
    found.stop()


@pytest.fixture
def service(served):
    found = tinker.ServiceClient(base_url=served.url)
    yield found
    found.close("success").result()


def made(client):
    """A training client once it is there; older SDKs have waited for it already."""
    return client.result() if hasattr(client, "result") else client


def datum(tokens, targets, **inputs):
    prompt = types.ModelInput.from_ints(list(tokens))
    return types.Datum(model_input=prompt, loss_fn_inputs={"target_tokens": targets, **inputs})


def prompt(*tokens):
    return types.ModelInput.from_ints(list(tokens))


def test_training_and_samples(served, service):
    client = made(service.create_lora_training_client(base_model="tiny/base", rank=8))
    assert client.get_info().lora_rank == 8
    data = [datum([n % 90, 2], [3, 4], weights=[1.0, float(n)]) for n in range(2500)]
    gradient = client.forward_backward(data, "cross_entropy")  # three requests, in any order
    step = client.optim_step(types.AdamParams(learning_rate=1e-6))
    found = gradient.result()
    expected = logprobs([3, 4], 0.0)
    assert len(found.loss_fn_outputs) == 2500
    assert all(np.array_equal(one["logprobs"].data, expected) for one in found.loss_fn_outputs)
    loss = -sum(float(expected[0] + n * expected[1]) for n in range(2500))
    assert found.metrics["loss:sum"] == pytest.approx(loss, rel=1e-6)
    assert step.result().metrics == {"step:max": 1.0}
    (number,) = (one.number for one in served.engine.tenants.values())
    assert number == pytest.approx(-1e-6 * (3 * 2500 + 4 * 2500 * 2499 / 2) / 100, rel=1e-6)

    snapshot = client.save_weights_and_get_sampling_client()
    client.forward_backward(data[:9], "cross_entropy").result()
    client.optim_step(types.AdamParams(learning_rate=5.0)).result()
    params = types.SamplingParams(max_tokens=6, stop=[20, 23], temperature=0.5)
    asked = {"num_samples": 2, "sampling_params": params, "include_prompt_logprobs": True}
    answer = snapshot.sample(prompt(5, 6), topk_prompt_logprobs=2, **asked).result()
    first = 11 + round(1000 * number)
    tokens = [(first + 3 * k) % 97 for k in range(6)]
    assert list(answer.sequences[0].tokens) == tokens
    assert answer.sequences[0].stop_reason == "length" and len(answer.sequences) == 2
    each = [logprobs([token], number, 0.5)[0] for token in tokens]
    assert np.allclose(answer.sequences[0].logprobs, each)
    assert answer.prompt_logprobs[0] is None
    scores = snapshot.compute_logprobs(prompt(5, 6, 7)).result()
    assert np.allclose(scores[1:], logprobs([5, 6, 7], number)[1:])


@pytest.mark.skipif(not NEWEST, reason="the oldest one has no targets of a prompt")
def test_other_tokens_of_a_prompt_are_scored(service):
    torch = pytest.importorskip("torch")
    sampler = service.create_sampling_client(base_model="tiny/base")
    ids = torch.full((40, 5), -1)
    ids[3, 2], ids[39, 0], ids[0, 4] = 7, 96, 3
    ways = [types.TensorData.from_torch(ids), types.TensorData.from_torch_sparse(ids, -1)]
    assert [way.sparse_crow_indices is None for way in ways] == [True, False]
    expected = np.where(ids.numpy() < 0, 0, logprobs(ids.numpy(), 0.0)).astype(np.float32)
    params = types.SamplingParams(max_tokens=1)
    for way in ways:
        asked = {"num_samples": 1, "sampling_params": params, "target_prompt_logprobs": way}
        found = sampler.sample(prompt(*range(41)), **asked).result().target_prompt_logprobs
        assert (found.sparse_crow_indices is None) == (way.sparse_crow_indices is None)
        assert np.array_equal(found.to_torch().numpy(), expected)


def test_saving_and_loading(served, service):
    client = made(service.create_lora_training_client(base_model="other/name", rank=4))
    client.forward_backward([datum([1, 2], [3, 4], weights=[1.0, 1.0])], "cross_entropy").result()
    client.optim_step(types.AdamParams(learning_rate=0.5)).result()
    state = client.save_state("one").result().path
    named = client.save_weights_for_sampler("named").result().path
    sampler = service.create_sampling_client(model_path=named)
    assert sampler.get_base_model() == "other/name"
    params = types.SamplingParams(max_tokens=3)
    served_tokens = sampler.sample(prompt(5), 1, params).result().sequences[0].tokens
    with_momentum = made(service.create_training_client_from_state_with_optimizer(state))
    without = made(service.create_training_client_from_state(state))
    old, new, fresh = (
        served.engine.tenants[one.model_id] for one in (client, with_momentum, without)
    )
    assert new.number == old.number == fresh.number != 0
    assert new.momentum == old.momentum != 0 == fresh.momentum
    client.load_state(state).result()
    live = with_momentum.save_weights_and_get_sampling_client()
    assert list(live.sample(prompt(5), 1, params).result().sequences[0].tokens) == list(
        served_tokens
    )
    rest = service.create_rest_client()
    runs = rest.list_training_runs().result().training_runs
    assert {one.training_run_id for one in runs} == set(served.engine.tenants)
    listed = rest.list_checkpoints(client.model_id).result().checkpoints
    assert {one.tinker_path for one in listed} == {state, named}
    rest.set_checkpoint_ttl_from_tinker_path(state, 4000).result()
    rest.publish_checkpoint_from_tinker_path(state).result()
    (found,) = (one for one in rest.list_user_checkpoints().result().checkpoints if one.expires_at)
    assert found.tinker_path == state and found.public
    rest.delete_checkpoint_from_tinker_path(state).result()
    assert len(rest.list_user_checkpoints().result().checkpoints) == 1
    assert rest.get_weights_info_by_tinker_path(named).result().lora_rank == 4
    assert len(rest.list_sessions().result().sessions) == 1


@pytest.mark.skipif(not NEWEST, reason="it exports nothing")
def test_exports(service):
    client = made(service.create_lora_training_client(base_model="tiny/base", rank=4))
    export = client.save_weights_external("out").result().path
    urls = service.create_rest_client().get_external_weights_urls(export).result().urls
    with urllib.request.urlopen(urls["adapter_config.json"]) as answer:
        assert answer.read() == b'{"r": 4}'


@pytest.mark.skipif(not NEWEST, reason="it exports nothing")
def test_the_cookbook_downloads_weights(served, service, tmp_path):
    """A training checkpoint is exported, encrypted, fetched, and the export deleted."""
    weights = pytest.importorskip("tinker_cookbook.weights")
    client = made(service.create_lora_training_client(base_model="tiny/base", rank=4))
    path = client.save_state("last").result().path
    weights.download(tinker_path=path, output_dir=str(tmp_path / "got"), base_url=served.url)
    assert (tmp_path / "got" / "adapter_config.json").read_bytes() == b'{"r": 4}'
    assert not any(one.suffix == ".age" for one in (tmp_path / "got").iterdir())
    left = str(service.create_rest_client().list_user_checkpoints().result())
    assert path in left and "external_weights" not in left


def test_errors_reach_the_user(service):
    client = made(service.create_lora_training_client(base_model="tiny/base", rank=4))
    one = datum([1, 2], [3, 4], weights=[1.0, 1.0])
    with pytest.raises(tinker.BadRequestError, match="ppo takes"):
        client.forward_backward([one], "ppo").result()
    with pytest.raises(tinker.RequestFailedError, match="on fire"):
        client.optim_step(types.AdamParams(learning_rate=666.0)).result()
    with pytest.raises(tinker.BadRequestError, match="Use tiny/base"):
        made(service.create_lora_training_client(base_model="big/model", rank=4))
    client.save_state("a").result()
    with pytest.raises(tinker.BadRequestError, match="exists already"):
        client.save_state("a").result()
    client.optim_step(types.AdamParams()).result()  # the client goes on
    refused = (tinker.BadRequestError, ValueError)  # older SDKs do not send it
    with pytest.raises(refused, match="learning_rate is null|not JSON compliant"):
        client.optim_step(types.AdamParams(learning_rate=float("nan"))).result()


def test_custom_losses(served, service):
    torch = pytest.importorskip("torch")
    client = made(service.create_lora_training_client(base_model="tiny/base", rank=4))
    data = [datum([1, 2], [3, 4]), datum([5, 6, 7], [8, 9, 10])]

    def squares(data, found):
        return sum((one**2).sum() for one in found), {"custom": 1.0}

    metrics = client.forward_backward_custom(data, squares).result().metrics
    expected = [logprobs(targets, 0.0) for targets in ([3, 4], [8, 9, 10])]
    squared = sum(float((one**2).sum()) for one in expected)
    if not NEWEST:  # it reports what the engine does: a linear loss, of twice the squares' size
        squared *= 2
    assert metrics["loss:sum"] == pytest.approx(squared, rel=1e-6)
    (tenant,) = served.engine.tenants.values()
    slopes = [-2 * one for one in expected]  # the engine gets minus the derivative as weights
    by_hand = sum(
        float((slope * targets).sum()) / 100
        for slope, targets in zip(slopes, ([3, 4], [8, 9, 10]), strict=True)
    )
    assert tenant.gradient == pytest.approx(by_hand, rel=1e-6) and torch.is_tensor


def test_a_client_outlives_the_server(served, service):
    client = made(service.create_lora_training_client(base_model="tiny/base", rank=4))
    one = datum([1, 2], [3, 4], weights=[1.0, 1.0])
    sampler = client.save_weights_and_get_sampling_client()
    before = served.engine.tenants[client.model_id]
    for _ in range(3):
        client.forward_backward([one], "cross_entropy")
        client.optim_step(types.AdamParams(learning_rate=0.5)).result()
    gradient = client.forward_backward([one], "cross_entropy")
    gradient.result()
    served.stop()
    served.start()
    step = client.optim_step(types.AdamParams(learning_rate=0.5)).result()
    assert step.metrics == {"step:max": 4.0}
    after = served.engine.tenants[client.model_id]
    assert after is not before and after.steps == 4 and after.gradient == 0
    params = types.SamplingParams(max_tokens=2)
    tokens = sampler.sample(prompt(5), 1, params).result().sequences[0].tokens
    assert list(tokens) == [5, 8]


FLOATS = st.floats(-1e6, 1e6, width=32)
SHAPES = st.tuples(st.integers(1, 9)) | st.tuples(st.integers(1, 9), st.integers(1, 5))


@settings(max_examples=60, deadline=None)
@given(st.lists(SHAPES, min_size=1, max_size=4), st.data())
def test_requests_of_the_sdk_are_read(shapes, data):
    drawn = [data.draw(arrays.arrays(np.float32, shape, elements=FLOATS)) for shape in shapes]
    targets = [
        data.draw(arrays.arrays(np.int64, one, elements=st.integers(0, 96))) for one in shapes
    ]

    def tensor(array):
        kind = "int64" if array.dtype == np.int64 else "float32"
        return types.TensorData(data=array.flatten().tolist(), dtype=kind, shape=list(array.shape))

    sent = [
        datum(range(len(one)), tensor(two), weights=tensor(one))
        for one, two in zip(drawn, targets, strict=True)
    ]
    inner = types.ForwardBackwardInput(data=sent, loss_fn="cross_entropy")
    request = types.ForwardBackwardRequest(
        forward_backward_input=inner, model_id="a:train:0", seq_id=5
    )
    content = request_conv.forward_backward_request_to_proto(request).SerializeToString()
    _, message = wire.parse(content)
    assert (message.model_id, message.seq_id) == ("a:train:0", 5)
    found = wire.gradient_of(message, FACTS)
    for one, weights, target in zip(found.data, drawn, targets, strict=True):
        assert one.tokens.tolist() == list(range(len(weights)))
        assert np.array_equal(one.inputs["weights"], weights)
        assert np.array_equal(one.inputs["target_tokens"], target)


def test_sparse_targets_of_the_sdk_are_read():
    torch = pytest.importorskip("torch")
    targets = torch.zeros(6, 8, dtype=torch.int64)
    weights = torch.zeros(6, 8)
    targets[1, 3], targets[5, 0], weights[1, 3], weights[5, 0] = 7, 9, 0.25, -2.0
    sparse = [types.TensorData.from_torch_sparse(one) for one in (targets, weights)]
    assert all(one.sparse_crow_indices is not None for one in sparse)
    inner = types.ForwardBackwardInput(
        data=[datum(range(6), sparse[0], weights=sparse[1])], loss_fn="cross_entropy"
    )
    request = types.ForwardBackwardRequest(forward_backward_input=inner, model_id="m", seq_id=1)
    content = request_conv.forward_backward_request_to_proto(request).SerializeToString()
    inputs = wire.gradient_of(wire.parse(content)[1], FACTS).data[0].inputs
    assert np.array_equal(inputs["target_tokens"], targets.numpy())
    assert np.array_equal(inputs["weights"], weights.numpy())


@settings(max_examples=60, deadline=None)
@given(st.lists(SHAPES, max_size=6), st.data())
def test_outputs_are_read_by_the_sdk(shapes, data):
    drawn = [data.draw(arrays.arrays(np.float32, shape, elements=FLOATS)) for shape in shapes]
    content = wire.encode_gradient(GradientResult(drawn, {"loss:sum": 0.1, "x:mean": -3.0}))
    found = response_conv.deserialize_forward_backward_output(content)
    assert found.metrics == {"loss:sum": 0.1, "x:mean": -3.0}
    read = [one["logprobs"].to_numpy() for one in found.loss_fn_outputs]
    assert [one.shape for one in read] == [one.shape for one in drawn]
    assert all(np.array_equal(one, two) for one, two in zip(read, drawn, strict=True))


def test_completions_are_read_by_the_sdk():
    top = Top(np.array([[0, 0], [5, 6]], np.int32), np.array([[-99999] * 2, [-1, -2]], np.float32))
    one = Completion(np.array([3, 4], np.int32), np.array([-1, -2], np.float32), True, top)
    two = Completion(np.zeros(0, np.int32), np.zeros(0, np.float32), False)
    content = wire.encode_samples(
        SampleResult([one, two], np.array([np.nan, -3], np.float32), top, 1)
    )
    found = response_conv.deserialize_sample_response(content)
    assert [each.stop_reason for each in found.sequences] == ["stop", "length"]
    assert list(found.sequences[0].tokens) == [3, 4] and list(found.sequences[1].tokens) == []
    assert list(found.sequences[0].logprobs) == [-1, -2] and found.prompt_cache_hit_tokens == 1
    assert found.prompt_logprobs == [None, -3]
    assert np.array_equal(found.topk_prompt_logprobs_np.token_ids, top.ids)
    if NEWEST:
        assert np.array_equal(found.sequences[0].topk_logprobs_np.logprobs, top.logprobs)


@thorough
@pytest.mark.skipif(not NEWEST, reason="it is the old one")
def test_the_oldest_sdk_passes_these_tests():
    if not any(OLD.glob("tinker-0.27.*")):
        pytest.skip(f"pip install --no-deps --target {OLD} tinker==0.27.2")
    command = [sys.executable, "-m", "pytest", __file__, "-n0", "-m", "serving"]
    root = Path(__file__).parents[3]
    env = {name: value for name, value in os.environ.items() if "LORA_JAX_TESTS" not in name}
    env["PYTHONPATH"] = f"{OLD}{os.pathsep}{root}"
    run = subprocess.run(command, cwd=root, env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "9 passed, 4 skipped" in run.stdout, run.stdout
