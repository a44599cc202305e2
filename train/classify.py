"""Text classification: `python -m train.classify` teaches MiniLM which words are positive.

The head of the encoder trains in full; the encoder trains with LoRA, in full, or not at all. With
a ViT or DINOv2, it classifies images: `--model NAME --dataset photos/`. With `--labels pairs`, it
learns to score completions instead: a reward model for `train.grpo`.
`python -m train.classify --help` lists the options. The run itself is in `train.finetune`.
"""

from train.data.files import holds_images
from train.options.scripts import classify as options
from train.options.tasks import IMAGES, SCORES, TEXTS
from train.script import TrainingScript


def _kind(config: options.Config) -> str:
    """Returns the kind of the task for a user's own rows."""
    if config.data.labels == "pairs":
        return SCORES
    return IMAGES if holds_images(config.data.image, config.data.dataset) else TEXTS


SCRIPT = TrainingScript(
    name="train.classify",
    plain=options.Config(),
    kind=_kind,
    check_options=options.check,
    completed=options.fill_defaults,
)
parse, task_of, check, main = SCRIPT.parse, SCRIPT.task_of, SCRIPT.check, SCRIPT.main

if __name__ == "__main__":
    main()
