"""`train.grpo` and `train.distill` on a tiny model: what is drawn, learned, resumed and refused."""

import json

import jax
import numpy as np
import pytest

import lora_jax as lj
from lora_jax import models
from tests.adapted_trees import with_random_factors
from tests.support import THOROUGH, assert_close, assert_identical, but_rarely, over, thorough
from tests.train.scripts import fails
from tests.train.tiny import CONFIG, tokenizer, write_jsonl, write_model
from train import distill, grpo
from train.adapters.source import find_adapter
from train.live.rollouts import Rollouts
from train.run.log import read_metrics

# Orbax leaves coroutines behind where a file cannot be read.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
ENDS = (*range(100, 124), CONFIG["eos_token_id"])  # so many that completions end in time
RULES = [lj.LoraRule(targets=["q_proj", "v_proj"], rank=3, alpha=6)]
GROUP, NEW, PROMPTS = 8, 12, 6
REWARDS = """
import math, random, time

def early(completion_ids, **others):
    return [sum(id < 90 for id in ids) / len(ids) for ids in completion_ids]

def shuffled(completion_ids, **others):
    values = early(completion_ids)
    random.Random(str(completion_ids)).shuffle(values)
    return values

def rare(completion_ids, **others):
    return [float(sum(id < 90 for id in ids) > 4) for ids in completion_ids]

def same(completions, **others):
    return [0.25] * len(completions)

def silent(completions, **others):
    return [None] * len(completions)

def hangs(completions, **others):
    time.sleep(60)

def half(completion_ids, **others):
    return [math.nan if i % 2 else x for i, x in enumerate(early(completion_ids))]
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model, an adapter over it that is in use, prompts and rewards."""
    folder = tmp_path_factory.mktemp("inputs")
    write_model(folder / "model", scale=0.5, eos_token_id=ENDS)
    _, params = models.from_pretrained(folder / "model")
    lj.save_adapter(folder / "used", with_random_factors(lj.lorafy(params, RULES)))
    write_model(folder / "endless", scale=0.5)
    write_jsonl(folder / "rows.jsonl", [{"prompt": "a" * (1 + i)} for i in range(PROMPTS)])
    (folder / "rewards.py").write_text(REWARDS)
    return folder


def line_of(folder, output, *args, reward="early"):
    line = ["--model", folder / "model", "--dataset", folder / "rows.jsonl", "--output", output]
    line += ["--max-new-tokens", NEW, "--seq-len", 64, "--warmup", 1, "--report-to", "none"]
    line += ["--targets", "q_proj", "v_proj"] if "--init-adapter" not in args else []
    if reward:
        line += ["--reward", f"{folder / 'rewards.py'}:{reward}"]
        line += ["--eval-questions", 0] if "--eval-dataset" not in args else []
        line += ["--group", GROUP, "--batch-size", GROUP * PROMPTS, "--loss", "grpo"]
    return [str(arg) for arg in [*line, *args]]


def run(folder, output, *args, **options):
    """Runs train.grpo; returns its metrics."""
    grpo.main(line_of(folder, output, *args, **options))
    return read_metrics(output)


def adapter_of(folder, output):
    model, params = models.from_pretrained(folder / "model")
    return lj.split(find_adapter(str(output)).load(model, params, "the base"))[0]


def lines_of(output, name):
    return [json.loads(line) for line in (output / name).read_text().splitlines()]


def told(capsys):
    """Returns what was printed, on one line."""
    return " ".join(capsys.readouterr().out.split())


def recorded(monkeypatch):
    """The arguments and the result of each draw, in a list that fills."""
    found, draw = [], Rollouts.draw

    def drawn(self, params, rows, number, attempt=0):
        made = draw(self, params, rows, number, attempt)
        found.append((np.array(rows), number, attempt, jax.tree.map(np.copy, made)))
        return made

    monkeypatch.setattr(Rollouts, "draw", drawn)
    return found


LEARNING = ["--steps", 10, "--lr", 5e-2]


@pytest.fixture(scope="module")
def learned(folder, tmp_path_factory):
    output = tmp_path_factory.mktemp("runs") / "learned"
    return output, run(folder, output, *LEARNING)


