"""The table of commands: `lora-jax NAME …` is `python -m train.NAME …`; alone, it lists the names.

It works in a folder with a `train.py` or a `train` of its own, where `python -m` finds that first.
"""

import difflib
import importlib
import sys
from collections.abc import Sequence

from train.console.extras import report_missing_package
from train.console.pipe import closed_pipe
from train.console.program import program

COMMANDS = {
    "sft": "fine-tunes a language model on chats, pairs or text",
    "dpo": "trains on preferences: pairs of a better and a worse completion",
    "grpo": "trains on rewards of the model's own completions",
    "distill": "trains on the probabilities that a teacher gives to the model's own completions",
    "classify": "fine-tunes an encoder on labelled texts or images",
    "compare": "measures LoRA against full fine-tuning on your model and data, and says which to "
    "use",
    "findings": "repeats published findings about LoRA, with a table and a picture each",
    "generate": "answers prompts with a base and its adapters, or chats",
    "rollouts": "shows the completions of one run or two in a browser",
    "serve": "serves a base and its adapters over HTTP: Tinker's client trains them, OpenAI's "
    "client asks them",
    "predict": "classifies texts or images with a classifier that `train.classify` or PEFT trained",
    "export": "writes files that PEFT, transformers and serving engines load",
    "plan": "tells how much memory and time a run needs, on a machine that you do not need to have",
    "launch": "prints a file for a scheduler (Slurm, JobSet, SkyPilot) that starts a run and "
    "continues it",
    "check": "tests kernels and steps on this machine",
    "doctor": "tells what this machine has, what is wrong with it, and what to do",
}


def main(args: Sequence[str]) -> None:
    """Runs a command by its name, or lists all. An unknown name exits with code 2.

    Args:
      args: the name and its options; options of the command become this process's.
    """
    if not args or args[0] in ("-h", "--help"):
        with closed_pipe():
            print(list_commands())
        return
    name, *options = args
    if name not in COMMANDS:
        nearest = difflib.get_close_matches(name, COMMANDS, 1, 0.0)[0]
        print(
            f"error: there is no command {name!r}. The nearest is {nearest}. Use one of "
            f"{', '.join(COMMANDS)}. {program('NAME')} --help lists the options of one.",
            file=sys.stderr,
        )
        sys.exit(2)
    sys.argv = [sys.argv[0], *options]
    sys.excepthook = report_missing_package
    module = importlib.import_module(f"train.{name}")
    if not hasattr(module, "main"):  # a package
        module = importlib.import_module(f"train.{name}.__main__")
    module.main()


def list_commands() -> str:
    """Returns the usage line and a line for each command."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {about}" for name, about in COMMANDS.items()]
    return "\n".join(
        [f"usage: {program('NAME')} [options]", "", *lines]
        + ["", f"{program('NAME')} --help lists the options of one."]
    )


if __name__ == "__main__":
    main(sys.argv[1:])
