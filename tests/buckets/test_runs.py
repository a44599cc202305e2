"""Runs whose folder is in a bucket: as on a disk, killed or not, however the bucket fails."""

import json
import os
import re
import signal
import socket
import time
from pathlib import Path
from urllib.parse import unquote

import jax
import pytest

import lora_jax as lj
from lora_jax import models
from lora_jax.buckets import copies
from lora_jax.buckets.store import bucket_path
from lora_jax.training.errors import TrainingError
from lora_jax.training.run import bucket_lock, lock
from lora_jax.training.run.bucket_lock import BucketLock
from lora_jax.training.run.lock import RunLock
from tests.buckets.store_proxy import bucket_store, use
from tests.support import assert_identical, over, with_random_factors
from tests.train.forks import Forked
from tests.train.scripts import fails
from tests.train.tiny import write_jsonl, write_model, write_rows
from train.adapters.source import find_adapter
from train.export import __main__ as export
from train.generate import __main__ as generate
from train.launch.__main__ import resume_option
from train.run.log import read_metrics

pytestmark = [
    pytest.mark.buckets,
    # Of Google's client.
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]

STEPS, SAVE = 7, 3
OPTIONS = [
    *("--batch-size", 4, "--seq-len", 64, "--dropout", 0.1, "--lr", 1e-2, "--eval-questions", 4),
    *("--eval-every", 3, "--keep-best", "loss", "--targets", "q_proj", "v_proj"),
    *("--steps", STEPS, "--save-every", SAVE, "--report-to", "none"),
]
MESH_RUNS = Path(__file__).parents[1] / "train" / "mesh_runs.py"
REWARD = """
def early(completion_ids, **others):
    return [sum(id < 90 for id in ids) / len(ids) for ids in completion_ids]
"""
TIMED = {"time", "tokens_per_s"}


@pytest.fixture(scope="module")
def running():
    with bucket_store() as both:
        yield both


class Runs:
    """Starts runs of one model and one file of rows, which lie in the bucket and on the disk."""

    def __init__(self, folder, proxy, variables):
        self.folder, self.proxy = folder, proxy
        model, rows = write_model(folder / "model"), write_rows(folder / "rows.jsonl")
        copies.upload_folder(model, bucket_path("gs://bucket/model"))
        proxy.put("rows.jsonl", rows.read_bytes())
        _, params = models.from_pretrained(model)
        tree = lj.lorafy(params, [lj.LoraRule(targets=["q_proj"], rank=2)])
        self.tree = with_random_factors(tree)
        self.environment = variables | {
            "JAX_ENABLE_COMPILATION_CACHE": "true",
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "XDG_CACHE_HOME": str(folder / "cache"),
        }
        self.line = [*OPTIONS, "--compilation-cache", folder / "programs"]

    def start(self, output, *more, inputs="gs://bucket"):
        given = ["--model", f"{inputs}/model", "--dataset", f"{inputs}/rows.jsonl"]
        words = ["-m", "train.sft", *given, *self.line, "--output", output, *more]
        return Forked(words, self.folder, self.environment)

    def run(self, output, *more, code=0, **options):
        process = self.start(output, *more, **options)
        said = "".join(process.communicate())
        assert process.returncode == code, said
        return said

    def adapter(self, output):
        base, params = models.from_pretrained(self.folder / "model")
        source = find_adapter(str(output))
        return lj.split(source.load(base, params, "the base"))[0]

    def assert_same(self, output):
        """Checks a run in the bucket against the one on the disk, bit for bit."""
        assert_identical(self.adapter(self.folder / "whole"), self.adapter(output))
        lines = []
        for place in (self.folder / "whole", copies.path_to_read(output, lambda n: "/" not in n)):
            lines.append(
                [{k: v for k, v in m.items() if k not in TIMED} for m in read_metrics(place)]
            )
        assert lines[0] == lines[1] and lines[0]
        names = {
            str(path.relative_to(self.folder / "whole")).split("/")[0]
            for path in (self.folder / "whole").rglob("*")
        }
        there = {*copies.list_objects(bucket_path(output))}
        assert {name.split("/")[0] for name in there} == names
        assert not any(name.endswith((copies.UNFINISHED_MARK, "run.lock")) for name in there)
        record = json.loads(self.proxy.objects(f"{output[12:]}/checkpoints.json").popitem()[1])
        assert sorted(map(int, record)) == [6, 7]


