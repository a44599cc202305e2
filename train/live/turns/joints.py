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

_ASKED = "dummy"  # what the user says in a chat that is rendered for its end alone
_PROBE = ToolAnswer("dummy", "dummy")


class TurnJoints:
    """Renders answers of tools between two turns of the assistant.

    Attributes:
      keeps_history: False where the template renders a turn that called tools differently once the
        tools have answered.
    """

    def __init__(self, tokenizer: Tokenizer, ends: Iterable[int], most: int) -> None:
        """Renders an answer, to see that the template can.

        Args:
          tokenizer: the model's, with a chat template.
          ends: the tokens that end a turn.
          most: the most tokens of an answer.

        Raises:
          UserError: the template does not render answers of tools.
        """
        self._tokenizer, self._ends, self._most = tokenizer, frozenset(ends), most
        self._arguments: Any = {}
        try:
            self._ids([_PROBE], {})
        except TypeError:  # some templates want the arguments as a text
            self._arguments = "{}"
        except Exception:  # the next call tells
            pass
        try:
            full = self._ids([_PROBE], {})
            called = self._called([_PROBE], {})
        except Exception as error:
            raise UserError(
                "the model's chat template does not render a chat with a tool's answer "
                f"({type(error).__name__}: {' '.join(str(error).split())[:200]}); take a model "
                "that knows tools, or give a template by --chat-template"
            ) from error
        self.keeps_history = full[: len(called)] == called
        self.render([_PROBE])

    def render(
        self,
        answers: Sequence[ToolAnswer],
        options: Mapping[str, Any] = {},
        last: int | None = None,
    ) -> list[int]:
        """Returns the tokens from the end of a turn that called tools to the next one's beginning.

        Args:
          answers: what the tools answered.
          options: the row's variables of the template.
          last: the token that ended the turn: it is left out where the tokens begin with it.

        Raises:
          UserError: the end of a turn cannot be found in what the template renders.
        """
        full, called = self._ids(answers, options), self._called(answers, options)
        if full[: len(called)] == called:
            ids = full[len(called) :]
        else:
            ids = self._after_other_turn(answers, options, full)
        return ids[1:] if ids[:1] == [last] and last in self._ends else ids

    def _called(self, answers: Sequence[ToolAnswer], options: Mapping[str, Any]) -> list[int]:
        """Returns the tokens of a chat up to the end of a turn that calls tools.

        What the template writes after the token that ends the turn is no part of it.
        """
        asked = self._ids((), options, turns=1)
        called = self._ids((), options, name=answers[0].name)
        begin = _n_common(asked, called)
        ends = [at for at in range(begin, len(called)) if called[at] in self._ends]
        return called[: ends[-1] + 1] if ends else called

    def _after_other_turn(
        self, answers: Sequence[ToolAnswer], options: Mapping[str, Any], full: list[int]
    ) -> list[int]:
        """Returns the tokens after a turn that the template renders differently once others follow.

        Two chats that differ in the turn's calls alone have in common what follows these.
        """
        more = '{"zz": "yy"}' if isinstance(self._arguments, str) else {"zz": "yy"}
        other = self._ids(answers, options, arguments=more)
        n = _n_common(full[::-1], other[::-1])
        tail = full[len(full) - n :]
        end = next((at for at, token in enumerate(tail) if token in self._ends), None)
        if end is None:
            raise UserError(
                "the model's chat template renders a turn that calls tools differently once they "
                "have answered, and the turn's end cannot be found: give another template by "
                "--chat-template"
            )
        return tail[end + 1 :]

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
        calls = [{"type": "function", "function": function}]
        asked: dict[str, Any] = {"role": "user", "content": _ASKED}
        calling: dict[str, Any] = {"role": "assistant", "content": "", "tool_calls": calls}
        messages = [asked, calling][:turns]
        messages += [{"role": "tool", "name": x.name, "content": x.content} for x in answers]
        chat = Conversation(messages, options=options)
        ask = turns == 1 or bool(answers)
        text = templates.render(chat, len(messages), self._tokenizer, ask=ask)
        ids: list[int]
        ids = self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return ids

    def cut(self, answer: ToolAnswer) -> ToolAnswer:
        """Returns an answer of at most --max-tool-output tokens, which says where it was cut."""
        text = answer.content[: 64 * self._most]  # no token has so many characters in the mean
        ids = self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        if len(ids) <= self._most and len(text) == len(answer.content):
            return answer
        kept = self._tokenizer.decode(ids[: self._most], skip_special_tokens=False)
        whole = f"{len(answer.content):,} characters"
        return answer._replace(content=f"{kept}\n[cut after {self._most:,} tokens, of {whole}]")


def _n_common(one: Sequence[int], other: Sequence[int]) -> int:
    """Returns the number of tokens that two sequences begin with."""
    differ = (i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)
    return next(differ, min(len(one), len(other)))
