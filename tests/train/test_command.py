"""The command `lora-jax`: what it starts, and where."""

import ast
import contextlib
import io
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console

from tests.train.tiny import write_jsonl, write_model
from train import command
from train.compare import costs
from train.console import extras
from train.console.errors import reported
from train.console.program import program
from train.options.command import parse_options
from train.plan.options import PlanOptions
from train.processes.session import Session

ROOT = Path(__file__).parents[2]
# As the installed script does, which has no folder of the user's on its path.
START = "import sys; sys.argv[0] = '/usr/bin/lora-jax'; from lora_jax.__main__ import main; main()"


@pytest.fixture
def folder(tmp_path):
    """A user's folder, with files whose names Python and this project have, too."""
    for name in ("train", "random"):
        (tmp_path / f"{name}.py").write_text(f"raise SystemExit('the user\\'s {name}.py ran')\n")
    return tmp_path


def run(folder, *words, path=()):
    """Runs `lora-jax` with words in a folder, with further folders before the checkout."""
    env = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (*path, ROOT)))}
    line = [sys.executable, "-P", "-c", START, *map(str, words)]
    return subprocess.run(line, cwd=folder, env=env, capture_output=True, text=True)


def test_it_lists_the_commands_beside_a_script_of_the_user(folder):
    (folder / "random.py").unlink()  # which PYTHONPATH puts before Python's own
    ended = run(folder, path=[folder])
    assert ended.returncode == 0, ended.stderr
    listed = re.findall(r"^  (\w+) +\S.*", ended.stdout, re.M)
    assert listed == [*command.COMMANDS] and "usage: lora-jax NAME" in ended.stdout


@contextlib.contextmanager
def without_reader():
    """Makes standard output a pipe that nobody reads any more, as behind `| head -1`."""
    reader, writer = os.pipe()
    os.close(reader)
    output = os.fdopen(writer, "w")
    try:
        with contextlib.redirect_stdout(output):
            yield
    finally:
        with contextlib.suppress(BrokenPipeError):
            output.close()


def _write():
    print("a line\n" * 10_000)


def _help():
    print("a line")  # which stays in a buffer
    sys.exit(0)


@pytest.mark.parametrize("way", [reported, lambda: Session().running()], ids=["tool", "trainer"])
@pytest.mark.parametrize("work", [_write, _help])
def test_a_script_whose_output_nobody_reads_ends_quietly(way, work):
    with without_reader(), pytest.raises(SystemExit) as ended, way():
        work()
    assert ended.value.code == 1


def test_the_other_processes_of_a_run_whose_output_nobody_reads_are_told(monkeypatch, capsys):
    """They would wait for it in the next collective, also where rich has noticed it."""
    session, told = Session(), []
    session._peers = SimpleNamespace(
        tell=lambda why, code: told.append((why, code)),
        wait_for_the_others=lambda seconds: None,
        close=lambda: None,
    )
    monkeypatch.setattr("train.processes.session.os._exit", sys.exit)  # pytest goes on
    with without_reader(), pytest.raises(SystemExit) as ended, session.running():
        Console(file=sys.stdout).print("a line\n" * 10_000)
    assert ended.value.code == 1 and capsys.readouterr().err == ""
    assert told == [("ended, because nobody reads its output any more", 1)]


def test_other_errors_than_a_closed_output_are_told():
    with without_reader(), pytest.raises(ZeroDivisionError), reported():
        print("a line")
        raise ZeroDivisionError


def test_a_connection_that_broke_is_no_closed_output():
    reader, writer = os.pipe()
    with os.fdopen(writer, "w") as output, contextlib.redirect_stdout(output):
        with pytest.raises(BrokenPipeError), reported():
            raise BrokenPipeError("a tracker's")
    os.close(reader)


