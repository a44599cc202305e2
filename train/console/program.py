"""The command that started this process, such as `lora-jax sft`, for messages and help."""

import argparse
import shlex
import sys
from pathlib import Path
from typing import NoReturn

COMMAND = "lora-jax"


class OneLineParser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, with a pointer to the help."""

    def error(self, message: str) -> NoReturn:
        """Prints the message, and exits with code 2."""
        self.exit(2, f"error: {message}. {self.prog} --help explains the options.\n")


def program_words(script: str) -> list[str]:
    """Returns the words that start a script: ["python", "-m", "train.sft"], or ["lora-jax", "sft"].

    Args:
      script: its module, and perhaps further words: "train.sft", "train.compare sft".
    """
    module, *arguments = script.split()
    command = module.removeprefix("train.")
    this_program = Path(sys.argv[0])
    if this_program.stem == COMMAND:
        return [COMMAND, command, *arguments]
    if this_program.parts[-2:] == ("lora_jax", "__main__.py"):
        return ["python", "-m", "lora_jax", command, *arguments]
    return ["python", "-m", f"train.{command}", *arguments]


def program(script: str, *arguments: str) -> str:
    """Returns the command line of a script, quoted for a shell; see `program_words`."""
    return shlex.join([*program_words(script), *arguments])


def about(text: str | None, script: str) -> str:
    """Returns a script's docstring with the command that started this process."""
    return (text or "").replace(f"python -m {script}", program(script))


def resume_hint(script: str) -> str:
    """Returns the command line of this call, with --resume, in a sentence."""
    options = [arg for arg in sys.argv[1:] if arg not in ("--overwrite", "--resume")]
    return f"Go on with: {program(script, *options, '--resume')}"
