"""Files are skipped before their import only where `-m` selects none of their tests."""

import json
import os
import re
import subprocess
import sys
import textwrap

import pytest

from tests.selection import selects_none
from tests.support import thorough
from tests.surroundings import ROOT

DEFAULT = "not slow and not parity"
SLOW_FILE = "import pytest\npytestmark = pytest.mark.slow\ndef test_a(): ...\n"
MARKED = "import pytest\n@pytest.mark.slow\ndef test_a(): ...\n"
# Files by what they show: their text, and whether DEFAULT selects none of their tests.
FILES = {
    "a mark of the file": (SLOW_FILE, True),
    "a list of marks": (
        "import pytest\nX = pytest.mark.skip\npytestmark = [X, pytest.mark.slow()]\n"
        "def test_a(): ...",
        True,
    ),
    "marks of another file": (
        "from tests.parity import PARITY, PATTERNS\npytestmark = [*PARITY, PATTERNS]\n"
        "def test_a(): ...",
        True,
    ),
    "a mark of each test": (MARKED + "@pytest.mark.parity\nasync def test_b(): ...", True),
    "a mark of a class": (
        "import pytest\n@pytest.mark.slow\nclass TestA:\n    def test_b(self): ...",
        True,
    ),
    "one test has no mark": (MARKED + "\n\ndef test_b(): ...", False),
    "one test of a class has no mark": (
        MARKED + "class TestA:\n    @pytest.mark.slow\n    def test_b(self): ...\n"
        "    def test_c(self): ...",
        False,
    ),
    "one test under a condition has no mark": (MARKED + "if X:\n    def test_b(): ...", False),
    "a mark that is bound twice": (SLOW_FILE + "if X:\n    pytestmark = []", False),
    "a mark under a condition": ("import pytest\nif X:\n    " + SLOW_FILE[14:], False),
    "a mark that a decorator may drop": (
        "import pytest\n@drop\n@pytest.mark.slow\ndef test_a(): ...",
        False,
    ),
    "a mark from a call": (
        "import pytest\npytestmark = find(pytest.mark.slow)\ndef test_a(): ...",
        False,
    ),
    "an imported test": (MARKED + "from elsewhere import test_b", False),
    "an imported file of tests": (MARKED + "from tests.laws import test_laws as test_b", True),
    "an assigned test": (MARKED + "test_b = make()", False),
    "all names of another file": (MARKED + "from elsewhere import *", False),
    "tests of unittest": (MARKED + "class A(unittest.TestCase): ...", False),
    "tests that code defines": (MARKED + "globals().update(x)", False),
    "no tests": ("import pytest\npytestmark = pytest.mark.slow", False),
    "an error of syntax": (SLOW_FILE + "def", False),
}
# Files in which `-m slow` selects none, or may select some.
UNMARKED = {
    "no mark": ("def test_a(): ...", True),
    "another mark": ("import pytest\n@pytest.mark.parity\ndef test_a(): ...", True),
    "a mark in a table": (
        "import pytest\nCASES = [pytest.param(1, marks=pytest.mark.slow)]\n"
        "@pytest.mark.parametrize('case', CASES)\ndef test_a(case): ...",
        False,
    ),
    "a mark that another file makes": (
        "from tests.support import over\n@over('case', 'ab', often='a')\ndef test_a(case): ...",
        False,
    ),
    "another file that could make it": (
        "from tests import support\n@support.over('case', 'ab', often='a')\ndef test_a(case): ...",
        False,
    ),
    "a name of a file that could make it": (
        "from tests.support import draw\nX = draw(1, (2, 3))\ndef test_a(): ...",
        True,
    ),
}


def skips(tmp_path, text, expression):
    file = tmp_path / "test_file.py"
    file.write_text(text)
    return selects_none(expression, file)


@pytest.mark.parametrize(("text", "skipped"), FILES.values(), ids=list(FILES))
def test_a_file_is_skipped_where_all_its_tests_are_marked(tmp_path, text, skipped):
    assert skips(tmp_path, text, DEFAULT) is skipped


