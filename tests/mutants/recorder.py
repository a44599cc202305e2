"""Records which files of tests run which lines, in all processes that the tests start.

`runs.py` copies this file to `sitecustomize.py` at the root of a copy of the checkout: each Python
that finds the copy by PYTHONPATH imports it at its start, before anything else. Lines are written
as they run, because the tests kill processes. It is pytest's plugin, too: it says which file runs,
judges the files in the order that is asked for, and writes the seconds and failures of each file.
It needs sys.monitoring, of Python 3.12 or newer, to record lines.
"""

import functools
import os
import sys
from pathlib import Path

ROOT = str(Path(__file__).resolve().parent) + os.sep
# Names in the environment: where to record, the file of tests that runs, and the order of files.
RECORD = "LORA_JAX_TESTS_RECORD"
TEST_FILE = "LORA_JAX_TESTS_FILE"
ORDER = "LORA_JAX_TESTS_ORDER"
_CACHED = type(functools.cache(len))
_TOOL = 4  # of the six numbers of sys.monitoring, one that no known tool has


def write(*words: object) -> None:
    """Appends a line of words to the record, which several processes share."""
    file = os.open(os.environ[RECORD], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    try:
        os.write(file, ("\t".join(map(str, words)) + "\n").encode())
    finally:
        os.close(file)


def record_lines() -> None:
    """Begins to write each line of the copy's packages, the first time that a test file runs it."""
    if sys.monitoring.get_tool(_TOOL):  # the tests of this module import it once more
        return
    packages = (f"{ROOT}lora_jax{os.sep}", f"{ROOT}train{os.sep}")

    def note(code, line):
        if code.co_filename.startswith(packages) and (test_file := os.environ.get(TEST_FILE)):
            write("line", test_file, code.co_filename.removeprefix(ROOT), line)
        return sys.monitoring.DISABLE

    def note_first_line(code, offset):
        """Writes the line of a function of one line, such as a lambda, which has no LINE event."""
        return note(code, code.co_firstlineno)

    events = sys.monitoring.events
    sys.monitoring.use_tool_id(_TOOL, "tests.mutants")
    sys.monitoring.register_callback(_TOOL, events.LINE, note)
    sys.monitoring.register_callback(_TOOL, events.PY_START, note_first_line)
    sys.monitoring.set_events(_TOOL, events.LINE | events.PY_START)


if os.environ.get(RECORD):
    record_lines()


def pytest_configure(config):
    if os.environ.get(RECORD) and "PYTEST_XDIST_WORKER" in os.environ:
        config.pluginmanager.register(Recording(), "recording of lines")
    if any("from hypothesis" in (config.rootpath / name).read_text() for name in _order()):
        end_at_a_failure()


def end_at_a_failure():
    """Has Hypothesis fail at once, rather than look for the smallest example for minutes."""
    from hypothesis import Phase, settings

    settings.register_profile("mutants", phases=[Phase.explicit, Phase.generate])
    settings.load_profile("mutants")


def _order():
    return os.environ.get(ORDER, "").split()


def pytest_collection_finish(session):
    """Puts the files in the order that is asked for, after all others have put theirs."""
    order = _order()
    if order:
        place = {name: index for index, name in enumerate(order)}
        session.items.sort(key=lambda item: place[_name(item)])


class Recording:
    """Tells the recorder which file of tests runs, and writes seconds and failures."""

    def __init__(self):
        self.test_file = None

    def pytest_runtest_logreport(self, report):
        name = report.nodeid.partition("::")[0]
        write("seconds", name, report.duration)
        if report.failed:
            write("failed", name, report.nodeid)

    def pytest_runtest_logstart(self, nodeid):
        """Begins the lines of a file before the fixtures of its first test."""
        name = nodeid.partition("::")[0]
        if name == self.test_file:
            return
        self.test_file = os.environ[TEST_FILE] = name
        forget_values()
        sys.monitoring.restart_events()
        if forks := sys.modules.get("tests.train.forks"):
            forks._server.cache_clear()  # a server's forks would have the name of its first file


def forget_values():
    """Empties the caches of functions: a value in them hides the lines that made it from a file."""
    if jax := sys.modules.get("jax"):
        jax.clear_caches()
    for name, module in [*sys.modules.items()]:
        if name.partition(".")[0] not in ("lora_jax", "train"):
            continue
        for value in [*vars(module).values()]:
            if isinstance(value, _CACHED):
                value.cache_clear()


def _name(item):
    return item.nodeid.partition("::")[0]
