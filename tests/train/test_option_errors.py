"""Errors of options are one line that names the help; some errors name the remedy."""

import pytest

from lora_jax.training.data.chats import chats
from lora_jax.training.errors import TrainingError
from tests.train.scripts import fails
from tests.train.test_help import PAGES, page_of
from tests.train.tiny import tokenizer, write_jsonl, write_model, write_rows
from train import command, dpo, sft
from train.run.output import begin


def refused(words, capsys, monkeypatch):
    """Runs a command line that is refused; returns the lines that it prints."""
    monkeypatch.setattr("sys.argv", ["lora-jax"])
    with pytest.raises(SystemExit) as ended:
        command.main(words)
    assert ended.value.code == 2
    printed = capsys.readouterr()
    assert not printed.out
    return printed.err.strip().splitlines()


@pytest.mark.parametrize("name", [*PAGES, "findings rates"])
def test_an_unknown_option_gets_one_line_and_the_help(name, capsys, monkeypatch):
    (line,) = refused([*name.split(), "--bogus"], capsys, monkeypatch)
    assert line.startswith("error: ") and "--bogus" in line
    assert line.endswith("lora-jax " + name + " --help explains the options.")


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["--lr", "abc"], "--lr takes FLOAT, but got abc."),
        (["--lr=abc"], "--lr takes FLOAT, but got abc."),
        (["--lr"], "--lr needs a value: FLOAT."),
        (["--rank", "8.5"], "--rank takes INT, but got 8.5."),
        (["--layers", "1", "b"], "--layers takes INT ..., but got 1 b."),
        (["--loss", "mse"], "--loss takes {cross-entropy,dft}, but got mse."),
        (["--rnk", "3"], "there is no option --rnk. The nearest is --rank."),
        (["--xyzzy", "3"], "there is no option --xyzzy."),
        (["--full", "yes"], "'yes' belongs to no option. A switch, such as --full, takes no value"),
        (["--remat", "none", "full"], "--remat takes one policy, but got none full. Pass only one"),
    ],
)
@pytest.mark.parametrize("columns", ["40", "200"])
def test_a_bad_value_is_named_with_what_the_option_takes(
    words, problem, columns, capsys, monkeypatch
):
    monkeypatch.setenv("COLUMNS", columns)
    (line,) = refused(["sft", *words], capsys, monkeypatch)
    assert problem in line and line.endswith("lora-jax sft --help explains the options.")
    assert "default" not in line


def test_a_missing_option_is_named(capsys, monkeypatch):
    (line,) = refused(["plan"], capsys, monkeypatch)
    assert line.startswith("error: --model TEXT is required. lora-jax plan --help")


@pytest.mark.parametrize("name", PAGES)
def test_no_help_shows_none_as_a_default(name):
    page = page_of(name, True)
    assert "(default: None)" not in page and "(default: )" not in page
    assert "default" in page.lower(), "the page has defaults that this test can see"


def test_rows_with_labels_name_the_loss_that_reads_them(tmp_path, capsys):
    rows = [{"prompt": "a", "completion": f"b{i}", "label": i % 2 == 0} for i in range(4)]
    data = write_jsonl(tmp_path / "rows.jsonl", rows)
    model = write_model(tmp_path / "model")
    args = ["--model", model, "--dataset", data, "--output", tmp_path / "run"]
    assert "Pass --loss kto for rows with labels" in fails(capsys, dpo.main, *args)


def test_resuming_with_another_rate_names_a_new_run_from_the_adapter(tmp_path, capsys):
    args = ["--model", "m", "--dataset", "x.jsonl", "--output", str(tmp_path)]
    begin(tmp_path, sft.parse(args), "train.sft", {})
    said = fails(capsys, sft.main, *args, "--resume", "--lr", "3e-5")
    assert "--lr was" in said and f"with --init-adapter {tmp_path}" in said


def test_a_rank_above_the_kernel_names_the_largest_rank(tmp_path, capsys):
    model, rows = write_model(tmp_path / "model"), write_rows(tmp_path / "rows.jsonl")
    args = ["--model", model, "--dataset", rows, "--output", tmp_path / "run"]
    said = fails(capsys, sft.main, *args, "--init", "olora", "--rank", "400")
    assert "Choose a rank of at most 24, or a start that takes every rank" in said


def test_calls_without_content_name_the_field():
    template = "{% for m in messages %}{{ m['role'] + m['content'] }}{{ m.tool_calls }}{% endfor %}"
    calls = [{"function": {"name": "f", "arguments": {}}}]
    for missing in ({}, {"content": None}):
        turns = [
            {"role": "user", "content": "a"},
            {"role": "assistant", "tool_calls": calls, **missing},
        ]
        with pytest.raises(TrainingError, match="the field `content`, such as an empty text"):
            chats([{"messages": turns}], tokenizer(template), seq_len=64)
    turns[1]["content"] = ""
    chats([{"messages": turns}], tokenizer(template), seq_len=256)