def test_a_reward_rises(learned):
    output, lines = learned
    rewards = [line["reward"] for line in lines]
    assert np.mean(rewards[-3:]) > np.mean(rewards[:3]) + 0.3
    # What is logged is what was drawn, and what was drawn is what trains.
    samples = lines_of(output, "samples.jsonl")
    for line in lines:
        here = [one for one in samples if one["step"] == line["step"]]
        assert len(here) == GROUP * PROMPTS and all(one["prompt"].strip("a") == "" for one in here)
        assert np.mean([one["reward"] for one in here]) == pytest.approx(line["reward"], rel=1e-6)
        assert np.mean([one["cut"] for one in here]) == pytest.approx(line["truncated"])
        places = [(one["group"], one["place"]) for one in here]
        assert places == [(group, place) for group in range(PROMPTS) for place in range(GROUP)]
        assert all([*one["rewards"].values()] == [one["reward"]] for one in here)
        by_group = np.reshape([one["advantage"] for one in here], (PROMPTS, GROUP))
        np.testing.assert_allclose(by_group.sum(1), 0, atol=1e-5)
    assert max(line["mismatch_max"] for line in lines) < 1e-5
    assert all(0 < line["truncated"] < 1 and 1 < line["length"] < NEW for line in lines)


def test_the_first_update_has_a_gradient_and_no_loss(learned):
    _, (first, *_) = learned
    assert abs(first["loss"]) < 1e-6 and first["grad_norm"] > 1e-2
    assert first["clip_low"] == first["clip_high"] == 0


@pytest.mark.slow
def test_a_shuffled_reward_does_not_rise(folder, tmp_path):
    lines = run(folder, tmp_path / "run", *LEARNING, reward="shuffled")
    rewards = [line["reward"] for line in lines]
    assert np.mean(rewards[-3:]) < np.mean(rewards[:3]) + 0.1


WITHOUT = ("same", "silent")  # equal rewards, and no opinion


@over("reward", WITHOUT, often=[])
def test_nothing_is_learned_from_nothing(folder, tmp_path, reward, capsys):
    args = ["--init-adapter", folder / "used", "--steps", 2, "--lr", 1e-1]
    lines = run(folder, tmp_path / "run", *args, reward=reward)
    assert [line["loss"] for line in lines] == [0, 0] == [line["grad_norm"] for line in lines]
    assert not any("skipped" in line for line in lines)
    assert_identical(adapter_of(folder, tmp_path / "run"), adapter_of(folder, folder / "used"))
    assert all(line["zero_spread"] == 1 for line in lines)
    if reward == "silent":
        assert not any("reward" in line for line in lines)
        assert told(capsys).count("No reward returned a number for any of 48 completions") == 1


@over("loss", ["dapo", "grpo", "rloo"], often=[], rare=["dapo", "rloo"])
def test_completions_without_a_counted_token_change_nothing(folder, tmp_path, loss, capsys):
    """Weight decay does not move the adapter, and no number of such steps ends the run."""
    args = ["--init-adapter", folder / "used", "--steps", 3, "--lr", 1e-1, "--loss", loss]
    args += ["--mask-truncated", "--max-new-tokens", 2, "--model", folder / "endless"]
    args += ["--weight-decay", 0.5, "--max-skipped", 2, "--save-every", 2]
    lines = run(folder, tmp_path / "run", *args)
    why = "no token of its batch counts"
    assert [(x["step"], x["skipped"], x["reason"]) for x in lines] == [
        (n, 1, why) for n in (1, 2, 3)
    ]
    assert told(capsys).count(f"skipped: {why}") == 3
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["skipped_steps"] == [1, 2, 3] and {*report["skip_reasons"].values()} == {why}
    assert {path.name for path in (tmp_path / "run" / "checkpoints").iterdir()} == {"2", "3"}
    assert_identical(adapter_of(folder, tmp_path / "run"), adapter_of(folder, folder / "used"))


@pytest.mark.slow
def test_a_reward_that_hangs_is_ended(folder, tmp_path, capsys):
    args = ["--steps", 1, "--reward-timeout", 1]
    (line,) = run(folder, tmp_path / "run", *args, reward="hangs")
    assert line["skipped"] == 1 and "loss" not in line
    assert "A call took longer than 1 seconds. Increase --reward-timeout" in told(capsys)


