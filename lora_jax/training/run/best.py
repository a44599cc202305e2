"""The best adapter of a run by one measurement, and early stopping.

Each adapter that was the best when it was measured is saved in a folder of its own, named by its
step. The older one is deleted only once no checkpoint needs it: a run that goes back to an earlier
checkpoint finds the adapter that was the best there. Each checkpoint records what was the best.
"""

import dataclasses
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import lora_jax as lj
from lora_jax.core.types import Fields, Tree
from lora_jax.folders import local_path
from lora_jax.training.errors import TrainingError
from lora_jax.training.processes import is_first, wait_for_all

BEST = "best"  # the folder of the best adapters, beside the folder of the checkpoints


@dataclasses.dataclass(frozen=True)
class Standing:
    """The best measurement so far.

    Attributes:
      value: the measurement; None before the first one that is a number.
      step: the step that it was taken after.
      waited: the measurements since then.
    """

    value: float | None = None
    step: int = 0
    waited: int = 0

    def after(self, step: int, value: float, *, goal: Literal["min", "max"]) -> "Standing":
        """Returns the standing after another measurement; the first of equal ones is best.

        >>> from lora_jax.training.run.best import Standing
        >>> Standing(2.0, 10).after(20, 1.5, goal="min")
        Standing(value=1.5, step=20, waited=0)
        >>> Standing(2.0, 10).after(20, float("nan"), goal="min")
        Standing(value=2.0, step=10, waited=1)
        """
        if self.value is None:
            is_better = not math.isnan(value)
        elif goal == "min":
            is_better = value < self.value
        else:
            is_better = value > self.value
        if is_better:
            return Standing(value, step)
        return dataclasses.replace(self, waited=self.waited + 1)


class Best:
    """Tracks and saves the best adapter of a run.

    Attributes:
      metric: the measurement that decides: "eval_loss".
      standing: the best measurement so far.
    """

    def __init__(
        self,
        folder: Path,
        metric: str,
        *,
        goal: Literal["min", "max"] = "min",
        patience: int | None = None,
        about: Fields | None = None,
    ) -> None:
        """Starts without a measurement; the best adapters are saved in `folder`.

        Args:
          folder: folder of the adapters, each in a folder of its step's number.
          metric: the name of the measurement, with its prefix.
          goal: whether the least or the largest is the best.
          patience: the measurements in a row without a better one that end training.
          about: facts to keep beside each adapter; see `lora_jax.save_adapter`.
        """
        self.folder = local_path(folder).absolute()
        self.metric = metric
        self.standing = Standing()
        self._goal = goal
        self._patience = patience
        self._about = dict(about or {})

    @property
    def is_over(self) -> bool:
        """Returns True if `patience` measurements brought no improvement."""
        return self._patience is not None and self.standing.waited >= self._patience

    @property
    def about(self) -> dict[str, Any]:
        """Returns the step and value of the best measurement, to store with its adapter.

        Returns {} where nothing was measured.
        """
        if self.standing.value is None:
            return {}
        return {"step": self.standing.step, self.metric: self.standing.value}

    def judge(self, step: int, tree: Callable[[], Tree], measured: Mapping[str, float]) -> bool:
        """Saves the adapter if it is the best so far; all processes must call this.

        Args:
          step: the step that was measured.
          tree: returns the adapted tree after it.
          measured: by name; the same in all processes.

        Returns:
          Whether training ends here.
        """
        if self.metric not in measured:
            return self.is_over
        self.standing = self.standing.after(step, measured[self.metric], goal=self._goal)
        is_best = self.standing.step == step and self.standing.waited == 0
        if is_best:
            facts = self._about | self.about
            lj.save_adapter(self.folder / str(step), tree(), about=facts, overwrite=True)
            wait_for_all("the best adapter is saved")
        return self.is_over

    def keep_for(self, checkpoints: Sequence[int]) -> None:
        """Deletes the adapters that neither the run nor its checkpoints need.

        Args:
          checkpoints: their steps.
        """
        needed_steps = {self.standing.step}
        for checkpoint in checkpoints:
            earlier_steps = [step for step in self._steps() if step <= checkpoint]
            needed_steps.add(max(earlier_steps, default=0))
        self._delete_all_but(needed_steps)

    def go_on_from(self, step: int, saved: Fields | None) -> None:
        """Restores the best measurement that a checkpoint recorded.

        Args:
          step: the checkpoint's.
          saved: the `as_json` that it holds; None for the beginning of a run.

        Raises:
          TrainingError: the checkpoint does not say what the best was, or its adapter is gone.
        """
        if step and saved is None:
            raise TrainingError(
                lambda option: (
                    f"{option('keep_best')}: the run went on for {step} steps without it, so the "
                    f"best adapter of these steps is not known. Remove {option('keep_best')}, or "
                    "start another run."
                )
            )
        if saved is not None and saved["metric"] != self.metric:
            raise TrainingError(
                lambda option: (
                    f"{option('keep_best')}: the run keeps the best adapter by {saved['metric']}, "
                    f"not by {self.metric}. Use the same metric."
                )
            )
        fields = {name: value for name, value in (saved or {}).items() if name != "metric"}
        self.standing = Standing(**fields)
        if self.standing.value is not None and self.standing.step not in self._steps():
            raise TrainingError(
                f"the best adapter {self.folder / str(self.standing.step)} is missing. Put it "
                "back, or start another run."
            )
        self._delete_all_but({best_step for best_step in self._steps() if best_step <= step})

    def as_json(self) -> dict[str, Any]:
        """Returns the standing in the form that checkpoints store."""
        return {"metric": self.metric, **dataclasses.asdict(self.standing)}

    def load(self, params: Tree) -> Tree:
        """Returns an adapted tree with the best adapter, or unchanged if nothing was measured."""
        if self.standing.value is None:
            return params
        best_folder = self.folder / str(self.standing.step)
        # Its base is this one: there is nothing to check.
        return lj.load_adapter(best_folder, params, allow_base_mismatch=True)

    def _steps(self) -> list[int]:
        """Returns the steps of the adapters in the folder."""
        if not self.folder.is_dir():
            return []
        return [int(path.name) for path in self.folder.iterdir() if path.name.isdecimal()]

    def _delete_all_but(self, needed_steps: set[int]) -> None:
        """Deletes all other adapters, in the first process."""
        if is_first() and self.folder.is_dir():
            for path in self.folder.iterdir():
                is_needed = path.name.isdecimal() and int(path.name) in needed_steps
                if not is_needed:
                    shutil.rmtree(path, ignore_errors=True)
        wait_for_all("older adapters are deleted")
