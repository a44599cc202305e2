"""`train.compare` on a tiny model: its runs, its report, and how it goes on after a signal."""

import json
import shutil
import signal

import jax
import pytest

import lora_jax as lj
from lora_jax import models
from lora_jax.bank.together.together import Together
from lora_jax.training import loop
from tests.support import assert_close
from tests.surroundings import WITHOUT_TORCH
from tests.train.scripts import exit_code, lines_of
from tests.train.tiny import write_model, write_rows
from train.compare import result
from train.compare.__main__ import main, parse
from train.compare.arms import make_arms, options_of_arm
from train.compare.intruders import mean_intruders
from train.compare.options import has_adapter
from train.compare.trials import script_defaults
from train.console.errors import UserError
from train.options.file import replace_options
from train.sft import main as sft

# Orbax leaves coroutines behind where a file cannot be read.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

TEXT = "The quick brown fox jumps over the lazy dog. " * 20
GRID = ["--ranks", "2", "--lrs", "1e-3", "4e-3", "--full-lrs", "1e-4", "4e-4"]
GRID += ["--seeds", "0", "3", "--target-sets", "q_proj,v_proj"]
MORE = ["--no-costs", "--intruders"]
# Adam divides a gradient by its size: a large eps keeps rounding as small as it is.
LINE = ["--batch-sizes", "4", "--eps", "1e-4", "--steps", "8", "--warmup", "1"]
LINE += ["--report-to", "none"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The tiny model, its rows, and text outside the task."""
    folder = tmp_path_factory.mktemp("inputs")
    write_model(folder / "model")
    write_rows(folder / "rows.jsonl", 60)
    (folder / "outside.txt").write_text(TEXT)
    return folder


def compare(folder, output, *args, grid=GRID):
    """Runs the comparison; returns the exit code."""
    line = ["sft", "--model", folder / "model", "--dataset", folder / "rows.jsonl"]
    line += [*LINE, *grid, "--outside", folder / "outside.txt", "--output", output]
    return exit_code(main, *line, *args)


@pytest.fixture(scope="module")
def whole(folder, tmp_path_factory):
    output = tmp_path_factory.mktemp("whole") / "out"
    with jax.numpy_dtype_promotion("standard"):
        assert compare(folder, output, *MORE) == 0
    return output


def timeless(comparison):
    """A comparison without what depends on the clock, and on how many calls it took."""
    found = json.loads((comparison / result.JSON).read_text())
    for run in found["runs"]:
        for name in ("seconds", "side_by_side", "saved_bytes"):
            run.pop(name)
    return found["runs"], found["rungs"]


@pytest.mark.slow
def test_hopeless_runs_stop_and_the_others_are_measured(whole, folder):
    found = result.read(whole)
    assert len(found.runs) == 2 * (2 + 2)
    by_arm = {run.arm: [r.status for r in found.runs if r.arm == run.arm] for run in found.runs}
    assert all(len({*statuses}) == 1 for statuses in by_arm.values()), "an arm goes as a whole"
    for method in ("lora", "full"):
        ended = [
            arm for arm, (status, _) in by_arm.items() if arm.method == method and status == "done"
        ]
        assert len(ended) == 1
        (rung,) = found.rungs  # after it each method has one arm, and nothing more to decide
        best = min(
            (pair for pair in rung.kept + rung.stopped if pair[0].method == method),
            key=lambda p: p[1],
        )
        assert best[0] in {arm for arm, _ in rung.kept} and ended == [best[0]]
    for run in found.runs:
        assert run.steps == (8 if run.status == "done" else 1)
        assert run.held_out_loss == run.held_out[-1].value
        assert not (whole / "runs" / run.name / "checkpoints").exists()
        if run.status == "done":
            assert run.forgetting.before != run.forgetting.after and run.saved_bytes > 1000
        assert (run.intruders is not None) == (run.status == "done")
    full = next(run for run in found.runs if run.status == "done" and run.arm.method == "full")
    lora = next(run for run in found.runs if run.status == "done" and run.arm.method == "lora")
    facts = json.loads((whole / "runs" / full.name / "facts.json").read_text())
    of_stages = facts["process_seconds"].values()  # and not of what the process did before
    assert len(of_stages) == 2 and sum(of_stages) <= full.seconds
    assert full.trained_parameters > 10 * lora.trained_parameters
    assert not (whole / "runs" / full.name / "adapter").exists(), "all weights are not kept"
    assert (whole / "runs" / lora.name / "adapter").exists()
    assert "<img" in (whole / "report.html").read_text()
    model, params = models.from_pretrained(folder / "model")
    adapted = lj.load_adapter(whole / "runs" / lora.name / "adapter", params)
    counted = mean_intruders(params, lj.merge(adapted), models.kinds(model.config))
    assert lora.intruders == counted


@pytest.mark.slow
def test_after_a_long_warmup_both_decisions_fall_at_one_step(folder, tmp_path):
    grid = ["--methods", "lora", "--ranks", "2", "--lrs", *("1e-4", "3e-4", "1e-3", "3e-3", "4e-3")]
    more = ["--seeds", "0", "--warmup", "5", "--no-costs"]
    assert compare(folder, tmp_path / "out", *more, grid=grid) == 0
    found = result.read(tmp_path / "out")
    first, second = found.rungs
    assert first.share == second.share == 5 / 8
    assert (len(first.kept), len(second.kept)) == (2, 1)
    assert second.kept == first.kept[:1], "by the same losses"
    assert sorted(run.steps for run in found.runs) == [5, 5, 5, 5, 8]


@pytest.mark.slow
def test_a_run_is_what_it_is_alone(whole, tmp_path):
    """Side by side in stages, or alone and at once: the same losses."""
    for method in ("lora", "full"):
        found = next(
            r for r in result.read(whole).runs if r.arm.method == method and r.status == "done"
        )
        run = whole / "runs" / found.name
        sft(["--config", str(run / "config.yaml"), "--output", str(tmp_path / method)])
        here, there = lines_of(run), lines_of(tmp_path / method)
        assert [line.keys() for line in here] == [line.keys() for line in there]
        assert_close(here, there, 1e-5)


@pytest.mark.slow
def test_a_comparison_goes_on_after_a_signal(folder, whole, tmp_path, monkeypatch, capsys):
    output, steps, real = tmp_path / "out", [], Together.step

    def step(self, batches):
        steps.append(batches)
        if len(steps) == 4:
            signal.raise_signal(signal.SIGTERM)
        return real(self, batches)

    with monkeypatch.context() as patch:
        patch.setattr(Together, "step", step)
        assert compare(folder, output, *MORE) == 143
    assert "Go on with: python -m train.compare" in capsys.readouterr().err
    assert compare(folder, output, *MORE) == 2
    assert "holds another comparison" in capsys.readouterr().err
    assert compare(folder, output, *MORE, "--resume", grid=[*GRID, "--at-once", "3"]) == 2
    assert "began with other options: --at-once was 8 and is now 3" in capsys.readouterr().err
    before = {path: path.stat().st_mtime_ns for path in output.glob("runs/*/metrics.jsonl")}
    assert compare(folder, output, *MORE, "--resume") == 0
    assert timeless(output) == timeless(whole)
    stopped = [r.name for r in result.read(output).runs if r.status == "stopped early"]
    adapters = [name for name in stopped if name.startswith("lora")]
    assert adapters
    for name in adapters:
        path = output / "runs" / name / "metrics.jsonl"
        assert path.stat().st_mtime_ns == before[path], "what is over is not run again"


@pytest.mark.slow
def test_full_fine_tuning_is_stopped_by_a_signal(folder, tmp_path, monkeypatch, capsys):
    """It hears of the comparison's command line, not of the script's."""

    def raising(*args):
        signal.raise_signal(signal.SIGTERM)
        return take_measures(*args)

    take_measures = loop._take_measures
    monkeypatch.setattr(loop, "_take_measures", raising)
    grid = ["--methods", "full", "--full-lrs", "1e-4", "--seeds", "0"]
    assert compare(folder, tmp_path / "out", "--no-costs", grid=grid) == 143
    assert "Go on with: python -m train.compare" in capsys.readouterr().err


@pytest.mark.slow
def test_costs_and_plans(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", WITHOUT_TORCH)  # of the processes that measure
    grid = ["--ranks", "3", "--lrs", "1e-3", "--full-lrs", "1e-4", "--seeds", "0"]
    more = ["--no-early-stopping", "--topology", "cpu:2", "--price", "2"]
    more += ["--methods", "vera", "full"]
    assert compare(folder, tmp_path / "out", *more, grid=grid) == 0
    found = result.read(tmp_path / "out")
    for run in found.runs:
        assert run.compiled_bytes > 0 and run.peak_bytes > 1e8
        assert 0 < run.step_seconds_low <= run.step_seconds <= run.step_seconds_high
    (latency,) = found.latencies
    assert has_adapter(latency.arm.method) and min(latency[1:4]) > 0
    assert {plan.arm.method for plan in found.planned} == {"vera", "full"}


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ([], "sft, classify or grpo"),
        (["sql"], "cannot compare runs of 'sql'. Pass sft, classify or grpo"),
        (["sft", "--rank", "3"], "--rank is set by the comparison itself. Use --ranks"),
        (["sft", "--ranks", "3", "3"], "--ranks 3 3 lists 3 twice"),
        (
            ["sft", "--methods", "tinylora", "--weight-tying", "1"],
            "side by side cannot share a vector",
        ),
        (["sft", "--methods", "lora", "--u", "4"], "no vector trains between A and B. Remove --u"),
        (["sft", "--methods", "full", "--ranks", "3"], "--methods names no adapter"),
        (
            ["sft", "--methods", "lora", "--full-lrs", "1e-3"],
            "--full-lrs only applies to full fine-tuning",
        ),
        (["sft", "--price", "3"], "--price needs a machine"),
        (["sft", "--lrs", "-1"], "--lrs -1.0 is out of range"),
        (["classify", "--topology", "v5e:2x2"], "language models"),
        (["classify", "--outside", "x.txt"], "nothing tells what it forgets"),
        (["sft", "--dry-run"], "this option is for a single run"),
        (["sft", "--report-to", "wandb"], "one run per process"),
        (["sft", "--init-adapter", "x"], "starts from the base"),
        (["sft", "--methods", "said"], "--methods said only trains classifiers"),
        (["sft", "--methods", "lora", "head-only"], "--methods head-only only trains classifiers"),
        (["classify", "--dimensions", "9"], "--dimensions only applies to said and did"),
        (["classify", "--intrinsic", "9"], "set by the comparison itself. Use --dimensions"),
        (["classify", "--methods", "did", "--dimensions", "0"], "Pass a number from 1 on"),
    ],
)
def test_bad_input_is_refused_before_anything_is_read(args, said, capsys):
    with pytest.raises(SystemExit) as error:
        main(args)
    assert error.value.code == 2
    assert said in " ".join(capsys.readouterr().err.split())


def test_files_of_older_comparisons_are_read_where_they_ask_for_nothing_else(tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text("ranks: [3]\npeft_experiments: []\npeft_json: false\n")
    _, config = parse(["sft", "--config", str(file)])
    assert config.compare.ranks == (3,)
    file.write_text("peft_json: true\n")
    with pytest.raises(UserError, match="line 1: There is no option peft_json"):
        parse(["sft", "--config", str(file)])


def test_the_numbers_of_a_variant_are_those_of_its_runs():
    script, config = parse(["sft", "--methods", "lora", "tinylora", "--u", "4"])
    options = script.options_of(config)
    arms = make_arms(config.compare, script_defaults(script, options))
    runs = [replace_options(options, options_of_arm(arm, 0)).adapter for arm in arms]
    numbers = {run.settings_of(variant)["u"] for run in runs for variant in run.variants}
    assert numbers == {4} and not all(run.variants for run in runs)


def test_what_cannot_be_done_is_found_before_the_first_run(folder, tmp_path, capsys):
    lr = ["--ranks", "2", "--seeds", "0", "--target-sets"]
    assert compare(folder, tmp_path / "a", grid=[*lr, "q_proj,no_such"]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "run lora-r2" in said and "no_such" in said
    assert compare(folder, tmp_path / "b", "--eval-questions", "0", grid=[*lr, "q_proj"]) == 2
    assert "--eval-questions" in capsys.readouterr().err
    missing = str(folder / "no.txt")
    assert compare(folder, tmp_path / "c", "--outside", missing, grid=[*lr, "q_proj"]) == 2
    assert "no.txt" in capsys.readouterr().err
    for name in "abc":
        assert not (tmp_path / name / "runs").exists()
        shutil.rmtree(tmp_path / name, ignore_errors=True)
