"""The command that measures the tests changes what it says it changes, and judges it soundly."""

import shutil
import subprocess
import sys
import textwrap

import pytest

from tests.mutants import __main__ as command
from tests.mutants import runs
from tests.mutants.operators import apply, mutations

# A function and, by hand, each text that its one line may turn into.
CHANGES = {
    "a < b": {"a <= b"},
    "a is not None": {"a is None"},
    "a in b": {"a not in b"},
    "a - b": {"a", "b - a"},
    "a * b": {"a", "b"},
    "a @ b": {"b @ a"},
    "a and b or c": {"a and b", "c", "a or c", "b or c"},
    "(a + b) / c": {"a / c", "b / c", "c / (a + b)"},
    "f(a, b, key=c)": {"f(a, b)", "f(a, key=c)"},
    "x[1:]": {"x[2:]", "x[0:]"},
    "f'{a < b}'": set(),
    "True": set(),
}
UNCHANGED = '''
"""A text of 3 lines."""
__all__ = ["a" + "b"]
if TYPE_CHECKING:
    SIZE = 3
def f(a: "x[1]" = None) -> y[2]:
    """Docstring, 1 + 2."""
    assert a != 1
    raise ValueError("text" + str(3))
'''
MODULE = "FACTOR = 2\n\n\ndef double(x):\n    unused = 7\n    return FACTOR * x\n"
MODULE += "HALVES = {1: lambda x: x / 2}\n"
KEPT = "import functools\n\n\n@functools.cache\ndef triple(x):\n    return 3 * x\n"
TESTS = """
    from lora_jax import kept, module

    def test_here():
        assert module.double(3) == 6 and kept.triple(3) == 9
        assert module.HALVES[1](6) == 3
"""
CHILD_TESTS = """
    import subprocess, sys
    from lora_jax import kept

    def test_a_value_that_another_file_has_asked_for():
        assert kept.triple(3) == 9

    def test_in_a_child():
        code = "from train import child; child.run()"
        assert subprocess.run([sys.executable, "-c", code]).returncode == 0
"""
CHILD = "def run():\n    if 3 < 3:\n        raise SystemExit(1)\n"


@pytest.mark.parametrize("line", CHANGES)
def test_each_operator_makes_the_changes_that_were_made_by_hand(line):
    text = f"def f(a, b, c, x):\n    return {line}\n"
    changed = {apply(text, change) for change in mutations(text)}

    def normal(expression):
        return compile(f"def f(a, b, c, x):\n    return {expression}\n", "f", "exec").co_consts[0]

    codes = [compile(source, "f", "exec").co_consts[0].co_code for source in changed]
    assert sorted(codes) == sorted(normal(expression).co_code for expression in CHANGES[line])


def test_texts_types_and_errors_stay_as_they_are():
    assert mutations(UNCHANGED) == []


def test_other_lines_stay_where_they_are():
    """A record of lines is of use for the mutant, too; the lines of failures are right."""
    text = "x = f(\n    a,\n    b=1,  # why\n)\ny = 0\n"
    for change in mutations(text):
        assert apply(text, change).splitlines()[4].startswith("y = ")
        assert len(apply(text, change).splitlines()) == 5


def test_a_draw_is_of_one_seed_and_of_distinct_expressions():
    names = [
        [mutant.name for mutant in command.draw(command.ROOT, "lora_jax/variants", 8, seed, None)]
        for seed in (0, 0, 1)
    ]
    assert names[0] == names[1] != names[2]
    assert len({name.partition(" ")[0] for name in names[0]}) == 8


@pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")
def test_only_lines_that_differ_from_a_commit_are_changed(tmp_path):
    def git(*words):
        subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=b", *words], check=True)

    folder = tmp_path / "lora_jax"
    folder.mkdir()
    (folder / "module.py").write_text("a = 1\nb = 2\nc = 3\n")
    git("init", "-q", str(tmp_path))
    git("-C", str(tmp_path), "add", ".")
    git("-C", str(tmp_path), "commit", "-qm", "first")
    (folder / "module.py").write_text("a = 1\nb = 5\nc = 3\n")
    (folder / "other.py").write_text("d = 4\n")
    lines = command.changed_lines(tmp_path, "HEAD")
    assert lines == {"lora_jax/module.py": {2}, "lora_jax/other.py": {1}}
    drawn = command.draw(tmp_path, "lora_jax", 20, 0, lines)
    assert {mutant.mutation.before for mutant in drawn} == {"5", "4"}


