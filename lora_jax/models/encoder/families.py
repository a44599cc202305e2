"""The families of encoders: the facts by which they differ."""

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class EncoderFamily:
    """The facts of one family.

    Attributes:
      class_name: the beginning of transformers' names of its classes.
      prefix: the name of the encoder inside a model with a head; its heads are of that kind.
      pad_token_id: transformers' default.
      after_padding: True if positions are counted over the tokens other than padding, from the one
        after ``pad_token_id``; else they are slots, from 0.
      default_targets: PEFT's default target_modules.
    """

    class_name: str
    prefix: str
    pad_token_id: int
    after_padding: bool
    default_targets: tuple[str, ...] = ("query", "value")


FAMILIES: dict[str, EncoderFamily] = {
    "bert": EncoderFamily(class_name="Bert", prefix="bert", pad_token_id=0, after_padding=False),
    "roberta": EncoderFamily(
        class_name="Roberta", prefix="roberta", pad_token_id=1, after_padding=True
    ),
    "xlm-roberta": EncoderFamily(
        class_name="XLMRoberta", prefix="roberta", pad_token_id=1, after_padding=True
    ),
}
