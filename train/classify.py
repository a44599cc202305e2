"""Text classification: `python -m train.classify` teaches MiniLM which words are positive.

The head of the encoder trains in full; the encoder trains with LoRA, in full, or not at all. With
a ViT or DINOv2, it classifies images: `--model NAME --dataset photos/`. With `--labels pairs`, it
learns to score completions instead: a reward model for `train.grpo`.
`python -m train.classify --help` lists the options. The run itself is in `train.finetune`.
"""

from train.options.defaults import Defaults
from train.options.scripts import classify as options
from train.script import TrainingScript
from train.settings.defaults import fill_defaults


def complete(config: options.Config, defaults: Defaults) -> options.Config:
    """Fills in defaults, some of which depend on the parameters that train."""
    return fill_defaults(*options.fill_head_options(config, defaults))


SCRIPT = TrainingScript(
    name="train.classify", plain=options.Config(), check_options=options.check, completed=complete
)
parse, task_of, check, main = SCRIPT.parse, SCRIPT.task_of, SCRIPT.check, SCRIPT.main

if __name__ == "__main__":
    main()
