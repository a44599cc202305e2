"""On-policy distillation: `python -m train.distill` trains an adapter on its own completions.

A teacher says how likely it finds each of their tokens: a larger model, another adapter, or the
model itself with a longer prompt. `python -m train.distill --help` lists the options. The run
itself is in `train.finetune`.
"""

from train.options.scripts import distill as options
from train.options.scripts.rollouts import fill_sampling
from train.script import TrainingScript
from train.settings.defaults import fill_defaults

SCRIPT = TrainingScript(
    name="train.distill",
    plain=options.Config(),
    check_options=options.check,
    completed=lambda config, defaults: fill_sampling(fill_defaults(config, defaults), defaults),
)
parse, task_of, check, main = SCRIPT.parse, SCRIPT.task_of, SCRIPT.check, SCRIPT.main

if __name__ == "__main__":
    main()
