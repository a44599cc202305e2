"""Repeats a published finding: data, runs, a table and a picture, by one command.

    python -m train.findings                                  # lists them
    python -m train.findings rates --output runs/rates
    python -m train.findings rates --output runs/rates --resume
    python -m train.findings rates --from runs/rates          # table and picture anew

The options of a finding stand in a file beside this one, and those on the line override them:
`--model` and `--dataset` repeat it on your own model and data. The output folder is that of
train.compare, and holds the finding's finding.md and finding.png beside its report.
"""

import argparse
import contextlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from lora_jax.training.processes import write_json, write_text
from train.compare import __main__ as compare
from train.compare import result
from train.compare.result import Comparison
from train.compare.scripts import SCRIPTS
from train.console.errors import UserError, flag
from train.console.help import asks_for_help
from train.console.output import tell
from train.console.program import about, program, resume_hint
from train.findings import catalog
from train.findings.catalog import FINDINGS, Finding
from train.findings.making.inputs import FindingInputs
from train.findings.reporting import document, picture, same_score
from train.findings.reporting.pivot import MEASURES, measures_of, pivot_of
from train.options.field import given_options
from train.options.paths import check_local
from train.processes import hosts
from train.processes.session import Session
from train.reporters.files import read_json
from train.run.output import CONFIG
from train.settings.command import read_line

_PROG = "train.findings"
MADE, _NOTES = "made", "notes.json"


class FindingRequest(NamedTuple):
    """A command line.

    Attributes:
      name, finding: the finding.
      output: the folder for all that comes of it.
      source: the folder of a comparison that is over; None to run one.
      measure: the only measure to show, by its name; None for the finding's own.
      rest: options of train.compare.
    """

    name: str
    finding: Finding
    output: Path
    source: Path | None
    measure: str | None
    rest: tuple[str, ...]


def main(args: Sequence[str] | None = None) -> None:
    """Runs the command line. Bad input exits with code 2, a signal with the signal's code."""
    given = list(sys.argv[1:] if args is None else args)
    session = Session()
    with session.running():
        if not given:
            return print(listed())
        asked = parse(given)
        if asked.source is not None:
            show(asked, result.read(asked.source), _notes(asked.source))
            return
        run(asked, session, program(_PROG, *given))


def listed() -> str:
    """Returns a line for each finding."""
    wide = max(map(len, FINDINGS))
    return "\n".join(f"{name:{wide}}  {finding.title}" for name, finding in FINDINGS.items())


def parse(args: Sequence[str]) -> FindingRequest:
    """Parses a command line.

    Args:
      args: the words, one at least.

    Raises:
      UserError: there is no such finding; an option has no effect; a path has a scheme.
    """
    if asks_for_help(args[:1]):
        print(f"{about(__doc__, _PROG)}\n{listed()}")
        sys.exit(0)
    name, finding = args[0], catalog.find(args[0])
    parser = argparse.ArgumentParser(prog=program(_PROG, name), add_help=False, allow_abbrev=False)
    parser.add_argument("--output")
    parser.add_argument("--from", dest="source")
    parser.add_argument("--measure", choices=(*MEASURES, same_score.NAME))
    known, rest = parser.parse_known_args(args[1:])
    if known.source is not None and rest:
        raise UserError(
            f"--from {known.source} runs nothing, so that {' '.join(rest)} has no effect: leave it "
            "out"
        )
    check_local("output", [known.output or ""])
    check_local("from", [known.source or ""])
    source = None if known.source is None else Path(known.source).expanduser()
    output = Path(known.output or known.source or f"runs/{name}").expanduser()
    return FindingRequest(name, finding, output, source, known.measure, tuple(rest))


def run(asked: FindingRequest, session: Session, command: str) -> None:
    """Makes the finding's base and data, runs the comparison, and shows its result.

    Args:
      asked: the command line.
      session: tells of signals.
      command: the command line in words, for the report.

    Raises:
      TrainingError: something that was asked for cannot be done.
      Interrupted: after a signal, once what is on its way is saved.
    """
    name, finding, rest = asked.name, asked.finding, asked.rest
    if "config" in given_options(rest):
        raise UserError(
            f"--config: the finding {name} has a file of its own, {catalog.options_of(name)}: give "
            "options on the line, or your file to train.compare"
        )
    if given := [option for option in finding.makes if option in given_options(rest)]:
        raise UserError(f"{flag(given[0])}: the finding {name} makes it itself: leave it out")
    if asks_for_help(rest):
        compare.parse([finding.script, *rest])  # exits
    options = ["--config", str(catalog.options_of(name)), *rest]
    plain = SCRIPTS[finding.script].compared
    read_line(plain, options, f"{_PROG} {name}")  # before anything is made
    made = _made(asked, session)
    if not (asked.output / CONFIG).exists():  # interrupted before the comparison began
        rest = tuple(word for word in rest if word != "--resume")
    named = [word for option, value in made.options.items() for word in (flag(option), str(value))]
    line = [finding.script, *options[:2], *named, *rest, "--output", str(asked.output)]
    script, config = compare.parse(line)
    comparison = compare.compare(script, config, session, command, _PROG)
    show(asked, comparison, made.notes)


def show(asked: FindingRequest, comparison: Comparison, notes: Sequence[str]) -> None:
    """Writes the tables and the picture of a comparison, and prints the tables.

    Args:
      asked: the command line.
      found: the measurements.
      notes: sentences about what was made for it.

    Raises:
      UserError: no run has ended, or none has the measure that was asked for.
    """
    finding = asked.finding
    sources = {name: (comparison, x) for name, x in measures_of(comparison).items()}
    common = same_score.common_score(comparison)
    if common is not None:
        sources[same_score.NAME] = common.comparison, common.measure
    names = finding.measures if asked.measure is None else (asked.measure,)
    chosen = [sources[name] for name in names if name in sources]
    if not chosen:
        has = f"only {' and '.join(sources)}" if sources else "none: no run ended"
        raise UserError(f"a {' or a '.join(names)} is needed for the table, and there is {has}")
    pivots = [pivot_of(source, finding.layout, measure) for source, measure in chosen]
    source, measure = chosen[0]
    asked.output.mkdir(parents=True, exist_ok=True)
    drawn = picture.write(pivot_of(source, finding.picture, measure), asked.output)
    text = document.document(finding.title, finding.said, notes, comparison, pivots, drawn)
    write_text(asked.output / document.MARKDOWN, text)
    console = hosts.console()
    for line in (text.rstrip(), "", f"written to {asked.output / document.MARKDOWN}"):
        tell(console, line)


def _made(asked: FindingRequest, session: Session) -> FindingInputs:
    """Makes the base and data of a finding, in a folder in its output folder."""
    if asked.finding.make is None:
        return FindingInputs({})
    folder = asked.output / MADE
    ours = [path for path in (folder, asked.output) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    session.stop.remedy = resume_hint(_PROG)
    try:
        made = asked.finding.make(folder, session)
    except BaseException:
        for empty in ours:
            with contextlib.suppress(OSError):  # something was made
                empty.rmdir()
        raise
    write_json(folder / _NOTES, {"notes": made.notes})
    return made


def _notes(folder: Path) -> tuple[str, ...]:
    return tuple(read_json(folder / MADE / _NOTES).get("notes", ()))


if __name__ == "__main__":
    main()
