"""`train.grpo --sampler`: an external sampler, and the check that it holds the adapter."""

import re
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lj
from lora_jax import models
from tests.adapted_trees import with_random_factors
from tests.support import assert_close, over
from tests.train.live.stub_server import EOS, Holder, StubServer
from tests.train.scripts import fails
from tests.train.test_mesh import run as run_processes
from tests.train.tiny import write_jsonl, write_model
from train import grpo
from train.live.external.check import SamplerCheck
from train.live.prompts import PromptFeed
from train.live.rollouts import Rollouts
from train.run.log import read_metrics

# Orbax leaves coroutines behind where a file cannot be read.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
GROUP, NEW = 2, 6
PROMPTS = [{"prompt": f"{n}?" * (1 + n % 3)} for n in range(6)]
REWARD = "def first(completion_ids, **_):\n    return [float(ids[0] % 5) for ids in completion_ids]"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    write_model(folder / "model", None, scale=0.7)
    _, params = models.from_pretrained(folder / "model")
    tree = lj.lorafy(params, [lj.LoraRule(targets=["q_proj", "up_proj"], rank=2, alpha=6)])
    lj.save_adapter(folder / "used", with_random_factors(tree))
    write_jsonl(folder / "prompts.jsonl", PROMPTS)
    (folder / "reward.py").write_text(REWARD)
    return folder


def line_of(folder, output, *args):
    line = ["--model", folder / "model", "--dataset", folder / "prompts.jsonl", "--output", output]
    line += ["--reward", f"{folder / 'reward.py'}:first", "--max-new-tokens", NEW, "--seq-len", 32]
    line += ["--group", GROUP, "--batch-size", 4, "--eval-questions", 0, "--warmup", 1]
    line += ["--report-to", "none", "--lr", 1e-2, "--schedule", "constant", "--scale", "none"]
    return [str(arg) for arg in [*line, *args]]


def run(folder, output, *args):
    grpo.main(line_of(folder, output, *args))
    return read_metrics(output)


def anything(name, prompt, n):
    """Completions that depend on the prompt alone."""
    rng = np.random.default_rng(len(prompt))
    return [[*rng.integers(33, 90, NEW - 1 - k), EOS] for k in range(n)]


@pytest.fixture(scope="module")
def holder(folder):
    return Holder(folder / "model", temperature=1.5)


BEGUN = ["--targets", "q_proj", "up_proj", "--rank", 2]
STEPS = ["--steps", 2, "--sampling-temperature", 1.5]


@pytest.fixture
def serving(folder, holder):
    """A stub server over the tiny model, its address, and the options of a run that asks it."""
    holder.lies = lambda loaded, name: name
    stub = StubServer(holder, anything)
    with stub.serving() as url:
        yield stub, ["--sampler", f"{url}/v1"]