@pytest.mark.parametrize("output", [None, io.StringIO()], ids=["none", "no file"])
def test_nor_is_one_that_broke_where_the_output_is_no_file(output):
    with contextlib.redirect_stdout(output), pytest.raises(BrokenPipeError), reported():
        raise BrokenPipeError("a tracker's")


@pytest.mark.slow
def test_the_list_of_commands_ends_quietly_where_nobody_reads_it(folder):
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    line, reader = [sys.executable, "-P", "-c", START, "--help"], os.pipe()
    os.close(reader[0])
    ended = subprocess.run(line, cwd=folder, env=env, stdout=reader[1], stderr=subprocess.PIPE)
    os.close(reader[1])
    assert (ended.returncode, ended.stderr) == (1, b"")


def test_every_script_is_a_command_and_stands_in_the_readme():
    scripts = {path.parent.name for path in (ROOT / "train").glob("*/__main__.py")}
    scripts |= {p.stem for p in (ROOT / "train").glob("*.py") if _has_main(p) and p.stem[0] != "_"}
    assert scripts - {"command"} == command.COMMANDS.keys()
    table = re.findall(
        r"^\| `lora-jax (\w+)` \| (.*) \|$", (ROOT / "train/README.md").read_text(), re.M
    )
    assert dict(table) == command.COMMANDS and len(table) == len(command.COMMANDS)


def _has_main(path):
    nodes = ast.parse(path.read_text()).body
    return any(isinstance(n, ast.If) and "__main__" in ast.unparse(n.test) for n in nodes)


def test_it_starts_the_script_with_the_rest_of_the_line(monkeypatch):
    seen = []
    monkeypatch.setattr("train.sft.main", lambda: seen.append(sys.argv))
    monkeypatch.setattr("train.plan.__main__.main", lambda: seen.append(sys.argv))
    monkeypatch.setattr(sys, "argv", ["/bin/lora-jax", "sft", "--rank", "3"])
    command.main(["sft", "--rank", "3"])
    command.main(["plan"])
    assert seen == [["/bin/lora-jax", "--rank", "3"], ["/bin/lora-jax"]]


# What the extras models, train and serve install, and lora_jax alone does not.
OF_EXTRAS = """
    tyro jinja2 transformers tokenizers huggingface_hub gguf PIL datasets pyarrow matplotlib sklearn
    snowballstemmer tensorboardX filelock starlette uvicorn zstandard pyrage llguidance
""".split()
ALL_COMMANDS = """
import sys
from train import command
for name in command.COMMANDS:
    if name != "doctor":
        try:
            command.main([name, "--help"])
        except ModuleNotFoundError as error:
            try:
                sys.excepthook(type(error), error, error.__traceback__)
            except SystemExit as ended:
                print(name, ended.code)
"""


@pytest.fixture
def hide(tmp_path, monkeypatch):
    """Returns a function that hides packages from the processes of the test."""

    def hide_packages(names):
        text = f"import sys\nsys.modules.update(dict.fromkeys({names}))\n"
        (tmp_path / "sitecustomize.py").write_text(text)  # which Python runs as it starts
        monkeypatch.setenv("PYTHONPATH", os.pathsep.join(map(str, (tmp_path, ROOT))))

    return hide_packages


@pytest.mark.slow
def test_without_extras_every_command_names_the_extra_in_one_line(hide, tmp_path, monkeypatch):
    hide(OF_EXTRAS)
    monkeypatch.chdir(tmp_path)
    line = [sys.executable, "-P", "-c", ALL_COMMANDS]
    ended = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True)
    names = [name for name in command.COMMANDS if name != "doctor"]
    assert ended.stdout.splitlines() == [f"{name} 2" for name in names], ended.stderr
    for name, said in zip(names, ended.stderr.splitlines(), strict=True):
        extra = "serve" if name == "serve" else "train"
        remedy = re.escape(extras.install_command(extra))
        assert re.fullmatch(rf"error: [\w.]+ is not installed. Run {remedy}", said), said


