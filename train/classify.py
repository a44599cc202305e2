"""Text classification: `python -m train.classify` teaches MiniLM which words are positive.

The head of the encoder trains in full; the encoder trains with LoRA, in full, or not at all. With
`--labels pairs`, it learns to score completions instead: a reward model for `train.grpo`.
`python -m train.classify --help` lists the options. The run itself is in `train.finetune`.
"""

from train.options.scripts import classify as options
from train.options.tasks import SCORES, TEXTS
from train.script import Script

SCRIPT = Script(
    name="train.classify",
    plain=options.Config(),
    kind=lambda config: SCORES if config.data.labels == "pairs" else TEXTS,
    check_options=options.check,
    completed=options.with_defaults,
)
parse, task_of, check, main = SCRIPT.parse, SCRIPT.task_of, SCRIPT.check, SCRIPT.main

if __name__ == "__main__":
    main()
