"""`train.grpo` with tools: what is drawn, masked, logged, resumed, refused and learned."""

import json

import numpy as np
import pytest

from tests.support import assert_close, thorough
from tests.train.live import guessing
from tests.train.live.local import LocalHost
from tests.train.scripts import fails
from tests.train.tiny import write_model as write_plain_model
from train import grpo
from train.console.errors import UserError
from train.environments.guess import GuessingGame
from train.live.prompts import PromptFeed
from train.run.log import read_metrics
from train.tasks import tool_use

# Orbax leaves coroutines behind where a file cannot be read.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
GROUP, NEW = 4, 12


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    guessing.write_model(folder / "model")
    guessing.write_rows(folder / "rows.jsonl")
    return folder


@pytest.fixture(autouse=True)
def host(monkeypatch):
    monkeypatch.setattr(tool_use, "find_tools", lambda data: LocalHost(GuessingGame))


def line_of(folder, output, *args):
    line = ["--model", folder / "model", "--dataset", folder / "rows.jsonl", "--output", output]
    line += ["--environment", "guess", "--max-new-tokens", NEW, "--seq-len", 32]
    line += ["--group", GROUP, "--batch-size", GROUP * 7, "--eval-questions", 0, "--warmup", 1]
    line += ["--targets", "all-linear", "--report-to", "none", "--loss", "grpo"]
    return [str(arg) for arg in [*line, *args]]


def run(folder, output, *args):
    grpo.main(line_of(folder, output, *args))
    return read_metrics(output)


def answer_to(number, secret):
    return "right" if number == secret else "too low" if number < secret else "too high"


def recorded(monkeypatch):
    """The completions and the batch of each step, in a list that fills."""
    found, make = [], PromptFeed.batch_from_completions

    def made(self, rows, drawn, *args):
        batch = make(self, rows, drawn, *args)
        found.append((np.array(rows), drawn, batch))
        return batch

    monkeypatch.setattr(PromptFeed, "batch_from_completions", made)
    return found


STEPS = ["--steps", 2, "--lr", 1e-2, "--schedule", "constant"]


