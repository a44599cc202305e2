"""Rows of a dataset as token sequences, with a mark on the tokens that the loss counts.

A row is a chat (``messages``) or a pair (``prompt``, ``completion``). Chats are rendered by the
model's own template; the loss counts what the assistant says, up to and including the end of its
turn, and nothing else.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from lora_jax.training.batches import Packs, Tokens, pack
from lora_jax.training.errors import TrainingError

Message = Mapping[str, str]
Row = Mapping[str, Any]
Mapped = Callable[[Callable[[Any], Any], Sequence[Any]], list[Any]]

_NEEDED = "a row needs `messages` (a list of turns with `role` and `content`), or `prompt` and "
_NEEDED += "`completion` (two strings)"


def chats(
    rows: Sequence[Row],
    tokenizer: Any,
    *,
    seq_len: int,
    packing: bool = False,
    truncate: bool = False,
    source: str = "the rows",
) -> Packs:
    """Returns chats as examples for a language model, which learns what the assistant says.

    Args:
      rows: dicts with `messages` (turns with `role` and `content`), or `prompt` and `completion`.
      tokenizer: the model's; its chat template renders the turns.
      seq_len: tokens a sequence, at most.
      packing: puts several rows into one sequence; none sees another.
      truncate: cuts rows off that are longer, which are an error otherwise; one that has no token
        of a completion left is left out.
      source: the name of the rows in errors.

    Raises:
      TrainingError: a row cannot be used; names it.

    >>> from lora_jax import models, training
    >>> rows = [{"prompt": "What is one plus one?", "completion": "Two."}]
    >>> tokenizer = models.load_tokenizer("HuggingFaceTB/SmolLM2-135M-Instruct")  # doctest: +SKIP
    >>> examples = training.chats(rows, tokenizer, seq_len=64)  # doctest: +SKIP
    """
    if not rows:
        raise TrainingError(f"{source} is empty")
    sequences = check_lengths(tokenize(rows, tokenizer, source), seq_len, truncate=truncate)
    return pack(sequences, seq_len, packing=packing)


def one_by_one(work: Callable[[Any], Any], items: Sequence[Any]) -> list[Any]:
    """Returns ``[work(item) for item in items]``."""
    return [work(item) for item in items]


def conversation(row: Row, name: str) -> list[dict[str, str]]:
    """Returns the turns of a row that is called `name` in errors.

    Raises:
      TrainingError: fields are missing or of the wrong type, or no assistant turn is there.
    """
    if row.get("messages") is not None:
        return _checked_turns(row["messages"], name)
    if row.get("prompt") is None or row.get("completion") is None:
        found = ", ".join(f"`{field}`" for field in row) or "nothing"
        raise TrainingError(f"{name} has {found}; {_NEEDED}")
    for field in ("prompt", "completion"):
        if not isinstance(row[field], str) or not row[field]:
            raise TrainingError(f"{name}: `{field}` is {_shown(row[field])}; {_NEEDED}")
    return [
        {"role": "user", "content": row["prompt"]},
        {"role": "assistant", "content": row["completion"]},
    ]


def _checked_turns(messages: Any, name: str) -> list[dict[str, str]]:
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise TrainingError(f"{name}: `messages` is {_shown(messages)}; {_NEEDED}")
    for index, turn in enumerate(messages):
        if not isinstance(turn, Mapping):
            raise TrainingError(f"{name}: turn {index} is {_shown(turn)}; {_NEEDED}")
        for field in ("role", "content"):
            if not isinstance(turn.get(field), str):
                raise TrainingError(
                    f"{name}: `{field}` of turn {index} is {_shown(turn.get(field))}; {_NEEDED}"
                )
    roles = [turn["role"] for turn in messages]
    if "assistant" not in roles:
        raise TrainingError(f"{name} has no assistant turn to learn from, only {', '.join(roles)}")
    if roles[0] == "assistant":
        raise TrainingError(
            f"{name} begins with an assistant turn; there is nothing that it answers"
        )
    return [{"role": turn["role"], "content": turn["content"]} for turn in messages]


def tokenize(
    rows: Sequence[Row],
    tokenizer: Any,
    source: str,
    *,
    numbers: Sequence[int] | None = None,
    mapped: Mapped = one_by_one,
) -> list[Tokens]:
    """Returns each row as one sequence, or several.

    Several where the template renders a turn otherwise once others follow.

    Args:
      rows: chats, or pairs of prompt and completion.
      tokenizer: the model's.
      source: the name of the rows in errors.
      numbers: the rows' numbers in the data, where these are not all; by default from 1 on.
      mapped: applies a function to each of a list of items, in any way; results are JSON.

    Raises:
      TrainingError: a row is not usable; names the first one.
    """

    def of_row(numbered: tuple[int, Row]) -> list[dict[str, list[int]]]:
        number, row = numbered
        name = f"{source}, row {number}"
        turns = conversation(row, name)
        if tokenizer.chat_template is None:
            sequences = [_plain_tokens(turns, tokenizer, name)]
        else:
            sequences = _chat_tokens(turns, tokenizer, name)
        return [{"ids": t.ids.tolist(), "counts": t.counts.astype(int).tolist()} for t in sequences]

    numbers = range(1, len(rows) + 1) if numbers is None else numbers
    parts = mapped(of_row, list(zip(numbers, rows, strict=True)))
    return [
        Tokens(np.array(part["ids"], np.int32), np.array(part["counts"], bool), row)
        for row, sequences in zip(numbers, parts, strict=True)
        for part in sequences
    ]


def _plain_tokens(turns: Sequence[Message], tokenizer: Any, name: str) -> Tokens:
    """Returns a prompt and its completion in a row, for a model without a chat template."""
    if [turn["role"] for turn in turns] != ["user", "assistant"]:
        raise TrainingError(
            f"{name} is a chat, and the model has no chat template: give rows with `prompt` and "
            "`completion`, or a model that was made for chats"
        )
    prompt = tokenizer(turns[0]["content"])["input_ids"]
    completion = tokenizer(turns[1]["content"], add_special_tokens=False)["input_ids"]
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    counts = [False] * len(prompt) + [True] * (len(completion) + len(end))
    return Tokens(np.array(prompt + completion + end, np.int32), np.array(counts))


def _chat_tokens(turns: Sequence[Message], tokenizer: Any, name: str) -> list[Tokens]:
    def render(messages: Sequence[Message], ask: bool) -> str:
        return tokenizer.apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=ask
        )

    try:
        whole = render(turns, False)
        answers = [i for i, turn in enumerate(turns) if turn["role"] == "assistant"]
        spans = [_span(turns[: answer + 1], render) for answer in answers]
    except TrainingError as error:
        raise TrainingError(f"{name}: {error}") from None
    except Exception as error:  # a template refuses a conversation in its own words
        raise TrainingError(f"{name}: the model's chat template refuses it: {error}") from error
    if all(whole.startswith(text) for text, _ in spans):
        return [_marked(whole, [span for _, span in spans], tokenizer)]
    # Some templates drop parts of a turn once others follow (a model's thoughts). What was said
    # then has to be learned as it was said, with what the model saw at that point.
    return [_marked(text, [span], tokenizer) for text, span in spans]


def _span(
    turns: Sequence[Message], render: Callable[[Sequence[Message], bool], str]
) -> tuple[str, tuple[int, int]]:
    """Returns the text up to an assistant turn's end, and that turn's span in it."""
    asked = render(turns[:-1], True)
    answered = render(turns, False).rstrip()
    if not answered.startswith(asked):
        raise TrainingError(
            "the model's chat template renders an answer otherwise than its prompt announces, so "
            f"that the answer cannot be found in it: {_shown(asked[-60:])} is no part of "
            f"{_shown(answered[-120:])}"
        )
    return answered, (len(asked), len(answered))


def _marked(text: str, spans: Sequence[tuple[int, int]], tokenizer: Any) -> Tokens:
    """Returns the tokens of `text` up to the last span; those that begin within one count."""
    text = text[: spans[-1][1]]
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    offsets = np.array([first for first, _ in encoded["offset_mapping"]], np.int64)
    counts = np.zeros(len(offsets), bool)
    for begin, end in spans:
        counts |= (offsets >= begin) & (offsets < end)
    return Tokens(np.array(encoded["input_ids"], np.int32), counts)


def check_lengths(sequences: Sequence[Tokens], seq_len: int, *, truncate: bool) -> list[Tokens]:
    """Returns the sequences, none longer than `seq_len`, each with a token that the loss counts.

    Raises:
      TrainingError: one is longer and `truncate` is off, or none is left.
    """
    longer = sum(len(tokens) > seq_len for tokens in sequences)
    if longer and not truncate:
        longest = max(len(tokens) for tokens in sequences)
        raise TrainingError(
            lambda option: (
                f"{longer} of {len(sequences)} sequences are longer than "
                f"{option('seq_len', seq_len)}, the longest has {longest} tokens. Raise "
                f"{option('seq_len')} to {longest}, take those rows out, or cut them off at the "
                f"end with {option('truncate', True)}"
            )
        )
    cut = [Tokens(t.ids[:seq_len], t.counts[:seq_len], t.row) for t in sequences]
    kept = [tokens for tokens in cut if tokens.counts[1:].any()]
    if not kept:
        raise TrainingError(
            lambda option: f"within {option('seq_len', seq_len)} no row has a token of a completion"
        )
    return kept


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
