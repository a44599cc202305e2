"""Turns rows of a dataset into token sequences, and marks the tokens that the loss counts.

The model's own template renders chats, with their tools. The loss counts what the assistant says,
its tool calls included, up to and including the end of its turn, and nothing else. Where a template
marks the assistant's words itself (``{% generation %}``), those marks count.
"""

import base64
import dataclasses
import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from lora_jax.training.batches import Packs, pack
from lora_jax.training.data.rows import (
    Conversation,
    Message,
    Row,
    check_rows,
    conversation,
    name_of,
    shown,
)
from lora_jax.training.data.sequences import Sequences, Tokens
from lora_jax.training.errors import TrainingError

Mapped = Callable[[Callable[[Any], Any], Sequence[Any]], list[Any]]
TrainOn = Literal["all", "assistant", "last"]

BLOCK = 1_000  # rows that are tokenised at once
# The tag of Jinja by which a template marks what the assistant says.
_GENERATION = re.compile(r"{%-?\s*generation\s*-?%}")


def chats(
    rows: Sequence[Row],
    tokenizer: Any,
    *,
    seq_len: int,
    packing: bool = False,
    truncate: bool = False,
    train_on: TrainOn = "assistant",
    source: str = "the rows",
) -> Packs:
    """Returns chats as examples for a language model, which learns what the assistant says.

    Args:
      rows: dicts with `messages` (turns with `role` and `content`, also `tool_calls`) and perhaps
        `tools`; or another of the forms in `lora_jax.training.data.rows`.
      tokenizer: the model's; its chat template renders the turns.
      seq_len: tokens a sequence, at most.
      packing: puts several rows into one sequence; none sees another. Without it, rows of about
        one length share a batch.
      truncate: cuts longer rows off, which are an error otherwise; drops one that has no token of a
        completion left.
      train_on: the tokens that the loss counts: "assistant", all that the assistant says; "last",
        its last turn; "all", every token.
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
    check_rows(rows, source)
    tokens = tokenize(rows, tokenizer, source, train_on=train_on)
    return pack(check_lengths(tokens, seq_len, truncate=truncate), seq_len, packing=packing)


def one_by_one(work: Callable[[Any], Any], items: Sequence[Any]) -> list[Any]:
    """Returns ``[work(item) for item in items]``."""
    return [work(item) for item in items]


class _Part(NamedTuple):
    """A text to be tokenised; tokens that begin within one of `spans` count."""

    text: str
    spans: Sequence[tuple[int, int]]
    special: bool = False  # whether the tokenizer adds its special tokens


class _Draft(NamedTuple):
    """A sequence before its texts are tokenised, or already tokenised by the template's marks."""

    row: int
    parts: Sequence[_Part]
    end: bool = False  # whether the token of a text's end follows
    marked: Tokens | None = None


def tokenize(
    rows: Sequence[Row],
    tokenizer: Any,
    source: str,
    *,
    numbers: Sequence[int] | None = None,
    mapped: Mapped = one_by_one,
    train_on: TrainOn = "assistant",
) -> Sequences:
    """Returns each row as one sequence, or several.

    There are several where the template renders a turn differently once others follow, and does not
    mark what the assistant says.

    Args:
      rows: see `chats`.
      tokenizer: the model's. It tokenises a block of rows at a time, on all cores.
      source: the name of the rows in errors.
      numbers: the rows' numbers in the data, where these rows are a part; by default from 1 on.
      mapped: applies a function to each of a list of items (here the first row of each block), in
        several processes, say; results are JSON.
      train_on: see `chats`.

    Raises:
      TrainingError: a row is not usable; names the first one.
    """

    numbered = range(1, len(rows) + 1) if numbers is None else numbers

    def of_block(first: int) -> dict[str, Any]:
        drafts: list[_Draft] = []
        block = slice(first, first + BLOCK)
        for number, row in zip(numbered[block], rows[block], strict=True):
            drafts += _drafts(row, number, tokenizer, name_of(row, source, number), train_on)
        return as_json(_encoded(drafts, tokenizer))

    blocks = mapped(of_block, range(0, len(rows), BLOCK))
    return Sequences.concatenated(map(from_json, blocks))