@pytest.mark.slow
@thorough  # test_killed.py does so without parts
def test_resumed_bit_by_bit_between_two_updates(folder, tmp_path):
    """With gradients in parts."""
    args = ["--updates", 2, "--schedule", "constant", "--lr", 3e-2, "--save-every", 3]
    args += ["--grad-accum", 2, "--batch-size", 24]
    whole = run(folder, tmp_path / "whole", *args, "--steps", 7)
    run(folder, tmp_path / "parts", *args, "--steps", 3)
    parts = run(folder, tmp_path / "parts", *args, "--steps", 7, "--resume")
    assert_identical(*(adapter_of(folder, tmp_path / name) for name in ("whole", "parts")))
    timed = ("time", "tokens_per_s")
    assert [{k: v for k, v in line.items() if k not in timed} for line in whole] == [
        {k: v for k, v in line.items() if k not in timed} for line in parts
    ]
    assert whole[3]["clip_high"] + whole[3]["clip_low"] > 0  # the second update is off the policy
    samples = [lines_of(tmp_path / name, "samples.jsonl") for name in ("whole", "parts")]
    drawn = [[(one["step"], one["answer"]) for one in run] for run in samples]
    assert drawn[0] == drawn[1] and [*dict.fromkeys(step for step, _ in drawn[0])] == [1, 3, 5, 7]


PARTS = {"dapo": (4, []), "grpo": (2, []), "dr_grpo": (4, ["--beta", 0.2])}


@pytest.fixture(scope="module")
def stepped(folder, tmp_path_factory):
    """Takes one step of plain descent, so that the adapter's change is its gradient."""
    output, found = tmp_path_factory.mktemp("stepped"), {}

    def step(loss, parts):
        if (loss, parts) not in found:
            args = [
                "--loss",
                loss,
                *PARTS[loss][1],
                "--init-adapter",
                folder / "used",
                "--steps",
                1,
            ]
            args += ["--lr", 1, "--optimizer", "sgd", "--momentum", 0, "--grad-clip", 0]
            args += ["--group", 2, "--batch-size", 8 // parts, "--grad-accum", parts]
            (line,) = run(folder, output / f"{loss} {parts}", *args)
            found[loss, parts] = line, adapter_of(folder, output / f"{loss} {parts}")
        return found[loss, parts]

    return step


@pytest.mark.slow
@pytest.mark.parametrize("loss", but_rarely(PARTS, "grpo"))
def test_rollouts_in_parts_are_the_batch(folder, stepped, loss):
    """The same completions are drawn, and one gradient comes of them."""
    (whole, expected), (line, adapter) = stepped(loss, 1), stepped(loss, PARTS[loss][0])
    begun = adapter_of(folder, folder / "used")
    moved = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), expected, begun)
    assert min(jax.tree.leaves(moved)) > 5e-4
    names = ["loss", "count", "grad_norm", "reward", "length", "truncated", "entropy"]
    got, want = ([x[name] for name in names] for x in (line, whole))
    assert got == pytest.approx(want, rel=1e-6, abs=1e-6)
    assert_close(adapter, expected, 1e-6)


@pytest.mark.slow
def test_groups_without_spread_are_drawn_again(folder, tmp_path, monkeypatch):
    found = recorded(monkeypatch)
    args = ["--steps", 2, "--redraw", 2]
    lines = run(folder, tmp_path / "run", *args, reward="rare")

    def is_flat(drawn):
        rare = [
            [sum(id < 90 for id in ids[:n]) > 4 for ids, n in zip(*group, strict=True)]
            for group in zip(drawn.tokens, drawn.lengths, strict=True)
        ]
        return np.array([len({*group}) == 1 for group in rare])

    for number in range(2):
        first, *again = [draw for draw in found if draw[1] == number]
        rows, flat = first[0], is_flat(first[3])
        assert 0 < flat.sum() < PROMPTS and again
        for attempt, (asked, _, made_as, drawn) in enumerate(again, start=1):
            assert made_as == attempt and asked.tolist() == rows[flat].tolist()
            flat[np.flatnonzero(flat)[~is_flat(drawn)]] = False
        assert lines[number]["zero_spread"] == pytest.approx(flat.mean())
        samples = [
            x for x in lines_of(tmp_path / "run", "samples.jsonl") if x["step"] == number + 1
        ]
        assert len(samples) == GROUP * PROMPTS
        earned = np.mean([one["reward"] for one in samples])
        assert earned == pytest.approx(lines[number]["reward"], rel=1e-6)


