"""The options of `python -m train.check`."""

import dataclasses
import os
from pathlib import Path

from lora_jax.training.arguments import POSITIVE, check_numbers
from lora_jax.training.errors import TrainingError
from train.console.errors import UserError, as_user_errors
from train.console.help import HelpPage
from train.options.paths import Place
from train.run.pretrained import find_config, model_errors


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckOptions:
    """Test this machine: compare kernels with dense arithmetic, train real steps, and compare
    memory and time with the plan. Exit with code 1 if a check fails."""

    HELP = HelpPage("minutes output overwrite json model", "--minutes 5")

    minutes: float = 5.0
    """The time that the checks may take. The most important checks run first. A check that is not
    reached is listed."""
    output: Place = "check.json"
    """The file for versions, device, options and figures. It contains no path, and no name of a
    user or a host."""
    overwrite: bool = False
    """Replace the file of --output."""
    json: bool = False
    """Print the content of the file, in place of a table."""
    model: Place | None = None
    """A config.json with the shapes of the steps; no weights are read. By default the shapes of a
    1B model, or of a smaller one where a 1B model does not fit."""
    distributed: bool = False
    """Run as one of several processes; see train.sft."""
    coordinator: str | None = None
    """Address of process 0, as host:port; see train.sft."""
    num_processes: int | None = None
    """Number of processes. Pass it together with --coordinator."""
    process_id: int | None = None
    """Number of this process, counted from 0. Pass it together with --coordinator."""
    heartbeat_timeout: int = 100
    """Seconds without a heartbeat after which a process counts as frozen."""

    @property
    def output_path(self) -> Path:
        """The file to write."""
        return Path(self.output).expanduser().absolute()


def check_options(options: CheckOptions) -> None:
    """Raises a UserError for options that cannot work, before anything runs."""
    with as_user_errors(TrainingError):
        check_numbers({"minutes": options.minutes}, {"minutes": POSITIVE})
    if options.model is not None:
        with model_errors(options.model):
            find_config(options.model)
    path = options.output_path
    if path.is_dir():
        raise UserError(f"--output {options.output} is a folder. Pass the name of a file.")
    if path.exists() and not options.overwrite:
        raise UserError(
            f"--output {options.output} exists. Pass --overwrite to replace it, or another "
            "--output."
        )
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise UserError(
            f"--output {options.output} cannot be written, because its folder does not exist or is "
            "read-only. Pass another --output."
        )
