"""Finds the text of each row's sequences, and the spans that the loss counts.

A draft is a sequence before its texts are tokenised. An answer is a turn of the assistant. A field
is left out if the template does not show it in some turns.
"""

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
    """A text to tokenize; tokens that start within one of `spans` count."""

    text: str
    spans: Sequence[tuple[int, int]]
    special: bool = False  # whether the tokenizer adds its special tokens


class Draft(NamedTuple):
    """A sequence before tokenization, or tokenized already by the template's marks."""

    row: int
    parts: Sequence[CountedText]
    end: bool = False  # whether the token of a text's end follows
    marked: TokenSequence | None = None


class Drafts(NamedTuple):
    """The drafts of a row, and the fields that the template shows only in some turns."""

    sequences: Sequence[Draft]
    left_out: Mapping[str, templates.LeftOut] = {}


def draft_sequences(
    row: Row, number: int, tokenizer: Tokenizer, name: str, train_on: TrainOn
) -> Drafts:
    """Returns the drafts of a row; see `lora_jax.training.data.chats.tokenize`.

    Raises:
      TrainingError: the row cannot be used, or the model's chat template drops some of it.
    """
    chat = conversation(row, name)
    check_text(json.dumps(chat._replace(images=()), ensure_ascii=False, default=repr), name)
    if chat.text is not None:
        text = CountedText(chat.text, [(0, len(chat.text))], special=True)
        return Drafts([Draft(number, [text], end=True)])
    if tokenizer.chat_template is None:
        return Drafts([Draft(number, prompt_and_completion(chat, name, train_on), end=True)])
    with name_row_in_errors(name):
        template = templates.template_of(tokenizer, chat)
        templates.check_variables(chat, template)
        if templates.marks_answers(template):
            return _drafts_by_marks(chat, tokenizer, number, train_on)
        return _drafts_by_text(chat, tokenizer, number, train_on)


@contextlib.contextmanager
def name_row_in_errors(name: str) -> Iterator[None]:
    """Converts a template's error to a TrainingError that names the row."""
    try:
        yield
    except TrainingError as error:
        raise TrainingError(f"{name}: {error}") from None
    except Exception as error:  # a template refuses a conversation in its own words
        remedy = "Correct or remove the row."
        if _needs_content(error):
            remedy = "Give each turn that calls tools the field `content`, such as an empty text."
        raise TrainingError(
            f"{name}: the model's chat template refuses the chat ({error}). {remedy}"
        ) from error


def _needs_content(error: Exception) -> bool:
    """Returns True for the error of a template that adds the content of a turn without any."""
    text = str(error)
    return "has no attribute 'content'" in text or 'not "NoneType"' in text


def prompt_and_completion(chat: Conversation, name: str, train_on: TrainOn) -> list[CountedText]:
    """Returns a row's prompt and completion, for a model without a chat template."""
    turns = chat.messages
    if [turn["role"] for turn in turns] != ["user", "assistant"] or "tool_calls" in turns[1]:
        raise TrainingError(
            f"{name} is a chat, but the model has no chat template. Use prompts and completions "
            "that are texts, or a model that was made for chats."
        )
    templates.check_without_template(chat, name)
    prompt, completion = (turn["content"] for turn in turns)
    prompt_spans = [(0, len(prompt))] if train_on == "all" else []
    return [
        CountedText(prompt, prompt_spans, special=True),
        CountedText(completion, [(0, len(completion))]),
    ]


class AnswerSpan(NamedTuple):
    """An assistant turn: its index, the text up to its end, and its span in that text."""

    turn: int
    text: str
    span: tuple[int, int]


def _drafts_by_text(
    chat: Conversation, tokenizer: Tokenizer, row: int, train_on: TrainOn
) -> Drafts:
    """Returns the drafts of a chat, by rendering the turns up to each answer."""
    answers = find_answers(chat, tokenizer)
    learned = [answer for answer in answers if is_learned(chat.messages[answer.turn])]
    if train_on != "all":  # the turns after the last that is learned are dropped
        answers = [answer for answer in answers if answer.turn <= learned[-1].turn]
    n_turns = answers[-1].turn + 1
    text = answers[-1].text
    rendered = templates.Rendered(chat, n_turns, text, tokenizer)
    rendered.check(n_turns)
    left_out = rendered.left_out(n_turns, {answer.turn: answer.text for answer in answers})
    if train_on == "all":
        spans = _spans_outside_muted_turns(answers, chat)
    elif train_on == "last":
        spans = [learned[-1].span]
    elif all(text.startswith(answer.text) for answer in learned):
        spans = [answer.span for answer in learned]
    else:
        # Some templates drop parts of a turn once others follow (a model's thoughts). Each turn is
        # then learned as it was said, after what the model saw at that point.
        drafts = [Draft(row, [CountedText(answer.text, [answer.span])]) for answer in learned]
        return Drafts(drafts, left_out)
    return Drafts([Draft(row, [CountedText(text, spans)])], count_partial_as_never(left_out))


def count_partial_as_never(
    left_out: Mapping[str, templates.LeftOut],
) -> dict[str, templates.LeftOut]:
    """Counts turns that lose a field later as turns that never show it."""
    return {
        field: templates.LeftOut(turns=counts.turns, later=0, never=counts.later + counts.never)
        for field, counts in left_out.items()
    }


def is_learned(turn: Message) -> bool:
    """Returns True if the loss counts an assistant turn."""
    return turn.get("weight") != 0