@pytest.fixture(scope="module")
def runs(running, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("runs")
        use(running[1], patch)
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        made = Runs(folder, *running)
        made.run(folder / "whole", inputs=folder)
        yield made


@pytest.fixture
def proxy(running, runs):
    proxy, _ = running
    yield proxy
    proxy.latency, proxy.failing = 0.0, lambda number, method, path: None
    proxy.seen = lambda method, path: None


def test_a_run_in_a_bucket_is_that_on_a_disk(runs, proxy, capsys):
    said = runs.run("gs://bucket/run")
    assert "adapter saved in gs://bucket/run/adapter" in said and "lora_jax_bucket" not in said
    runs.assert_same("gs://bucket/run")
    refused = runs.run("gs://bucket/run", code=2)
    assert "The output folder gs://bucket/run already contains a run" in refused
    assert "To continue after step 7, increase" in runs.run("gs://bucket/run", "--resume")
    runs.assert_same("gs://bucket/run")
    words = ["--prompt", "1 plus 7?", "--max-new-tokens", "2"]
    generate.main(["--adapter", "gs://bucket/run", *words])
    assert "lora_jax_bucket" not in capsys.readouterr().out
    options = [resume_option([f"gs://bucket/{name}"]) for name in ("run", "none")]
    assert options == ["--resume", ""]


def test_an_export_is_written_to_a_bucket_and_replaces_its_own_kind_alone(runs, proxy, capsys):
    lj.save_adapter("gs://bucket/trained", runs.tree, about={"model": "gs://bucket/model"})
    line = ["--adapter", "gs://bucket/trained", "--output"]
    export.main([*line, "gs://bucket/served"])
    assert "gs://bucket/served" in capsys.readouterr().out
    assert {*proxy.objects("served/")} == {
        f"served/{name}"
        for name in ("README.md", "adapter_config.json", "adapter_model.safetensors")
    }
    proxy.put("served/README.md", b"written by hand")
    said = fails(capsys, export.main, *line, "gs://bucket/served")
    assert "gs://bucket/served already exists" in said and "lora_jax_bucket" not in said
    export.main([*line, "gs://bucket/served", "--overwrite"])
    assert proxy.objects("served/README.md").popitem()[1] == b"written by hand"
    said = fails(capsys, export.main, *line, "gs://bucket/model", "--overwrite")
    assert "holds something other than a PEFT adapter" in said
    said = fails(capsys, export.main, *line, "gs://bucket/trained", "--overwrite")
    assert "--output gs://bucket/trained is or holds the input gs://bucket/trained" in said
    export.main([*line, "gs://bucket/merged", "--merged"])
    said = " ".join(capsys.readouterr().out.split())
    assert 'Load it with: lora_jax.models.from_pretrained("gs://bucket/merged").' in said
    _, merged = models.from_pretrained("gs://bucket/merged")
    _, base = models.from_pretrained("gs://bucket/model")
    assert not jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), merged, base))


