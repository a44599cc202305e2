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

_WAITING = "…"
_ERASE_LINE = "\r\x1b[K"
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
      adapters: the model and the adapters.
      name: the adapter that answers.
      system: the system prompt; None for the chat template's own.
      turns: what user and assistant have said.
      number: the number of answers so far, from which the next one's key comes.
    """

    adapters: LoadedAdapters
    name: str
    system: str | None = None
    turns: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    number: int = 0


def talk(adapters: LoadedAdapters) -> None:
    """Chats until /quit or the end of standard input."""
    chat = Chat(adapters, adapters.names[0], adapters.options.system)
    say(f"{_describe_adapters(chat)}. Type /help for a list of the commands.")
    while True:
        try:
            line = input(f"{chat.name}> ").strip()
            if line == "/quit":
                return
            if line.startswith("/") and not line.startswith("//"):
                say(execute_command(chat, line))
            elif line:
                text = line.removeprefix("/") if line.startswith("//") else line
                with ctrl_c() as is_pressed:
                    ask(chat, text, is_pressed)
        except KeyboardInterrupt:
            say("\nType /quit or press Ctrl-D to end the chat.")
        except EOFError:
            say("")
            return


def execute_command(chat: Chat, line: str) -> str:
    """Executes a line that begins with /; returns the reply."""
    word, _, argument = line.partition(" ")
    argument = argument.strip()
    if word == "/help":
        return _HELP
    if word == "/reset":
        chat.turns.clear()
        return "the conversation is forgotten"
    if word == "/system":
        chat.system = argument or None
        return "the system prompt is set" if argument else "the system prompt is removed"
    if word != "/adapter":
        return (
            f"There is no command {word}. Type /help for a list. Begin the line with // to "
            "send text that starts with a /."
        )
    if argument in chat.adapters.names:
        chat.name = argument
    elif argument:
        return f"There is no adapter {argument}: {_describe_adapters(chat)}"
    return _describe_adapters(chat)


def ask(chat: Chat, text: str, is_pressed: Callable[[], bool]) -> None:
    """Answers the user's next turn, and keeps both turns, even if Ctrl-C ended the answer.

    The whole conversation is computed again for each answer: adapters and system prompts change
    between turns, and templates may render earlier turns otherwise.

    Args:
      chat: the conversation so far.
      text: the user's turn.
      is_pressed: returns True once Ctrl-C was pressed.
    """
    chat.turns.append({"role": "user", "content": text})
    outline = chat.adapters.outline
    most_tokens = chat.adapters.options.max_new_tokens
    try:
        prompt = Prompt("the conversation", {}, Conversation(chat.turns))
        (tokens,) = tokenize([prompt], outline, chat.system)
        free_tokens = outline.max_tokens - len(tokens)
        if free_tokens < 1:
            raise UserError(
                f"The conversation has {len(tokens):,} tokens with this turn, but {outline.name} "
                f"allows at most {outline.max_tokens:,}. Type /reset to begin a new "
                "conversation."
            )
    except UserError as error:
        chat.turns.pop()
        say(str(error))
        return
    answer = _print_answer(chat, tokens, min(free_tokens, most_tokens), is_pressed)
    is_stopped = answer.ended is None
    if not answer.said and is_stopped:
        chat.turns.pop()
        say("(Stopped before the first word. The conversation does not contain the question.)")
        return
    chat.turns.append({"role": "assistant", "content": answer.said})
    if is_stopped:
        say("(Stopped. The conversation keeps the beginning of the answer.)")
    elif answer.ended == "length" and free_tokens <= most_tokens:
        say(
            f"(The model allows at most {outline.max_tokens:,} tokens. Type /reset to begin a new "
            "conversation.)"
        )
    elif answer.ended == "length":
        say(f"(The answer was cut off at --max-new-tokens {most_tokens}.)")


def _print_answer(
    chat: Chat, tokens: PromptTokens, most_tokens: int, is_pressed: Callable[[], bool]
) -> GeneratedAnswer:
    """Prints an answer while it is generated, and returns it."""
    generator = chat.adapters.generator(chat.name)
    is_waiting = sys.stdout.isatty()

    def show(text: str) -> None:
        nonlocal is_waiting
        print(_ERASE_LINE if is_waiting else "", text, sep="", end="", flush=True)
        is_waiting = False

    if is_waiting:  # the first answer of a length waits for the compiler
        print(_WAITING, end="", flush=True)
    answer = generator.answer(most_tokens)
    with contextlib.suppress(KeyboardInterrupt):
        stream_answer(generator, answer, tokens, chat.number, show, stopped=is_pressed)
    chat.number += 1
    show("\n")
    return answer


@contextlib.contextmanager
def ctrl_c() -> Iterator[Callable[[], bool]]:
    """Yields a function that returns True after Ctrl-C. A second Ctrl-C raises KeyboardInterrupt.

    An exception in the midst of a compilation could leave half of its work behind. A second Ctrl-C
    raises KeyboardInterrupt nevertheless.
    """
    n_presses = 0

    def press(number: int, frame: Any) -> None:
        nonlocal n_presses
        n_presses += 1
        if n_presses > 1:
            raise KeyboardInterrupt

    earlier_handler = signal.signal(signal.SIGINT, press)
    try:
        yield lambda: n_presses > 0
    finally:
        signal.signal(signal.SIGINT, earlier_handler)


def _describe_adapters(chat: Chat) -> str:
    """Returns a line with the adapter that answers, and the other ones."""
    others = [name for name in chat.adapters.names if name != chat.name]
    return f"{chat.name} answers" + (f"; there are also {', '.join(others)}" if others else "")


def say(text: str) -> None:
    """Prints a line that does not belong to the conversation."""
    print(f"\x1b[2m{text}\x1b[0m" if sys.stdout.isatty() else text, flush=True)