def _drafts(row: Row, number: int, tokenizer: Any, name: str, train_on: TrainOn) -> list[_Draft]:
    chat = conversation(row, name)
    if chat.text is not None:
        return [_Draft(number, [_Part(chat.text, [(0, len(chat.text))], special=True)], end=True)]
    if tokenizer.chat_template is None:
        return [_Draft(number, _plain(chat, name, train_on), end=True)]
    try:
        if _GENERATION.search(_template(tokenizer, chat)):
            tokens = _marked_by_template(chat, tokenizer, number, train_on)
            return [_Draft(number, [], marked=tokens)]
        texts = _answers(chat, tokenizer)
    except TrainingError as error:
        raise TrainingError(f"{name}: {error}") from None
    except Exception as error:  # a template refuses a conversation in its own words
        raise TrainingError(f"{name}: the model's chat template refuses it: {error}") from error
    whole = texts[-1][0]
    if train_on == "all":
        return [_Draft(number, [_Part(whole, [(0, len(whole))])])]
    if train_on == "last":
        return [_Draft(number, [_Part(whole, [texts[-1][1]])])]
    if all(whole.startswith(text) for text, _ in texts):
        return [_Draft(number, [_Part(whole, [span for _, span in texts])])]
    # Some templates drop parts of a turn once others follow (a model's thoughts). Each turn is then
    # learned as it was said, after what the model saw at that point.
    return [_Draft(number, [_Part(text, [span])]) for text, span in texts]


def _plain(chat: Conversation, name: str, train_on: TrainOn) -> list[_Part]:
    """Returns a prompt and its completion in a row, for a model without a chat template."""
    turns = chat.messages
    if [turn["role"] for turn in turns] != ["user", "assistant"] or "tool_calls" in turns[1]:
        raise TrainingError(
            f"{name} is a chat, and the model has no chat template: give rows with `prompt` and "
            "`completion`, or a model that was made for chats"
        )
    if chat.tools:
        raise TrainingError(f"{name} has `tools`, and the model has no chat template to show them")
    prompt, completion = (turn["content"] for turn in turns)
    asked = [(0, len(prompt))] if train_on == "all" else []
    return [_Part(prompt, asked, special=True), _Part(completion, [(0, len(completion))])]


def _template(tokenizer: Any, chat: Conversation) -> str:
    """Returns the chat template that renders a conversation; some models have one for tools."""
    if isinstance(tokenizer.chat_template, str):
        return tokenizer.chat_template
    return tokenizer.get_chat_template(None, chat.tools)


def _render(chat: Conversation, n: int, tokenizer: Any, *, ask: bool = False, **how: Any) -> Any:
    """Returns the first `n` turns as the template renders them."""
    return tokenizer.apply_chat_template(
        chat.messages[:n],
        tools=chat.tools,
        add_generation_prompt=ask,
        **{"tokenize": False, **chat.options, **how},
    )


def _answers(chat: Conversation, tokenizer: Any) -> list[tuple[str, tuple[int, int]]]:
    """Returns for each assistant turn the text up to its end, and its span in that text."""
    found = []
    for index, turn in enumerate(chat.messages):
        if turn["role"] != "assistant":
            continue
        asked = _render(chat, index, tokenizer, ask=True)
        answered = _render(chat, index + 1, tokenizer).rstrip()
        if not answered.startswith(asked):
            raise TrainingError(
                "the model's chat template renders an answer otherwise than its prompt announces, "
                f"so that the answer cannot be found in it: {shown(asked[-60:])} is no part of "
                f"{shown(answered[-120:])}"
            )
        _check_calls(turn, answered[len(asked) :])
        found.append((answered, (len(asked), len(answered))))
    _check_tools(chat, found[-1][0])
    return found


def _check_calls(turn: Message, text: str) -> None:
    """Raises TrainingError if the rendered turn lacks one of its calls."""
    for call in turn.get("tool_calls", ()):
        name = (call.get("function") or call)["name"]
        if name not in text:
            raise TrainingError(
                f"the model's chat template shows no tool calls: {name!r} is not in "
                f"{shown(text)}. Give a model whose template knows tools, or rows without calls"
            )


def _check_tools(chat: Conversation, text: str) -> None:
    """Raises TrainingError if the rendered chat lacks a tool, or what a tool returned."""
    for tool in chat.tools or ():
        name = (tool.get("function") or tool).get("name")
        if isinstance(name, str) and name not in text:
            raise TrainingError(
                f"the model's chat template shows no tools: {name!r} is not in {shown(text)}. Give "
                "a model whose template knows tools, or rows without `tools`"
            )
    last = max(i for i, turn in enumerate(chat.messages) if turn["role"] == "assistant")
    for turn in chat.messages[:last]:
        said = turn.get("content")
        if turn["role"] == "tool" and isinstance(said, str):
            escaped = (json.dumps(said, ensure_ascii=only)[1:-1] for only in (True, False))
            if not any(form in text for form in (said.strip(), *escaped)):
                raise TrainingError(
                    f"the model's chat template shows no turns of the role 'tool': {shown(said)} "
                    f"is not in {shown(text)}. Give a model whose template knows tools"
                )


