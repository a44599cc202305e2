"""Reporters by the names of `--report-to`."""

import importlib
from collections.abc import Callable, Sequence

from train.console.errors import UserError
from train.reporters.contract import Reporter, Start
from train.reporters.mlflow import MLflow
from train.reporters.tensorboard import TensorBoard
from train.reporters.trackio import Trackio
from train.reporters.wandb import Wandb

REPORTERS: dict[str, Callable[[Start], Reporter]] = {
    "tensorboard": TensorBoard,
    "wandb": Wandb,
    "mlflow": MLflow,
    "trackio": Trackio,
}
_PACKAGES = {"tensorboard": "tensorboardX"}
_EXTRAS = {"tensorboard": "train"}


def check_reporters(names: Sequence[str]) -> None:
    """Imports what reporters need, before a run does long work.

    Raises:
      UserError: a package is missing, or fails as it is imported.
    """
    for name in [name for name in names if name in REPORTERS]:
        package = _PACKAGES.get(name, name)
        try:
            importlib.import_module(package)
        except ModuleNotFoundError as error:
            raise UserError(
                f"--report-to {name}: the package {error.name} is missing: install the extra "
                f"{_EXTRAS.get(name, name)} (pip install -e '.[{_EXTRAS.get(name, name)}]'), or "
                "leave it out"
            ) from error
        except Exception as error:
            raise UserError(
                f"--report-to {name}: the package {package} fails as it is imported "
                f"({type(error).__name__}: {error}): mend it, or leave it out"
            ) from error
