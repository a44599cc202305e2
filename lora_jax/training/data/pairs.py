"""Turns rows of preferences into token sequences: pairs of completions, or single ones with labels.

A completion begins where the tokens of the prompt alone and of prompt and completion part, as in
TRL. All that follows counts, but for turns in it that are not the assistant's.
"""

import dataclasses
import functools
import json
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from lora_jax.core.types import Tokenizer
from lora_jax.training.data import templates
from lora_jax.training.data.chats import tokenize
from lora_jax.training.data.drafts import (
    CountedText,
    Draft,
    Drafts,
    answers_of,
    count_as_never,
    errors_of,
    is_learned,
    plain_parts,
)
from lora_jax.training.data.rows import (
    Conversation,
    Row,
    TextOrTurns,
    as_turns,
    check_nulls,
    check_rows,
    check_text,
    field_names,
    name_of,
    question,
    system_turns,
    text_or_turns,
)
from lora_jax.training.data.sequences import Sequences
from lora_jax.training.data.turns import shown
from lora_jax.training.errors import TrainingError

Turns = list[dict[str, Any]]

_PAIR, _LABELLED = ("chosen", "rejected"), ("prompt", "completion", "label")
FORMS = (("prompt", *_PAIR), _PAIR, _LABELLED)
_QUESTIONS = ("question", "instruction", "query", "input", "problem")  # names of prompts elsewhere
_OF_TEMPLATE = ("tools", "documents", "chat_template_kwargs")
READ = frozenset({"system", *_OF_TEMPLATE}.union(*FORMS))  # the fields that are read
_NEEDED = (
    "a row needs `prompt`, `chosen` and `rejected` (each a text, or a list of turns with `role` "
    "and `content`), or a `chosen` and a `rejected` that begin with the same prompt"
)
_NEEDED_LABELLED = "a row needs `prompt`, `completion` and `label` (true or false), or is a pair: "


def check_pairs(rows: Iterable[Row], source: str, *, labelled: bool = False) -> None:
    """Raises TrainingError for the first row that is no pair, named by its number in `source`.

    With `labelled`, it may also be a completion with a label.
    """
    check_rows(rows, source, lambda row, name: read_pair(row, name, labelled)[0], _needed(labelled))


def _needed(labelled: bool) -> str:
    return _NEEDED_LABELLED + _NEEDED if labelled else _NEEDED


def _is_pair(row: Row) -> bool:
    return all(row.get(field) is not None for field in _PAIR)


def read_pair(row: Row, name: str, labelled: bool) -> tuple[Conversation, list[Turns]]:
    """Returns the prompt of a row, whose `text` is set in plain texts, and its completions.

    A `system` of the row is the prompt's first turn.
    """
    fields = _PAIR if _is_pair(row) else ("completion",)
    if fields != _PAIR:
        if not labelled or any(row.get(field) is None for field in _LABELLED):
            check_nulls(row, _PAIR + _LABELLED * labelled, name)
            raise TrainingError(f"{name} has {field_names(row)}; {_needed(labelled)}")
        if not isinstance(row["label"], bool):
            raise TrainingError(
                f"{name}: `label` is {shown(row['label'])}; true or false is needed"
            )
    answers = [text_or_turns(row[field], field, name) for field in fields]
    if answers[1:] == answers[:1]:
        raise TrainingError(f"{name}: `chosen` and `rejected` are the same: leave the row out")
    asked, text = row.get("prompt"), None
    if asked is None:
        n = _common_beginning(row, answers[0], answers[1], name)
        asked, answers = answers[0][:n], [answer[n:] for answer in answers]
        text = asked if isinstance(asked, str) else None
    prompt = question({"prompt": asked, **{key: row.get(key) for key in _OF_TEMPLATE}}, name)
    completions: list[Turns] = []
    for field, answer in zip(fields, answers, strict=True):
        turns, n = as_turns(answer, "assistant"), len(prompt.messages)
        turns = turns[n:] if turns[:n] == prompt.messages else turns  # some repeat the prompt
        roles = [turn["role"] for turn in turns]
        if {*roles[:1], *roles[-1:]} != {"assistant"}:
            raise TrainingError(
                f"{name}: after the prompt, `{field}` has the turns {', '.join(roles) or 'none'}; "
                "they need to begin and end with the assistant's"
            )
        learned = (turn for turn in turns if turn["role"] == "assistant" and is_learned(turn))
        if not any(turn.get("content") or turn.get("tool_calls") for turn in learned):
            raise TrainingError(f"{name}: the assistant says nothing in `{field}`")
        completions.append(turns)
    messages = system_turns(row, prompt.messages, name) + prompt.messages
    return prompt._replace(messages=messages, text=text), completions


