"""`train.grpo` and its rewards: what fails, what they get, signals, and the widths of batches."""

import json
import os
import re
import signal
import threading

import pytest

from lora_jax import models
from lora_jax.training.data.order import Order
from lora_jax.training.setup import Setup
from tests.support import assert_close, assert_identical
from tests.train import test_rollouts
from tests.train.scripts import fails
from tests.train.test_rollouts import GROUP, PROMPTS, adapter_of, line_of, lines_of, run, told
from train import grpo
from train.live.prompts import TokenizedPrompts, Widths
from train.run.log import read_metrics

# Processes of rewards end with the process of a script.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
folder = test_rollouts.folder
REWARDS = """
import os, time
from pathlib import Path

def raises(completions, **_):
    raise ValueError("no reward today")

def at_first(completions, trainer_state, **_):
    return [1.0 if trainer_state.global_step else None] * len(completions)

def now_and_then(completions, completion_ids, trainer_state, **_):
    if len(completions) > 1:  # while training
        return [len(ids) for ids in completion_ids]
    return [{1: -5.0, 3: -4.0}[trainer_state.global_step]]

def answers(completions, answer, prompts, log_metric, log_extra, **_):
    log_metric("known", float(answer[0] is not None))
    log_extra("answer", answer)
    return [None if a is None else len(a) + i for i, a in enumerate(answer)]

def slow(completion_ids, trainer_state, **_):
    if trainer_state.global_step == 2 and Path("hang").exists():
        Path("hangs").touch()
        time.sleep(60)
    return [sum(id < 90 for id in ids) / len(ids) for ids in completion_ids]
"""


@pytest.fixture
def rewards(tmp_path):
    """Writes the rewards; returns the options of one of them."""
    (tmp_path / "mine.py").write_text(REWARDS)
    return lambda name: ["--reward", f"{tmp_path / 'mine.py'}:{name}"]


@pytest.mark.slow
def test_a_reward_that_always_fails_ends_the_run_as_nan_does(folder, tmp_path, rewards, capsys):
    line = line_of(folder, tmp_path / "run", *rewards("raises"), "--steps", 12, "--log-every", 5)
    said = fails(capsys, grpo.main, *line)
    assert "--max-skipped 3: 3 steps in a row were skipped" in said
    assert "no completion has a reward (raises: ValueError: no reward today (mine.py, line" in said
    lines = read_metrics(tmp_path / "run")
    assert [{**line, "time": 0} for line in lines] == [
        {"step": step, "skipped": 1.0, "time": 0} for step in (1, 2, 3)
    ]


@pytest.mark.slow
def test_a_score_that_is_not_known_is_none(folder, tmp_path, rewards, capsys):
    """Not in the log, nor to --keep-best and --patience, in the table and in scores.json."""
    args = [*rewards("now_and_then"), "--steps", 3, "--score-every", 1, "--keep-best", "score"]
    args += ["--patience", 1, "--eval-dataset", folder / "rows.jsonl"]
    lines = run(folder, tmp_path / "run", *args)
    assert [(x["step"], x["score_reward"]) for x in lines if "score_reward" in x] == [
        (1, -5.0),
        (3, -4.0),
    ]
    said = told(capsys)
    assert re.search(r"reward [│|] none [│|] -4.0000", said), said
    assert "warning: no held-out completion has a reward (now_and_then: KeyError: 2" in said
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["best"] == {"step": 3, "score_reward": -4.0}
    scores = json.loads((tmp_path / "run" / "scores.json").read_text())
    assert scores["reward"] == {"fine-tuned": -4.0}


@pytest.mark.slow
def test_what_a_step_does_not_know_is_left_out_of_its_line(folder, tmp_path, rewards, capsys):
    both = [*rewards("at_first"), "--steps", 2]
    (line,) = run(folder, tmp_path / "run", *both, "--log-every", 2)
    assert line["reward"] == 1.0 and "kl" not in line
    assert re.search(r"step 2/2 reward 1 zero_spread 1 entropy ", told(capsys))
    first, second = run(folder, tmp_path / "each", *both, "--beta", 0.1)
    assert "reward" not in first and second["reward"] == 1.0 and first["kl"] == 0.0


