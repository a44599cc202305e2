"""Trackers by the names of `--report-to`."""

import importlib
from collections.abc import Sequence

from train.console.errors import UserError, flag
from train.console.extras import install_command
from train.reporters import mlflow, tensorboard, trackio, wandb
from train.reporters.contract import Tracker

TRACKERS: dict[str, Tracker] = {
    "tensorboard": tensorboard.TRACKER,
    "wandb": wandb.TRACKER,
    "mlflow": mlflow.TRACKER,
    "trackio": trackio.TRACKER,
}


def trackers(names: Sequence[str]) -> dict[str, Tracker]:
    """Returns the trackers of these names; "none" names none."""
    return {name: TRACKERS[name] for name in names if name in TRACKERS}


def check_packages(names: Sequence[str]) -> None:
    """Imports the packages of trackers, before a run does long work.

    Raises:
      UserError: a package is missing, or fails as it is imported.
    """
    for name, tracker in trackers(names).items():
        try:
            importlib.import_module(tracker.package)
        except ModuleNotFoundError as error:
            raise UserError(
                f"--report-to {name} needs the package {error.name}, which is missing. Install the "
                f"extra {tracker.extra} ({install_command(tracker.extra)}), or remove {name}."
            ) from error
        except Exception as error:
            raise UserError(
                f"--report-to {name} needs the package {tracker.package}, which cannot be imported "
                f"({type(error).__name__}: {error}). Repair the package, or remove {name}."
            ) from error


def check_many(names: Sequence[str], what: str) -> None:
    """Raises a UserError for a tracker that cannot follow several runs of one process.

    Args:
      names: the trackers.
      what: the runs, for the message: "a table of runs".
    """
    single_run_names = [name for name, tracker in trackers(names).items() if tracker.one_run]
    if single_run_names:
        able_names = [name for name, tracker in TRACKERS.items() if not tracker.one_run]
        raise UserError(
            f"{flag('report_to', *single_run_names)} keeps only one run per process, but {what} "
            "has "
            f"several runs. Use --report-to {', '.join(able_names)} or none."
        )