def _check_read(row: Row, begun: TextOrTurns, name: str) -> None:
    """Raises TrainingError if a row without `prompt` has one by another name, unread.

    Beside turns with a question of the user, such a field is something else.
    """
    if not isinstance(begun, str) and any(turn["role"] == "user" for turn in begun):
        return
    turns = as_turns(begun, "user")
    known = _one_spaced("\n".join(str(turn.get("content")) for turn in turns))
    for field in _QUESTIONS:
        value = row.get(field)
        if isinstance(value, str) and _one_spaced(value) not in known:
            raise TrainingError(
                f"{name} has no `prompt`, and its `{field}` would not be read: rename it (in a "
                f"script, --fields prompt={field}), or take it out"
            )


def _one_spaced(text: str) -> str:
    """Returns a text with a space for each run of white space, and none at its ends."""
    return " ".join(text.split())


def _common_beginning(row: Row, chosen: TextOrTurns, rejected: TextOrTurns, name: str) -> int:
    """Returns the number of turns or characters that two completions share, as TRL counts them.

    One is left to each completion, and so is the space before a completion.
    """
    both = enumerate(zip(chosen, rejected, strict=False))
    n = next((i for i, (one, other) in both if one != other), None)
    if n is None:
        n = min(len(chosen), len(rejected)) - 1
    elif chosen[n - 1 : n] == " ":
        n -= 1
    begun = chosen[:n]
    _check_read(row, begun, name)
    if not (begun.strip() if isinstance(begun, str) else begun):
        raise TrainingError(
            f"{name} has no `prompt`, and `chosen` and `rejected` begin differently; {_NEEDED}"
        )
    return n


def _drafts(row: Row, number: int, tokenizer: Tokenizer, name: str, *, labelled: bool) -> Drafts:
    """Returns a prompt and its completions; with `labelled`, a prompt before each completion."""
    prompt, completions = read = read_pair(row, name, labelled)
    check_text(json.dumps(read, ensure_ascii=False, default=repr), name)
    is_plain = prompt.text is not None or tokenizer.chat_template is None
    drafts: list[Draft] = []
    left_out: dict[str, templates.LeftOut] = {}
    for completion in completions:
        chat = prompt._replace(messages=prompt.messages + completion)
        if is_plain and row.get("system"):
            why = "texts without a `prompt`" if prompt.text is not None else "a model that has none"
            raise TrainingError(
                f"{name}: `system` is a turn of a chat template, and not of {why}: write it into "
                "the texts, and take it out"
            )
        if is_plain:
            asked, answer = (part.text for part in plain_parts(chat, name, "last"))
            counted = CountedText(asked + answer, [(0, len(asked + answer))], special=True)
        else:
            with errors_of(name):
                asked, counted = _rendered(chat, len(prompt.messages), tokenizer, left_out)
        if labelled or not drafts:
            drafts.append(Draft(number, [CountedText(asked, [], special=is_plain)]))
        drafts.append(Draft(number, [counted], end=is_plain))
    return Drafts(drafts, left_out)


