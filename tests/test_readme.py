"""The README's code runs, and prints what its comments say."""

import re
from pathlib import Path

import jax
import pytest

README = (Path(__file__).parent.parent / "README.md").read_text()
BLOCKS = re.findall(r"^```python( continued)?\n(.*?)^```", README, re.DOTALL | re.MULTILINE)


def expected_lines(code):
    return re.findall(r"print\(.*\)(?:  |\n)# (.*)", code)


def run(code, names, capsys):
    with jax.numpy_dtype_promotion("standard"):
        exec(compile(code, "README.md", "exec"), names)
    printed = capsys.readouterr().out.splitlines()
    assert [line for line in printed if line in expected_lines(code)] == expected_lines(code)


def test_the_example(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    code = BLOCKS[0][1]
    assert 20 <= sum(bool(line.strip()) for line in code.splitlines()) <= 26
    names = {}
    run(code, names, capsys)
    fresh = names["lj"].lorafy(
        names["lj"].strip(names["params"]), [names["lj"].LoraRule(targets="all-linear", rank=4)]
    )
    start = names["loss"](names["lj"].split(fresh)[0])
    assert names["loss"](names["adapter"]) < 0.5 * start
    assert (tmp_path / "adapter").is_dir()


@pytest.mark.slow
def test_the_example_with_a_pretrained_model(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names = {}
    for _, code in BLOCKS:
        run(code, names, capsys)
    assert names["logits"].shape == (1, 3, 49152)


def test_the_two_commands_are_one_line_each():
    commands = re.findall(r"^```sh\n(.*?)^```", README, re.DOTALL | re.MULTILINE)
    assert [c.count("\n") for c in commands[:2]] == [1, 1]
    assert all(c.startswith("python3 -m venv .venv && ") for c in commands[:2])
