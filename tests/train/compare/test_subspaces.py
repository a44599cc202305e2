"""`train.compare classify` with random subspaces, on a tiny model."""

import pytest

from tests.support import THOROUGH, assert_close
from tests.train.scripts import exit_code
from tests.train.test_classify import inputs
from train.classify import main as classify
from train.compare import result
from train.compare.__main__ import main
from train.run.log import read_metrics

# Orbax leaves coroutines behind where a file cannot be read.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
__all__ = ["inputs"]  # a fixture


def compare(inputs, output, *args):
    """Runs the comparison; returns the exit code."""
    own = {"--rank", "--targets", "--batch-size", "--lr"}  # a comparison sets them
    line, name = ["classify", "--output", output], ""
    for word in inputs:
        name = word if str(word).startswith("--") else name
        line += [word] if name not in own else []
    line += ["--steps", 4, "--report-to", "none", "--seeds", 0, "--no-early-stopping", *args]
    return exit_code(main, *line)


@pytest.mark.slow
def test_subspaces_are_runs_like_others(inputs, tmp_path, capsys):
    subspaces = ("said", "did") if THOROUGH else ("said",)
    methods = ["--methods", *subspaces, "full", "--subspace-lrs", 0.01, "--full-lrs", 1e-3]
    assert compare(inputs, tmp_path / "out", *methods, "--dimensions", 20, "--no-costs") == 0
    printed = capsys.readouterr().out
    found = result.read(tmp_path / "out")
    assert {run.status for run in found.runs} == {"done"}
    assert {len(run.question_scores) for run in found.runs} == {12}
    assert all(sum(run.question_scores) / 12 == pytest.approx(run.score) for run in found.runs)
    sizes = {(run.arm.method, run.trained_parameters) for run in found.runs}
    assert {(method, 20) for method in subspaces} < sizes and len(sizes) == len(subspaces) + 1
    assert "full fine-tuning's accuracy" in printed
    assert all(method.upper() in printed for method in subspaces)
    one = tmp_path / "out" / "runs" / found.runs[0].name
    assert (one / "adapter").exists(), "kilobytes are kept"
    classify(["--config", str(one / "config.yaml"), "--output", str(tmp_path / "alone")])
    losses = [
        [line["loss"] for line in read_metrics(run) if "lr" in line]
        for run in (one, tmp_path / "alone")
    ]
    assert_close(*losses, 1e-5)


def test_a_dimension_that_cannot_be_is_found_before_the_first_run(inputs, tmp_path, capsys):
    assert compare(inputs, tmp_path / "a", "--methods", "said", "--dimensions", 5) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "run said-d5-" in said and "Choose a dimension larger than 5" in said
    assert compare(inputs, tmp_path / "b", "--methods", "did", "--dimensions", 10**9) == 2
    assert "is larger than the number of parameters" in " ".join(capsys.readouterr().err.split())
