"""Servers that fail, are busy, or return something else than was asked for; and refused options."""

import functools
import http.client
from types import SimpleNamespace

import numpy as np
import pytest

import lora_jax as lj
from lora_jax.training.layout import layout_of_one_device
from tests.adapted_trees import adapted
from tests.train.live.stub_server import EOS, StubServer
from train import grpo
from train.console.errors import UserError
from train.live import sampler_server as client
from train.live.external import versions
from train.live.external.versions import AdapterVersion
from train.live.sampler_server import DrawnCompletion, SamplerServer, SamplingOptions

OPTIONS = SamplingOptions(2, 4, 1.5, 0.9, None, ("stop",), (EOS,))
PROMPT = [3, 1, 4]


def script(name, prompt, n):
    return [[5, 6, EOS], [7, 8, 9, 10]][:n]


@pytest.fixture
def stub():
    return StubServer(None, script)


def drawn_from(stub, seconds=20.0):
    with stub.serving() as url:
        return SamplerServer(f"{url}/v1/", seconds).complete("mine", PROMPT, OPTIONS, 11)


def test_completions_are_read_as_they_were_drawn(stub):
    drawn = drawn_from(stub)
    assert drawn == [
        DrawnCompletion([5, 6, EOS], [-1.0] * 3, True),
        DrawnCompletion([7, 8, 9, 10], [-1.0] * 4, False),
    ]
    (body,) = stub.asked
    expected = {"model": "mine", "prompt": PROMPT, "n": 2, "max_tokens": 4, "seed": 11}
    expected |= {"temperature": 1.5, "top_p": 0.9, "top_k": -1, "stop": ["stop"]}
    expected |= {"stop_token_ids": [EOS], "return_token_ids": True, "logprobs": 1}
    expected |= {"repetition_penalty": 1.0, "min_p": 0.0}  # whatever a server's defaults are
    assert expected.items() <= body.items()


def changed(answer, **fields):
    return {"choices": [{**choice, **fields} for choice in answer["choices"]]}


def without_ids(answer):
    return {"choices": [{**choice, "token_ids": None} for choice in answer["choices"]]}


