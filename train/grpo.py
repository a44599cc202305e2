"""Rewards: `python -m train.grpo` trains an adapter on rewards of its own completions.

It samples from the very arrays that it trains. `python -m train.grpo --help` lists the options. The
run itself is in `train.finetune`.
"""

from collections.abc import Collection

from train import prior
from train.options.defaults import Defaults
from train.options.scripts import grpo as options
from train.options.scripts.rollouts import fill_sampling
from train.run.output import resumed_option
from train.script import TrainingScript
from train.settings.defaults import fill_defaults


def completed(config: options.Config, defaults: Defaults) -> options.Config:
    """Fills in defaults; a resumed run keeps its reference."""
    config = fill_sampling(fill_defaults(config, defaults), defaults)
    return options.fill_reference(config, resumed_option(config, "reference"))


def with_dataset(config: options.Config, given: Collection[str]) -> options.Config:
    """Fills in --dataset; a resumed run keeps its own."""
    return options.fill_dataset(config, given, resumed_option(config, "dataset"))


SCRIPT = TrainingScript(
    name="train.grpo",
    plain=options.Config(),
    check_options=options.check,
    completed=completed,
    with_dataset=with_dataset,
    prior=prior,
)
parse, task_of, check, main = SCRIPT.parse, SCRIPT.task_of, SCRIPT.check, SCRIPT.main

if __name__ == "__main__":
    main()