@pytest.mark.slow
def test_a_run_on_the_same_ids_is_the_internal_one(folder, serving, tmp_path, monkeypatch):
    """Loss and adapter; with a mean over parts, a mask of what is cut off, and stops."""
    stub, sampler = serving
    drawn, real = {}, Rollouts.draw

    def noted(self, params, rows, number, attempt=0):
        made = real(self, params, rows, number, attempt)
        for row, ids, lengths in zip(rows, made.tokens, made.lengths, strict=True):
            prompt = tuple(self.feed.prompts.tokens[row])
            cut = [x[:n].tolist() for x, n in zip(ids, lengths, strict=True)]
            drawn[f"step{number}", prompt] = cut
        return made

    monkeypatch.setattr(Rollouts, "draw", noted)
    args = [*BEGUN, *STEPS, "--grad-accum", 2, "--batch-size", 2, "--stop", "7"]
    inside = run(folder, tmp_path / "inside", *args)
    monkeypatch.undo()
    stub.script = lambda name, prompt, n: drawn.get(
        (name.rpartition("-")[2], tuple(prompt)), [[40, 41]] * n
    )
    outside = run(folder, tmp_path / "outside", *args, *sampler)
    for ours, theirs in zip(inside, outside, strict=True):
        for name in ("loss", "grad_norm", "reward", "entropy", "length", "truncated"):
            assert theirs[name] == pytest.approx(ours[name], rel=1e-5, abs=1e-6), name
        assert theirs["mismatch_max"] < 1e-5
        assert theirs["importance_mean"] == pytest.approx(1, abs=1e-5)
    ways, plain = ("inside", "outside"), stub.holder.params
    trees = [lj.load_adapter(tmp_path / way / "adapter", plain) for way in ways]
    kept = [lj.split(tree)[0] for tree in trees]
    assert_close(kept[1], kept[0], 1e-5)
    seeds = [body["seed"] for body in stub.asked if "-step" in body["model"]]
    assert len({*seeds}) == len(seeds) == 4, "each prompt of each draw has its own seed"
    holder = stub.holder
    assert [name.rpartition("-")[2] for name in holder.loaded] == [
        "begin",
        "probe",
        "step0",
        "step1",
    ]
    assert sorted(holder.unloaded) == sorted(holder.loaded) and not holder.adapters
    assert not (tmp_path / "outside" / "sampler").exists()


LIES = {  # what is held in the place of the adapter asked for, and how the run begins
    "another": (lambda loaded, name: None, ["--init-adapter", "used"]),
    "the base": (lambda loaded, name: None, BEGUN),
    "the one before": (lambda loaded, name: loaded[-2] if len(loaded) > 1 else name, BEGUN),
}


@over("lie", LIES, often=[])
def test_a_sampler_that_holds_another_adapter_is_refused(folder, serving, tmp_path, capsys, lie):
    """Before the first step, and where the adapter begins as the base, too."""
    stub, sampler = serving
    del stub.holder.loaded[:]
    stub.holder.lies, args = LIES[lie]
    args = [folder / "used" if arg == "used" else arg for arg in args]
    line = line_of(folder, tmp_path / "run", *args, *STEPS, *sampler)
    message = fails(capsys, grpo.main, *line)
    far = float(re.search(r"differ from the adapter's by ([\d.e+-]+) on average", message)[1])
    assert far > 0.05 and "--max-mismatch allows 0.05" in message
    assert "does not draw from the adapter that trains" in message
    assert ("has not loaded the new one" in message) == (lie != "another")
    assert not read_metrics(tmp_path / "run")
    assert not stub.holder.adapters, "what was loaded is unloaded"


def test_a_batch_that_was_drawn_ahead_is_held_to_the_adapter_of_its_time():
    """A server that drew it by other weights is found out, while that adapter trains on."""
    adapter, base = lj.split(
        lj.lorafy({"kernel": jnp.ones((3, 2))}, [lj.LoraRule(targets=["kernel"], rank=1)])
    )
    data = SimpleNamespace(max_mismatch=0.05, staleness=1, sampler=None, importance_sampling=None)
    config = SimpleNamespace(data=data, optim=SimpleNamespace(loss="grpo"))
    server = SimpleNamespace(url="http://there")
    sampler = SimpleNamespace(version=SimpleNamespace(step=3, adapter=adapter), server=server)
    before = lambda params, batch: np.full_like(batch["old"], -2.0)  # noqa: E731
    check = SamplerCheck(SimpleNamespace(config=config), None, sampler, before)
    batch = {"old": np.full((2, 3, 5), -9.0), "weights": np.ones((2, 3, 5))}

    def weighed(logp):
        drawn = SimpleNamespace(logps=np.full((6, 5), logp))
        return check.weigh(batch, drawn, base, number=4)

    assert weighed(-2.0) == ({"staleness": 1.0, "sampler_mismatch": 0.0}, None)
    metrics, problem = weighed(-2.5)
    assert metrics["sampler_mismatch"] == 0.5
    assert (
        "http://there does not draw from the adapter" in problem and "by 0.5 on average" in problem
    )


