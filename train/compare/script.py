"""A training script, as a comparison uses it."""

from collections.abc import Callable
from typing import Any, NamedTuple

from train.options.common import Options
from train.options.defaults import Defaults
from train.options.file import replaced
from train.tasks.task import Task


class Script(NamedTuple):
    """A training script, as a comparison uses it.

    Attributes:
      name: name of its module: "train.sft".
      compared: the options of a comparison of its runs, none of them given.
      plain: its own options, none of them given.
      task_of, check: see `train.sft`.
      with_defaults: fills in a task's defaults.
      quick: options of a first look, where they are not given.
      quick_full: the multiples of the script's learning rate that it then tries in full
        fine-tuning.
    """

    name: str
    compared: Options
    plain: Options
    task_of: Callable[[Any], Task]
    check: Callable[[Any], None]
    with_defaults: Callable[[Any, Defaults], Any]
    quick: dict[str, Any]
    quick_full: tuple[float, ...]

    @property
    def kind(self) -> str:
        """Returns the word on the command line: "sft"."""
        return self.name.removeprefix("train.")

    def options_of(self, config: Any) -> Any:
        """Returns a comparison's options without what is compared: those of the script."""
        return type(self.plain)(**{name: getattr(config, name) for name in vars(self.plain)})

    def completed(self, options: Any, **changes: Any) -> Any:
        """Returns options of a run, changed, with the task's defaults."""
        changed = replaced(options, changes)
        return self.with_defaults(changed, self.task_of(changed).defaults)
