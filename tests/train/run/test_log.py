"""The record of a run, its copies, and what a resumed run does with them."""

import io
import json
import time
from types import SimpleNamespace

import matplotlib.image
import numpy as np
import pytest
from matplotlib.figure import Figure
from rich.console import Console
from tensorboardX.proto.event_pb2 import Event

from train.reporters.contract import Sample
from train.reporters.files import METRICS, SAMPLES, read_lines
from train.reporters.reporting import Reporting
from train.reporters.tensorboard import TensorBoard
from train.run import log as run_log
from train.run.log import RunLog, draw_curve, draw_progress, duration, read_metrics
from train.tasks import prompts


def line(step):
    return {"step": step, "loss": 1 / step, "lr": 0.1, "count": 5, "tokens_per_s": 7.0}


def reporting(folder, reporters, warn=print):
    """The reporters of a run, as a script opens them."""
    lines, samples = (read_lines(folder / name) for name in (METRICS, SAMPLES))
    config = {"rank": 4, "summary": "few parameters"}
    return Reporting(
        folder, reporters, config=config, project=None, lines=lines, samples=samples, warn=warn
    )


def events(folder):
    """(tag, step) of each scalar in the event files."""
    found = []
    for path in (folder / "tensorboard").iterdir():
        content = path.read_bytes()
        while content:  # length, its checksum, the record, its checksum
            length = int.from_bytes(content[:8], "little")
            event = Event.FromString(content[12 : 12 + length])
            found += [(value.tag, event.step) for value in event.summary.value]
            content = content[16 + length :]
    return sorted(found)


def write(folder, steps, first):
    console = Console(file=io.StringIO(), force_terminal=False)
    with (
        reporting(folder, {"tensorboard": TensorBoard}) as reports,
        RunLog(folder, console, first=first, last=6, reporting=reports) as log,
    ):
        for step in steps:
            log.add(line(step))
    return console.file.getvalue()


def test_lines_and_events_are_the_same_steps(tmp_path):
    text = write(tmp_path, [1, 2, 3], first=0)
    assert "step 3/6  loss 0.3333  lr 1.00e-01  7 tokens/s" in text
    assert [entry["step"] for entry in read_metrics(tmp_path)] == [1, 2, 3]
    assert [step for tag, step in events(tmp_path) if tag == "loss"] == [1, 2, 3]


def test_a_resumed_run_has_no_step_twice(tmp_path):
    write(tmp_path, [1, 2, 3, 4], first=0)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "lo')  # a kill cut it short
    write(tmp_path, [3, 4, 5, 6], first=2)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(text)["step"] for text in lines] == [1, 2, 3, 4, 5, 6]
    assert [step for tag, step in events(tmp_path) if tag == "loss"] == [1, 2, 3, 4, 5, 6]


def test_the_time_left_leaves_out_the_first_line_whose_steps_compile(tmp_path, monkeypatch):
    """Ten minutes to compile, then three seconds a step."""
    clock = SimpleNamespace(monotonic=lambda: clock.now, time=time.time, now=0.0)
    monkeypatch.setattr(run_log, "time", clock)
    console = Console(file=io.StringIO(), force_terminal=False)
    with RunLog(tmp_path, console, first=0, last=6) as log:
        for step, clock.now in ((1, 600.0), (3, 606.0), (5, 612.0)):
            log.add(line(step))
    lines = console.file.getvalue().splitlines()
    assert [text.partition("tokens/s")[2] for text in lines] == ["", "  9 s left", "  3 s left"]


def test_a_terminal_gets_a_progress_bar(tmp_path):
    console = Console(file=io.StringIO(), force_terminal=True, width=120)
    with RunLog(tmp_path, console, first=0, last=2) as log:
        log.add(line(1))
        log.add({"step": 1, "eval_loss": 0.5})
        log.add(line(2))
    assert "2/2" in console.file.getvalue() and "loss 0.5000" in console.file.getvalue()


WATCHED = {"reward": "should rise", "zero_spread": "teaches nothing", "length": "tokens"}


