"""Measures which changes of the code the fast tests find: its mutants.

    python -m tests.mutants                         # 20 mutants of each of twelve folders
    python -m tests.mutants --since main            # of the lines that differ from a commit
    python -m tests.mutants --folders train/tools --count 5

A mutant is the code with one expression changed (`operators.py`). Its judges are the files of fast
tests that run the expression, the quickest first. The fast suite is run once to know them
(`recorder.py`). The first failure ends the judging of a mutant, and so do 60 seconds: a mutant that
no test has found by then counts as not found. Slow tests judge nothing.

Each verdict is kept as soon as it is there, so that the command goes on where it was stopped.
"""

import argparse
import json
import math
import random
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby, zip_longest
from pathlib import Path
from queue import SimpleQueue
from typing import Any, NamedTuple

from tests.mutants import runs
from tests.mutants.operators import Mutation, apply, mutations

ROOT = Path(__file__).parents[2]
FOLDERS = (
    *("lora_jax/core", "lora_jax/adapt", "lora_jax/variants", "lora_jax/training/losses"),
    *("lora_jax/models/sampling", "lora_jax/peft", "lora_jax/quantized", "lora_jax/bank"),
    *("train/serve/engine", "train/live", "train/tools", "train/rewards"),
)
PACKAGES = ("lora_jax", "train")


class Mutant(NamedTuple):
    """A mutation of a file.

    Attributes:
      folder: the folder that it was drawn from.
      path: the file, from the root of the checkout.
      mutation: the change.
    """

    folder: str
    path: str
    mutation: Mutation

    @property
    def name(self) -> str:
        """Returns the words by which it is known between runs."""
        change = self.mutation
        return f"{self.path}:{change.line}:{change.column} {change.kind}: {change.after}"


def draw(
    root: Path, folder: str, count: int, seed: int, lines: dict[str, set[int]] | None
) -> list[Mutant]:
    """Returns mutants of a folder, by chance: expressions first, then a change of each.

    Args:
      root: the checkout.
      folder: the folder of modules.
      count: the number of mutants, if there are as many.
      seed: the seed of the draw.
      lines: the lines of each file that may change; None for all.
    """
    expressions = []
    for file in sorted((root / folder).rglob("*.py")):
        path = file.relative_to(root).as_posix()
        allowed = None if lines is None else lines.get(path, set())
        if allowed is not None and not allowed:
            continue
        changes = mutations(file.read_text(encoding="utf-8"))
        for _, group in groupby(
            changes, lambda change: (change.line, change.column, change.before)
        ):
            mutants = [Mutant(folder, path, change) for change in group]
            if allowed is None or mutants[0].mutation.line in allowed:
                expressions.append(mutants)
    chance = random.Random(f"{seed}: {folder}")
    chance.shuffle(expressions)
    drawn: list[Mutant] = []
    for mutants in expressions:
        if len(drawn) == count:
            break
        mutant = chance.choice(mutants)
        try:
            apply((root / mutant.path).read_text(encoding="utf-8"), mutant.mutation)
        except SyntaxError:
            continue
        drawn.append(mutant)
    return drawn


def changed_lines(root: Path, commit: str) -> dict[str, set[int]]:
    """Returns the lines of each file that differ from a commit, and all lines of new files."""
    command = ["git", "diff", "-U0", "--no-color", "--no-ext-diff", "--no-prefix", commit, "--"]
    text = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout
    lines: dict[str, set[int]] = {}
    path = ""
    for line in text.splitlines():
        if line.startswith("+++ "):
            path = line[4:]
        elif match := re.match(r"@@ -\S+ \+(\d+)(?:,(\d+))? @@", line):
            first, count = int(match[1]), int(match[2] or 1)
            lines.setdefault(path, set()).update(range(first, first + count))
    command = ["git", "ls-files", "-z", "--others", "--exclude-standard", "*.py"]
    names = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout
    for name in filter(None, names.split("\0")):
        lines[name] = set(range(1, len((root / name).read_text().splitlines()) + 1))
    return lines


def main() -> int:
    """Draws mutants, has tests judge them, and prints which ones no test found."""
    options = _options()
    if sys.version_info < (3, 12):
        print("tests.mutants records lines by sys.monitoring: run it with Python 3.12 or newer")
        return 2
    lines = None if options.since is None else changed_lines(ROOT, options.since)
    drawn = [draw(ROOT, folder, options.count, options.seed, lines) for folder in options.folders]
    # In turns, so that a run that is stopped has judged as many of each folder.
    mutants = [mutant for row in zip_longest(*drawn) for mutant in row if mutant is not None]
    if not mutants:
        print("there is nothing to change: the lines hold none of the expressions of operators.py")
        return 0
    options.output.mkdir(parents=True, exist_ok=True)
    files = [file for file in runs.files_of(ROOT) if options.output not in (ROOT / file).parents]
    key = "-".join([runs.digest(ROOT, files), *(name.replace("/", ".") for name in options.tests)])
    results = options.output / f"verdicts-{key}.jsonl"
    with tempfile.TemporaryDirectory(prefix="lora_jax-mutants-") as scratch:
        folders = [Path(scratch) / f"copy-{number}" for number in range(options.workers)]
        for folder in folders:
            runs.copy(ROOT, files, folder)
        known = _record(folders[0], options, key)
        verdicts = _judge_all(mutants, folders, known, options, results)
    print("\n".join(report(mutants, verdicts)))
    return 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tests.mutants", description=__doc__.partition("\n")[0]
    )
    add = parser.add_argument
    add(
        "--folders", nargs="+", metavar="FOLDER", help="to change code in; --since: lora_jax, train"
    )
    add("--count", type=int, default=20, help="mutants of each folder (default: 20)")
    add("--seed", type=int, default=0, help="of the draw of mutants (default: 0)")
    add("--since", metavar="COMMIT", help="change only lines that differ from this commit")
    add("--output", type=Path, default=ROOT / ".mutants", help="folder of verdicts (.mutants)")
    add("--workers", type=int, default=2, help="mutants that are judged at once (default: 2)")
    add("--tests", nargs="+", default=[], metavar="PATH", help="tests that judge (default: all)")
    options = parser.parse_args()
    options.output = options.output.absolute()
    options.folders = options.folders or (PACKAGES if options.since else FOLDERS)
    for folder in options.folders:
        if not (ROOT / folder).is_dir():
            parser.error(f"--folders: {folder} is no folder of {ROOT}")
    return options


