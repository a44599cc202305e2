"""Supervised fine-tuning: `python -m train.sft` teaches SmolLM2 to answer questions in SQL.

`python -m train.sft --help` lists the options. The run itself is in `train.finetune`.
"""

from train.options.scripts import sft as options
from train.script import TrainingScript

SCRIPT = TrainingScript(
    name="train.sft", plain=options.Config(), check_options=options.check, own_output="runs/sft"
)
parse, task_of, check, main = SCRIPT.parse, SCRIPT.task_of, SCRIPT.check, SCRIPT.main

if __name__ == "__main__":
    main()
