"""Trains the adapter or the model that another run starts from."""

import hashlib
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from lora_jax.training.processes import write_json
from train import classify, sft
from train.console.output import tell
from train.export import __main__ as export
from train.export.options import ExportOptions
from train.finetune import finetune
from train.options.common import Options
from train.processes import hosts
from train.processes.session import Session
from train.reporters.files import read_json
from train.run.output import ADAPTER, CONFIG
from train.run.task import Task
from train.stages.types import RunContext

_SCRIPTS: dict[str, Any] = {"train.sft": sft, "train.classify": classify}
MODEL, _RUN, _RECIPE = "base", "base-run", "base.json"


def train(script: str, config: Options, task: Task, session: Session) -> None:
    """Fine-tunes within another run. Its hint tells an interrupted user how to continue.

    Args:
      script: the command: "train.sft".
      config: its options, checked, with the task's defaults.
      task: the task.
      session: tells of signals.

    Raises:
      TrainingError: something that was asked for cannot be done.
      Interrupted: after a signal, once the last step is saved.
    """
    with session.part():
        prior = RunContext(hint=session.stop.remedy, is_prior=True)
        finetune(script, config, task, session, prior)
    session.stop.check()


def train_base(
    script: str, options: Sequence[str], inputs: Sequence[Path], folder: Path, session: Session
) -> Path:
    """Trains a model in full by a script, unless it exists already; returns its folder.

    A run that was interrupted goes on. A model of other options, or of other files, is replaced.

    Args:
      script: "train.sft" or "train.classify".
      options: its options, but for --full and --output.
      inputs: the files that it reads.
      folder: where the model goes, and the run that makes it.
      session: tells of signals.

    Raises:
      TrainingError: the model cannot be trained or written.
      Interrupted: after a signal, once the last step is saved.
    """
    model, run = folder / MODEL, folder / _RUN
    recipe = {"script": script, "options": [*options], "inputs": [*map(digest, inputs)]}
    if read_json(folder / _RECIPE) != recipe:
        for path in (model, run):
            shutil.rmtree(path, ignore_errors=True)
        write_json(folder / _RECIPE, recipe)
    if model.exists():  # it appears as a whole
        return model
    tell(
        hosts.console(),
        f"the run has two parts: 1. {script} trains the base, in {model}; 2. the run itself begins "
        "with this base",
    )
    module = _SCRIPTS[script]
    line = ["--full", *options, "--output", str(run), *["--resume"] * (run / CONFIG).exists()]
    config = module.parse(line)
    module.check(config)
    train(script, config, module.task_of(config), session)
    merged = ExportOptions(adapter=str(run / ADAPTER), merged=True, output=str(model))
    export.run(merged, Console(quiet=True))
    shutil.rmtree(run)
    return model


def digest(path: Path) -> str:
    """Returns a hash of a file, or of all files in a folder and their names."""
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    digest_ = hashlib.sha256()
    for file in files:
        if file.is_file():
            digest_.update(file.name.encode() + file.read_bytes())
    return digest_.hexdigest()
