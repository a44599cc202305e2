"""Converts preferences to token sequences: pairs of completions, or single ones with labels.

A completion begins, as in TRL, at the first token that differs between the prompt alone and the
prompt with its completion. All that follows counts, except turns that are not the assistant's.
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
    count_partial_as_never,
    find_answers,
    is_learned,
    name_row_in_errors,
    prompt_and_completion,
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

_PAIR = ("chosen", "rejected")
KTO = "kto"
_LABELLED = ("prompt", "completion", "label")
FORMS = (("prompt", *_PAIR), _PAIR, _LABELLED)
_QUESTIONS = ("question", "instruction", "query", "input", "problem")  # names of prompts elsewhere
_TEMPLATE_FIELDS = ("tools", "documents", "chat_template_kwargs")
READ = frozenset({"system", *_TEMPLATE_FIELDS}.union(*FORMS))  # the fields that are read
_NEEDED = (
    "a row needs `prompt`, `chosen` and `rejected` (each a text, or a list of turns with `role` "
    "and `content`), or a `chosen` and a `rejected` that begin with the same prompt"
)
_NEEDED_LABELLED = "a row needs `prompt`, `completion` and `label` (true or false), or is a pair: "


def check_pairs(rows: Iterable[Row], source: str, *, labelled: bool = False) -> None:
    """Raises TrainingError for the first row that is not a pair; names its number.

    With `labelled`, it may also be a completion with a label.
    """
    check_rows(rows, source, lambda row, name: read_pair(row, name, labelled)[0], _needed(labelled))


def _needed(labelled: bool) -> str:
    return _NEEDED_LABELLED + _NEEDED if labelled else _NEEDED


def _is_pair(row: Row) -> bool:
    return all(row.get(field) is not None for field in _PAIR)


def read_pair(row: Row, name: str, labelled: bool) -> tuple[Conversation, list[Turns]]:
    """Returns the prompt and the completions of a row.

    A `system` of the row is the prompt's first turn. If the row has no `prompt` and its completions
    are texts, the prompt's `text` is set.
    """
    if _is_pair(row):
        fields: tuple[str, ...] = _PAIR
    else:
        _check_labelled(row, name, labelled)
        fields = ("completion",)
    answers = [text_or_turns(row[field], field, name) for field in fields]
    if _is_pair(row) and answers[0] == answers[1]:
        raise TrainingError(f"{name}: `chosen` and `rejected` are the same. Remove the row.")
    prompt_content = row.get("prompt")
    text = None
    if prompt_content is None:
        length = _common_beginning(row, answers[0], answers[1], name)
        prompt_content = answers[0][:length]
        answers = [answer[length:] for answer in answers]
        if isinstance(prompt_content, str):
            text = prompt_content
    template_fields = {field: row.get(field) for field in _TEMPLATE_FIELDS}
    prompt = question({"prompt": prompt_content, **template_fields}, name)
    completions = [
        _completion_turns(answer, prompt.messages, field, name)
        for field, answer in zip(fields, answers, strict=True)
    ]
    messages = system_turns(row, prompt.messages, name) + prompt.messages
    return prompt._replace(messages=messages, text=text), completions


def _check_labelled(row: Row, name: str, labelled: bool) -> None:
    """Raises TrainingError for a row that is neither a pair nor an allowed labelled one."""
    is_labelled = all(row.get(field) is not None for field in _LABELLED)
    if is_labelled and not labelled:
        raise TrainingError(
            lambda flag: (
                f"{name} has `prompt`, `completion` and `label`, which only the loss kto reads. "
                f"Pass {flag('loss', KTO)} for rows with labels, or rows with `chosen` "
                "and `rejected`."
            )
        )
    if not is_labelled:
        check_nulls(row, _PAIR + _LABELLED if labelled else _PAIR, name)
        raise TrainingError(f"{name} has {field_names(row)}; {_needed(labelled)}")
    if not isinstance(row["label"], bool):
        raise TrainingError(
            f"{name}: `label` is {shown(row['label'])}, but it must be true or false. Correct it."
        )


def _completion_turns(answer: TextOrTurns, prompt: Turns, field: str, name: str) -> Turns:
    """Returns a completion's turns, without the prompt's turns if it repeats them.

    Raises:
      TrainingError: they do not begin and end with the assistant, or the assistant says nothing.
    """
    turns = as_turns(answer, "assistant")
    n_prompt = len(prompt)
    if turns[:n_prompt] == prompt:
        turns = turns[n_prompt:]
    roles = [turn["role"] for turn in turns]
    if {*roles[:1], *roles[-1:]} != {"assistant"}:
        raise TrainingError(
            f"{name}: after the prompt, `{field}` has the turns {', '.join(roles) or 'none'}, but "
            "these must begin and end with an assistant's turn. Correct the row."
        )
    learned_turns = [turn for turn in turns if turn["role"] == "assistant" and is_learned(turn)]
    if not any(turn.get("content") or turn.get("tool_calls") for turn in learned_turns):
        raise TrainingError(
            f"{name}: the assistant says nothing in `{field}`. Fill it in, or remove the row."
        )
    return turns


def _check_read(row: Row, beginning: TextOrTurns, name: str) -> None:
    """Raises TrainingError if a row without `prompt` seems to have one under another name.

    If the `beginning` of the completions has a turn of the user, such a field is something else.
    """
    if not isinstance(beginning, str) and any(turn["role"] == "user" for turn in beginning):
        return
    turns = as_turns(beginning, "user")
    beginning_text = _normalise_spaces("\n".join(str(turn.get("content")) for turn in turns))
    for field in _QUESTIONS:
        value = row.get(field)
        if isinstance(value, str) and _normalise_spaces(value) not in beginning_text:
            raise TrainingError(
                f"{name} has no `prompt`, and its `{field}` would not be read. Rename it to "
                f"`prompt` (in a script with --fields prompt={field}), or remove it."
            )


def _normalise_spaces(text: str) -> str:
    """Returns a text with normalised white space."""
    return " ".join(text.split())


def _common_beginning(row: Row, chosen: TextOrTurns, rejected: TextOrTurns, name: str) -> int:
    """Returns the number of leading turns or characters that two completions share.

    One turn or character is left to each completion, and so is the space before a completion.
    """
    shorter = min(len(chosen), len(rejected))
    length = shorter
    for index, (chosen_item, rejected_item) in enumerate(zip(chosen, rejected, strict=False)):
        if chosen_item != rejected_item:
            length = index
            break
    if length == shorter:
        length -= 1
    elif chosen[length - 1 : length] == " ":
        length -= 1
    beginning = chosen[:length]
    _check_read(row, beginning, name)
    if not (beginning.strip() if isinstance(beginning, str) else beginning):
        raise TrainingError(
            f"{name} has no `prompt`, and `chosen` and `rejected` begin differently; {_NEEDED}"
        )
    return length


def _drafts(row: Row, number: int, tokenizer: Tokenizer, name: str, *, labelled: bool) -> Drafts:
    """Returns drafts of a prompt and its completions; with `labelled`, one prompt for each."""
    prompt, completions = read_pair(row, name, labelled)
    check_text(json.dumps([prompt, completions], ensure_ascii=False, default=repr), name)
    is_plain = prompt.text is not None or tokenizer.chat_template is None
    drafts: list[Draft] = []
    left_out: dict[str, templates.LeftOut] = {}
    for completion in completions:
        chat = prompt._replace(messages=prompt.messages + completion)
        if is_plain and row.get("system"):
            context = (
                "texts without a `prompt`" if prompt.text is not None else "a model that has none"
            )
            raise TrainingError(
                f"{name}: `system` is a turn of a chat template, and not of {context}. Write it "
                "into the texts, and remove the field."
            )
        if is_plain:
            prompt_part, completion_part = prompt_and_completion(chat, name, "last")
            prompt_text = prompt_part.text
            text = prompt_text + completion_part.text
            counted_text = CountedText(text, [(0, len(text))], special=True)
        else:
            n_prompt = len(prompt.messages)
            with name_row_in_errors(name):
                prompt_text, counted_text = _render_chat(chat, n_prompt, tokenizer, left_out)
        if labelled or not drafts:
            drafts.append(Draft(number, [CountedText(prompt_text, [], special=is_plain)]))
        drafts.append(Draft(number, [counted_text], end=is_plain))
    return Drafts(drafts, left_out)


def _render_chat(
    chat: Conversation, n_prompt: int, tokenizer: Tokenizer, left_out: dict[str, templates.LeftOut]
) -> tuple[str, CountedText]:
    """Returns the texts of the prompt and of all turns, with the counted spans.

    What the template writes after the last answer belongs to it, as in TRL.

    Args:
      chat: the prompt and a completion.
      n_prompt: the number of turns of the prompt.
      tokenizer: the model's.
      left_out: gets the fields that the template shows in some turns only.
    """
    templates.check_variables(chat, templates.template_of(tokenizer, chat))
    answers = find_answers(chat, tokenizer, n_prompt)
    n_turns = len(chat.messages)
    text: str = templates.render(chat, n_turns, tokenizer)
    if not all(text.startswith(answer.text) for answer in answers):
        raise TrainingError(
            "the model's chat template renders an assistant's turn differently if other turns "
            "follow, so the turns of a completion cannot be found. Use completions "
            "of one turn."
        )
    rendered = templates.Rendered(chat, n_turns, text, tokenizer)
    rendered.check(n_turns)
    left_out |= count_partial_as_never(rendered.left_out(n_turns, {}))
    spans = [answer.span for answer in answers]
    prompt_end, first_end = spans[0]
    spans[0] = (0, first_end)  # only tokens that differ from the prompt's count
    last_begin, _ = spans[-1]
    spans[-1] = (last_begin, len(text))
    learned_spans = [
        span
        for answer, span in zip(answers, spans, strict=True)
        if is_learned(chat.messages[answer.turn])
    ]
    return text[:prompt_end], CountedText(text, learned_spans)


def tokenize_pairs(
    rows: Sequence[Row], tokenizer: Tokenizer, source: str, *, labelled: bool = False, **how: Any
) -> Sequences:
    """Returns two sequences per row: the prompt with the chosen and the rejected completion.

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
    table = tokenize(rows, tokenizer, source, drafted=drafted, **how)
    sequences = _completions(table, 1 if labelled else 2)
    if not labelled:
        return sequences
    labels = [[True, False] if _is_pair(row) else [row["label"]] for row in rows]
    return dataclasses.replace(sequences, labels=np.concatenate(labels))