@pytest.mark.slow
def test_batches_are_drawn_ahead(folder, serving, tmp_path, monkeypatch):
    """Each by the adapter of so many batches before, with the weights of its age."""
    stub, sampler = serving
    batches, real = [], PromptFeed.batch_from_completions

    def noted(self, rows, drawn, *args):
        batches.append((drawn, real(self, rows, drawn, *args)))
        return batches[-1][1]

    monkeypatch.setattr(PromptFeed, "batch_from_completions", noted)
    args = [*BEGUN, "--steps", 5, "--staleness", 2, "--lr", 0.1, "--importance-cap", 1.1]
    args += ["--sampling-temperature", 1.5, "--importance-sampling", "sequence_truncate"]
    lines = run(folder, tmp_path / "run", *args, *sampler)
    assert [line["staleness"] for line in lines] == [0, 1, 2, 2, 2]
    names = [body["model"].rpartition("-")[2] for body in stub.asked]
    assert names[4:] == ["step0"] * 6 + ["step1"] * 2 + ["step2"] * 2
    for line, (drawn, batch) in zip(lines, batches[2:], strict=True):
        counted = batch["weights"] > 0
        theirs = drawn.logps.reshape(counted.shape)
        apart = np.where(counted, batch["old"] - theirs, 0)
        weights = np.minimum(np.exp(apart.sum(-1, keepdims=True)), 1.1) + 0 * apart
        assert_close(batch["importance"], weights, 1e-5)
        assert line["importance_min"] == pytest.approx(weights[counted].min(), rel=1e-5)
        assert line["sampler_mismatch"] < 1e-5
    assert lines[0]["mismatch_max"] < 1e-5 < 0.01 < lines[2]["mismatch_max"]
    assert lines[3]["importance_capped"] > 0
    assert not stub.holder.adapters


@pytest.mark.slow
def test_runs_of_a_table_have_adapters_of_their_own(folder, serving, tmp_path):
    """Each is what it is alone; one whose adapter the server does not hold leaves the others."""
    stub, sampler = serving
    rows = [{"lr": 0.1, "staleness": 1}, {"lr": 0.02, "rank": 1}, {"seed": 1}]
    table = [{"name": f"run{n}"} | row for n, row in enumerate(rows)]
    table = write_jsonl(tmp_path / "runs.jsonl", table)
    stub.holder.lies = lambda loaded, name: None if name.startswith("run2") else name
    args = [*BEGUN, "--steps", 3, "--sampling-temperature", 1.5, "--eps", 1e-4, *sampler]
    with pytest.raises(SystemExit):
        grpo.main(line_of(folder, tmp_path / "many", *args, "--many", table))
    assert "does not draw from the adapter" in (tmp_path / "many/run2/error.txt").read_text()
    assert not stub.holder.adapters, "what was loaded is unloaded"
    for n, row in enumerate(rows[:2]):
        options = [str(x) for name, value in row.items() for x in (f"--{name}", value)]
        alone = run(folder, tmp_path / f"alone{n}", *args, *options)
        beside = read_metrics(tmp_path / "many" / f"run{n}")
        for name in ("loss", "grad_norm", "importance_mean", "importance_min"):
            both = ([line[name] for line in lines] for lines in (beside, alone))
            assert_close(*map(np.array, both), 1e-5)
        ways, plain = (f"many/run{n}", f"alone{n}"), stub.holder.params
        trees = [lj.load_adapter(tmp_path / way / "adapter", plain) for way in ways]
        assert_close(*(lj.split(tree)[0] for tree in trees), 1e-5)


