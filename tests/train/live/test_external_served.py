"""`train.grpo --sampler` beside `train.serve` in a process of its own, and behind one that lies."""

import json
import urllib.error
import urllib.request

import pytest

import lora_jax as lj
from lora_jax import models, peft
from tests.adapted_trees import with_random_factors
from tests.train.live.stub_server import StubServer
from tests.train.live.test_external import BEGUN, STEPS, folder, line_of, run
from tests.train.scripts import fails
from tests.train.serve.process import serve
from train import grpo
from train.run.log import read_metrics

pytest.importorskip("uvicorn", reason="the extra 'serve' has the server")
pytestmark = [
    pytest.mark.serving,
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]
__all__ = ["folder"]


@pytest.fixture(scope="module")
def server(folder, tmp_path_factory):
    options = "--max-length 64 --max-rank 8 --slots 3 --sequences 8"
    made = serve(tmp_path_factory.mktemp("served"), folder / "model", options)
    made.ready()
    yield made
    made.end()


class Lying(StubServer):
    """Passes all on to a server, which gets another adapter's folder in the place of each."""

    def __init__(self, port, folder):
        super().__init__(None, None)
        self.address, self.folder = f"http://127.0.0.1:{port}", folder

    def answer(self, path, body):
        if "lora_path" in body and self.folder is not None:
            body["lora_path"] = str(self.folder)
        sent = None if path == "/v1/models" else json.dumps(body).encode()
        request = urllib.request.Request(self.address + path, sent)
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()


def test_our_server_draws_for_a_run(folder, server, tmp_path):
    """At temperature 1.5 and with a stop text; a resumed run draws what the whole one drew."""
    sampler = ["--sampler", f"http://127.0.0.1:{server.port}"]
    args = [*BEGUN, *STEPS, "--steps", 3, "--lr", 0.05, "--stop", "e", "--save-every", 1, *sampler]
    lines = run(folder, tmp_path / "whole", *args)
    assert len(lines) == 3 and max(line["mismatch_max"] for line in lines) < 1e-4
    run(folder, tmp_path / "parts", *args, "--steps", 1)
    run(folder, tmp_path / "parts", *args, "--resume")
    answers = [
        [json.loads(x)["answer"] for x in (tmp_path / way / "samples.jsonl").open()]
        for way in ("whole", "parts")
    ]
    assert answers[0] == answers[1] and len({*answers[0]}) > 6
    names = [model["id"] for model in server.once("v1/models")["data"]]
    assert len(names) == 1, "what was loaded is unloaded"


def test_our_server_with_another_adapter_is_refused(folder, server, tmp_path, capsys):
    model, params = models.from_pretrained(folder / "model")
    rules = [lj.LoraRule(targets=["q_proj", "up_proj"], rank=2, alpha=6)]
    peft.save(tmp_path / "other", model, with_random_factors(lj.lorafy(params, rules), 7))
    for what, wrong in (("other", tmp_path / "other"), ("right", None)):
        with Lying(server.port, wrong).serving() as url:
            line = line_of(folder, tmp_path / what, *BEGUN, *STEPS, "--sampler", url)
            if wrong is None:
                grpo.main(line)
                assert len(read_metrics(tmp_path / what)) == 2
            else:
                message = fails(capsys, grpo.main, *line)
                assert "does not draw from the adapter that trains" in message
                assert not read_metrics(tmp_path / what)