def rewarded(step, **others):
    return line(step) | {"reward": -1.23456e-05 * step, "length": 12.0, "kl": 0.5} | others


@pytest.mark.parametrize("seconds", [0.0, float("inf")])
def test_a_step_shows_what_to_watch_and_the_record_has_the_rest(seconds, tmp_path, monkeypatch):
    """Lines of steps that follow one another closely are left out; the last one never is."""
    monkeypatch.setattr(run_log, "_SECONDS_BETWEEN_STEP_LINES", seconds)
    console = Console(file=io.StringIO(), force_terminal=False)
    with RunLog(tmp_path, console, first=0, last=3, watched=WATCHED) as log:
        for step in (1, 2, 3):
            log.add(rewarded(step))
    text = console.file.getvalue()
    assert text.count("  zero_spread: teaches nothing\n") == 1
    steps = [one for one in text.splitlines() if one.startswith("step")]
    assert [one.split()[1] for one in steps] == (
        ["1/3", "2/3", "3/3"] if not seconds else ["1/3", "3/3"]
    )
    assert steps[-1] == "step 3/3  reward -3.7e-05  length 12  0 s left"
    assert all({"kl", "lr", "loss", "tokens_per_s"} <= one.keys() for one in read_metrics(tmp_path))
    assert len(read_metrics(tmp_path)) == 3


def test_the_line_of_a_step_fits_120_columns(tmp_path):
    names = prompts.WATCHED
    console = Console(file=io.StringIO(), force_terminal=False)
    with RunLog(tmp_path, console, first=0, last=100_000, watched=names) as log:
        log.add(rewarded(99_999, **dict.fromkeys(names, -1.23456e-05)))
    (step,) = (one for one in console.file.getvalue().splitlines() if one.startswith("step"))
    assert len(step) <= 120 and all(f"{name} -1.23e-05" in step for name in names), step


def test_progress_is_a_picture_and_a_sentence(tmp_path):
    lines = [rewarded(step, reward=step / 40) for step in range(1, 41)] + [
        {"step": 41, "skipped": 1.0}
    ]
    told = draw_progress(tmp_path, lines, WATCHED)
    assert told.startswith("reward: 0.0375 in the first 2 steps, 0.988 in the last; drawn in ")
    assert told.endswith("progress.png") and (tmp_path / "progress.png").stat().st_size > 5_000
    assert draw_progress(tmp_path / "none", [line(1)], WATCHED) == ""
    assert draw_progress(tmp_path / "none", lines, {}) == "" and not (tmp_path / "none").exists()


def test_a_sentence_of_progress_weighs_lines_by_their_steps_and_counts_them(tmp_path):
    """Forty lines of five steps, and a last one of one: the last two lines cover six steps."""
    lines = [rewarded(step, reward=0.0) for step in range(5, 201, 5)] + [rewarded(201, reward=3.0)]
    told = draw_progress(tmp_path, lines, ["reward"])
    assert told.startswith("reward: 0 in the first 10 steps, 0.5 in the last 6;")


def seen_in(draw, monkeypatch):
    """Returns whether a colour is seen at a point of a picture: f(axes' number, x, y, colour)."""
    figures, files = [], []
    save = Figure.savefig

    def saved(figure, file, **how):
        figures.append(figure)
        files.append(file)
        save(figure, file, **how)

    monkeypatch.setattr(Figure, "savefig", saved)
    draw()
    pixels = matplotlib.image.imread(files[0])[::-1, :, :3]  # from below
    height, width, _ = pixels.shape

    def seen(panel, x, y, colour):
        axes = figures[0].axes[panel]
        place = axes.transData + figures[0].transFigure.inverted()
        column, row = (place.transform((x, y)) * (width, height)).astype(int)
        near = pixels[row - 2 : row + 3, column - 2 : column + 3]
        return np.abs(near - matplotlib.colors.to_rgb(colour)).sum(-1).min() < 0.05

    return seen


CURVES = {"a single line": ([10], [10]), "ten steps a line": ([10, 20, 30], [10, 20])}