def _record(folder: Path, options: argparse.Namespace, key: str) -> runs.Record:
    """Returns the record of this checkout's fast suite, from an earlier run if there is one."""
    file = options.output / f"lines-{key}.json"
    if not file.exists():
        print(
            "running the fast suite once, to learn which files of tests run which lines", flush=True
        )
        known = runs.record(
            folder, options.output, options.output / "programs", options.workers, options.tests
        )
        runs.save_record(known, file)
    known = runs.load_record(file)
    print(
        f"{len(known.seconds)} files of tests; {len(known.failed)} tests fail without a mutant, "
        "and judge nothing"
    )
    return known


def _judge_all(
    mutants: Sequence[Mutant],
    folders: Sequence[Path],
    known: runs.Record,
    options: argparse.Namespace,
    results: Path,
) -> dict[str, dict[str, Any]]:
    """Has all mutants judged that were not judged before; returns the verdict of each name."""
    verdicts = read_verdicts(results)
    rest = [mutant for mutant in mutants if mutant.name not in verdicts]
    idle: SimpleQueue[Path] = SimpleQueue()
    for folder in folders:
        idle.put(folder)

    def judged(mutant: Mutant) -> runs.Verdict:
        folder = idle.get()
        try:
            return judge_mutant(mutant, folder, known, options.output / "programs")
        finally:
            idle.put(folder)

    begun = time.monotonic()
    with ThreadPoolExecutor(len(folders)) as pool:
        for number, (mutant, verdict) in enumerate(
            zip(rest, pool.map(judged, rest), strict=True), 1
        ):
            verdicts[mutant.name] = verdict._asdict()
            with results.open("a") as file:
                file.write(json.dumps({"mutant": mutant.name} | verdict._asdict()) + "\n")
            found = sum(verdicts[m.name]["found"] for m in mutants if m.name in verdicts)
            minutes = (time.monotonic() - begun) / number * (len(rest) - number) / 60
            judged_so_far = len(mutants) - len(rest) + number
            print(
                f"{judged_so_far} of {len(mutants)}, found {found}, {minutes:.0f} min left: "
                f"{'found' if verdict.found else 'NOT FOUND'} {mutant.name}",
                flush=True,
            )
    return verdicts


def judge_mutant(mutant: Mutant, folder: Path, known: runs.Record, programs: Path) -> runs.Verdict:
    """Puts a mutant into a copy of the checkout, has it judged, and takes it out again."""
    file, change = folder / mutant.path, mutant.mutation
    text = file.read_text(encoding="utf-8")
    judges = known.judges(mutant.path, change.line, change.lines, change.in_function)
    file.write_text(apply(text, change), encoding="utf-8")
    try:
        return runs.judge(folder, programs, known, judges, runs.MOST_SECONDS)
    finally:
        file.write_text(text, encoding="utf-8")


def read_verdicts(file: Path) -> dict[str, dict[str, Any]]:
    """Returns the verdicts that are written in a file, without a last line that was cut off."""
    verdicts = {}
    for line in file.read_text().splitlines() if file.exists() else []:
        try:
            verdict = json.loads(line)
        except json.JSONDecodeError:
            continue
        verdicts[verdict.pop("mutant")] = verdict
    return verdicts


def report(mutants: Sequence[Mutant], verdicts: dict[str, dict[str, Any]]) -> Iterator[str]:
    """Yields the lines of the report: a table by folder, then each mutant that was not found."""
    yield "| folder | mutants | found | share | standard error |"
    yield "|---|---|---|---|---|"
    folders = list(dict.fromkeys(mutant.folder for mutant in mutants))
    for folder in [*folders, "all"]:
        of_folder = [mutant for mutant in mutants if folder in (mutant.folder, "all")]
        count, found = len(of_folder), sum(verdicts[m.name]["found"] for m in of_folder)
        share = found / count
        error = math.sqrt(share * (1 - share) / count)
        yield f"| {folder} | {count} | {found} | {share:.0%} | {error:.1%} |"
    for mutant in mutants:
        verdict = verdicts[mutant.name]
        if verdict["found"]:
            continue
        yield f"\n{mutant.path}:{mutant.mutation.line} ({mutant.mutation.kind})"
        yield f"  - {mutant.mutation.before}"
        yield f"  + {mutant.mutation.after}"
        yield f"  judged by: {' '.join(verdict['ran']) or 'no file of tests runs it'}"
        if verdict["not_reached"]:
            yield f"  not reached: {' '.join(verdict['not_reached'])}"


if __name__ == "__main__":
    sys.exit(main())