@pytest.mark.parametrize(("text", "skipped"), UNMARKED.values(), ids=list(UNMARKED))
def test_a_file_is_skipped_where_no_test_can_be_marked(tmp_path, text, skipped):
    assert skips(tmp_path, text, "slow") is skipped


@pytest.mark.parametrize(
    ("expression", "skipped"),
    [
        ("slow", False),
        ("not slow or parity", True),
        ("(parity or serving) and not slow", True),
        ("slow and not serving", False),
        ("slow and (parity or serving)", True),
        ("not (slow or parity)", True),
        ("slow(times=3)", False),  # an expression that is not read
        ("slow and", False),  # pytest says what is wrong with it
    ],
)
def test_expressions(tmp_path, expression, skipped):
    assert skips(tmp_path, SLOW_FILE, expression) is skipped


def environment():
    """Returns the environment of a session that does not end this one's."""
    names = [name for name in os.environ if not name.startswith(("LORA_JAX_TESTS_", "PYTEST_"))]
    return {name: os.environ[name] for name in names}


def run(folder, *words):
    command = [sys.executable, "-m", "pytest", "-p", "tests.conftest", "-n0"]
    command += ["-c", str(ROOT / "pyproject.toml"), "--rootdir", str(folder), *words]
    done = subprocess.run(command, cwd=folder, env=environment(), capture_output=True, text=True)
    return done.stdout + done.stderr


@pytest.mark.slow
def test_the_command_imports_no_file_without_a_selected_test(tmp_path):
    (tmp_path / "test_broken.py").write_text(SLOW_FILE + "raise RuntimeError('it is imported')")
    (tmp_path / "test_mixed.py").write_text(MARKED + "\n\ndef test_b(): ...")
    printed = run(tmp_path, ".", "-v")
    assert "1 passed, 1 deselected" in printed and "it is imported" not in printed, printed
    assert "1 files: test_broken.py" in printed
    assert "it is imported" in run(tmp_path, "test_broken.py")


@pytest.mark.slow
@thorough
def test_no_file_of_this_suite_is_skipped_that_has_a_selected_test(tmp_path):
    plugin = """\
    import json
    from pathlib import Path

    from _pytest.mark import MarkMatcher
    from _pytest.mark.expression import Expression


    def pytest_collection_finish(session):
        expressions = json.loads(Path("expressions.json").read_text())
        chosen = {}
        for text in expressions:
            condition = Expression.compile(text)
            chosen[text] = sorted({
                str(item.path) for item in session.items
                if condition.evaluate(MarkMatcher.from_markers(item.iter_markers()))
            })
        Path("chosen.json").write_text(json.dumps(chosen))
    """
    settings = (ROOT / "pyproject.toml").read_text() + (ROOT / ".ci" / "run").read_text()
    expressions = sorted(
        set(re.findall(r"-m '([^']+)'", settings)) | {"slow", "serving", "versions"}
    )
    assert len(expressions) >= 5
    (tmp_path / "expressions.json").write_text(json.dumps(expressions))
    (tmp_path / "marks_plugin.py").write_text(textwrap.dedent(plugin))
    command = [sys.executable, "-m", "pytest", "-n0", "-q", "--collect-only", "-m", ""]
    command += ["-c", str(ROOT / "pyproject.toml"), "--rootdir", str(ROOT), str(ROOT / "tests")]
    program = "import os, sys; sys.path.insert(0, os.getcwd()); import runpy; "
    program += f"sys.argv = {[*command[2:], '-p', 'marks_plugin']!r}; "
    program += "runpy.run_module('pytest', run_name='__main__')"
    words = [sys.executable, "-c", program]
    done = subprocess.run(words, cwd=tmp_path, env=environment(), capture_output=True, text=True)
    assert done.returncode in (0, 2), done.stdout + done.stderr  # 2: an extra is missing
    chosen = json.loads((tmp_path / "chosen.json").read_text())
    files = sorted((ROOT / "tests").rglob("test_*.py"))
    for expression in expressions:
        skipped = {str(path) for path in files if selects_none(expression, path)}
        assert len(skipped) > 50
        assert not skipped & set(chosen[expression]), expression