def _completions(table: Sequences, n: int) -> Sequences:
    """Returns the completions in a table of prompts, each followed by `n` completions.

    The tokens that the prompt and its `n` completions begin with do not count.
    """
    for index in range(0, len(table), n + 1):
        prompt = table[index]
        completions = [table[index + i] for i in range(1, n + 1)]
        begin = min(_common_length(prompt.ids, completion.ids) for completion in completions)
        for completion in completions:
            completion.counts[:begin] = False  # a view of the table
    is_completion = np.arange(len(table)) % (n + 1) > 0
    return table.select(np.flatnonzero(is_completion))


def _common_length(ids: np.ndarray, other_ids: np.ndarray) -> int:
    """Returns the number of leading tokens that two sequences share."""
    n = min(len(ids), len(other_ids))
    is_equal = ids[:n] == other_ids[:n]
    return int(np.argmin(np.append(is_equal, False)))


def tokenize_prompts(rows: Sequence[Row], tokenizer: Tokenizer, source: str) -> list[list[int]]:
    """Returns the tokens of each prompt, up to the start of an answer.

    Args:
      rows: `prompt` (a text, or turns), or `messages`, with `tools` where there are some.
      tokenizer: the model's. Without a chat template, prompts are plain texts.
      source: the name of the rows in errors.

    Raises:
      TrainingError: a row has no prompt, or the template drops something of it; names the first.
    """
    texts = []
    is_plain = tokenizer.chat_template is None
    for number, row in enumerate(rows, start=1):
        name = name_of(row, source, number)
        chat = question(row, name)
        check_text(json.dumps(chat, ensure_ascii=False, default=repr), name)
        if is_plain:
            chat.messages.append({"role": "assistant", "content": ""})
            prompt, _ = prompt_and_completion(chat, name, "last")
            texts.append(prompt.text)
            continue
        with name_row_in_errors(name):
            texts.append(templates.render_prompt(chat, tokenizer))
    ids: list[list[int]]
    ids = tokenizer(texts, add_special_tokens=is_plain, verbose=False)["input_ids"]
    return ids