@pytest.mark.parametrize(
    "words",
    [["-P", "-c", START, "predict"], ["-m", "train.predict"]],
    ids=["lora-jax", "python -m"],
)
def test_a_command_whose_extra_is_missing_ends_with_its_name(words, hide):
    hide(["tyro"])
    line = [sys.executable, *words, "--help"]
    ended = subprocess.run(line, cwd=ROOT, capture_output=True, text=True)
    said = "error: tyro is not installed. Run pip install -e '.[train]'\n"
    assert (ended.returncode, ended.stdout, ended.stderr) == (2, "", said)


def test_a_missing_module_of_the_user_keeps_its_traceback(tmp_path, capsys):
    (tmp_path / "judge.py").write_text("import no_such_module")
    with pytest.raises(ModuleNotFoundError) as raised:
        runpy.run_path(str(tmp_path / "judge.py"))
    extras.report_missing_package(raised.type, raised.value, raised.tb)
    assert "Traceback" in capsys.readouterr().err


def test_only_in_a_checkout_the_remedy_installs_the_checkout(monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    assert extras.install_command("tpu") == "pip install -e '.[tpu]'"
    monkeypatch.chdir(tmp_path)
    assert extras.install_command("tpu") == f"pip install -e '.[tpu]' in {ROOT.resolve()}"
    monkeypatch.setattr(extras, "_ROOT", tmp_path)  # as in site-packages
    assert extras.install_command("tpu") == "pip install 'lora_jax[tpu]'"


def test_an_unknown_name_gets_the_nearest(capsys):
    with pytest.raises(SystemExit) as ended:
        command.main(["comapre", "sft"])
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith("error: there is no command 'comapre'. The nearest is compare.")


@pytest.mark.parametrize(
    ("started", "expected"),
    [
        ("/opt/venv/bin/lora-jax", "lora-jax compare sft --output 'a b'"),
        ("C:/venv/Scripts/lora-jax.exe", "lora-jax compare sft --output 'a b'"),
        ("/x/lora_jax/__main__.py", "python -m lora_jax compare sft --output 'a b'"),
        ("/x/train/compare/__main__.py", "python -m train.compare sft --output 'a b'"),
    ],
)
def test_hints_and_usage_name_the_form_that_was_used(started, expected, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [started])
    assert program("train.compare sft", "--output", "a b") == expected
    with pytest.raises(SystemExit):
        parse_options(PlanOptions, ["--help"], "train.plan")
    assert f"usage: {program('train.plan')} " in capsys.readouterr().out


@pytest.mark.slow
def test_a_run_and_the_processes_that_it_starts_beside_the_users_files(folder):
    """Rewards are a process of their own, and so are the costs of a comparison."""
    write_model(folder / "model")
    write_jsonl(folder / "rows.jsonl", [{"prompt": f"{i}?"} for i in range(8)])
    judge = "import near, far\n"
    judge += "def judge(completions, **_): return [near.N + far.N] * len(completions)"
    for name, text in {"judges/near": "N = 1", "far": "N = 2", "judges/judge": judge}.items():
        (folder / name).with_suffix(".py").parent.mkdir(exist_ok=True)
        (folder / name).with_suffix(".py").write_text(text)
    line = "grpo --model model --dataset rows.jsonl --reward judges/judge.py:judge --steps 1"
    line += " --group 2 --batch-size 2 --max-new-tokens 2 --seq-len 32 --output run"
    ended = run(folder, *line.split())
    assert ended.returncode == 0, ended.stderr
    assert "lora-jax export --adapter run/adapter" in " ".join(ended.stdout.split())
    assert "lora-jax grpo --config FILE" in (folder / "run/config.yaml").read_text()


@pytest.mark.slow
def test_the_costs_of_a_comparison_start_this_projects_script(folder, monkeypatch):
    monkeypatch.chdir(folder)
    said = costs._run_command([*costs._PYTHON, "train.plan", "--help"])
    assert "train.plan" in said
