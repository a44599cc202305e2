"""Renders the tokens between two turns of a completion: the answers of tools in the chat template.

Turns are appended as token ids, so that drawn tokens are never rendered and tokenised again. A
template may render a turn differently after others follow it (some remove thoughts). The model then
still trains and draws with its own tokens, not with the tokens that a chat application would show.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from lora_jax.core.types import Tokenizer
from lora_jax.training.data import templates
from lora_jax.training.data.rows import Conversation
from train.console.errors import UserError
from train.tools.contract import ToolAnswer

_USER_TEXT = "dummy"  # the user's text in chats of which only the end matters
_PROBE_ANSWER = ToolAnswer("dummy", "dummy")


class TurnJoints:
    """Renders answers of tools between two turns of the assistant.

    Attributes:
      keeps_history: whether the template renders a turn that called tools in the same way after the
        tools have answered.
    """

    def __init__(
        self, tokenizer: Tokenizer, end_tokens: Iterable[int], max_answer_tokens: int
    ) -> None:
        """Checks that the template renders answers of tools.

        Args:
          tokenizer: the model's tokenizer, with a chat template.
          end_tokens: the tokens that end a turn.
          max_answer_tokens: the maximum number of tokens of an answer.

        Raises:
          UserError: the template does not render answers of tools.
        """
        self._tokenizer = tokenizer
        self._end_tokens = frozenset(end_tokens)
        self._max_answer_tokens = max_answer_tokens
        self._arguments: Any = {}
        # Some templates need the arguments of a call as text. Other errors come again below.
        try:
            self._tokenize_chat([_PROBE_ANSWER], {})
        except TypeError:
            self._arguments = "{}"
        except Exception:
            pass
        try:
            chat_ids = self._tokenize_chat([_PROBE_ANSWER], {})
            calling_ids = self._tokenize_calling_turn([_PROBE_ANSWER], {})
        except Exception as error:
            raise UserError(
                "The model's chat template does not render a chat with a tool's answer "
                f"({type(error).__name__}: {' '.join(str(error).split())[:200]}). Use a model that "
                "was trained to call tools, or pass a template with --chat-template."
            ) from error
        self.keeps_history = chat_ids[: len(calling_ids)] == calling_ids
        self.render([_PROBE_ANSWER])

    def render(
        self,
        answers: Sequence[ToolAnswer],
        options: Mapping[str, Any] = {},
        turn_end: int | None = None,
    ) -> list[int]:
        """Returns the tokens between a turn that called tools and the next turn.

        Args:
          answers: the tools' answers.
          options: the row's variables of the template.
          turn_end: the token that ended the turn, which the result does not repeat.

        Raises:
          UserError: the end of a turn cannot be found in the rendered chat.
        """
        chat_ids = self._tokenize_chat(answers, options)
        calling_ids = self._tokenize_calling_turn(answers, options)
        if chat_ids[: len(calling_ids)] == calling_ids:
            ids = chat_ids[len(calling_ids) :]
        else:
            ids = self._ids_after_changed_turn(answers, options, chat_ids)
        repeats_turn_end = ids[:1] == [turn_end] and turn_end in self._end_tokens
        return ids[1:] if repeats_turn_end else ids

    def _tokenize_calling_turn(
        self, answers: Sequence[ToolAnswer], options: Mapping[str, Any]
    ) -> list[int]:
        """Returns the tokens of a chat up to the end token of a turn that calls tools.

        The result does not include text that the template writes after the end token.
        """
        question_ids = self._tokenize_chat((), options, turns=1)
        chat_ids = self._tokenize_chat((), options, name=answers[0].name)
        turn_start = _common_prefix_length(question_ids, chat_ids)
        # The last end token of the calling turn.
        for index in reversed(range(turn_start, len(chat_ids))):
            if chat_ids[index] in self._end_tokens:
                return chat_ids[: index + 1]
        return chat_ids

    def _ids_after_changed_turn(
        self, answers: Sequence[ToolAnswer], options: Mapping[str, Any], chat_ids: list[int]
    ) -> list[int]:
        """Returns the tokens after a turn that the template changes when others follow it.

        Two chats that differ only in the turn's calls have the same tokens after the calls.

        Args:
          answers: the tools' answers.
          options: the row's variables of the template.
          chat_ids: the tokens of the chat with these answers.
        """
        # The common tail of two chats with different calls.
        arguments = '{"zz": "yy"}' if isinstance(self._arguments, str) else {"zz": "yy"}
        other_ids = self._tokenize_chat(answers, options, arguments=arguments)
        n_common = _common_prefix_length(chat_ids[::-1], other_ids[::-1])
        common_tail = chat_ids[len(chat_ids) - n_common :]
        # It begins with the rest of the turn, up to the turn's end token.
        for index, token in enumerate(common_tail):
            if token in self._end_tokens:
                return common_tail[index + 1 :]
        raise UserError(
            "The model's chat template changes a turn that calls tools after the tools have "
            "answered, and the end of the turn cannot be found. Pass another template with "
            "--chat-template."
        )

    def _tokenize_chat(
        self,
        answers: Sequence[ToolAnswer],
        options: Mapping[str, Any],
        *,
        turns: int = 2,
        name: str | None = None,
        arguments: Any = None,
    ) -> list[int]:
        """Returns the tokens of a chat: a question, a turn that calls a tool, and answers.

        Args:
          answers: the answers, after which the next turn begins.
          options: the row's variables of the template.
          turns: the number of turns before the answers. With 1, only the question, after which a
            turn begins.
          name: the name of the called tool; by default the name in the first answer.
          arguments: the arguments of the call.
        """
        function = {
            "name": answers[0].name if answers else name,
            "arguments": self._arguments if arguments is None else arguments,
        }
        messages: list[dict[str, Any]] = [{"role": "user", "content": _USER_TEXT}]
        if turns == 2:
            calls = [{"type": "function", "function": function}]
            messages.append({"role": "assistant", "content": "", "tool_calls": calls})
        for answer in answers:
            messages.append({"role": "tool", "name": answer.name, "content": answer.content})
        chat = Conversation(messages, options=options)
        next_turn_begins = turns == 1 or bool(answers)
        text = templates.render(chat, len(messages), self._tokenizer, ask=next_turn_begins)
        ids: list[int]
        ids = self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return ids

    def cut(self, answer: ToolAnswer) -> ToolAnswer:
        """Returns an answer of at most --max-tool-output tokens, with a notice if it was cut."""
        max_tokens = self._max_answer_tokens
        n_chars = len(answer.content)
        text = answer.content[: 64 * max_tokens]  # tokens have fewer characters on average
        ids = self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        if len(ids) <= max_tokens and len(text) == n_chars:
            return answer
        beginning = self._tokenizer.decode(ids[:max_tokens], skip_special_tokens=False)
        notice = f"[cut after {max_tokens:,} tokens, of {n_chars:,} characters]"
        return answer._replace(content=f"{beginning}\n{notice}")


def _common_prefix_length(tokens: Sequence[int], other_tokens: Sequence[int]) -> int:
    """Returns the number of tokens at the start of two sequences that are equal."""
    n_common = 0
    for token, other_token in zip(tokens, other_tokens, strict=False):
        if token != other_token:
            break
        n_common += 1
    return n_common
