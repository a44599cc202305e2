"""See what a model drew: `python -m train.rollouts runs/grpo` writes a page with the completions.

The page is one file for a browser. With --text, the completions are printed. Two runs are shown
side by side.
"""

import dataclasses
import os
import sys
from collections.abc import Sequence

import tyro
from rich.console import Console

from train.console.errors import UserError, reported
from train.console.help import HelpPage
from train.console.output import check_free, opened, say
from train.options.command import parse_options
from train.options.paths import Place, Words
from train.rollouts.page import render_page
from train.rollouts.runs import Filter, arrange, read_groups, run_names, select
from train.rollouts.terminal import print_views

_PAGE = "rollouts.html"


@dataclasses.dataclass(frozen=True, kw_only=True)
class RolloutsOptions:
    """Show the completions of a run, or of two runs side by side."""

    HELP = HelpPage(
        "runs text output steps rewards words overwrite", "runs/grpo --output rollouts.html"
    )

    runs: tyro.conf.Positional[tuple[Place, ...]] = ()
    """The folder of a run, or the folders of two runs on the same prompts."""
    text: bool = False
    """Print the completions as text, in place of the page."""
    output: str | None = None
    """The path of the file, which appears when it is complete. By default rollouts.html, and
    standard output with --text."""
    overwrite: bool = False
    """Replace the file of --output."""
    steps: tuple[int, int] | None = None
    """The first and the last step to show. By default all steps."""
    rewards: tuple[float, float] | None = None
    """The lowest and the highest reward to show. By default all completions, also those without a
    reward."""
    words: tuple[Words, ...] = ()
    """Words that must all occur in a prompt with its completion, in upper or lower case."""


def main(args: Sequence[str] | None = None) -> None:
    """Runs the command line."""
    with reported():
        options = parse_options(RolloutsOptions, args, "train.rollouts")
        check(options)
        run(options)


def check(options: RolloutsOptions) -> None:
    """Raises a UserError for invalid options, and for options that would have no effect."""
    if len(options.runs) not in (1, 2):
        raise UserError(
            f"train.rollouts shows one run or two runs, but the command line names "
            f"{len(options.runs)}. Pass the folder of a run, such as runs/grpo."
        )
    real_paths = {os.path.realpath(os.path.expanduser(run)) for run in options.runs}
    if len(real_paths) < len(options.runs):
        raise UserError(
            f"The run {options.runs[0]} is named twice. Pass it once, or pass another run."
        )
    for name, bounds in (("steps", options.steps), ("rewards", options.rewards)):
        if bounds is not None and not bounds[0] <= bounds[1]:
            raise UserError(
                f"--{name} {bounds[0]} {bounds[1]} contains no number. Pass the lower bound first."
            )
    if options.overwrite and options.text and options.output is None:
        raise UserError(
            "--overwrite replaces the file of --output, but --output is not set. Pass --output, or "
            "remove --overwrite."
        )


def run(options: RolloutsOptions) -> None:
    """Reads the runs, and writes the page or the text.

    Raises:
      UserError: a folder contains no run or no completions, the runs have no prompt in common, no
        completion is left, or the file exists.
    """
    output = options.output
    if output is None and not options.text:
        output = _PAGE
    if output is not None:
        check_free(output, options.overwrite, "--output")
    views = arrange(options.runs, [read_groups(run) for run in options.runs])
    views = select(views, Filter(options.steps, options.rewards, options.words))
    names = run_names(options.runs)
    with opened(output, options.overwrite, "--output") as file:
        if options.text:
            print_views(Console(file=file, highlight=False), names, views)
        else:
            file.writelines(render_page(names, views))
    if output is not None:
        groups = [group for view in views for group in view.groups if group is not None]
        n_completions = sum(len(group.completions) for group in groups)
        n_steps = len({view.step for view in views})
        remedy = "" if options.text else ". Open this file in a browser"
        say(f"{n_completions:,} completions of {n_steps:,} steps are in {output}{remedy}")


if __name__ == "__main__":
    main(sys.argv[1:])
