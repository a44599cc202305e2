"""Rewards: `python -m train.grpo` trains an adapter on rewards of its own completions.

It samples from the very arrays that it trains. `python -m train.grpo --help` lists the options. The
run itself is in `train.finetune`.
"""

from train import start
from train.options.defaults import Defaults
from train.options.scripts import grpo as options
from train.options.scripts.rollouts import fill_sampling
from train.run.output import resumed_reference
from train.script import TrainingScript
from train.settings.defaults import fill_defaults


def completed(config: options.Config, defaults: Defaults) -> options.Config:
    """Fills in defaults; a resumed run keeps its reference."""
    config = fill_sampling(fill_defaults(config, defaults), defaults)
    return options.fill_reference(config, resumed_reference(config))


SCRIPT = TrainingScript(
    name="train.grpo",
    plain=options.Config(),
    check_options=options.check,
    completed=completed,
    prior=start,
)
parse, task_of, check, main = SCRIPT.parse, SCRIPT.task_of, SCRIPT.check, SCRIPT.main

if __name__ == "__main__":
    main()