def _marked_by_template(chat: Conversation, tokenizer: Any, row: int, train_on: TrainOn) -> Tokens:
    """Returns a chat as tokens, of which those count that the template marks as generated."""
    if chat.tools or any("tool_calls" in turn for turn in chat.messages):
        text = _render(chat, len(chat.messages), tokenizer)
        for turn in chat.messages:
            _check_calls(turn, text)
        _check_tools(chat, text)
    made = _render(
        chat,
        len(chat.messages),
        tokenizer,
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    ids, counts = np.array(made["input_ids"], np.int32), np.array(made["assistant_masks"], bool)
    (counted,) = np.nonzero(counts)
    if not len(counted):
        raise TrainingError("the model's chat template marks no token as generated")
    if train_on == "all":
        counts[:] = True
    elif train_on == "last":
        gaps = np.nonzero(np.diff(counted) > 1)[0]
        counts[: counted[gaps[-1] + 1] if len(gaps) else 0] = False
    end = int(counted[-1]) + 1
    return Tokens(ids[:end], counts[:end], row)


def _encoded(drafts: Sequence[_Draft], tokenizer: Any) -> list[Tokens]:
    """Returns drafts as tokens; the tokenizer sees all texts at once."""
    encoded: dict[bool, list[tuple[list[int], list[tuple[int, int]]]]] = {}
    for special in (False, True):
        texts = [part.text for draft in drafts for part in draft.parts if part.special == special]
        if texts:
            made = tokenizer(
                texts,
                add_special_tokens=special,
                return_offsets_mapping=True,
                return_attention_mask=False,
                return_token_type_ids=False,
                verbose=False,
            )
            pairs = zip(made["input_ids"], made["offset_mapping"], strict=True)
            encoded[special] = list(pairs)[::-1]
    found = []
    for draft in drafts:
        if draft.marked is not None:
            found.append(draft.marked)
            continue
        ids: list[int] = []
        counts = []
        for part in draft.parts:
            tokens, offsets = encoded[part.special].pop()
            ids += tokens
            at = np.array([begin for begin, _ in offsets], np.int64)
            counts.append(np.zeros(len(at), bool))
            for begin, end in part.spans:
                counts[-1] |= (at >= begin) & (at < end)
        if draft.end and tokenizer.eos_token_id not in (None, ids[-1]):
            ids.append(tokenizer.eos_token_id)
            counts.append(np.ones(1, bool))
        found.append(Tokens(np.array(ids, np.int32), np.concatenate(counts), draft.row))
    return found


def as_json(sequences: Sequence[Tokens], origin: int = 0) -> dict[str, Any]:
    """Returns sequences as JSON, their arrays as text: a number a token would be slow to send."""
    table = Sequences.of(sequences)
    return {
        "lengths": table.lengths.tolist(),
        "rows": table.rows.tolist(),
        "origin": origin,
        "ids": base64.b64encode(table.ids.astype("<i4").tobytes()).decode(),
        "counts": base64.b64encode(table.counts.tobytes()).decode(),
    }


def from_json(block: Mapping[str, Any]) -> Sequences:
    """Returns the sequences that `as_json` wrote, all of one origin."""
    table = Sequences.of_arrays(
        ids=np.frombuffer(base64.b64decode(block["ids"]), "<i4"),
        counts=np.frombuffer(base64.b64decode(block["counts"]), bool),
        lengths=block["lengths"],
        rows=block["rows"],
    )
    return dataclasses.replace(table, origins=np.full_like(table.origins, block["origin"]))


def check_lengths(sequences: Sequence[Tokens], seq_len: int, *, truncate: bool) -> Sequences:
    """Returns the sequences, none longer than `seq_len`, each with a token that the loss counts.

    Raises:
      TrainingError: one is longer and `truncate` is off, or none is left.
    """
    table = Sequences.of(sequences)
    longer = int((table.lengths > seq_len).sum())
    if longer and not truncate:
        longest = int(table.lengths.max())
        raise TrainingError(
            lambda option: (
                f"{longer} of {len(sequences)} sequences are longer than "
                f"{option('seq_len', seq_len)}, the longest has {longest} tokens. Raise "
                f"{option('seq_len')} to {longest}, take those rows out, or cut them off at the "
                f"end with {option('truncate', True)}"
            )
        )
    table = table.cut(seq_len)
    kept = table.select(np.flatnonzero(table.predicted))
    if not len(kept):
        raise TrainingError(
            lambda option: f"within {option('seq_len', seq_len)} no row has a token of a completion"
        )
    return kept