STOPS = ("\n\n", "\r", ")")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stops", "special"), [(STOPS, ""), ([*"()*+,-./"], "()*+,-./:")], ids=["texts", "special"]
)
def test_a_text_ends_a_completion_and_rewards_that_fail_leave_the_others(
    folder, tmp_path, monkeypatch, capsys, stops, special
):
    found, made = recorded(monkeypatch), tokenizer()
    args = ["--steps", 1, "--stop", *stops, "--lr", 1e-2]
    if special:  # they are left out of all texts
        other = tokenizer()
        other.add_special_tokens({"additional_special_tokens": [*special]})
        assert len(other) == len(made)
        other.save_pretrained(tmp_path / "other")
        args += ["--tokenizer", tmp_path / "other"]
    (line,) = run(folder, tmp_path / "run", *args, reward="half")
    assert line["reward_failed"] == 0.5 and line["grad_norm"] > 0
    assert "returned no reward for 24 of 48 completions (not finite): nan" in told(capsys)
    ((*_, drawn),) = found
    stopped = 0
    for ids, n, ended, text in zip(
        drawn.tokens.reshape(-1, NEW),
        drawn.lengths.ravel(),
        drawn.ended.ravel(),
        drawn.texts.ravel(),
        strict=True,
    ):
        texts = [made.decode(ids[:k], skip_special_tokens=True) for k in range(NEW + 1)]
        ends = next((k for k in range(1, NEW + 1) if int(ids[k - 1]) in ENDS), NEW + 1)
        stop = next(
            (k for k, one in enumerate(texts) if any(stop in one for stop in stops)), NEW + 1
        )
        assert n == min(ends, stop, NEW) and ended == (min(ends, stop) <= NEW)
        if stop <= ends and stop <= NEW:
            stopped += 1
            before = min(at for at in map(texts[stop].find, stops) if at >= 0)
            assert text == "".join(c for c in texts[stop][:before] if c not in special)
    assert stopped > 2 and line["length"] == pytest.approx(drawn.lengths.mean())


EVERYWHERE = ["--targets", "all-linear", "--lr", 3e-2]


@pytest.mark.slow
def test_held_out_prompts_are_completed_and_rewarded_as_others_are(folder, tmp_path):
    """The likeliest token alone is drawn: what is greedy on the way and what is measured agree."""
    args = ["--steps", 1, "--top-k", 1, "--eval-dataset", folder / "rows.jsonl", "--stop", *STOPS]
    args += ["--reward", "length"]
    (line,) = run(folder, tmp_path / "run", *args)
    scores = json.loads((tmp_path / "run" / "scores.json").read_text())
    assert scores["reward"]["base"] == pytest.approx(line["reward"], rel=1e-6) and line["reward"]
    drawn = {(x["prompt"], x["answer"]) for x in lines_of(tmp_path / "run", "samples.jsonl")}
    assert {(x["prompt"], x["answer"]) for x in scores["answers"]["base"]} == drawn


@pytest.mark.slow
@thorough
def test_runs_of_a_table_draw_their_own_completions(folder, tmp_path):
    """Each is what its options make of it alone; an epsilon hides the last bits."""
    rows = [
        {"lr": 1e-2, "sampling_temperature": 1.3, "beta": 0.1, "seed": 3},
        {"lr": 1e-2, "loss": "rloo", "updates": 2, "batch_size": 24, "grad_accum": 3},
    ]
    if THOROUGH:
        masked = {"loss": "dr_grpo", "mask_truncated": True}
        rows.append({"lr": 5e-2, "group": 4, "batch_size": 24, **masked})
    line = ["--steps", 3, "--eps", 1e-4, "--schedule", "constant"]
    table = write_jsonl(
        tmp_path / "runs.jsonl", [{"name": f"{i}"} | row for i, row in enumerate(rows)]
    )
    grpo.main(line_of(folder, tmp_path / "many", *line, "--many", table))
    for number, row in enumerate(rows):
        args = [f"--{name.replace('_', '-')}={value}" for name, value in row.items()]
        args = ["--mask-truncated" if "mask" in arg else arg for arg in args]
        alone = run(folder, tmp_path / f"alone {number}", *line, *args)
        beside = read_metrics(tmp_path / "many" / f"{number}")
        for name in ("loss", "grad_norm", "reward", "count"):
            both = ([x[name] for x in lines] for lines in (beside, alone))
            assert_close(*map(np.array, both), 1e-5)
        places = (tmp_path / "many" / f"{number}", tmp_path / f"alone {number}")
        assert_close(*(adapter_of(folder, place) for place in places), 1e-5)


