"""Runs tests in copies of the checkout: once to learn which run a line, then to judge mutants."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from tests.mutants import recorder

MOST_SECONDS = 60.0  # that the judging of a mutant takes
_START_SECONDS = 5.0  # of these, before the first test begins
_FILE_SECONDS = 0.1  # to import a file of tests


class Verdict(NamedTuple):
    """The result of judging a mutant.

    Attributes:
      found: whether a test failed.
      reason: the first line that says what failed; empty if nothing did.
      ran: the files of tests that were asked to run; the last one may have been cut off.
      not_reached: the files that time was too short for.
      seconds: how long it took.
    """

    found: bool
    reason: str
    ran: list[str]
    not_reached: list[str]
    seconds: float


class Record(NamedTuple):
    """The lines, seconds and failures of one run of the fast suite.

    Attributes:
      lines: the files of tests that run each line, by the path of a module and the line.
      seconds: how long each file of tests takes.
      failed: the tests that fail without a mutant; they judge nothing.
    """

    lines: dict[str, dict[int, list[str]]]
    seconds: dict[str, float]
    failed: list[str]

    def judges(self, path: str, line: int, statement: Iterable[int], called: bool) -> list[str]:
        """Returns the files of tests that run an expression, the quickest first.

        Args:
          path: the module's path from the root of the checkout.
          line: the line of the expression, from 1.
          statement: the lines that hold the statement, where no file runs the line alone.
          called: whether a call runs the expression. An import runs it otherwise, once a process
            and not once a file, so that whoever calls the module is a judge.
        """
        lines = self.lines.get(path, {})
        if not called:
            names = {name for names in lines.values() for name in names}
        else:
            of_statement = {name for number in statement for name in lines.get(number, ())}
            names = set(lines.get(line, ())) or of_statement
        return sorted(names, key=lambda name: (self.seconds.get(name, 0.0), name))


def files_of(root: Path) -> list[Path]:
    """Returns the files of a checkout that git knows or does not ignore, from its root."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout
    return [Path(name) for name in sorted(names.split("\0")) if name and (root / name).is_file()]


def digest(root: Path, files: Iterable[Path]) -> str:
    """Returns a digest of the names and contents of files."""
    contents = hashlib.sha256()
    for file in files:
        contents.update(f"{file}\0".encode())
        contents.update(hashlib.sha256((root / file).read_bytes()).digest())
    return contents.hexdigest()[:16]


def copy(root: Path, files: Iterable[Path], folder: Path) -> None:
    """Makes a copy of a checkout's files, with the recorder in it."""
    shutil.rmtree(folder, ignore_errors=True)
    for file in files:
        (folder / file.parent).mkdir(parents=True, exist_ok=True)
        shutil.copy(root / file, folder / file)
    shutil.copy(recorder.__file__, folder / "sitecustomize.py")


def record(folder: Path, output: Path, programs: Path, workers: int, tests: list[str]) -> Record:
    """Runs the fast suite in a copy of the checkout, and returns what runs which line.

    Args:
      folder: the copy.
      output: the folder for the record as it is written, and what pytest prints.
      programs: the store of compiled programs.
      workers: the number of pytest's processes.
      tests: the files or folders of tests; empty for the whole fast suite.
    """
    written, log = output / "record.tsv", output / "record.log"
    written.unlink(missing_ok=True)
    environment = _environment(folder, programs) | {recorder.RECORD: str(written)}
    command = [*_PYTEST, "-n", str(workers), *tests]
    with log.open("w") as printed:
        subprocess.run(command, cwd=folder, env=environment, stdout=printed, stderr=printed)
    return read_record(written)


