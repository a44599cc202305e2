"""The tokens between two turns of a completion: what tools answered, as the chat template has it.

Turns are appended as ids: what was drawn is never rendered and tokenised again. A template may
render a turn differently once others follow it (some leave out what was thought). The model then
trains and draws on its own words as they were, not on what a chat application would show it later.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from lora_jax.core.types import Tokenizer
from lora_jax.training.data import templates
from lora_jax.training.data.rows import Conversation
from train.console.errors import UserError
from train.tools.contract import ToolAnswer

_USER_TEXT = "dummy"  # what the user says in a chat that is rendered for its end alone
_PROBE_ANSWER = ToolAnswer("dummy", "dummy")


class TurnJoints:
    """Renders answers of tools between two turns of the assistant.

    Attributes:
      keeps_history: False where the template renders a turn that called tools differently once the
        tools have answered.
    """

    def __init__(
        self, tokenizer: Tokenizer, end_tokens: Iterable[int], max_answer_tokens: int
    ) -> None:
        """Renders an answer, to see that the template can.

        Args:
          tokenizer: the model's, with a chat template.
          end_tokens: the tokens that end a turn.
          max_answer_tokens: the maximum number of tokens of an answer.

        Raises:
          UserError: the template does not render answers of tools.
        """
        self._tokenizer = tokenizer
        self._end_tokens = frozenset(end_tokens)
        self._max_answer_tokens = max_answer_tokens
        self._arguments: Any = {}
        try:
            self._ids([_PROBE_ANSWER], {})
        except TypeError:  # some templates want the arguments as a text
            self._arguments = "{}"
        except Exception:  # the next call tells
            pass
        try:
            chat = self._ids([_PROBE_ANSWER], {})
            calling_chat = self._calling_chat([_PROBE_ANSWER], {})
        except Exception as error:
            raise UserError(
                "the model's chat template does not render a chat with a tool's answer "
                f"({type(error).__name__}: {' '.join(str(error).split())[:200]}); take a model "
                "that knows tools, or give a template by --chat-template"
            ) from error
        self.keeps_history = chat[: len(calling_chat)] == calling_chat
        self.render([_PROBE_ANSWER])

    def render(
        self,
        answers: Sequence[ToolAnswer],
        options: Mapping[str, Any] = {},
        turn_end: int | None = None,
    ) -> list[int]:
        """Returns the tokens from the end of a turn that called tools to the next one's beginning.

        Args:
          answers: the tools' answers.
          options: the row's variables of the template.
          turn_end: the token that ended the turn: it is left out where the tokens begin with it.

        Raises:
          UserError: the end of a turn cannot be found in what the template renders.
        """
        chat = self._ids(answers, options)
        calling_chat = self._calling_chat(answers, options)
        if chat[: len(calling_chat)] == calling_chat:
            ids = chat[len(calling_chat) :]
        else:
            ids = self._after_changed_turn(answers, options, chat)
        repeats_turn_end = ids[:1] == [turn_end] and turn_end in self._end_tokens
        return ids[1:] if repeats_turn_end else ids

    def _calling_chat(self, answers: Sequence[ToolAnswer], options: Mapping[str, Any]) -> list[int]:
        """Returns the tokens of a chat up to the end of a turn that calls tools.

        What the template writes after the token that ends the turn is no part of it.
        """
        question_chat = self._ids((), options, turns=1)
        chat = self._ids((), options, name=answers[0].name)
        turn_start = _n_common(question_chat, chat)
        for index in reversed(range(turn_start, len(chat))):
            if chat[index] in self._end_tokens:
                return chat[: index + 1]
        return chat

    def _after_changed_turn(
        self, answers: Sequence[ToolAnswer], options: Mapping[str, Any], chat: list[int]
    ) -> list[int]:
        """Returns the tokens after a turn that the template renders differently once others follow.

        Two chats that differ in the turn's calls alone have in common what follows these.

        Args:
          answers: the tools' answers.
          options: the row's variables of the template.
          chat: the tokens of the chat with these answers.
        """
        arguments = '{"zz": "yy"}' if isinstance(self._arguments, str) else {"zz": "yy"}
        other_chat = self._ids(answers, options, arguments=arguments)
        n_common = _n_common(chat[::-1], other_chat[::-1])
        common_tail = chat[len(chat) - n_common :]
        for index, token in enumerate(common_tail):
            if token in self._end_tokens:
                return common_tail[index + 1 :]
        raise UserError(
            "the model's chat template renders a turn that calls tools differently once they "
            "have answered, and the turn's end cannot be found: give another template by "
            "--chat-template"
        )

    def _ids(
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
          answers: the answers; the beginning of the next turn follows them.
          options: the row's variables of the template.
          turns: the number of turns before the answers; after a single one, a turn begins.
          name: the name of the tool that is called; that of the first answer by default.
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
        """Returns an answer of at most --max-tool-output tokens, which says where it was cut."""
        max_tokens = self._max_answer_tokens
        n_chars = len(answer.content)
        text = answer.content[: 64 * max_tokens]  # no token has so many characters in the mean
        ids = self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        if len(ids) <= max_tokens and len(text) == n_chars:
            return answer
        beginning = self._tokenizer.decode(ids[:max_tokens], skip_special_tokens=False)
        notice = f"[cut after {max_tokens:,} tokens, of {n_chars:,} characters]"
        return answer._replace(content=f"{beginning}\n{notice}")


def _n_common(tokens: Sequence[int], other_tokens: Sequence[int]) -> int:
    """Returns the number of tokens that two sequences begin with."""
    n_common = 0
    for token, other_token in zip(tokens, other_tokens, strict=False):
        if token != other_token:
            break
        n_common += 1
    return n_common
