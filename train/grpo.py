"""Rewards: `python -m train.grpo` trains an adapter on rewards of its own completions.

It samples from the very arrays that it trains. `python -m train.grpo --help` lists the options. The
run itself is in `train.finetune`.
"""

from train import start
from train.options.scripts import grpo as options
from train.script import TrainingScript
from train.settings.defaults import fill_defaults

SCRIPT = TrainingScript(
    name="train.grpo",
    plain=options.Config(),
    check_options=options.check,
    completed=lambda config, defaults: options.fill_reference(
        fill_defaults(config, defaults), defaults
    ),
    prior=start,
)
parse, task_of, check, main = SCRIPT.parse, SCRIPT.task_of, SCRIPT.check, SCRIPT.main

if __name__ == "__main__":
    main()