def read_record(written: Path) -> Record:
    """Reads what the recorder wrote.

    Raises:
      RuntimeError: no test ran.
    """
    lines: dict[str, dict[int, set[str]]] = defaultdict(lambda: defaultdict(set))
    seconds: dict[str, float] = defaultdict(float)
    failed = set()
    for entry in written.read_text().splitlines() if written.exists() else []:
        match entry.split("\t"):
            case ["line", test_file, path, number]:
                lines[path][int(number)].add(test_file)
            case ["seconds", test_file, spent]:
                seconds[test_file] += float(spent)
            case ["failed", _, test]:
                failed.add(test)
    if not seconds:
        raise RuntimeError(f"no test ran: {written.with_suffix('.log')} says why")
    sorted_lines = {
        path: {number: sorted(names) for number, names in by_number.items()}
        for path, by_number in lines.items()
    }
    return Record(sorted_lines, dict(seconds), sorted(failed))


def save_record(kept: Record, file: Path) -> None:
    """Writes a record to a file."""
    file.write_text(json.dumps(kept._asdict()))


def load_record(file: Path) -> Record:
    """Returns the record in a file."""
    fields = json.loads(file.read_text())
    lines = fields.pop("lines")
    by_number = {path: {int(n): names for n, names in of.items()} for path, of in lines.items()}
    return Record(lines=by_number, **fields)


def judge(folder: Path, programs: Path, known: Record, judges: list[str], most: float) -> Verdict:
    """Returns the verdict of the judges on a copy of the checkout. The first failure ends the run.

    Args:
      folder: the copy, with the mutant in it.
      programs: the store of compiled programs.
      known: seconds of the judges, by which those that time is too short for are left out.
      judges: files of tests, in the order in which they judge.
      most: seconds.
    """
    chosen, expected = [], _START_SECONDS
    for name in judges:
        if chosen and expected > most:
            break
        expected += known.seconds.get(name, 0.0) + _FILE_SECONDS
        chosen.append(name)
    if not chosen:
        return Verdict(found=False, reason="", ran=[], not_reached=[], seconds=0.0)
    deselected = [word for test in known.failed for word in ("--deselect", test)]
    command = [*_PYTEST, "-n0", "-x", "--tb=line", "-vv", *deselected, *chosen]
    environment = _environment(folder, programs) | {recorder.ORDER: " ".join(chosen)}
    begun, log = time.monotonic(), folder.with_suffix(".log")
    with log.open("w") as printed:
        process = subprocess.Popen(
            command,
            cwd=folder,
            env=environment,
            stdout=printed,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code = process.wait(most)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            _kill(process)
    output = log.read_text(errors="replace").splitlines()
    ended = {line.partition("::")[0] for line in output if "::" in line}
    is_cut_off = code is None
    reached = [name for name in chosen if not is_cut_off or name in ended]
    # 0: all passed; 5: no test was selected; 1 and 2: a test or an import failed.
    found = code not in (None, 0, 5)
    return Verdict(
        found=found,
        reason=_reason(output) if found else "",
        ran=reached,
        not_reached=[name for name in judges if name not in reached],
        seconds=round(time.monotonic() - begun, 1),
    )


_PYTEST = (
    *(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "sitecustomize"),
    *("-W", "ignore::pytest.PytestAssertRewriteWarning"),  # Python imports it before pytest does
)


def _environment(folder: Path, programs: Path) -> dict[str, str]:
    """Returns an environment whose Python imports the copy, and keeps no bytecode of mutants."""
    names = ("LORA_JAX_TESTS_HOME", "LORA_JAX_TESTS_CACHE", "PYTEST_ADDOPTS")
    names += (recorder.RECORD, recorder.TEST_FILE, recorder.ORDER)  # those of a run around it
    outer = {name: value for name, value in os.environ.items() if name not in names}
    return outer | {
        "PYTHONPATH": str(folder),
        "PYTHONDONTWRITEBYTECODE": "1",
        "LORA_JAX_TESTS_PROGRAMS": str(programs),
    }


def _kill(process: subprocess.Popen[bytes]) -> None:
    """Ends a process and those of its session."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()


def _reason(output: list[str]) -> str:
    """Returns the line of pytest's summary that names the first failure, or its last line."""
    named = [line for line in output if line.startswith(("FAILED ", "ERROR "))]
    return (named or output[-1:] or [""])[0]
