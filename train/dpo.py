"""Preferences: `python -m train.dpo` trains an adapter on pairs of a better and a worse completion.

The reference is the base under the adapter, or another adapter over it. `python -m train.dpo
--help` lists the options. The run itself is in `train.finetune`.
"""

from train.options.defaults import with_defaults
from train.options.scripts import dpo as options
from train.options.tasks import PAIRS
from train.script import Script

SCRIPT = Script(
    name="train.dpo",
    plain=options.Config(),
    kind=lambda config: PAIRS,
    check_options=options.check,
    completed=lambda config, defaults: options.with_loss(with_defaults(config, defaults)),
)
parse, task_of, check, main = SCRIPT.parse, SCRIPT.task_of, SCRIPT.check, SCRIPT.main

if __name__ == "__main__":
    main()