def _rendered(
    chat: Conversation, first: int, tokenizer: Tokenizer, left_out: dict[str, templates.LeftOut]
) -> tuple[str, CountedText]:
    """Returns the text up to the answer that is turn `first`, and that of all turns.

    What the template writes after the last answer belongs to it, as in TRL.
    """
    templates.check_variables(chat, templates.template_of(tokenizer, chat))
    answers, n = answers_of(chat, tokenizer, first), len(chat.messages)
    text: str = templates.render(chat, n, tokenizer)
    if not all(text.startswith(answer.text) for answer in answers):
        raise TrainingError(
            "the model's chat template renders a turn of the assistant otherwise once others "
            "follow, so that the turns of a completion cannot be found: give completions of one"
        )
    rendered = templates.Rendered(chat, n, text, tokenizer)
    rendered.check(n)
    left_out |= count_as_never(rendered.left_out(n, {}))
    begins, ends = zip(*(answer.span for answer in answers), strict=True)
    spans = zip(answers, [0, *begins[1:]], [*ends[:-1], len(text)], strict=True)
    learned = [span for answer, *span in spans if is_learned(chat.messages[answer.turn])]
    return text[: begins[0]], CountedText(text, [(begin, end) for begin, end in learned])


def tokenize_pairs(
    rows: Sequence[Row], tokenizer: Tokenizer, source: str, *, labelled: bool = False, **how: Any
) -> Sequences:
    """Returns two sequences a row: its prompt with the chosen completion, and with the rejected.

    Args:
      rows: see `lora_jax.training.pairs`.
      tokenizer: the model's.
      source: the name of the rows in errors.
      labelled: returns a sequence for each labelled completion, and two for a pair, a good one and
        a bad one; sets `labels` of the sequences.
      how: `numbers`, `mapped` and `say` of `lora_jax.training.data.chats.tokenize`.

    Raises:
      TrainingError: a row is not usable; names the first one.
    """
    drafted = functools.partial(_drafts, labelled=labelled)
    made = tokenize(rows, tokenizer, source, drafted=drafted, **how)
    sequences = _completions(made, 1 if labelled else 2)
    if not labelled:
        return sequences
    labels = [[True, False] if _is_pair(row) else [row["label"]] for row in rows]
    return dataclasses.replace(sequences, labels=np.concatenate(labels))


def _completions(table: Sequences, n: int) -> Sequences:
    """Returns the completions of a table in which a prompt stands before each `n` of them.

    None counts the tokens that the prompt and all `n` begin with.
    """
    for at in range(0, len(table), n + 1):
        prompt, *completions = (table[i] for i in range(at, at + n + 1))
        begin = min(_common(prompt.ids, completion.ids) for completion in completions)
        for completion in completions:
            completion.counts[:begin] = False  # a view of the table
    return table.select(np.flatnonzero(np.arange(len(table)) % (n + 1)))


def _common(one: np.ndarray, other: np.ndarray) -> int:
    """Returns the number of tokens that two sequences begin with."""
    n = min(len(one), len(other))
    return int(np.argmin(np.append(one[:n] == other[:n], False)))


def tokenize_prompts(rows: Sequence[Row], tokenizer: Tokenizer, source: str) -> list[list[int]]:
    """Returns the tokens of each prompt, up to the beginning of an answer.

    Args:
      rows: `prompt` (a text, or turns), or `messages`, with `tools` where there are some.
      tokenizer: the model's. Without a chat template, prompts are plain texts.
      source: the name of the rows in errors.

    Raises:
      TrainingError: a row has no prompt, or the template drops something of it; names the first.
    """
    texts, is_plain = [], tokenizer.chat_template is None
    for number, row in enumerate(rows, start=1):
        name = name_of(row, source, number)
        chat = question(row, name)
        check_text(json.dumps(chat, ensure_ascii=False, default=repr), name)
        if is_plain:
            chat.messages.append({"role": "assistant", "content": ""})
            texts.append(plain_parts(chat, name, "last")[0].text)
            continue
        with errors_of(name):
            texts.append(templates.render_prompt(chat, tokenizer))
    ids: list[list[int]]
    ids = tokenizer(texts, add_special_tokens=is_plain, verbose=False)["input_ids"]
    return ids
