"""The help of each command: ten options first, all with --help-all, wrapped once."""

import dataclasses
import re
import shlex

import pytest

from train import classify, command, distill, dpo, grpo, sft
from train.check.options import CheckOptions
from train.compare import __main__ as compare
from train.compare.scripts import SCRIPTS
from train.console.help import help_text
from train.doctor.__main__ import DoctorOptions
from train.doctor.__main__ import parse as parse_doctor
from train.export.options import ExportOptions
from train.export.options import parse_export_options as parse_export
from train.generate.options import GenerateOptions
from train.generate.options import parse as parse_generate
from train.options.command import parse_options
from train.plan.__main__ import parse as parse_plan
from train.plan.options import PlanOptions
from train.predict.__main__ import PredictOptions
from train.rollouts.__main__ import RolloutsOptions
from train.serve.options import ServeOptions
from train.serve.options import parse as parse_serve

TRAINERS = {"sft": sft, "dpo": dpo, "grpo": grpo, "distill": distill, "classify": classify}
# The options of each command, an instance with their defaults, and what reads its command line.
PAGES = {
    **{name: (type(s.SCRIPT.plain), s.SCRIPT.plain, s.parse) for name, s in TRAINERS.items()},
    **{
        f"compare {name}": (
            type(script.compared),
            script.compared,
            lambda args, name=name: compare.parse([name, *args]),
        )
        for name, script in SCRIPTS.items()
    },
    "plan": (PlanOptions, None, parse_plan),
    "check": (
        CheckOptions,
        None,
        lambda args: parse_options(CheckOptions, args, "train.check"),
    ),
    "doctor": (DoctorOptions, None, parse_doctor),
    "generate": (GenerateOptions, None, parse_generate),
    "serve": (ServeOptions, None, parse_serve),
    "export": (ExportOptions, None, parse_export),
    "rollouts": (
        RolloutsOptions,
        None,
        lambda args: parse_options(RolloutsOptions, args, "train.rollouts"),
    ),
    "predict": (
        PredictOptions,
        None,
        lambda args: parse_options(PredictOptions, args, "train.predict"),
    ),
}

WORDS = ("texts", "runs")  # of a command line without a flag


def page_of(name, everything, columns=80):
    kind, default, _ = PAGES[name]
    return help_text(kind, f"train.{name}", everything, columns, default)


def names_of(kind):
    for field in dataclasses.fields(kind):
        part = field.default if dataclasses.is_dataclass(field.default) else field.type
        turned_off = "no-" * (field.default is True)
        name = turned_off + field.name.replace("_", "-")
        yield from names_of(part) if dataclasses.is_dataclass(part) else [name]


def explained(page):
    """The flags that a page explains, in its order."""
    return re.findall(r"^  --([a-z][\w-]*)", page, re.M)


def test_each_command_has_a_page():
    assert {name.split()[0] for name in PAGES} | {"findings", "launch"} == command.COMMANDS.keys()


@pytest.mark.parametrize("name", PAGES)
def test_ten_options_come_first_and_all_are_explained_elsewhere(name):
    kind = PAGES[name][0]
    first = kind.HELP.first.split()
    flags = [word.replace("_", "-") for word in first if word not in WORDS]
    assert 3 <= len(first) <= 10
    short, whole = page_of(name, False), page_of(name, True)
    assert explained(short) == explained(whole)[: len(flags)] == flags
    rest = [option for option in names_of(kind) if option not in WORDS]
    assert sorted(explained(whole)) == sorted(rest)
    assert all(f"--{option}" in short.split() for option in rest)


@pytest.mark.parametrize("name", PAGES)
def test_the_example_is_a_command_line(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    kind, _, parse = PAGES[name]
    parse(shlex.split(kind.HELP.example))
    assert page_of(name, False).endswith(kind.HELP.example)


def broken_early(page, columns):
    """The lines of texts that had room for the next line's first word, or have no room."""
    lines = page.splitlines()
    deep = re.compile(r" {24}\S")
    return [
        line
        for line, after in zip(lines, [*lines[1:], ""], strict=True)
        if len(line) > columns
        or (deep.match(after) and (deep.match(line) or re.match(r"  \S.{19}  \S", line)))
        and len(line) + 1 + len(after.split()[0]) <= columns
    ]


@pytest.mark.parametrize("columns", [60, 80, 100])
def test_texts_are_wrapped_once(columns):
    page = page_of("sft", True, columns).partition("An example")[0]
    # The values of a choice have no spaces.
    wide = [line for line in page.splitlines() if "{" in line and len(line) > columns]
    assert set(broken_early(page, columns)) <= set(wide)


def test_the_judge_of_lines_sees_breaks_of_the_source():
    page = "  --dropout FLOAT       Dropout probability\n" + " " * 24 + "of the input.\n"
    assert broken_early(page, 80) and broken_early("x" * 81, 80)
    assert not broken_early(page.replace("\n" + " " * 24, " "), 80)


def test_an_option_appears_in_its_group_by_itself():
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Data(type(sft.SCRIPT.plain.data)):
        """Model and data."""

        answer: int = 42

    kind = dataclasses.make_dataclass(
        "Config",
        [("data", Data, Data())],
        bases=(type(sft.SCRIPT.plain),),
        frozen=True,
        kw_only=True,
    )
    group = help_text(kind, "train.sft", True, 80, kind()).split("\n\n")
    assert "--answer INT" in next(part for part in group if part.startswith("Model and data:"))


def test_the_help_of_a_file_of_options_has_its_values(tmp_path, capsys):
    (tmp_path / "run.yaml").write_text("rank: 7\n")
    with pytest.raises(SystemExit) as ended:
        sft.parse(["--help", "--config", str(tmp_path / "run.yaml")])
    assert ended.value.code == 0
    assert re.search(r"--rank INT .*\(default: 7\)", capsys.readouterr().out)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (["sft", "--help-all"], "--heartbeat-timeout INT"),
        (["plan", "-h"], "usage: "),
        (["compare", "--help-all"], "compare sft"),
        (["findings", "--help"], "findings"),
        (["findings", "alphas", "--help-all"], "--target-sets TEXT ..."),
        (["--help"], "lists the options of one"),
    ],
)
def test_every_command_takes_both(line, expected, capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["/bin/lora-jax", *line])
    if line == ["--help"]:
        command.main(line)
    else:
        with pytest.raises(SystemExit) as ended:
            command.main(line)
        assert not ended.value.code
    assert expected in capsys.readouterr().out
