"""An encoder's family, its options, and its config.json."""

import dataclasses
from typing import Any

from lora_jax.core.types import Fields
from lora_jax.hf.fields import (
    ConfigError,
    check_no_unknown_fields,
    check_supported,
    read_boolean,
)
from lora_jax.models.fields import (
    FieldTable,
    check_classes,
    check_transformer,
    read_classes,
    read_head,
    write_classes,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class EncoderFamily:
    """The declaration of one family.

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


HEADS = ("none", "masked_lm", "classification", "embedding")
POOLINGS = ("mean", "cls")
OPTIONS = frozenset({"head", "num_labels", "pooling", "normalize"})
_NEEDED_HEADS = {
    "num_labels": "classification",
    "pooling": "embedding",
    "normalize": "embedding",
}
# Fields of a config.json that describe the head.
_HEAD_FIELDS = {"num_labels", "_num_labels", "sentence_pooling", "sentence_normalize"}

# transformers' class names for a model with the head; the first is the one that is written.
_ARCHITECTURES = {
    "none": ("Model",),
    "masked_lm": ("ForMaskedLM", "ForPreTraining"),
    "classification": ("ForSequenceClassification",),
    "embedding": (),
}

# Without an effect on the output: dropout is for training; TensorFlow's BERT, older versions of
# transformers and sentence-transformers write the rest.
_NO_EFFECT = frozenset(
    """
    hidden_dropout_prob attention_probs_dropout_prob classifier_dropout bos_token_id eos_token_id
    gradient_checkpointing directionality pooler_fc_size pooler_num_attention_heads
    pooler_num_fc_layers pooler_size_per_head pooler_type output_past sentence_transformers
    sbert_ce_default_activation_function
    """.split()
)

# Known options that would change the forward pass, and the only value that is supported.
_UNSUPPORTED: dict[str, object] = {
    "position_embedding_type": "absolute",
    "is_decoder": False,
    "tie_word_embeddings": True,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class EncoderConfig:
    """An encoder of the BERT, RoBERTa and XLM-RoBERTa kind, with its head. Hashable.

    Sizes are in elements. ``head`` is one of

    - "none": final hidden states, and the pooler's output;
    - "masked_lm": logits of each token, by the tied embedding;
    - "classification": logits of ``num_labels`` classes for the whole text;
    - "embedding": one vector for the whole text: by ``pooling``, the mean over its real tokens or
      the first token's ("mean", "cls"), divided by its norm if ``normalize``.

    Raises:
      ConfigError: if the fields contradict each other.
    """

    model_type: str = "bert"
    vocab_size: int
    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-12
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    initializer_range: float = 0.02
    pad_token_id: int | None = None
    head: str = "none"
    num_labels: int = 2
    label_names: tuple[str, ...] = ()
    pooling: str = "mean"
    normalize: bool = False

    def __post_init__(self) -> None:
        check_transformer(self)
        check_supported("model_type", self.model_type, FAMILIES)
        check_supported("head", self.head, HEADS)
        check_supported("pooling", self.pooling, POOLINGS)
        if self.family.after_padding and self.pad_token_id is None:
            raise ConfigError(
                f"{self.model_type} counts positions from pad_token_id, which is missing. Set "
                "pad_token_id."
            )
        check_classes(self.num_labels, self.label_names)

    @property
    def family(self) -> EncoderFamily:
        """The declaration of the model's family."""
        return FAMILIES[self.model_type]

    @property
    def prefix(self) -> str:
        """The name of the encoder inside a model with a head: "bert" or "roberta"."""
        return self.family.prefix

    @property
    def has_pooler(self) -> bool:
        """True if the head uses the pooler's output."""
        return self.head == "none" or (self.head == "classification" and self.prefix == "bert")

    @property
    def max_tokens(self) -> int:
        """The maximum number of tokens; RoBERTa does not use its first positions."""
        if not self.family.after_padding or self.pad_token_id is None:
            return self.max_position_embeddings
        return self.max_position_embeddings - self.pad_token_id - 1

    @classmethod
    def from_hf(cls, config: Fields, **options: Any) -> "EncoderConfig":
        """Reads a config.json of transformers 4 or 5.

        Args:
          config: the parsed config.json. Its ``architectures`` tells the head.
          **options: head, num_labels, pooling and normalize, instead of the file's.

        Returns:
          The configuration.

        Raises:
          ConfigError: names the fields that are missing, unsupported or unknown, and options that
            do not go with the head.
        """
        family = check_supported("model_type", config.get("model_type"), FAMILIES)
        known_names = _HEAD_FIELDS | _FIELDS.file_names | _NO_EFFECT
        check_no_unknown_fields(config, family, known_names, _UNSUPPORTED)
        if config.get("vocab_size") is None:
            raise ConfigError(
                "config.json lacks vocab_size. Add the field, or download the model again."
            )
        head = options.get("head") or _read_head(config)
        for name, option_head in _NEEDED_HEADS.items():
            if name in options and head != option_head:
                raise ConfigError(
                    f"{name} needs head={option_head!r}, but the head is {head!r}. Pass "
                    f"head={option_head!r}, or remove {name}."
                )
        num_labels, label_names = read_classes(config, options.get("num_labels"))
        fields: dict[str, Any] = {
            "num_labels": num_labels,
            "label_names": label_names,
            "pooling": config.get("sentence_pooling") or "mean",
            "normalize": read_boolean("sentence_normalize", config.get("sentence_normalize")),
            "pad_token_id": FAMILIES[family].pad_token_id,
        }
        fields |= _FIELDS.read(config)
        fields |= options
        fields["head"] = head
        return cls(**fields)

    def to_hf(self) -> dict[str, object]:
        """Returns the config.json that ``from_hf`` reads back as this configuration.

        transformers has no name for the head "embedding": it reads such a file as a bare encoder.
        """
        fields = _FIELDS.write(self)
        hf_head = "none" if self.head == "embedding" else self.head
        fields["architectures"] = [self.family.class_name + _ARCHITECTURES[hf_head][0]]
        fields |= write_classes(self.num_labels, self.label_names)
        if self.head == "embedding":
            fields["sentence_pooling"] = self.pooling
            fields["sentence_normalize"] = self.normalize
        return fields


_FIELDS = FieldTable(EncoderConfig, excluded=(*OPTIONS, "label_names"))


def _read_head(config: Fields) -> str:
    """Returns the head that a config.json names."""
    if config.get("sentence_pooling") is not None:
        return "embedding"
    class_names = [family.class_name for family in FAMILIES.values()]
    return read_head(config, class_names, _ARCHITECTURES)