# Each is a request, by its method, a part of its address, its number, and a part of an address that
# came before: the process is killed when the store gets it.
MOMENTS = {
    "a checkpoint begins": ("POST", "/checkpoints/3/", 1),
    "a checkpoint is half written": ("POST", "/checkpoints/3/", 5),
    "a checkpoint has no mark": ("POST", "/checkpoints/3/commit_success.txt", 1),
    "the best adapter is half written": ("POST", "/best/3/lora/metadata", 1),
    "a checkpoint has no record": ("POST", "/checkpoints.json", 2),
    "an older checkpoint goes": ("DELETE", "/checkpoints/3/", 2, "/checkpoints/7/"),
    "the last checkpoint is half written": ("POST", "/checkpoints/7/", 4),
    "the adapter is half written": ("POST", "/adapter/lora/metadata", 1),
    "the adapter has its mark": ("DELETE", "/adapter/.being_written", 1),
    "the lock goes": ("DELETE", "/run.lock", 1),
}


def fails_often(number, method, path):
    """Fails every fourteenth request, in each way."""
    return {0: "503", 14: "cut", 28: "lost"}.get(number % 41)


def kills(process, output, moment):
    method, part, nth, before = (*moment, "")[:4]
    times, begun = 0, False

    def seen(asked, path):
        nonlocal times, begun
        begun = begun or f"{output[12:]}{before}" in unquote(path)
        times += begun and asked == method and f"{output[12:]}{part}" in unquote(path)
        if times >= nth and process:
            process[0].kill()
            return "cut"

    return seen


@over("name", MOMENTS, often=["a checkpoint is half written"])
def test_killed_at_any_moment_it_goes_on_bit_by_bit(name, runs, proxy):
    output, process = f"gs://bucket/killed-{[*MOMENTS].index(name)}", []
    proxy.latency, proxy.failing = 0.01, fails_often
    proxy.seen = kills(process, output, MOMENTS[name])
    process.append(runs.start(output))
    said = "".join(process[0].communicate())
    assert process[0].returncode == -signal.SIGKILL, said
    proxy.seen = lambda method, path: None
    said = runs.run(output, "--resume")
    begun = re.search(r"training continues after step (\d+)", said)
    place = [*MOMENTS].index(name)
    assert int(begun[1] if begun else 0) == ([0] * 5 + [7, 6] + [7] * 3)[place], said
    runs.assert_same(output)


def test_sigterm_waits_for_the_bucket_and_says_so(runs, proxy):
    output = "gs://bucket/stopped"
    process = runs.start(output, "--steps", 400, "--save-every", 400, "--schedule", "constant")
    while "step 3" not in process.out.read_text():
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    assert "stopped/run.lock" in proxy.objects("stopped/"), "its own clearing leaves the lock"
    proxy.latency = 0.2
    process.terminate()
    said = "".join(process.communicate())
    assert process.returncode == 128 + signal.SIGTERM, said
    assert f"waiting until the checkpoint is in {output}/checkpoints" in said
    step = int(re.search(r"stopped after step (\d+)", said)[1])
    record = json.loads(proxy.objects("stopped/checkpoints.json").popitem()[1])
    assert [*record] == [str(step)] and "lora_jax_bucket" not in said


def test_a_step_does_not_wait_for_the_bucket(runs, proxy):
    output, goes_on = "gs://bucket/slow", {}

    def stalls(method, path):
        parts = [part for part in ("/checkpoints.json", "/checkpoints/3/") if part in unquote(path)]
        if method == "POST" and parts and parts[0] not in goes_on:
            goes_on[parts[0]] = False
            deadline = time.monotonic() + 60
            while not goes_on[parts[0]] and time.monotonic() < deadline:
                goes_on[parts[0]] = "step 5/7 " in process.out.read_text()
                time.sleep(0.02)

    proxy.seen = stalls
    process = runs.start(output, "--log-every", 1)
    assert process.wait() == 0, process.communicate()
    steps = (
        "steps 4 and 5 were taken while the record, and the checkpoint of step 3, were on their way"
    )
    assert goes_on == {"/checkpoints.json": True, "/checkpoints/3/": True}, steps


