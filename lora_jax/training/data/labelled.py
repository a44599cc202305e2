"""Labelled texts as arrays, and a classifier's predictions."""

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Mapping, Sequence

import jax
import numpy as np

from lora_jax.core.types import Batch, Forward, Model, Tokenizer, Tree
from lora_jax.training.data.batches import HostBatch, Padded, round_up
from lora_jax.training.data.rows import Row, check_text, field_names, name_of
from lora_jax.training.data.sequences import MapFunction, few_lengths, map_serially
from lora_jax.training.data.turns import shown
from lora_jax.training.errors import TrainingError
from lora_jax.training.losses import logits_of

_BLOCK = 256  # texts that are encoded at once
_MOST_LENGTHS = 4  # steps, losses and predictions are compiled for each


@dataclasses.dataclass(frozen=True)
class Labelled(Padded):
    """Labelled texts to be batched, as int32 arrays.

    A batch is cut to the smallest of `lengths` that holds its texts, so that a step has few shapes.

    Attributes:
      ids: [n, seq], tokens; or [n, 2, seq], and so the next two, see `comparisons`.
      attention_mask: [n, seq], 0 for padding.
      token_type_ids: [n, seq], 1 in the second text of a pair, for models that tell them apart.
      labels: [n], indices of classes.
      weights: [n], the factor of each row in the loss; 0 for one that does not count.
    """

    weights: np.ndarray
    ids: np.ndarray
    attention_mask: np.ndarray
    token_type_ids: np.ndarray
    labels: np.ndarray

    @functools.cached_property
    def lengths(self) -> tuple[int, ...]:
        """Returns the padded lengths of batches, ascending."""
        return few_lengths(round_up(self._sizes, self.ids.shape[-1]), _MOST_LENGTHS)

    def _padding(self) -> tuple[tuple[int, ...], np.ndarray]:
        return self.lengths, self._sizes

    @functools.cached_property
    def _sizes(self) -> np.ndarray:
        """Returns the unpadded size of each row: [n]."""
        n_places = self.ids.shape[-1]
        is_token = (self.attention_mask != 0).reshape(len(self), -1, n_places)
        text_sizes = n_places - is_token[..., ::-1].argmax(axis=-1)
        text_sizes = np.where(is_token.any(axis=-1), text_sizes, 0)
        return np.asarray(text_sizes.max(axis=-1))

    def by_name(self) -> HostBatch:
        """Returns the arrays."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    def take(self, rows: np.ndarray) -> HostBatch:
        """Returns the texts with these indices, padded to the longest of them."""
        length = self.lengths[self.groups[rows].max()]
        return {
            name: array if name in ("labels", "weights") else array[..., :length]
            for name, array in super().take(rows).items()
        }

    def tokens(self, batch: HostBatch) -> int:
        """Returns the number of tokens in a batch, without padding."""
        return int(batch["attention_mask"].sum())

    def digest(self) -> str:
        """Returns a fingerprint of all texts and of the padded lengths."""
        return hashlib.sha256(f"{self.lengths}{super().digest()}".encode()).hexdigest()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fields:
    """Names the fields of a row with its text, second text (or None) and label."""

    text: str = "text"
    text_pair: str | None = None
    label: str = "label"


def texts(
    rows: Sequence[Row],
    tokenizer: Tokenizer,
    *,
    names: Sequence[str] | None = None,
    fields: Fields = Fields(),
    seq_len: int = 128,
    truncate: bool = False,
    source: str = "the rows",
    mapped: MapFunction = map_serially,
) -> Labelled:
    """Returns rows with texts and labels as examples for a classifier.

    Args:
      rows: dicts, each with a text and a label.
      tokenizer: the model's.
      names: the classes in the order of their indices; by default `label_names` of these rows.
      fields: the names of the fields.
      seq_len: the most tokens of a text.
      truncate: cuts longer texts off, which are an error otherwise.
      source: the name of the rows in errors.
      mapped: applies a function to each of a list of items, in several processes, say; see
        `lora_jax.training.data.chats.tokenize`.

    Raises:
      TrainingError: a row lacks a field, is too long, or has a label that is not among `names`.

    >>> from lora_jax import models, training
    >>> rows = [{"text": "a delight", "label": "good"}, {"text": "a bore", "label": "bad"}]
    >>> name = "sentence-transformers/all-MiniLM-L6-v2"
    >>> tokenizer = models.load_tokenizer(name)  # doctest: +SKIP
    >>> examples = training.texts(rows, tokenizer)  # doctest: +SKIP
    >>> probabilities = training.predict(model, params, examples, 8)  # doctest: +SKIP
    """
    check_rows(rows, source, fields)
    names = names or label_names(rows, fields.label)
    first_texts = [row[fields.text] for row in rows]
    second_texts = [row[fields.text_pair] for row in rows] if fields.text_pair else None
    options = {"truncation": True, "max_length": seq_len} if truncate else {}

    def encode_block(block: slice) -> dict[str, list[list[int]]]:
        """Tokenizes a block of texts, or of text pairs."""
        encoding = tokenizer(
            first_texts[block],
            second_texts[block] if second_texts else None,
            return_token_type_ids=True,
            verbose=False,
            **options,
        )
        return dict(encoding)

    labels = label_indices(rows, names, fields.label, source)
    return Labelled(
        **padded_texts(encode_block, len(rows), tokenizer, seq_len, source, mapped),
        labels=labels,
        weights=np.ones(len(rows), np.int32),
    )


def label_indices(rows: Sequence[Row], names: Sequence[str], label: str, source: str) -> np.ndarray:
    """Returns the index of each row's class among `names`: [n] int32.

    Raises:
      TrainingError: a row has a label that is not among them.
    """
    index_of_name = {name: index for index, name in enumerate(names)}
    for number, row in enumerate(rows, start=1):
        if str(row[label]) not in index_of_name:
            raise TrainingError(
                f"{name_of(row, source, number)}: the label {row[label]!r} is none of the labels "
                f"of training: {', '.join(names)}. Correct the label, or remove the row."
            )
    return np.array([index_of_name[str(row[label])] for row in rows], np.int32)


def padded_texts(
    encode_block: Callable[[slice], Mapping[str, list[list[int]]]],
    n: int,
    tokenizer: Tokenizer,
    seq_len: int,
    source: str,
    mapped: MapFunction,
) -> dict[str, np.ndarray]:
    """Returns the arrays of `n` texts, by their names in `Labelled`.

    Args:
      encode_block: returns `input_ids` and `token_type_ids` of a slice of the texts.
      n: the number of texts.
      tokenizer: the model's, which has the token of padding.
      seq_len, source, mapped: see `texts`.

    Raises:
      TrainingError: a text is longer than `seq_len`.
    """
    blocks = mapped(lambda start: encode_block(slice(start, start + _BLOCK)), range(0, n, _BLOCK))
    ids_of_texts = [ids for block in blocks for ids in block["input_ids"]]
    types_of_texts = [types for block in blocks for types in block["token_type_ids"]]
    lengths = [len(ids) for ids in ids_of_texts]
    n_longer = sum(length > seq_len for length in lengths)
    if n_longer:
        raise TrainingError(
            lambda option: (
                f"{source}: {n_longer} of {n} texts are longer than {option('seq_len', seq_len)}. "
                f"The longest text has {max(lengths)} tokens. Increase {option('seq_len')}, remove "
                f"these rows, or cut them off with {option('truncate', True)}."
            )
        )
    padded_length = round_up(max(lengths), seq_len)

    def pad(lists: Sequence[Sequence[int]], fill: int) -> np.ndarray:
        array = np.full((n, padded_length), fill, np.int32)
        for row, values in zip(array, lists, strict=True):
            row[: len(values)] = values
        return array

    return {
        "ids": pad(ids_of_texts, tokenizer.pad_token_id or 0),
        "attention_mask": pad([[1] * length for length in lengths], 0),
        "token_type_ids": pad(types_of_texts, 0),
    }


def check_rows(rows: Sequence[Row], source: str, fields: Fields) -> None:
    """Raises TrainingError if a row lacks a text or a label; names the row and the field."""
    field_of_option = {"text": fields.text}
    if fields.text_pair:
        field_of_option["text_pair"] = fields.text_pair
    for number, row in enumerate(rows, start=1):
        name = name_of(row, source, number)
        for option, field in field_of_option.items():
            text = row.get(field)
            if not isinstance(text, str) or not text.strip():
                raise missing_field_error(row, name, option, field, "a text")
            if not text.isascii():
                check_text(text, name)
        check_label(row, name, fields.label)


def check_label(row: Row, where: str, field: str) -> None:
    """Raises TrainingError if a row lacks a label; `where` names the row."""
    if not isinstance(row.get(field), str | int) or row[field] == "":
        raise missing_field_error(row, where, "label", field, "a name or a whole number")


def missing_field_error(
    row: Row, where: str, option: str, field: str, needed: str
) -> TrainingError:
    """Returns the error for a row whose field is missing or has a wrong type.

    Args:
      row: the row.
      where: its name.
      option: the option that names the field.
      field: the field's name.
      needed: what has to stand there, in words.
    """
    if field in row:
        return TrainingError(
            f"{where}: `{field}` is {shown(row[field])}, but it must be {needed}. Correct the row."
        )
    return TrainingError(
        lambda written: (
            f"{where} has {field_names(row)}, but no `{field}`. Name the field with "
            f"{written(option)}."
        )
    )


def label_names(rows: Sequence[Row], label: str = "label") -> tuple[str, ...]:
    """Returns the class names by index: numbers in ascending order, names alphabetically.

    Args:
      rows: dicts, each with a label.
      label: the name of its field.

    Raises:
      TrainingError: there is only one class.

    >>> from lora_jax import training
    >>> training.label_names([{"label": "good"}, {"label": "bad"}])
    ('bad', 'good')
    """
    names = {str(row[label]) for row in rows}
    if len(names) < 2:
        raise TrainingError(
            f"all rows have the label {names.pop()}, so there is nothing to classify. Add rows "
            "with other labels."
        )
    has_numbers_alone = all(name.lstrip("-").isdigit() for name in names)
    return tuple(sorted(names, key=int) if has_numbers_alone else sorted(names))


def predict(model: Model | Forward, params: Tree, examples: Padded, batch_size: int) -> np.ndarray:
    """Returns the probability of each class for each text or image: [n, classes].

    See the example of `texts`.

    Args:
      model: a classifier, or its ``apply`` on an adapted tree, ``lora_jax.adapt(model.apply)``.
        What is compiled for one function serves it again.
      params: the parameters, plain or adapted as `model` is.
      examples: the texts or images; see `texts` and `images`.
      batch_size: how many of them are in memory at once.
    """
    forward = getattr(model, "apply", model)
    probabilities = [
        np.asarray(_probabilities(forward, params, batch)) for batch in examples.parts(batch_size)
    ]
    sorted_predictions = np.concatenate(probabilities)[: len(examples)]
    predictions = np.empty_like(sorted_predictions)
    predictions[examples.by_length] = sorted_predictions
    return predictions


@functools.partial(jax.jit, static_argnums=0)
def _probabilities(forward: Callable[..., jax.Array], params: Tree, batch: Batch) -> jax.Array:
    return jax.nn.softmax(logits_of(forward, params, batch))
