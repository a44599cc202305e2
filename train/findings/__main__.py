"""Repeats a published finding: data, runs, a table and a picture, by one command.

    python -m train.findings                                  # lists them
    python -m train.findings rates --output runs/rates
    python -m train.findings rates --output runs/rates --resume
    python -m train.findings rates --from runs/rates          # table and picture anew

The options of a finding stand in a file beside this one, and those on the line override them:
`--model` and `--dataset` repeat it on your own model and data. The output folder is that of
train.compare, and holds the finding's finding.md and finding.png beside its report.
"""

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
from train.console.program import OneLineParser, about, program, resume_hint
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
    """A parsed command line.

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
    arguments = list(sys.argv[1:] if args is None else args)
    session = Session()
    with session.running():
        if not arguments:
            return print(listed())
        request = parse(arguments)
        if request.source is not None:
            show(request, result.read(request.source), _read_notes(request.source))
            return
        run(request, session, program(_PROG, *arguments))


def listed() -> str:
    """Returns a line for each finding, with its name and title."""
    width = max(map(len, FINDINGS))
    return "\n".join(f"{name:{width}}  {finding.title}" for name, finding in FINDINGS.items())


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
    name = args[0]
    finding = catalog.find(name)
    parser = OneLineParser(prog=program(_PROG, name), add_help=False, allow_abbrev=False)
    parser.add_argument("--output")
    parser.add_argument("--from", dest="source")
    parser.add_argument("--measure", choices=(*MEASURES, same_score.NAME))
    options, compare_arguments = parser.parse_known_args(args[1:])
    if options.source is not None and compare_arguments:
        raise UserError(
            f"--from {options.source} runs nothing, so {' '.join(compare_arguments)} has no "
            "effect. "
            "Remove one of the two."
        )
    check_local("output", [options.output or ""])
    check_local("from", [options.source or ""])
    return FindingRequest(
        name=name,
        finding=finding,
        output=Path(options.output or options.source or f"runs/{name}").expanduser(),
        source=None if options.source is None else Path(options.source).expanduser(),
        measure=options.measure,
        rest=tuple(compare_arguments),
    )


def run(request: FindingRequest, session: Session, command: str) -> None:
    """Prepares a finding's base and data, runs the comparison, and shows the result.

    Args:
      request: the command line.
      session: tells of signals.
      command: the command line in words, for the report.

    Raises:
      TrainingError: something that was asked for cannot be done.
      Interrupted: after a signal, once what is on its way is saved.
    """
    name = request.name
    finding = request.finding
    arguments = request.rest
    config_path = str(catalog.options_of(name))
    if "config" in given_options(arguments):
        raise UserError(
            f"--config does not work with the finding {name}, which uses its own file, "
            f"{config_path}. Pass options on the command line, or use train.compare with your file."
        )
    for option in finding.makes:
        if option in given_options(arguments):
            raise UserError(
                f"{flag(option)} is set by the finding {name} itself. Remove {flag(option)}."
            )
    if asks_for_help(arguments):
        compare.parse([finding.script, *arguments])  # exits
    # The options are checked before anything is made.
    default_options = SCRIPTS[finding.script].compared
    read_line(default_options, ["--config", config_path, *arguments], f"{_PROG} {name}")
    inputs = _make_inputs(request, session)
    if not (request.output / CONFIG).exists():  # interrupted before the comparison began
        arguments = tuple(word for word in arguments if word != "--resume")
    input_arguments: list[str] = []
    for option, value in inputs.options.items():
        input_arguments += [flag(option), str(value)]
    compare_line = [
        finding.script,
        *("--config", config_path),
        *input_arguments,
        *arguments,
        *("--output", str(request.output)),
    ]
    script, config = compare.parse(compare_line)
    comparison = compare.compare(script, config, session, command, _PROG)
    show(request, comparison, inputs.notes)


def show(request: FindingRequest, comparison: Comparison, notes: Sequence[str]) -> None:
    """Writes the tables and the picture of a comparison, and prints the tables.

    Args:
      request: the command line.
      comparison: the measurements.
      notes: sentences about what was made for it.

    Raises:
      UserError: no run has ended, or none has the measure that was asked for.
    """
    finding = request.finding
    # Each measure, with the comparison that has it.
    available = {name: (comparison, measure) for name, measure in measures_of(comparison).items()}
    common = same_score.common_score(comparison)
    if common is not None:
        available[same_score.NAME] = (common.comparison, common.measure)
    names = finding.measures if request.measure is None else (request.measure,)
    shown_measures = [available[name] for name in names if name in available]
    if not shown_measures:
        problem = f"only has {' and '.join(available)}" if available else "has none: no run ended"
        raise UserError(
            f"the table needs a {' or a '.join(names)}, but the comparison {problem}. Pass another "
            "--measure, or run the finding again."
        )
    pivots = [pivot_of(source, finding.layout, measure) for source, measure in shown_measures]
    picture_source, picture_measure = shown_measures[0]
    picture_pivot = pivot_of(picture_source, finding.picture, picture_measure)
    request.output.mkdir(parents=True, exist_ok=True)
    picture_link = picture.write(picture_pivot, request.output)
    text = document.document(finding.title, finding.said, notes, comparison, pivots, picture_link)
    write_text(request.output / document.MARKDOWN, text)
    console = hosts.console()
    for line in (text.rstrip(), "", f"written to {request.output / document.MARKDOWN}"):
        tell(console, line)


def _make_inputs(request: FindingRequest, session: Session) -> FindingInputs:
    """Prepares the base and the data of a finding, in its output folder."""
    if request.finding.make is None:
        return FindingInputs({})
    folder = request.output / MADE
    new_folders = [path for path in (folder, request.output) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    session.stop.remedy = resume_hint(_PROG)
    try:
        inputs = request.finding.make(folder, session)
    except BaseException:
        for new_folder in new_folders:
            with contextlib.suppress(OSError):  # it is not empty
                new_folder.rmdir()
        raise
    write_json(folder / _NOTES, {"notes": inputs.notes})
    return inputs


def _read_notes(folder: Path) -> tuple[str, ...]:
    return tuple(read_json(folder / MADE / _NOTES).get("notes", ()))


if __name__ == "__main__":
    main()