@pytest.mark.parametrize("case", CURVES)
def test_a_mean_is_drawn_over_its_steps_and_a_single_point_is_seen(case, tmp_path, monkeypatch):
    steps, measured = CURVES[case]
    lines = [line(step) for step in steps] + [{"step": at, "eval_loss": 0.06} for at in measured]
    seen = seen_in(lambda: draw_curve(tmp_path, lines), monkeypatch)
    for step in steps:
        assert all(seen(0, x, 1 / step, "C0") for x in (step - 9.7, step - 5, step - 0.3))
    assert all(seen(0, step, 0.06, "C1") for step in measured)


def test_progress_is_drawn_over_the_steps_of_its_means(tmp_path, monkeypatch):
    """Sixty lines of five steps: a mean over three lines covers fifteen steps."""
    lines = [rewarded(5 * n, reward=float(n > 3)) for n in range(1, 61)]
    told = []
    seen = seen_in(lambda: told.append(draw_progress(tmp_path, lines, ["reward"])), monkeypatch)
    assert told[0].startswith("reward: 0 in the first 15 steps, 1 in the last;")
    assert all(seen(0, x, 0, "C0") for x in (1, 8, 14))
    assert all(seen(0, x, 1, "C0") for x in (16, 150, 299))


@pytest.mark.parametrize("constrained", [False, True])  # a user's own setting
def test_the_curve_is_a_picture(constrained, tmp_path):
    with matplotlib.rc_context({"figure.constrained_layout.use": constrained}):
        draw_curve(tmp_path, [line(1), {"step": 1, "eval_loss": 2.0}, line(2)])
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(("seconds", "text"), [(0.2, "0 s"), (59, "59 s"), (200, "3 min 20 s")])
def test_durations(seconds, text):
    assert duration(seconds) == text


def test_a_log_file_says_what_is_done_before_it_is_done(monkeypatch):
    said = io.StringIO()
    monkeypatch.setattr(run_log, "_SECONDS_BETWEEN_PROGRESS_LINES", 0.0)
    with run_log.doing(Console(file=said), "answering") as progress:
        assert said.getvalue() == "answering …\n"
        progress(1, 2)
        progress(2, 2)
    assert said.getvalue().splitlines()[1:] == ["answering: 1 of 2", "answering: 0 s"]


def test_a_long_record_is_reported_again_in_order_and_in_one_pass(tmp_path):
    class Looked(dict):
        looks = 0

        def __getitem__(self, name):
            Looked.looks += 1
            return super().__getitem__(name)

    class Told:
        def __init__(self):
            self.steps = []

        def line(self, line):
            self.steps.append(dict.__getitem__(line, "step"))

        def samples(self, step, samples, at):
            self.steps.append((step, [sample.answer for sample in samples], at))

    n, told = 500, Told()
    lines = [Looked(step=step, loss=1.0) for step in range(1, n + 1)]
    answers = [Looked(step=2, prompt="a", answer=text, time=9.0) for text in ("b", "c")]
    run_log._replay(told, lines, answers)
    assert told.steps == [1, 2, (2, ["b", "c"], 9.0), *range(3, n + 1)]
    assert Looked.looks < 4 * n, "a look at each line for each step would be quadratic"


def test_the_facts_of_samples_are_reported_again_with_those_that_older_lines_have():
    """An older line has fewer facts, and a later one may have facts that are not known here."""
    reported = []
    told = SimpleNamespace(samples=lambda step, samples, at: reported.extend(samples))
    turns = [{"role": "assistant", "text": "b"}]
    older = {"step": 1, "prompt": "a", "answer": "b", "time": 1.0}
    newer = {**older, "step": 2, "reward": 0.5, "place": 3, "turns": turns, "advantage": -1.0}
    run_log._replay(told, [], [older, {**newer, "from_the_future": 1}])
    first, second = reported
    assert first == Sample("a", "b")
    assert second == Sample("a", "b", 0.5, place=3, turns=turns, advantage=-1.0)
