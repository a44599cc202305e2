"""The parts of a table of runs: rows that are read once, the board, and a run's own log."""

import dataclasses
import io
from contextlib import ExitStack

from rich.console import Console

from train.options.file import replace_options
from train.options.scripts.sft import Config
from train.run.board import Board, BufferedConsole, print_results
from train.settings.defaults import fill_defaults
from train.stages import inputs
from train.stages.inputs import InputReader
from train.tasks.chats import TASK
from train.tasks.sql import TASK as SQL


def test_rows_are_read_once_for_all_runs_that_share_them(monkeypatch):
    monkeypatch.setattr(inputs, "read_inputs", lambda config, task: object())
    reader = InputReader()
    plain = fill_defaults(replace_options(Config(), {"dataset": ("rows.jsonl",)}), TASK.defaults)

    def found(task=TASK, **options):
        return reader(replace_options(plain, options), task)

    first = found()
    same = [{"lr": 3e-4, "rank": 3, "steps": 9}, {"seed": 5}, {"output": "b", "batch_size": 2}]
    assert all(found(**options) is first for options in same)
    others = [{"seq_len": 64}, {"packing": True}, {"train_on": "all"}, {"rows": 5}]
    others += [{"dataset": ("b.jsonl",)}, {"stream": True}, {"eval_every": 2}]
    made = [found(**options) for options in others]
    assert len({*map(id, made), id(first)}) == len(others) + 1
    # The seed draws held-out rows, and the questions of the SQL task.
    assert found(eval_every=2, seed=1) is not found(eval_every=2)
    assert found(SQL, seed=1) is not found(SQL) is found(SQL, lr=1e-5)
    never = dataclasses.replace(TASK, reads=lambda config: ())
    assert found(never, eval_every=2, seed=1) is found(never, eval_every=2)


def test_the_board_shows_all_runs(monkeypatch):
    console = Console(file=io.StringIO(), width=100)
    board = Board(console, {"a": 9, "b [1]": 4})
    with board:
        board.show()
        assert not console.file.getvalue()  # nothing is new
        board.note("a", {"step": 3, "loss": 1.5, "tokens_per_s": 1234.0})
        board.note("a", {"step": 3, "eval_loss": 2.25})
        board.show()
        board.note("a", {"step": 4, "loss": 1.25})
        board.show()  # too soon
        board.ended("b [1]", "failed")
    rows = [line.split() for line in console.file.getvalue().splitlines()]
    assert rows[1] == ["a", "3/9", "1.5000", "2.2500", "1,234"]
    assert rows[2] == ["b", "[1]", "0/4"] and rows[3:] == [["b", "[1]:", "failed"]]


def test_what_a_run_prints_is_kept_in_its_folder_once_it_has_one(tmp_path):
    paper = BufferedConsole()
    paper.console.print("before")
    with ExitStack() as held:
        paper.keep_in(tmp_path, held)
        paper.console.print("after")
        assert (tmp_path / "log.txt").read_text() == "before\nafter\n"


def test_figures_of_the_results_are_whole_in_80_columns():
    console = Console(file=io.StringIO(), width=80)
    runs = [f"rank-{rank}-of-all-linear-layers-on-{rank} chats" for rank in (4, 128)]
    figures = {
        "status": "stopped",
        "steps": 12_345,
        "kept_step": 12_344,
        "loss": 12.34567,
        "loss_step": 12_343,
        "held_out_loss": 23.45678,
        "held_out_step": 12_342,
        "score": 0.98765,
    }
    print_results(console, [{"name": name} | figures for name in runs])
    lines = console.file.getvalue().splitlines()
    assert max(map(len, lines)) <= 80 and "…" not in console.file.getvalue()
    in_words = ["stopped", "12345", "12344", "12.3457", "12343", "23.4568", "12342", "0.9877"]
    assert [line.split()[-8:] for line in lines if "stopped" in line] == [in_words] * 2
    for name in runs:
        assert name.replace(" ", "") in "".join(line[:18].replace(" ", "") for line in lines)
    print_results(console, [{"name": "a", "loss": None}, {"name": "b", "loss": None}])
    assert "loss" not in console.file.getvalue().rpartition("Runs")[2]
