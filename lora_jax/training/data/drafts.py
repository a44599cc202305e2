"""Finds in each row the text of its sequences, and what the loss counts in it."""

import contextlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Literal, NamedTuple

import numpy as np

from lora_jax.core.types import Tokenizer
from lora_jax.training.data import templates
from lora_jax.training.data.rows import Conversation, Row, check_text, conversation
from lora_jax.training.data.sequences import TokenSequence
from lora_jax.training.data.turns import Message, shown
from lora_jax.training.errors import TrainingError

TrainOn = Literal["all", "assistant", "last"]


class CountedText(NamedTuple):
    """A text to be tokenised; tokens that begin within one of `spans` count."""

    text: str
    spans: Sequence[tuple[int, int]]
    special: bool = False  # whether the tokenizer adds its special tokens


class Draft(NamedTuple):
    """A sequence before its texts are tokenised, or already tokenised by the template's marks."""

    row: int
    parts: Sequence[CountedText]
    end: bool = False  # whether the token of a text's end follows
    marked: TokenSequence | None = None


class Drafts(NamedTuple):
    """The sequences of a row, and the fields that the template shows in some turns only."""

    sequences: Sequence[Draft]
    left_out: Mapping[str, templates.LeftOut] = {}


def drafts_of(row: Row, number: int, tokenizer: Tokenizer, name: str, train_on: TrainOn) -> Drafts:
    """Returns the sequences of a row; see `lora_jax.training.data.chats.tokenize`.

    Raises:
      TrainingError: the row cannot be used, or the model's chat template drops some of it.
    """
    chat = conversation(row, name)
    check_text(json.dumps(chat._replace(images=()), ensure_ascii=False, default=repr), name)
    if chat.text is not None:
        part = CountedText(chat.text, [(0, len(chat.text))], special=True)
        return Drafts([Draft(number, [part], end=True)])
    if tokenizer.chat_template is None:
        return Drafts([Draft(number, plain_parts(chat, name, train_on), end=True)])
    with errors_of(name):
        template = templates.template_of(tokenizer, chat)
        templates.check_variables(chat, template)
        if templates.marks_answers(template):
            return _drafts_by_marks(chat, tokenizer, number, train_on)
        return _drafts_by_text(chat, tokenizer, number, train_on)


@contextlib.contextmanager
def errors_of(name: str) -> Iterator[None]:
    """Raises a template's error as a TrainingError that names the row."""
    try:
        yield
    except TrainingError as error:
        raise TrainingError(f"{name}: {error}") from None
    except Exception as error:  # a template refuses a conversation in its own words
        raise TrainingError(f"{name}: the model's chat template refuses it: {error}") from error


def plain_parts(chat: Conversation, name: str, train_on: TrainOn) -> list[CountedText]:
    """Returns a prompt and its completion in a row, for a model without a chat template."""
    turns = chat.messages
    if [turn["role"] for turn in turns] != ["user", "assistant"] or "tool_calls" in turns[1]:
        raise TrainingError(
            f"{name} is a chat, and the model has no chat template: give prompts and completions "
            "that are texts, or a model that was made for chats"
        )
    templates.check_without_template(chat, name)
    prompt, completion = (turn["content"] for turn in turns)
    asked = [(0, len(prompt))] if train_on == "all" else []
    return [
        CountedText(prompt, asked, special=True),
        CountedText(completion, [(0, len(completion))]),
    ]


class AnswerSpan(NamedTuple):
    """An assistant's turn: its number, the text up to its end, and its span in that text."""

    turn: int
    text: str
    span: tuple[int, int]


def _drafts_by_text(
    chat: Conversation, tokenizer: Tokenizer, row: int, train_on: TrainOn
) -> Drafts:
    """Returns a chat whose answers are found by rendering the turns up to each."""
    answers = answers_of(chat, tokenizer)
    learned = [answer for answer in answers if is_learned(chat.messages[answer.turn])]
    if train_on != "all":  # then the turns after the last that is learned are left out
        answers = [answer for answer in answers if answer.turn <= learned[-1].turn]
    end, whole = answers[-1].turn + 1, answers[-1].text
    rendered = templates.Rendered(chat, end, whole, tokenizer)
    rendered.check(end)
    left_out = rendered.left_out(end, {answer.turn: answer.text for answer in answers})
    if train_on == "all":
        spans = _spans_without_muted(answers, chat)
    elif train_on == "last":
        spans = [learned[-1].span]
    elif all(whole.startswith(answer.text) for answer in learned):
        spans = [answer.span for answer in learned]
    else:
        # Some templates drop parts of a turn once others follow (a model's thoughts). Each turn is
        # then learned as it was said, after what the model saw at that point.
        drafts = [Draft(row, [CountedText(answer.text, [answer.span])]) for answer in learned]
        return Drafts(drafts, left_out)
    return Drafts([Draft(row, [CountedText(whole, spans)])], count_as_never(left_out))


def count_as_never(left_out: Mapping[str, templates.LeftOut]) -> dict[str, templates.LeftOut]:
    """Adds the turns whose fields later renderings lack to those that never show them."""
    return {
        field: templates.LeftOut(counts.turns, 0, counts.later + counts.never)
        for field, counts in left_out.items()
    }