WRONG = {  # what it does to an answer, and what is said of it
    "no ids": (without_ids, "does not return the ids of drawn tokens"),
    "no log-probabilities": (functools.partial(changed, logprobs=None), "of 0 tokens, but"),
    "one too few": (
        functools.partial(changed, logprobs={"token_logprobs": [-1.0, -1.0]}),
        "log-probabilities of 2 tokens, but it drew 3",
    ),
    "unknown ones": (
        functools.partial(changed, logprobs={"token_logprobs": [-1.0, None, -1.0]}),
        "log-probabilities of 3 tokens, but it drew 3",
    ),
    "nan": (
        functools.partial(changed, logprobs={"token_logprobs": [-1.0, float("nan"), -1.0]}),
        "the log-probability of token 6 is nan. The server's model computes numbers that",
    ),
    "fewer completions": (lambda answer: {"choices": answer["choices"][1:]}, "returns 1 compl"),
    "another prompt": (functools.partial(changed, prompt_token_ids=[1, *PROMPT]), "of 4 tokens"),
    "too many tokens": (
        functools.partial(changed, token_ids=[5] * 5, logprobs={"token_logprobs": [-1.0] * 5}),
        "drew 5 tokens, more than --max-new-tokens 4",
    ),
    "a number": (functools.partial(changed, logprobs={"token_logprobs": 3}), "of 0 tokens, but"),
    "one id": (functools.partial(changed, token_ids=5), "does not return the ids of drawn tokens"),
    "a text": (lambda answer: "Hello", "returns 0 completions"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_answers_that_lack_something_are_refused(stub, wrong):
    stub.change, message = WRONG[wrong]
    with pytest.raises(UserError, match="--sampler http://127.*") as caught:
        drawn_from(stub)
    assert message in str(caught.value)


def test_a_busy_server_is_asked_again(stub, monkeypatch):
    for name in ("_FIRST_PAUSE_SECONDS", "_MAX_PAUSE_SECONDS"):
        monkeypatch.setattr(client, name, 0.0)
    stub.failures = [(503, "starting"), (429, ""), (500, "once"), (502, "a proxy's")]
    stub.failures.append((503, '{"error": "still"}'))
    assert len(drawn_from(stub)) == 2 and len(stub.paths) == 6
    stub.failures = [(500, '{"error": {"message": "out of memory"}}')] * 2
    with pytest.raises(UserError, match="refuses to draw .500: out of memory"):
        drawn_from(stub)
    stub.failures = [(400, '{"error": {"message": "too long"}}'), (503, "")]
    with pytest.raises(UserError, match="refuses to draw .400: too long"):
        drawn_from(stub)
    assert len(stub.failures) == 1, "what is wrong is not asked again"
    stub.failures = [(308, "moved")]
    with pytest.raises(UserError, match="refuses to draw .308: moved"):
        drawn_from(stub)
    stub.failures = [(401, '{"error": "no key"}')]
    with pytest.raises(UserError, match="401: no key.. Set its key in .* LORA_JAX_SAMPLER_KEY"):
        drawn_from(stub)
    stub.failures = [(503, "starting")] * 100_000
    with pytest.raises(UserError, match="answers 503 .starting. for 0.5 s .--sampler-timeout"):
        drawn_from(stub, 0.5)


def test_a_server_may_take_a_second_until_it_can_be_reached(stub, monkeypatch):
    connect, refused = http.client.HTTPConnection.connect, []

    def refusing_once(connection):
        if not refused:
            refused.append(connection)
            raise ConnectionRefusedError
        connect(connection)

    for name in ("_FIRST_PAUSE_SECONDS", "_MAX_PAUSE_SECONDS"):
        monkeypatch.setattr(client, name, 0.0)
    monkeypatch.setattr(client, "_PROBE_SECONDS", 60.0)
    monkeypatch.setattr(http.client.HTTPConnection, "connect", refusing_once)
    with stub.serving() as url:
        assert SamplerServer(url, 60.0).probe() == ["base"] and len(refused) == 1


def test_a_server_that_is_not_there_is_named(stub, monkeypatch):
    monkeypatch.setattr(client, "_PROBE_SECONDS", 0.0)
    with stub.serving() as url:
        server = SamplerServer(url, 20.0)
        assert server.probe() == ["base"]
        server.check_loads()
        stub.routes = ()
        with pytest.raises(UserError, match="loads no adapters.*VLLM_ALLOW_RUNTIME_LORA_UPDATING"):
            SamplerServer(url, 20.0).check_loads()
    with pytest.raises(UserError, match="cannot be reached .*Start the server, or check"):
        server.probe()
    for url in ("127.0.0.1:8000", "http://127.0.0.1:port"):
        with pytest.raises(UserError, match="an address such as"):
            SamplerServer(url, 20.0)


def test_a_run_that_ends_while_a_request_connects_does_not_wait_for_it(stub, monkeypatch):
    with stub.serving() as url:
        server, connect = SamplerServer(url, 20.0), http.client.HTTPConnection.connect

        def closing(connection):
            server.close()
            connect(connection)

        monkeypatch.setattr(http.client.HTTPConnection, "connect", closing)
        with pytest.raises(UserError, match="the run has ended"):
            server.complete("mine", PROMPT, OPTIONS, 11)
    assert not stub.paths


def test_a_server_that_started_anew_is_given_an_adapter_once(tmp_path):
    """By whichever of the requests that it had lost; one that is dropped is not loaded again."""
    loads = []
    server = SimpleNamespace(load=lambda *args: loads.append(args), unload=loads.append)
    version = AdapterVersion("mine", tmp_path / "mine", "/there", None)
    assert [version.load(server) for _ in range(3)] == [1, 1, 1]
    assert [version.load(server, 1) for _ in range(3)] == [2, 2, 2]
    assert loads == [("mine", "/there")] * 2
    version.drop(server)
    version.drop(server)
    assert version.load(server) == version.load(server, -1) == -1
    assert loads == [*[("mine", "/there")] * 2, "mine"]


def test_versions_are_written_where_the_server_reads_them(tmp_path, monkeypatch):
    """A server of another machine sees the shared folder alone, under a path of its own."""
    shared, written = tmp_path / "shared", []
    monkeypatch.setattr(versions.peft, "save", lambda folder, *_, **__: written.append(folder))
    data = SimpleNamespace(sampler_folder=str(shared), sampler_mount="/mnt/there/")
    of = SimpleNamespace(config=SimpleNamespace(data=data), folder=tmp_path / "run")
    of.layout, of.model, of.outline = layout_of_one_device(), None, SimpleNamespace(name="base")
    rule = lj.LoraRule(targets=["kernel"], rank=1, alpha=1.0)
    tree = adapted({"kernel": np.ones((3, 2), np.float32)}, rule)
    version = versions.Publisher(of).publish(tree, "step1")
    loads = []
    version.load(SimpleNamespace(load=lambda *args: loads.append(args)))
    assert written == [shared / version.name] and version.name.endswith("step1")
    assert loads == [(version.name, f"/mnt/there/{version.name}")]


def test_adapters_are_loaded_where_the_server_loads_them(stub):
    """vLLM and SGLang have different routes, and different names of an adapter."""
    with stub.serving() as url:
        server = SamplerServer(url, 20.0)
        server.load("mine", "/there")
        assert server.model_of("mine") == "mine"
        stub.routes = ("/load_lora_adapter", "/unload_lora_adapter")
        server = SamplerServer(url, 20.0)
        server.probe()
        server.load("mine", "/there")
        assert server.model_of("mine") == "base:mine"
        server.unload("mine")
        assert stub.paths[-1] == "/unload_lora_adapter"
        stub.failures = [(400, '{"message": "it is already loaded"}')]
        del stub.paths[:]
        server.load("mine", "/there")
        assert [path.partition("_")[0] for path in stub.paths] == ["/load", "/unload", "/load"]
        stub.failures = [(404, '{"message": "No adapter found for /there"}')]
        with pytest.raises(UserError, match="does not load .*No adapter found.*--sampler-mount"):
            server.load("other", "/there")


URL = "--sampler http://localhost:1"
REFUSED = {
    "--staleness 1": "Without --sampler, this run draws completions itself",
    "--resume --staleness 1": "needs it again with --resume",
    "--max-mismatch 1 --sampler-folder a": "Remove --sampler-folder and --max-mismatch",
    f"{URL} --full": "--full trains without an adapter",
    f"{URL} --tools a.py:f": "Remove --tools or --sampler",
    f"{URL} --environment guess": "Remove --environment or --sampler",
    f"{URL} --staleness 1 --redraw 2": "cannot be combined",
    f"{URL} --loss rloo --importance-sampling token_mask": "has no effect on --loss rloo",
    f"{URL} --importance-sampling none --importance-cap 2": "without importance sampling",
    f"{URL} --importance-sampling none --importance-floor 0.5": "without importance sampling",
    f"{URL} --importance-floor 3.5": "must be below --importance-cap 3",
    f"{URL} --staleness -1": "--staleness -1",
    f"{URL} --max-mismatch 0": "--max-mismatch 0",
}


@pytest.mark.parametrize("line", REFUSED)
def test_options_that_cannot_be_are_refused(line):
    args = ["--model", "nowhere", "--dataset", "rows.jsonl", "--reward", "length", *line.split()]
    with pytest.raises(UserError) as caught:
        grpo.check(grpo.parse(args))
    assert REFUSED[line] in str(caught.value)