def test_one_run_at_a_time_writes_to_a_folder(runs, proxy, monkeypatch):
    lost = []

    def loses_the_first(number, method, path):
        if method == "POST" and not lost:
            return lost.append(path) or "lost"

    proxy.failing = loses_the_first
    with RunLock(BucketLock(bucket_path("gs://bucket/locked"))):
        proxy.failing = lambda number, method, path: None
        assert lost and "locked/run.lock" in proxy.objects("locked/")
        said = runs.run("gs://bucket/locked", code=2)
        assert f"another run, process {os.getpid()} on" in said and "gs://bucket/locked" in said
        assert {*proxy.objects("locked/")} == {"locked/run.lock"}
    assert not proxy.objects("locked/")
    # That of a host that is gone is taken over, once it was not touched for a while.
    monkeypatch.setattr(lock, "_STALE_SECONDS", 1.0)
    monkeypatch.setattr(lock, "_POLL_SECONDS", 0.1)
    monkeypatch.setattr(lock, "_TOUCH_SECONDS", 0.2)
    elsewhere, told = {"pid": 1, "host": "elsewhere"}, []
    proxy.put("locked/run.lock", json.dumps(elsewhere).encode())
    with RunLock(BucketLock(bucket_path("gs://bucket/locked")), told.append):
        assert "process 1 on elsewhere holds gs://bucket/locked/run.lock" in told[0]
        monkeypatch.setattr(bucket_lock, "describe_this_process", lambda: elsewhere)
        with pytest.raises(TrainingError, match="another run, process"):
            with RunLock(BucketLock(bucket_path("gs://bucket/locked"))):
                pass
    assert not proxy.objects("locked/")


@pytest.mark.slow
@pytest.mark.parametrize("script", ["sft", "grpo"])
def test_two_processes_write_one_folder_which_one_of_eight_devices_goes_on_with(
    script, runs, proxy, monkeypatch
):
    """As on a disk: there, both are stopped after the step whose checkpoint the bucket has."""
    if script == "grpo":
        (runs.folder / "reward.py").write_text(REWARD)
        rows = write_jsonl(
            runs.folder / "prompts.jsonl", [{"prompt": "a" * (1 + i)} for i in range(8)]
        )
        line = ["--dataset", rows, "--reward", f"{runs.folder / 'reward.py'}:early"]
        line += ["--group", 4, "--max-new-tokens", 4, "--batch-size", 16]
        line += ["--eval-questions", 0]
    else:
        line = ["--dataset", runs.folder / "rows.jsonl", "--dropout", 0.1, "--batch-size", 8]
    line += ["--model", runs.folder / "model", "--mesh", "fsdp=8", "--seq-len", 64, "--lr", 1e-2]
    line += ["--schedule", "constant", "--warmup", 1, "--save-every", 3, "--report-to", "none"]
    line += ["--compilation-cache", "off", "--targets", "q_proj", "v_proj"]

    def start(output, *more, processes=2):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        words = [*line, "--", "--output", output, *more]
        return [
            Forked(
                [MESH_RUNS, 8 // processes, f"{process}/{processes}", port, script, *words],
                runs.folder,
                runs.environment,
            )
            for process in range(processes)
        ]

    def ended(processes):
        said = ["".join(process.communicate()) for process in processes]
        assert not any(process.returncode for process in processes), said
        return said[0]

    disk, output = runs.folder / f"{script}-two", f"gs://bucket/{script}-two"
    ended(start(disk, "--steps", 3))
    assert "training continues after step 3" in ended(
        start(disk, "--steps", 7, "--resume", processes=1)
    )

    proxy.latency, proxy.failing, process = 0.01, fails_often, []
    proxy.seen = kills(process, output, ("POST", "/checkpoints/6/", 3))
    process += start(output, "--steps", 7)
    said = ["".join(one.communicate()) for one in process]
    assert all(one.returncode for one in process), said
    proxy.seen = lambda method, path: None
    assert "training continues after step 3" in ended(
        start(output, "--steps", 7, "--resume", processes=1)
    )
    assert_identical(runs.adapter(disk), runs.adapter(output))