TEACHERS = {
    "an adapter": lambda folder: ["--teacher", folder / "used"],
    "a longer prompt": lambda folder: ["--teacher-prompt", "Say nothing but zzzzzz. "],
    "another model": lambda folder: ["--teacher-model", folder / "other", *EVERYWHERE],
}


@over("teacher", TEACHERS, often=[], rare=["an adapter"])
def test_a_student_comes_closer_to_its_teacher(folder, tmp_path, teacher):
    if not (folder / "other").exists():
        write_model(folder / "other", scale=0.8, eos_token_id=ENDS)
    args = ["--steps", 12, "--lr", 2e-2, "--batch-size", 48, *TEACHERS[teacher](folder)]
    distill.main(line_of(folder, tmp_path / "run", *args, reward=None))
    lines = read_metrics(tmp_path / "run")
    apart = [line["reverse_kl"] for line in lines]
    assert np.mean(apart[-3:]) < 0.7 * np.mean(apart[:3]) and apart[0] > 0.01
    assert max(line["mismatch_max"] for line in lines) < 1e-5


BAD = {
    "no room": (["--max-new-tokens", "40"], "and leave no room for --max-new-tokens 40"),
    "no room at all": (["--max-new-tokens", "64"], "leaves no room for prompts in --seq-len 64"),
    "one of a group": (["--group", "1"], "--group 1 leaves nothing to compare"),
    "a broken group": (["--batch-size", "12"], "--batch-size 12 is not a multiple of --group 8"),
    "a reference without beta": (["--reference", "base"], "do not fit together"),
    "a divergence without beta": (["--divergence", "k3"], "--divergence k3 has no effect"),
    "rloo": (["--loss", "rloo", "--clip", "0.1"], "--clip has no effect on --loss rloo"),
    "cispo": (["--loss", "cispo", "--clip", "0.1"], "--loss cispo uses only one bound"),
    "weights": (["--reward-weights", "1", "2"], "2 weights for 1 rewards"),
    "no reward": (["--reward", "nowhere.py:f"], "The file nowhere.py does not exist"),
    "no such name": (["--reward", "length_"], "nor a known reward. Use arithmetic"),
    "a column": (["--reward", "arithmetic"], "--reward arithmetic needs the column 'answer'"),
    "held-out loss": (["--eval-every", "1"], "no held-out loss"),
    "held-out rows": (
        ["--eval-dataset", "rows.jsonl", "--eval-questions", "8"],
        "all of them are used. Remove --eval-questions",
    ),
    "a task's own rows": (
        ["--dataset", "arithmetic", "--eval-dataset", "rows.jsonl"],
        "--eval-dataset only applies to your own rows",
    ),
}


@pytest.mark.parametrize("way", BAD)
def test_bad_input_is_one_paragraph_before_training(folder, tmp_path, capsys, way):
    args, message = BAD[way]
    told = fails(capsys, grpo.main, *line_of(folder, tmp_path / "run", *args))
    assert message in told and len(told.splitlines()) == 1, told
    assert not list(tmp_path.glob("run/*"))


CHANGES = "training changes the base itself"


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "The teacher is the base model itself"),
        (["--teacher", "nowhere"], "--teacher nowhere"),
        (["--teacher-prompt", "long " * 900], "--teacher-prompt: the model"),
        (
            ["--teacher", "used", "--eval-questions", "3"],
            "--eval-questions 3 has no effect, because a teacher gives no",
        ),
        (["--teacher", "used", "--eval-dataset", "rows.jsonl"], "a teacher gives no score"),
        (["--teacher", "used", "--full"], CHANGES),
        pytest.param(
            *(["--teacher", "used", "--init", "pissa", "--rank", "2"], CHANGES),
            marks=pytest.mark.slow,
        ),
    ],
)
def test_bad_teachers_are_one_paragraph(folder, tmp_path, capsys, args, message):
    args = [str(folder / "used") if arg == "used" else arg for arg in args]
    line = line_of(folder, tmp_path / "run", *args, reward=None)
    if "--full" in args:
        at = line.index("--targets")
        del line[at : at + 3]
    told = fails(capsys, distill.main, *line)
    assert message in told and len(told.splitlines()) == 1, told


@pytest.mark.parametrize("script", [grpo, distill])
def test_an_empty_stop_text_is_refused(script, capsys):
    teacher = ["--teacher", "runs/teacher"] * (script is distill)
    said = fails(capsys, script.main, "--dataset", "rows.jsonl", "--stop", "a", "", *teacher)
    assert said.startswith("--stop '' would end every completion before it begins.")