@pytest.mark.slow
def test_tokens_of_the_environment_are_read_and_not_learned(folder, tmp_path, monkeypatch):
    found = recorded(monkeypatch)
    lines = run(folder, tmp_path / "run", *STEPS)
    made = guessing.tokenizer()
    for line, (rows, drawn, batch) in zip(lines, found, strict=True):
        turns = drawn.turns.ravel()
        own = np.array([x.is_own + [False] * (NEW - len(x.ids)) for x in turns])
        assert own.sum() < drawn.lengths.sum(), "some tokens are the environment's"
        weights = batch["weights"].reshape(-1, NEW)
        np.testing.assert_array_equal(weights > 0, own)
        np.testing.assert_array_equal(
            batch["targets"].reshape(-1, NEW), drawn.tokens.reshape(-1, NEW)
        )
        for x, secret in zip(turns, np.repeat(rows, GROUP) + 1, strict=True):
            text = made.decode(x.ids)
            guesses = [
                call["function"]["arguments"]["number"]
                for turn in x.messages
                for call in turn.get("tool_calls", ())
            ]
            told = [turn["content"] for turn in x.messages if turn["role"] == "tool"]
            words = [answer_to(n, secret) for n in guesses]
            assert words[: len(told)] == told and all(word in text for word in told)
            ran = words[: x.calls]  # what the last of them said may have found no room
            worth = 1 - 0.1 * ran.index("right") if "right" in ran else 0
            assert x.earned.value == pytest.approx(worth)
        assert line["tools/call_frequency"] == sum(x.calls for x in turns) / len(turns) > 0
        assert line["tools/turns"] == sum(len(x.turn_starts) for x in turns) / len(turns) > 1
        assert line["tools/failure_frequency"] == line["tools/lost"] == 0
        assert line["length"] == pytest.approx(own.sum(-1).mean())
        assert line["reward"] == pytest.approx(np.mean([x.earned.value for x in turns]), rel=1e-5)
        assert line["mismatch_max"] < 1e-5
    samples = [json.loads(x) for x in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
    assert any("low" in sample["answer"] for sample in samples)
    roles = {turn["role"] for sample in samples for turn in sample["turns"]}
    assert roles == {"assistant", "tool"}
    for sample in samples:
        told = [turn["text"] for turn in sample["turns"] if turn["role"] == "tool"]
        assert all(text in sample["answer"] for text in told)
        assert [*sample["rewards"].values()] == [sample["reward"]]


@pytest.mark.slow
@thorough  # test_turn_processes.py goes on after a kill
def test_runs_resume_with_the_same_bits(folder, tmp_path):
    whole = run(folder, tmp_path / "whole", *STEPS, "--grad-accum", 7, "--batch-size", GROUP)
    args = [*STEPS, "--grad-accum", 7, "--batch-size", GROUP, "--save-every", 1]
    run(folder, tmp_path / "parts", *args, "--steps", 1)
    parts = run(folder, tmp_path / "parts", *args, "--resume")
    timed = ("time", "tokens_per_s")
    assert [{k: v for k, v in line.items() if k not in timed} for line in whole] == [
        {k: v for k, v in line.items() if k not in timed} for line in parts
    ]


@pytest.mark.slow
def test_runs_side_by_side_draw_as_each_alone(folder, tmp_path):
    (tmp_path / "runs.csv").write_text("name,rank,lr\na,2,1e-2\nb,4,2e-2\n")
    grpo.main(line_of(folder, tmp_path / "all", *STEPS, "--many", tmp_path / "runs.csv"))
    alone = run(folder, tmp_path / "b", *STEPS, "--rank", 4, "--lr", 2e-2)
    beside, other = (read_metrics(tmp_path / "all" / name) for name in "ba")
    rewards = [[line["reward"] for line in lines] for lines in (beside, alone, other)]
    assert rewards[0] == rewards[1] != rewards[2]
    assert_close(*(np.array([line["loss"] for line in x]) for x in (beside, alone)), 1e-5)


BAD = {
    "turns": (["--max-turns", "0"], "--max-turns"),
    "no tools": (["--max-turns", "2"], "no tool is called"),
    "no secret": ([], "`reset` needs the field 'secret', but the rows of --dataset"),
    "no format": ([], "writes calls in no known format"),
}


@pytest.mark.parametrize("way", BAD)
def test_bad_input_is_one_paragraph(folder, tmp_path, capsys, way):
    args, message = BAD[way]
    line = line_of(folder, tmp_path / "run", "--steps", 1, *args)
    if way == "no tools":
        at = line.index("--environment")
        line[at : at + 2] = ["--reward", "length"]
    if way == "no secret":
        (tmp_path / "rows.jsonl").write_text('{"prompt": "play"}\n')
        line[line.index("--dataset") + 1] = str(tmp_path / "rows.jsonl")
    if way == "no format":
        if not (folder / "plain").exists():
            write_plain_model(folder / "plain")
        line[line.index("--model") + 1] = str(folder / "plain")
    told = fails(capsys, grpo.main, *line)
    assert message in told and len(told.splitlines()) == 1, told


@pytest.mark.slow
@thorough
def test_a_reward_of_several_turns_rises(folder, tmp_path):
    """A guess in time earns more, and so do further ones, which are told where to look."""
    args = ["--steps", 60, "--lr", 2e-2, "--rank", 1, "--group", 16, "--batch-size", 16 * 7]
    args += ["--loss", "dapo", "--schedule", "constant", "--max-new-tokens", 24, "--seq-len", 40]
    args += ["--sampling-temperature", 0.25]  # the frozen head alone would keep it near uniform
    rewards = [line["reward"] for line in run(folder, tmp_path / "run", *args)]
    assert np.mean(rewards[-10:]) > np.mean(rewards[:5]) + 0.15


def test_a_game_takes_the_options_of_tools():
    line = ["--dataset", "guess", "--max-turns", "3", "--tool-timeout", "5"]
    assert grpo.parse(line).data.max_turns == 3
    with pytest.raises(UserError, match="no tool is called"):
        grpo.parse(line[2:])
