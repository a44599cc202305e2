"""The defaults that a task sets for options that the user did not pass."""

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class Defaults:
    """The defaults that a task sets for options that the user did not pass.

    Attributes:
      model: the base; None if the user must name one.
      alpha: alpha as a multiple of the rank.
      lr, full_lr: AdamW's peak learning rate for an adapter, and for full fine-tuning.
      beta2: Adam's decay rate of the squared gradients.
      steps, epochs: the length of a run; one epoch if both are None.
      eval_questions: number of questions to answer, or of rows to hold out.
      seq_len, max_new_tokens: tokens of a prompt with its completion, and of a completion, in tasks
        that draw completions.
      temperature: divisor of the logits from which completions are drawn.
    """

    model: str | None
    alpha: float
    lr: float
    full_lr: float
    beta2: float = 0.999
    steps: int | None = None
    epochs: float | None = None
    eval_questions: int = 64
    seq_len: int = 512
    max_new_tokens: int = 128
    temperature: float = 1.0