@pytest.mark.slow
def test_a_reward_gets_the_fields_of_all_rows(folder, tmp_path, rewards):
    rows = [{"prompt": "a"}, {"prompt": "aa", "answer": "four"}, {"prompt": "aaa"}]
    (tmp_path / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    args = [*rewards("answers"), "--steps", 1, "--dataset", tmp_path / "rows.jsonl"]
    (line,) = run(folder, tmp_path / "run", *args, "--batch-size", 24)
    samples = lines_of(tmp_path / "run", "samples.jsonl")
    known = {len(one["prompt"]): one["extra"]["answers/answer"] for one in samples}
    assert known == {1: None, 2: "four", 3: None}
    assert [one["reward"] for one in samples if "reward" in one] == [4 + i for i in range(8)]
    assert line["reward"] == 7.5 and line["answers/known"] == pytest.approx(1 / 3)


@pytest.mark.slow
def test_a_dry_run_asks_the_reward_and_names_the_column_that_is_missing(
    folder, tmp_path, rewards, capsys
):
    asked = ["--eval-dataset", folder / "rows.jsonl", "--dry-run"]
    both = ["--reward", f"{folder / 'rewards.py'}:early", *rewards("raises")[1:]]
    grpo.main(line_of(folder, tmp_path / "run", *both, *asked))
    said = told(capsys)
    assert f"{PROMPTS} prompts; a step has {GROUP} completions of each of {PROMPTS} prompts" in said
    assert re.search(
        r"the rewards of 'Hello! .*' after the first prompt, in .*: early: 0\.\d+ raises: none w",
        said,
    )
    assert (
        "raises: It returned no reward for 8 of 8 completions (exception): ValueError: no reward"
        in said
    )
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": "a", "answer": "b"}))
    args = [*rewards("answers"), "--dataset", tmp_path / "rows.jsonl", *asked]
    line = line_of(folder, tmp_path / "run", *args)
    said = fails(capsys, grpo.main, *line)
    assert "the reward answers needs the column 'answer', but the rows have no column" in said


@pytest.mark.slow
def test_a_signal_drops_completions_that_are_rewarded(
    folder, tmp_path, rewards, monkeypatch, capsys
):
    """They are drawn again, to the bits of a run without a break."""
    monkeypatch.chdir(tmp_path)
    args = [*rewards("slow"), "--steps", 4, "--lr", 3e-2, "--schedule", "constant"]
    whole = run(folder, tmp_path / "whole", *args)
    (tmp_path / "hang").touch()
    line = line_of(folder, tmp_path / "parts", *args)

    def end():
        while not (tmp_path / "hangs").exists():
            ended.wait(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    ended = threading.Event()
    threading.Thread(target=end, daemon=True).start()
    with pytest.raises(SystemExit) as caught:
        grpo.main(line)
    assert caught.value.code == 128 + signal.SIGTERM
    assert "stopped after step 2. Go on with: " in capsys.readouterr().err
    (tmp_path / "hang").unlink()
    parts = run(folder, tmp_path / "parts", *args, "--resume")
    assert_identical(*(adapter_of(folder, tmp_path / name) for name in ("whole", "parts")))
    timed = ("time", "tokens_per_s")
    assert [{k: v for k, v in line.items() if k not in timed} for line in whole] == [
        {k: v for k, v in line.items() if k not in timed} for line in parts
    ]


def test_widths_are_chosen_by_the_longest_prompt_of_each_step():
    """One long prompt of 16 is in every step of all, whatever part of the step it is in."""
    prompts = TokenizedPrompts([{}] * 16, [[1] * (700 if i == 5 else 8) for i in range(16)])
    assert len(Widths.choose(prompts, Order(0, 16, 4, 4), 8).rows) == 1
    assert len(Widths.choose(prompts, Order(0, 16, 4, 1), 8).rows) == 2


@pytest.mark.slow
def test_a_batch_is_as_wide_as_its_own_prompts_need(folder, tmp_path, monkeypatch, capsys):
    """And gives what it gives at the width of the longest prompt; each width is compiled once."""
    rows = [{"prompt": "a" * (120 if i == 5 else 1 + i)} for i in range(16)]
    (tmp_path / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    args = ["--steps", 4, "--dataset", tmp_path / "rows.jsonl", "--seq-len", 256, "--grad-accum", 2]
    args += ["--group", 4, "--batch-size", 8, "--eps", 1e-4]  # an epsilon hides the last bits
    args += ["--no-share-prompt"]
    drawn, compiled = [], []

    def sampled(model, params, ids, *rest, **options):
        drawn.append(ids.shape[1])
        return models.sample(model, params, ids, *rest, **options)

    def compile(setup, forward, loss, state, base, batch):
        compiled.append(batch["ids"].shape[2])
        return compile_step(setup, forward, loss, state, base, batch)

    compile_step = Setup.compile
    monkeypatch.setattr("train.live.rollouts.sample", sampled)
    monkeypatch.setattr(Setup, "compile", compile)
    lines = run(folder, tmp_path / "run", *args)
    assert compiled == [160, 56], "the widest first, and each once"
    assert {*drawn} == {40, 144} and drawn.count(144) == 1
    assert "batches have 2 widths, 56, 160 tokens" in told(capsys)
    monkeypatch.setattr("train.live.prompts.few_lengths", lambda rows, *_, **__: (int(max(rows)),))
    drawn.clear()
    whole = run(folder, tmp_path / "whole", *args)
    assert {*drawn} == {144} and compiled[2:] == [160]
    samples = [lines_of(tmp_path / name, "samples.jsonl") for name in ("run", "whole")]
    assert [{**one, "time": 0} for one in samples[0]] == [{**one, "time": 0} for one in samples[1]]
    for name in ("loss", "grad_norm", "reward", "entropy"):
        got, want = ([x[name] for x in each] for each in (lines, whole))
        assert got == pytest.approx(want, rel=1e-4, abs=1e-6)
    assert_close(*(adapter_of(folder, tmp_path / name) for name in ("run", "whole")), 1e-5)
