"""Prints a file for a scheduler, with a command line filled in: `python -m train.launch`.

    python -m train.launch slurm sft --model MODEL --dataset FILE --output FOLDER > job.sbatch

The file starts the run on each node, lets it save before its time is over, and goes on with it
where it is started again. Nodes, GPUs and volumes stand in it, to be changed there.
"""

import importlib
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from lora_jax.buckets.copies import folder_with_files
from train.console.errors import UserError, flag, reported
from train.console.help import asks_for_help
from train.console.program import COMMAND, about, program
from train.options.file import value_of
from train.settings.command import read_line
from train.settings.files import CONFIG

_SCRIPT = "train.launch"
FILES = {"slurm": "slurm.sbatch", "jobset": "jobset.yaml", "skypilot": "skypilot.yaml"}
_RESUME = "resume"  # asked by the files, in the place of a scheduler
_TRAINERS = ("sft", "dpo", "grpo", "distill", "classify")
# Options that contradict the file, and the reasons.
_REASONS_AGAINST_OPTION = dict.fromkeys(
    ("resume", "distributed", "coordinator", "num_processes", "process_id"),
    "the scheduler's file sets this option itself",
) | {
    "overwrite": "the scheduler's file continues the run in the output folder",
    "dry_run": "it starts no run and belongs to the script itself",
    "many": "the scheduler's file starts and continues a single run",
}


def main(args: Sequence[str] | None = None) -> None:
    """Runs the command line. Bad input exits with code 2."""
    with reported():
        words = list(sys.argv[1:] if args is None else args)
        if not words or asks_for_help(words[:2]):
            usage = f"usage: {program(_SCRIPT)} {{{','.join(FILES)}}} {{{','.join(_TRAINERS)}}}"
            print(f"{about(__doc__, _SCRIPT)}\n{usage} [options of the script]")
            return
        if words[0] == _RESUME:
            print(resume_option(words[1:]))
            return
        print(launch_file(words), end="")


def resume_option(words: Sequence[str]) -> str:
    """Returns "--resume" if there is a run in an output folder, else "".

    Args:
      words: the folder, which may lie in a bucket.

    Raises:
      UserError: there is not one word.
    """
    if len(words) != 1:
        raise UserError(
            f"{program(_SCRIPT, _RESUME)} takes one argument, the output folder. Pass only this "
            "folder."
        )
    return "--resume" if (folder_with_files(words[0], (CONFIG,)) / CONFIG).exists() else ""


def launch_file(words: Sequence[str]) -> str:
    """Returns the file of a scheduler, with a command line filled in.

    Args:
      words: the scheduler, the script, and the script's options.

    Raises:
      UserError: there is no such scheduler or script, or an option that the script refuses or that
        the file gives.
    """
    scheduler = words[0] if words else ""
    script = words[1] if len(words) > 1 else ""
    options = words[2:]
    if scheduler not in FILES or script not in _TRAINERS:
        raise UserError(
            f"{' '.join(words)}: Name a scheduler ({', '.join(FILES)}) and a script "
            f"({', '.join(_TRAINERS)}), such as: "
            f"{program(_SCRIPT, 'slurm', 'sft')} --model MODEL --output FOLDER"
        )
    trainer = importlib.import_module(f"train.{script}").SCRIPT
    config, line_options, file_options = read_line(trainer.plain, options, trainer.name)
    for name, reason in _REASONS_AGAINST_OPTION.items():
        is_changed_by_file = name in file_options and (
            value_of(config, name) != value_of(trainer.plain, name)
        )
        if name in line_options or is_changed_by_file:
            raise UserError(
                f"{flag(name)} cannot be used here, because {reason}. Remove {flag(name)}."
            )
    trainer.parse(options)
    text = (Path(__file__).parent / FILES[scheduler]).read_text()
    if "output" in line_options or "output" in file_options:
        text = _set_shell_variable(text, "OUTPUT", shlex.quote(config.run.output))
    command = shlex.join([COMMAND, script, *_remove_output_option(options)])
    return _set_shell_variable(text, "COMMAND", f"({command})")


def _set_shell_variable(text: str, name: str, value: str) -> str:
    """Returns a shell script with another value of one of its variables."""
    return re.sub(
        rf"^( *{name}=)(?:\(.*\)|\S+)", lambda match: match[1] + value, text, count=1, flags=re.M
    )


def _remove_output_option(options: Sequence[str]) -> list[str]:
    """Returns options without --output and its value."""
    other_words: list[str] = []
    is_output_value = False
    for word in options:
        if is_output_value:
            is_output_value = False
        elif word == "--output":
            is_output_value = True
        elif not word.startswith("--output="):
            other_words.append(word)
    return other_words


if __name__ == "__main__":
    main(sys.argv[1:])