@pytest.mark.slow
def test_a_sampler_that_goes_astray_teaches_nothing(folder, serving, tmp_path, capsys):
    stub, sampler = serving
    stub.holder.lies = lambda loaded, name: None if name.endswith("step1") else name
    args = ["--init-adapter", folder / "used", *STEPS, "--steps", 3, "--batch-size", 12]
    (tmp_path / "shared").mkdir()
    args += ["--sampler-folder", tmp_path / "shared"]
    lines = run(folder, tmp_path / "run", *args, *sampler)
    assert [line["step"] for line in lines if "skipped" in line] == [2]
    assert "step 2 skipped: http://127" in capsys.readouterr().out
    stub.holder.lies = lambda loaded, name: name
    assert len(run(folder, tmp_path / "right", *args, *sampler)) == 3
    assert [*(tmp_path / "shared").iterdir()] == [], "it is emptied, and stays"


@pytest.mark.slow
def test_a_server_that_ends_leaves_what_was_learned(folder, serving, tmp_path, capsys):
    """It is saved, and goes on; a server that has started anew is given the adapter again."""
    stub, sampler = serving
    args = [*BEGUN, *STEPS, "--steps", 3, "--save-every", 9, *sampler]

    def failing(name, prompt, n):
        if name.endswith("step2"):
            stub.failures = [(503, "gone")] * 100_000
        return anything(name, prompt, n)

    stub.script = failing
    line = line_of(folder, tmp_path / "run", *args, "--sampler-timeout", 1)
    message = fails(capsys, grpo.main, *line)
    assert "503" in message and "The run stopped after step 2" in message
    stub.failures = []
    begun = set()

    def restarted(name, prompt, n):
        if name.endswith("step2") and name not in begun:
            begun.add(name)
            stub.holder.adapters.clear()
        return anything(name, prompt, n)

    stub.script = restarted
    lines = run(folder, tmp_path / "run", *args, "--resume", "--grad-accum", 1)
    assert [line["step"] for line in lines] == [1, 2, 3]
    line = line_of(folder, tmp_path / "run", *args[: -len(sampler)], "--resume")
    message = fails(capsys, grpo.main, *line)
    assert "needs it again with --resume" in message


@pytest.mark.slow
def test_a_dry_run_asks_the_server(folder, serving, tmp_path, capsys):
    stub, sampler = serving
    rules = [lj.LoraRule(targets=["q_proj"], rank=1)]
    stub.holder.hold("base", lj.lorafy(stub.holder.params, rules))
    line = line_of(folder, tmp_path / "run", *BEGUN, *STEPS, *sampler, "--dry-run")
    try:
        grpo.main(line)
    finally:
        del stub.holder.adapters["base"]
    said = capsys.readouterr().out
    assert "serves base; base drew 11 tokens in 2 completions of the first prompt" in said
    assert not (tmp_path / "run").exists() and "probe" not in "".join(stub.paths)


@pytest.mark.slow
def test_hosts_hear_what_the_first_process_heard(folder, serving, tmp_path):
    stub, sampler = serving
    shared = line_of(folder, tmp_path, *BEGUN, *STEPS, "--staleness", 1, *sampler)
    at = shared.index("--output")
    shared = [*shared[:at], *shared[at + 2 :]]
    for name, mesh, processes in (("one", "data=1", 1), ("two", "data=2", 2)):
        each = [["--mesh", mesh, "--output", str(tmp_path / name)]]
        run_processes(shared, each, devices=1, processes=processes, script="grpo")
    losses, trees = [], []
    for name in ("one", "two"):
        losses.append(np.array([line["loss"] for line in read_metrics(tmp_path / name)]))
        trees.append(lj.split(lj.load_adapter(tmp_path / name / "adapter", stub.holder.params))[0])
    assert_close(losses[1], losses[0], 1e-5)
    assert_close(trees[1], trees[0], 1e-5)
    asked = [(body["model"].rpartition("-")[2], body["prompt"]) for body in stub.asked]
    half = len(asked) // 2
    assert sorted(asked[:half]) == sorted(asked[half:]), "one process of the two asks"
    assert not stub.holder.adapters