def is_learned(turn: Message) -> bool:
    """Returns True if the loss counts a turn of the assistant."""
    return turn.get("weight") != 0


def answers_of(chat: Conversation, tokenizer: Tokenizer, first: int = 0) -> list[AnswerSpan]:
    """Returns each assistant turn, from turn `first` on, with the text up to its end.

    Raises:
      TrainingError: the template renders an answer otherwise than its prompt announces.
    """
    spans = []
    for index, turn in enumerate(chat.messages):
        if turn["role"] != "assistant" or index < first:
            continue
        asked = templates.render(chat, index, tokenizer, ask=True)
        answered = templates.render(chat, index + 1, tokenizer).rstrip()
        if not answered.startswith(asked) and (
            rest := _answer_after(chat, index, asked, tokenizer)
        ):
            answered = asked + rest
        if not answered.startswith(asked):
            raise TrainingError(
                "the model's chat template renders an answer otherwise than its prompt announces, "
                f"so that the answer cannot be found in it: {shown(asked[-60:])} is no part of "
                f"{shown(answered[-120:])}"
            )
        templates.check_calls(turn, answered[len(asked) :])
        spans.append(AnswerSpan(index, answered, (len(asked), len(answered))))
    return spans


def _answer_after(chat: Conversation, index: int, asked: str, tokenizer: Tokenizer) -> str | None:
    """Returns an answer whose template renders turns before it otherwise once it is there.

    So does gpt-oss's, which drops the thoughts before a tool call once an answer follows. What the
    model sees when it answers is the prompt. The answer begins where that of another text does.

    Returns:
      None where its beginning is not that of the prompt's end.
    """
    turn = chat.messages[index]
    texts = {name for name, value in turn.items() if isinstance(value, str)} - {"role"}
    other = turn | {name: f"~{turn[name]}" for name in texts}
    changed = chat._replace(messages=[*chat.messages[:index], other])
    both = [templates.render(turns, index + 1, tokenizer).rstrip() for turns in (chat, changed)]
    begins = asked.removeprefix(templates.render(chat, index, tokenizer))
    at = both[0].rfind(begins, 0, len(os.path.commonprefix(both)))
    return None if begins in ("", asked) or at < 0 else both[0][at + len(begins) :]


def _spans_without_muted(
    answers: Sequence[AnswerSpan], chat: Conversation
) -> list[tuple[int, int]]:
    """Returns the spans of the whole text that lie outside turns of the weight 0."""
    whole, spans, begin = answers[-1].text, [], 0
    for answer in answers:
        if is_learned(chat.messages[answer.turn]):
            continue
        if not whole.startswith(answer.text):
            raise TrainingError(
                f"turn {answer.turn} has the weight 0, and the model's chat template renders it "
                "otherwise once others follow, so that it cannot be found: leave out the weight, "
                "or learn what the assistant says rather than all"
            )
        spans.append((begin, answer.span[0]))
        begin = answer.span[1]
    return [*spans, (begin, len(whole))]


def _drafts_by_marks(
    chat: Conversation, tokenizer: Tokenizer, row: int, train_on: TrainOn
) -> Drafts:
    """Returns a chat as tokens, of which those count that the template marks as generated."""
    turns, left_out = chat.messages, {}
    if templates.needs_check(chat):
        text = templates.render(chat, len(turns), tokenizer)
        last = max(i for i, turn in enumerate(turns) if turn["role"] == "assistant")
        rendered = templates.Rendered(chat, len(turns), text, tokenizer)
        rendered.check(last + 1)
        left_out = count_as_never(rendered.left_out(last + 1, {}))
    made = templates.render(
        chat,
        len(turns),
        tokenizer,
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    ids, counts = np.array(made["input_ids"], np.int32), np.array(made["assistant_masks"], bool)
    if not counts.any():
        raise TrainingError("the model's chat template marks no token as generated")
    runs = _run_bounds(counts)
    end = int(runs[-1][1])
    if train_on == "all":
        counts[:] = True
    answers = [i for i, turn in enumerate(turns) if turn["role"] == "assistant"]
    if muted := [n for n, index in enumerate(answers) if not is_learned(turns[index])]:
        if len(runs) != len(answers):
            raise TrainingError(
                f"turn {answers[muted[0]]} has the weight 0, and cannot be told from the others: "
                f"the model's chat template marks {len(runs)} texts as generated, for "
                f"{len(answers)} turns of the assistant. Leave out the weights of this row"
            )
        for n in muted:
            counts[slice(*runs[n])] = False
    if train_on == "last":
        counts[: _run_bounds(counts)[-1][0]] = False
    return Drafts([Draft(row, [], marked=TokenSequence(ids[:end], counts[:end], row))], left_out)


def _run_bounds(counts: np.ndarray) -> np.ndarray:
    """Returns the bounds of each run of tokens that count: [runs, 2]."""
    edges = np.diff(counts.astype(np.int8), prepend=0, append=0)
    return np.flatnonzero(edges).reshape(-1, 2)