def test_verdicts_are_read_without_a_line_that_was_cut_off(tmp_path):
    file = tmp_path / "verdicts.jsonl"
    file.write_text('{"mutant": "a", "found": true}\n{"mutant": "b", "fou')
    assert command.read_verdicts(file) == {"a": {"found": True}}


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A checkout of a module, of one that a child process runs, and of tests of both."""
    if shutil.which("git") is None:
        pytest.skip("git is not installed")
    root = tmp_path_factory.mktemp("checkout")
    texts = {
        "lora_jax/__init__.py": "",
        "lora_jax/module.py": MODULE,
        "lora_jax/kept.py": KEPT,
        "train/__init__.py": "",
        "train/child.py": CHILD,
        "tests/test_here.py": TESTS,
        "tests/test_child.py": CHILD_TESTS,
        "pytest.ini": "[pytest]\naddopts = --import-mode=importlib\npythonpath = .\n",
    }
    for name, text in texts.items():
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_text(textwrap.dedent(text))
    subprocess.run(["git", "init", "-q", root], check=True)
    return root


@pytest.fixture(scope="module")
def copied(checkout, tmp_path_factory):
    """A copy of the checkout, and what its run recorded."""
    if sys.version_info < (3, 12):
        pytest.skip("lines are recorded by sys.monitoring, of Python 3.12 and newer")
    folder, output = (tmp_path_factory.mktemp(name) for name in ("copy", "output"))
    runs.copy(checkout, runs.files_of(checkout), folder)
    known = runs.record(folder, output, output / "programs", 1, [])
    assert known.failed == []
    return folder, output / "programs", known


@pytest.mark.slow
def test_judges_run_the_line_also_in_a_process_that_tests_start(copied):
    known = copied[2]
    assert known.judges("lora_jax/module.py", 6, range(6, 7), True) == ["tests/test_here.py"]
    assert known.judges("train/child.py", 2, range(2, 3), True) == ["tests/test_child.py"]
    assert known.judges("train/child.py", 3, range(3, 4), True) == []
    of_a_cache = known.judges("lora_jax/kept.py", 6, range(6, 7), True)
    assert {*of_a_cache} == {"tests/test_here.py", "tests/test_child.py"}
    of_a_lambda = known.judges("lora_jax/module.py", 7, range(7, 8), True)
    assert of_a_lambda == ["tests/test_here.py"]
    # An import runs it, and whoever calls the module judges it.
    assert known.judges("lora_jax/module.py", 1, range(1, 2), False) == ["tests/test_here.py"]


# Mutations of the checkout's files: the expression, what replaces it, and whether tests find it.
JUDGED = {
    "a value that is returned": ("lora_jax/module.py", "FACTOR * x", "x", True),
    "a value that nobody reads": ("lora_jax/module.py", "7", "8", False),
    "a function of one line": ("lora_jax/module.py", "x / 2", "2 / x", True),
    "a process that the tests start": ("train/child.py", "3 < 3", "3 <= 3", True),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", JUDGED)
def test_a_mutant_is_found_where_a_test_fails(copied, case):
    """The copy is what Python imports: an installed lora_jax would have no such modules."""
    folder, programs, known = copied
    path, before, after, found = JUDGED[case]
    text = (folder / path).read_text()
    (change,) = [
        change for change in mutations(text) if (change.before, change.after) == (before, after)
    ]
    verdict = command.judge_mutant(command.Mutant("", path, change), folder, known, programs)
    assert (verdict.found, verdict.not_reached) == (found, [])
    assert (folder / path).read_text() == text, "the next mutant must be the only one"


def test_time_that_is_too_short_is_reported_with_the_files_that_were_not_reached(copied):
    folder, programs, known = copied
    judges = ["tests/test_here.py", "tests/test_child.py"]
    verdict = runs.judge(folder, programs, known, judges, 0.01)
    assert (verdict.found, verdict.ran, verdict.not_reached) == (False, [], judges)


def test_the_report_counts_what_was_found_and_shows_the_rest():
    first, second = command.draw(command.ROOT, "lora_jax/variants", 2, 0, None)
    missed = {"found": False, "ran": ["a.py"], "not_reached": ["b.py"]}
    lines = [*command.report([first, second], {first.name: {"found": True}, second.name: missed})]
    # The share of one of two is 1/2, and its standard error sqrt(1/2 * 1/2 / 2).
    assert lines[2] == "| lora_jax/variants | 2 | 1 | 50% | 35.4% |"
    assert f"  + {second.mutation.after}" in lines and f"  + {first.mutation.after}" not in lines
    assert "  judged by: a.py" in lines and "  not reached: b.py" in lines
