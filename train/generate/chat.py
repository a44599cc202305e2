"""A chat in the terminal: the conversation, its commands, and Ctrl-C."""

import contextlib
import dataclasses
import signal
import sys
from collections.abc import Callable, Iterator
from typing import Any

from lora_jax.training.data.rows import Conversation
from train.console.errors import UserError
from train.generate.answers import GeneratedAnswer, stream_answer
from train.generate.prompts import Prompt, PromptTokens, tokenize
from train.generate.shared_base import LoadedAdapters

with contextlib.suppress(ImportError):  # not on Windows
    import readline  # noqa: F401  (gives `input` a history, and keys to edit a line)

_WAITING, _ERASED = "…", "\r\x1b[K"
_HELP = """\
/adapter         lists the adapters
/adapter NAME    goes on with another one; the conversation stays
/system TEXT     sets the system prompt; without a text, removes it
/reset           forgets the conversation; the system prompt stays
/help            lists the commands
/quit            ends the chat, as does Ctrl-D
Ctrl-C           ends an answer
//…              sends a line that begins with a /"""


@dataclasses.dataclass
class Chat:
    """A conversation with one of several adapters.

    Attributes:
      served: the model and the adapters.
      name: the adapter that answers.
      system: the system prompt; None for the chat template's own.
      turns: what user and assistant have said.
      number: the number of answers so far, from which the next one's key comes.
    """

    served: LoadedAdapters
    name: str
    system: str | None = None
    turns: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    number: int = 0


def talk(served: LoadedAdapters) -> None:
    """Chats until /quit or the end of standard input."""
    chat = Chat(served, served.names[0], served.options.system)
    say(f"{_adapters(chat)}. /help lists the commands.")
    while True:
        try:
            line = input(f"{chat.name}> ").strip()
            if line == "/quit":
                return
            if line.startswith("/") and not line.startswith("//"):
                say(command(chat, line))
            elif line:
                with ctrl_c() as pressed:
                    ask(chat, line.removeprefix("/") if line.startswith("//") else line, pressed)
        except KeyboardInterrupt:
            say("\n/quit or Ctrl-D ends the chat")
        except EOFError:
            say("")
            return


def command(chat: Chat, line: str) -> str:
    """Executes a line that begins with /; returns the reply."""
    word, _, rest = line.partition(" ")
    rest = rest.strip()
    if word == "/help":
        return _HELP
    if word == "/reset":
        chat.turns.clear()
        return "the conversation is forgotten"
    if word == "/system":
        chat.system = rest or None
        return "the system prompt is set" if rest else "the system prompt is removed"
    if word != "/adapter":
        return f"there is no command {word}; /help lists them, and // sends a line that begins so"
    if rest in chat.served.names:
        chat.name = rest
    elif rest:
        return f"there is no adapter {rest}; {_adapters(chat)}"
    return _adapters(chat)


def ask(chat: Chat, text: str, pressed: Callable[[], bool]) -> None:
    """Answers the user's next turn, and keeps both turns, also of an answer that Ctrl-C ended.

    The whole conversation is computed again for each answer: adapters and system prompts change
    between turns, and templates may render earlier turns otherwise.

    Args:
      chat: the conversation so far.
      text: the user's turn.
      pressed: tells of Ctrl-C.
    """
    chat.turns.append({"role": "user", "content": text})
    outline, longest = chat.served.outline, chat.served.options.max_new_tokens
    try:
        prompt = Prompt("the conversation", {}, Conversation(chat.turns))
        (tokens,) = tokenize([prompt], outline, chat.system)
        room = outline.max_tokens - len(tokens)
        if room < 1:
            raise UserError(
                f"the conversation has {len(tokens):,} tokens with this turn, and "
                f"{outline.name} allows {outline.max_tokens:,}: /reset begins a new one"
            )
    except UserError as error:
        chat.turns.pop()
        say(str(error))
        return
    answer = _answered(chat, tokens, min(room, longest), pressed)
    stopped = answer.ended is None
    if not answer.said and stopped:
        chat.turns.pop()
        say("(stopped before the first word: the question is forgotten)")
        return
    chat.turns.append({"role": "assistant", "content": answer.said})
    if stopped:
        say("(stopped; the conversation keeps what was said)")
    elif answer.ended == "length" and room <= longest:
        say(f"(the model allows {outline.max_tokens:,} tokens: /reset begins a new one)")
    elif answer.ended == "length":
        say(f"(cut off at --max-new-tokens {longest})")


def _answered(
    chat: Chat, tokens: PromptTokens, most: int, pressed: Callable[[], bool]
) -> GeneratedAnswer:
    """Prints an answer of at most so many tokens as it is generated, and returns it."""
    speaker, waiting = chat.served.speaker(chat.name), sys.stdout.isatty()

    def tell(text: str) -> None:
        nonlocal waiting
        print(_ERASED if waiting else "", text, sep="", end="", flush=True)
        waiting = False

    if waiting:  # the first answer of a length waits for the compiler
        print(_WAITING, end="", flush=True)
    answer = speaker.answer(most)
    with contextlib.suppress(KeyboardInterrupt):
        stream_answer(speaker, answer, tokens, chat.number, tell, stopped=pressed)
    chat.number += 1
    tell("\n")
    return answer


@contextlib.contextmanager
def ctrl_c() -> Iterator[Callable[[], bool]]:
    """Has Ctrl-C set a flag, which the function that is yielded reads.

    An exception in the midst of a compilation could leave half of its work behind. A second Ctrl-C
    raises KeyboardInterrupt nevertheless.
    """
    presses = 0

    def press(number: int, frame: Any) -> None:
        nonlocal presses
        presses += 1
        if presses > 1:
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, press)
    try:
        yield lambda: presses > 0
    finally:
        signal.signal(signal.SIGINT, before)


def _adapters(chat: Chat) -> str:
    others = [name for name in chat.served.names if name != chat.name]
    return f"{chat.name} answers" + (f"; there are also {', '.join(others)}" if others else "")


def say(text: str) -> None:
    """Prints a line that is no part of the conversation."""
    print(f"\x1b[2m{text}\x1b[0m" if sys.stdout.isatty() else text, flush=True)
