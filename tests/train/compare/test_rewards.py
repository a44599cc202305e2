"""`train.compare grpo` on a tiny model: its runs are those of `train.grpo`, also after a kill.

The reward is the share of odd tokens: a greedy completion shows in eight tokens what was learned.
"""

import json
import shutil
import statistics
import sys
from types import SimpleNamespace

import jax
import pytest
from scipy.special import rel_entr

import lora_jax as lj
from lora_jax import models
from tests.support import THOROUGH, assert_close, thorough
from tests.train.compare.test_compare import timeless
from tests.train.scripts import exit_code, lines_of
from tests.train.tiny import write_jsonl, write_model
from train.compare import divergence, result
from train.compare.__main__ import main, parse
from train.compare.divergence import BaseDivergence
from train.compare.sweep import Sweep
from train.grpo import main as grpo
from train.reporters.files import read_json
from train.run.task import EvaluatedModel
from train.tasks.reward_scores import standard_error
from train.tasks.sql import accuracy_error

# Orbax leaves coroutines behind where a file cannot be read, and rewards' processes end with the
# garbage.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

REWARD = """
def odd(completion_ids, **_):
    return [sum(i % 2 for i in ids) / len(ids) for ids in completion_ids]
"""
TINY = 1e-12  # a rate that changes nothing
GRID = ["--methods", "lora", "full", "--ranks", "2", "--lrs", str(TINY), "0.1"]
GRID += ["--full-lrs", "1e-2", "--seeds", "0", "3", "--target-sets", "all-linear"]
LINE = ["--batch-sizes", "32", "--group", "8", "--eps", "1e-4", "--steps", "16", "--warmup", "1"]
LINE += ["--max-new-tokens", "8", "--seq-len", "64", "--eval-questions", "4", "--no-costs"]
LINE += ["--score-every", "8"]
LINE += ["--report-to", "none"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    write_model(folder / "model", scale=0.4)
    write_jsonl(folder / "prompts.jsonl", [{"prompt": "?" * (1 + n % 5)} for n in range(40)])
    (folder / "reward.py").write_text(REWARD)
    return folder


def compare(folder, output, *args, grid=GRID):
    """Runs the comparison; returns the exit code."""
    line = ["grpo", "--model", folder / "model", "--dataset", folder / "prompts.jsonl"]
    line += ["--reward", f"{folder / 'reward.py'}:odd", *LINE, *grid, "--outside", "off"]
    return exit_code(main, *line, "--output", output, *args)


@pytest.fixture(scope="module")
def whole(folder, tmp_path_factory):
    output = tmp_path_factory.mktemp("whole") / "out"
    with jax.numpy_dtype_promotion("standard"):
        assert compare(folder, output) == 0
    return output


@pytest.mark.slow
def test_the_reward_decides_and_a_rate_that_changes_nothing_is_last(whole):
    comparison = result.read(whole)
    assert comparison.facts.by_score and comparison.facts.score == "reward"
    assert "highest reward" in comparison.facts.rule
    (rung,) = comparison.rungs
    kept, stopped = dict(rung.kept), dict(rung.stopped)
    assert [arm.learning_rate for arm in stopped] == [TINY]
    assert max(kept.values()) > max(stopped.values()), "the larger reward goes on"
    base = comparison.facts.baselines["base"]
    for run in comparison.runs:
        if run.arm in stopped:
            assert run.status == "stopped early" and run.score is None
            assert run.scores[-1].value == pytest.approx(base), "nothing was learned"
        else:
            assert run.score == run.scores[-1].value and run.score > base and run.held_out == ()
            assert run.score_error is not None
            assert statistics.fmean(run.question_scores) == pytest.approx(run.score)
    assert (comparison.facts.eval_questions, comparison.facts.most_questions) == (4, 4)
    text = (whole / "report.md").read_text()
    assert "Standard error" in text and "| After | Reward | Decision |" in text
    assert "Reward by step" in text and "Without training, reward is" in text


@pytest.mark.slow
def test_a_run_is_what_train_grpo_makes_of_its_options(whole, tmp_path):
    """Side by side in stages, or alone and at once: the same rewards, losses and scores."""
    for method in ("lora", "full") if THOROUGH else ("lora",):
        ended = [run for run in result.read(whole).runs if run.status == "done"]
        run = whole / "runs" / next(run.name for run in ended if run.arm.method == method)
        grpo(["--config", str(run / "config.yaml"), "--output", str(tmp_path / method)])
        here, there = lines_of(run), lines_of(tmp_path / method)
        assert [line.keys() for line in here] == [line.keys() for line in there]
        assert_close(here, there, 1e-6)
        ours, alone = (read_json(folder / "scores.json") for folder in (run, tmp_path / method))
        assert ours["reward"] == alone["reward"]
        assert ours["answers"]["fine-tuned"] == alone["answers"]["fine-tuned"]


@pytest.mark.slow
@thorough  # test_compare.py goes on with examples
def test_a_comparison_goes_on_after_a_kill(folder, whole, tmp_path, monkeypatch):
    """It is killed as the second group begins; what is over is not run again."""

    class Killed(BaseException):
        pass

    output, begun, real = tmp_path / "out", [], Sweep._train

    def train(self, group, *args):
        begun.append(group)
        if len(begun) == 3:
            raise Killed
        return real(self, group, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Sweep, "_train", train)
        with pytest.raises(Killed):
            compare(folder, output)
    assert compare(folder, output, "--resume") == 0
    assert timeless(output) == timeless(whole)
    shutil.rmtree(output / "pictures")
    assert json.loads((output / result.JSON).read_text())["facts"]["by_score"]


@pytest.mark.slow
def test_the_divergence_is_the_exact_one_and_examples_are_scored_by_rewards(folder, tmp_path):
    """Checks an adapter of each trainer against logits that are computed for one row at a time."""
    rows = [{"prompt": "?" * (1 + n % 5), "completion": "1357"} for n in range(40)]
    write_jsonl(folder / "rows.jsonl", rows)
    kept, real = [], BaseDivergence.read

    def read(self, *args):
        kept.append(self)
        return real(self, *args)

    output = tmp_path / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(BaseDivergence, "read", read)
        more = ["--methods", "lora", "sft", "--lrs", "3e-2", "--seeds", "0", "--steps", "8"]
        more += ["--kl", "--demonstrations", str(folder / "rows.jsonl")]
        grid = ["--ranks", "2", "--target-sets", "all-linear"]
        assert compare(folder, output, *more, grid=grid) == 0
    comparison = result.read(output)
    model, plain = models.from_pretrained(folder / "model")
    for run in comparison.runs:
        assert run.status == "done" and run.score is not None and run.score_error is not None
        adapter = lj.load_adapter(output / "runs" / run.name / "adapter", plain)
        expected = _exact(kept[0].batches, model, plain, lj.merge(adapter))
        assert run.divergence == pytest.approx(expected, rel=1e-3) and expected > 1e-3
    assert {run.arm.method for run in comparison.runs} == {"lora", "sft"}
    config = (output / "runs" / comparison.runs[-1].name / "config.yaml").read_text()
    assert "rows.jsonl" in config, "it learns from the demonstrations"
    report = (output / "report.md").read_text()
    assert "Divergence from the base" in report and "of the 4 held-out prompts (nats" in report


def _exact(parts, model, plain, merged):
    """The mean KL(base ‖ merged) of the next token, sequence by sequence without padding."""
    total, n = 0.0, 0
    for part in parts:
        for ids, segments, at, counted in zip(*part[:4], strict=True):
            length = int(segments.sum())
            logits = [model.apply({"params": p}, ids[None, :length])[0] for p in (plain, merged)]
            base, other = (jax.nn.softmax(x, axis=-1)[at[counted]] for x in logits)
            total, n = total + float(rel_entr(base, other).sum()), n + int(counted.sum())
    return total / n


@pytest.mark.slow
def test_full_fine_tuning_keeps_the_base_as_its_reference(folder, tmp_path):
    """The divergence is 0 at the first step, and grows: the reference does not move along."""
    line = ["--model", folder / "model", "--dataset", folder / "prompts.jsonl", "--full"]
    line += ["--reward", f"{folder / 'reward.py'}:odd", "--beta", "0.1", "--lr", "1e-2"]
    line += ["--batch-size", "32", "--steps", "4", "--group", "8"]
    line += ["--max-new-tokens", "8", "--seq-len", "64", "--eval-questions", "0"]
    grpo([str(word) for word in [*line, "--report-to", "none", "--output", tmp_path / "out"]])
    kl = [step["kl"] for step in lines_of(tmp_path / "out")]
    assert kl[0] == pytest.approx(0, abs=1e-6) and kl[-1] > 1e-3


@pytest.mark.parametrize(
    ("args", "told"),
    [
        (["--batch-size", "8"], "--batch-size is set by the comparison itself. Use --batch-sizes"),
        (["--eval-every", "3"], "no held-out loss"),
        (["--topology", "v5e:2x2"], "the drawing of completions"),
        (["--demonstrations", "x"], "--methods names neither"),
        (["--methods", "sft"], "needs rows with right answers"),
        (["--methods", "said"], "--methods said only trains classifiers"),
        (["--init-adapter", "x"], "starts from the base"),
    ],
)
def test_options_without_an_effect_are_refused(args, told, capsys):
    with pytest.raises(SystemExit) as error:
        main(["grpo", *args])
    assert error.value.code == 2
    assert told in " ".join(capsys.readouterr().err.split())


def test_the_standard_error_is_that_of_the_mean_over_held_out_prompts():
    rewards = [0.0, 1.0, None, 0.5, 0.25]
    scores = {"answers": {"fine-tuned": [{"reward": reward} for reward in rewards]}}
    known = [0.0, 1.0, 0.5, 0.25]
    assert standard_error(scores) == pytest.approx(statistics.stdev(known) / 2)
    assert standard_error({"answers": {"fine-tuned": [{"reward": 1.0}]}}) is None
    assert standard_error({}) is None
    accuracy = {"a": {"base": 0.1, "fine-tuned": 0.5}, "b": {"fine-tuned": 0.9}}
    found = accuracy_error({"questions_of_each_kind": 65, "accuracy": accuracy})
    assert found == pytest.approx((0.25 / 64 + 0.09 / 64) ** 0.5 / 2)
    assert accuracy_error({}) is None


@pytest.mark.slow
def test_where_nothing_is_held_out_nothing_is_trained(folder, tmp_path, capsys):
    assert compare(folder, tmp_path / "out", "--eval-questions", "0") == 2
    assert "nothing is held out" in capsys.readouterr().err
    assert not (tmp_path / "out" / "runs").exists()
    assert compare(folder, tmp_path / "out", "--batch-sizes", "32", "6") == 2
    assert "run lora-r2-a4-all_linear-lr1e-12-b6-s0" in capsys.readouterr().err


@pytest.mark.slow
def test_examples_are_learned_in_as_many_steps_as_rewards(folder, tmp_path, monkeypatch):
    """With --epochs, the epochs of the prompts set the number of steps, at each batch size."""
    write_jsonl(folder / "more.jsonl", [{"prompt": "?", "completion": "1"} for _ in range(99)])
    trials = []
    monkeypatch.setattr(Sweep, "run", lambda self: trials.extend(self.trials) or sys.exit(0))
    line = ["--dataset", folder / "prompts.jsonl", "--reward", f"{folder / 'reward.py'}:odd"]
    line += ["--model", folder / "model", "--demonstrations", folder / "more.jsonl"]
    line += ["--methods", "lora", "sft", "--ranks", "2", "--lrs", "0.1", "--seeds", "0"]
    line += ["--batch-sizes", "8", "16", "--group", "4", "--epochs", "2", "--max-new-tokens", "8"]
    line += ["--seq-len", "64", "--eval-questions", "4", "--outside", "off"]
    with pytest.raises(SystemExit):
        main(["grpo", *map(str, line), "--output", str(tmp_path / "out")])
    steps = {(trial.arm.method, trial.arm.batch_size): trial.steps for trial in trials}
    assert steps == {("lora", 8): 36, ("sft", 8): 36, ("lora", 16): 18, ("sft", 16): 18}


@pytest.mark.slow
def test_a_divergence_on_some_prompts_says_so(folder, monkeypatch):
    """Prompts are left out beyond a number of bytes, whose rows are few at once, too."""
    model, params = models.from_pretrained(folder / "model")
    outline = SimpleNamespace(config=model.config, ends=())
    monkeypatch.setattr(divergence, "end_tokens", lambda of: [])
    of_prompt = 4 * 2 * model.config.vocab_size
    prompts = [[5, 6], [7], [8, 9, 3]]
    for held, part, words, rows in (
        (99, 99, "the 3 held-out prompts", [3]),
        (2, 1, "the first 2 of the 3 held-out prompts", [1, 1]),
    ):
        monkeypatch.setattr(divergence, "_MAX_TOTAL_BYTES", held * of_prompt)
        monkeypatch.setattr(divergence, "_MAX_BATCH_BYTES", part * of_prompt)
        base = BaseDivergence()
        base.read(EvaluatedModel(model, params, model.apply), outline, prompts, 2)
        assert base.measured_on == words and [len(part.ids) for part in base.batches] == rows
        assert base.tokens == 2 * sum(rows)


def test_the_data_follow_from_the_options_as_those_of_the_script():
    for args, dataset in (([], "arithmetic"), (["--model", "x"], "sql")):
        _, config = parse(["grpo", *args])
        assert config.data.dataset == dataset
