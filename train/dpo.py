"""Preferences: `python -m train.dpo` trains an adapter on pairs of a better and a worse completion.

The reference is the adapter that it begins with, the base, or another adapter over it. `python -m
train.dpo --help` lists the options. The run itself is in `train.finetune`.
"""

from train.options.defaults import Defaults
from train.options.scripts import dpo as options
from train.run.output import resumed_option
from train.script import TrainingScript
from train.settings.defaults import fill_defaults


def completed(config: options.Config, defaults: Defaults) -> options.Config:
    """Fills in defaults; a resumed run keeps its reference."""
    reference = resumed_option(config, "reference")
    return options.fill_reference(fill_defaults(config, defaults), reference)


SCRIPT = TrainingScript(
    name="train.dpo", plain=options.Config(), check_options=options.check, completed=completed
)
parse, task_of, check, main = SCRIPT.parse, SCRIPT.task_of, SCRIPT.check, SCRIPT.main

if __name__ == "__main__":
    main()