def find_answers(chat: Conversation, tokenizer: Tokenizer, first: int = 0) -> list[AnswerSpan]:
    """Returns each assistant turn from turn `first` on, with the text up to its end.

    Raises:
      TrainingError: the template renders an answer otherwise than its prompt announces.
    """
    spans = []
    for index, turn in enumerate(chat.messages):
        if turn["role"] != "assistant" or index < first:
            continue
        prompt = templates.render(chat, index, tokenizer, ask=True)
        text = templates.render(chat, index + 1, tokenizer).rstrip()
        if not text.startswith(prompt):
            answer = _answer_after_changed_prompt(chat, index, prompt, tokenizer)
            if answer:
                text = prompt + answer
        if not text.startswith(prompt):
            raise TrainingError(
                "the model's chat template renders an answer differently from its prompt, so the "
                f"answer cannot be found: {shown(prompt[-60:])} is no part of "
                f"{shown(text[-120:])}. Use another chat template."
            )
        templates.check_calls(turn, text[len(prompt) :])
        spans.append(AnswerSpan(index, text, (len(prompt), len(text))))
    return spans


def _answer_after_changed_prompt(
    chat: Conversation, index: int, prompt: str, tokenizer: Tokenizer
) -> str | None:
    """Finds an answer whose template rewrites the prompt before it.

    Some templates render earlier turns differently once an answer follows: gpt-oss's drops the
    thoughts before a tool call. To find where the answer begins, the chat is rendered once more
    with another answer. Both texts are equal up to the answer, which follows the prompt's
    announcement: what the prompt adds after the last turn, such as "<|im_start|>assistant".

    Args:
      chat: the chat.
      index: the index of the assistant's turn.
      prompt: the text that the model sees when it answers.
      tokenizer: the model's.

    Returns:
      The answer; None if the equal beginning has no announcement.
    """
    turn = chat.messages[index]
    changes = {
        name: f"~{value}"
        for name, value in turn.items()
        if isinstance(value, str) and name != "role"
    }
    changed_chat = chat._replace(messages=[*chat.messages[:index], turn | changes])
    text = templates.render(chat, index + 1, tokenizer).rstrip()
    changed_text = templates.render(changed_chat, index + 1, tokenizer).rstrip()
    equal_length = len(os.path.commonprefix([text, changed_text]))
    announcement = prompt.removeprefix(templates.render(chat, index, tokenizer))
    if announcement in ("", prompt):  # the prompt announces nothing, or is rendered anew
        return None
    start = text.rfind(announcement, 0, equal_length)
    return None if start < 0 else text[start + len(announcement) :]


def _spans_outside_muted_turns(
    answers: Sequence[AnswerSpan], chat: Conversation
) -> list[tuple[int, int]]:
    """Returns the spans of a chat's text outside turns with weight 0."""
    text = answers[-1].text
    spans = []
    begin = 0
    for answer in answers:
        if is_learned(chat.messages[answer.turn]):
            continue
        if not text.startswith(answer.text):
            raise TrainingError(
                f"turn {answer.turn} has the weight 0, but the model's chat template renders it "
                "differently if other turns follow, so it cannot be found. Remove the weight, or "
                "learn only what the assistant says."
            )
        spans.append((begin, answer.span[0]))
        begin = answer.span[1]
    return [*spans, (begin, len(text))]


def _drafts_by_marks(
    chat: Conversation, tokenizer: Tokenizer, row: int, train_on: TrainOn
) -> Drafts:
    """Returns a tokenized chat that counts the tokens marked by the template."""
    turns = chat.messages
    answer_indices = [index for index, turn in enumerate(turns) if turn["role"] == "assistant"]
    left_out: Mapping[str, templates.LeftOut] = {}
    if templates.needs_check(chat):
        text = templates.render(chat, len(turns), tokenizer)
        n_turns = answer_indices[-1] + 1
        rendered = templates.Rendered(chat, len(turns), text, tokenizer)
        rendered.check(n_turns)
        left_out = count_partial_as_never(rendered.left_out(n_turns, {}))
    encoding = templates.render(
        chat,
        len(turns),
        tokenizer,
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    ids = np.array(encoding["input_ids"], np.int32)
    counts = np.array(encoding["assistant_masks"], bool)
    if not counts.any():
        raise TrainingError(
            "the model's chat template marks no token of this chat as generated. Use a template "
            "that marks what the assistant says."
        )
    runs = _bounds_of_runs(counts)
    end = int(runs[-1][1])
    if train_on == "all":
        counts[:] = True
    muted_indices = [index for index in answer_indices if not is_learned(turns[index])]
    if muted_indices and len(runs) != len(answer_indices):
        raise TrainingError(
            f"turn {muted_indices[0]} has the weight 0, but the tokens of each turn cannot be "
            f"found, because the model's chat template marks {len(runs)} texts as generated for "
            f"{len(answer_indices)} turns of the assistant. Remove the weights of this row."
        )
    for index in muted_indices:
        begin, stop = runs[answer_indices.index(index)]
        counts[begin:stop] = False
    if train_on == "last":
        counts[: _bounds_of_runs(counts)[-1][0]] = False
    return Drafts([Draft(row, [], marked=TokenSequence(ids[:end], counts[:end], row))], left_out)


def _bounds_of_runs(counts: np.ndarray) -> np.ndarray:
    """Returns the start and end of each run of counted tokens: [runs, 2]."""
    edges = np.diff(counts.astype(np.int8), prepend=0, append=0)
    return np.flatnonzero(edges).reshape(-1, 2)
