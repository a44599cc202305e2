"""The prompts to answer: from arguments, a file or standard input, and as tokens."""

import dataclasses
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from jinja2 import TemplateError

from lora_jax.training.data.rows import Conversation, Row, check_text, name_of, question
from lora_jax.training.data.templates import asked
from lora_jax.training.errors import TrainingError
from train.console.errors import UserError, as_user_errors
from train.data.files import kind_of, read_file
from train.data.text_files import read_lines
from train.generate.options import GenerateOptions
from train.run.pretrained import Outline

_TOO_LONG = "prompt and --max-new-tokens"


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A prompt.

    Attributes:
      name: for messages: "prompt 3", or "rows.jsonl, line 3".
      fields: the prompt as an output repeats it: {"prompt": "…"} or {"messages": […]}.
      chat: the turns; of a plain text, the user's.
    """

    name: str
    fields: dict[str, Any]
    chat: Conversation

    @property
    def text(self) -> str:
        """The last turn's text."""
        return str(self.chat.messages[-1].get("content") or "")

    @property
    def is_text(self) -> bool:
        """True for a text, False for turns."""
        return self.fields.get("prompt") == self.text


def prompt_of(text: str, name: str) -> Prompt:
    """Returns a prompt that is a text."""
    chat = Conversation([{"role": "user", "content": text}])
    return Prompt(name, {"prompt": text}, chat)


def read_prompts(options: GenerateOptions) -> list[Prompt] | None:
    """Returns the prompts of arguments or of a file; None where neither is given.

    Raises:
      UserError: a file cannot be read, or has no prompt; names the line.
    """
    if options.prompts is not None:
        return _of_file(options.prompts)
    given = enumerate(options.prompt, start=1)
    return [prompt_of(text, f"prompt {n}") for n, text in given] or None


def of_standard_input() -> list[Prompt]:
    """Reads a prompt a line, up to the end.

    Raises:
      UserError: there is none, or the text is not UTF-8.
    """
    with as_user_errors(UnicodeDecodeError, prefix="standard input is not UTF-8 text: "):
        prompts = list(typed())
    if not prompts:
        raise UserError("standard input has no prompt: give one a line, or name one with --prompt")
    return prompts


def typed() -> Iterator[Prompt]:
    """Yields the prompts of standard input, one per line, as they come."""
    if sys.stdin.isatty():
        print("One prompt per line; end with Ctrl-D.", file=sys.stderr)
    for n, line in enumerate(filter(str.strip, sys.stdin), start=1):
        yield prompt_of(line.strip(), f"prompt {n}")


def _of_file(given: str) -> list[Prompt]:
    path = Path(given).expanduser()
    if not path.is_file():
        raise UserError(f"--prompts {given}: there is no such file")
    if kind_of(given):
        rows = enumerate(read_file(path), start=1)
        found = [_of_row(row, name_of(row, given, n)) for n, row in rows]
    else:
        lines = enumerate(read_lines(path), start=1)
        found = [prompt_of(s.strip(), f"{given}, line {n}") for n, s in lines if s.strip()]
    if not found:
        raise UserError(f"--prompts {given} has no prompt")
    return found


def _of_row(row: Row, name: str) -> Prompt:
    chat = question(row, name)
    repeated = {one: row[one] for one in ("messages", "prompt", "tools") if row.get(one)}
    if "messages" in repeated:
        repeated.pop("prompt", None)
    return Prompt(name, repeated, chat)


def check_template(options: GenerateOptions, outline: Outline, prompts: Iterable[Prompt]) -> None:
    """Raises a UserError for what needs a chat template, if the model has none."""
    if outline.tokenizer.chat_template is not None:
        return
    if options.interactive:
        raise UserError(
            f"--interactive: {outline.name} has no chat template to put a conversation into: give "
            "single texts with --prompt, and it continues them"
        )
    if options.system is not None:
        raise UserError(
            f"--system: {outline.name} has no chat template to put a system prompt into: leave it "
            "out, or write it into the prompt"
        )
    if chat := next((prompt for prompt in prompts if not prompt.is_text), None):
        raise UserError(
            f"{chat.name} has turns, and {outline.name} has no chat template to render them: "
            "give its text as `prompt`"
        )


def tokenize(prompts: Sequence[Prompt], outline: Outline, system: str | None) -> list[list[int]]:
    """Returns the tokens of each prompt, up to the start of the answer.

    Args:
      prompts: the prompts.
      outline: the model's, with its tokenizer.
      system: a system prompt; None for none.

    Raises:
      UserError: the chat template refuses a prompt or drops some of it, or it has another system
        prompt.
    """
    with as_user_errors(TrainingError):
        for prompt in prompts:
            check_text(json.dumps(prompt.chat, ensure_ascii=False, default=repr), prompt.name)
        check_text(system or "", "--system")
    if outline.tokenizer.chat_template is None:
        return outline.tokenizer([prompt.text for prompt in prompts], verbose=False)["input_ids"]
    texts = [_rendered(prompt, outline, system) for prompt in prompts]
    return outline.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]


def _rendered(prompt: Prompt, outline: Outline, system: str | None) -> str:
    turns = prompt.chat.messages
    if system is not None:
        if any(turn["role"] == "system" for turn in turns):
            raise UserError(f"{prompt.name} has a system prompt of its own: leave out --system")
        turns = [{"role": "system", "content": system}, *turns]
    with (
        as_user_errors(TemplateError, prefix=f"{prompt.name}: the model's chat template says: "),
        as_user_errors(TrainingError, prefix=f"{prompt.name}: "),
    ):
        return asked(prompt.chat._replace(messages=turns), outline.tokenizer)


def check_lengths(
    prompts: Sequence[Prompt],
    tokens: Sequence[list[int]],
    outline: Outline,
    options: GenerateOptions,
) -> None:
    """Raises a UserError if a prompt and its answer together are longer than the model allows."""
    most = outline.max_tokens - options.max_new_tokens
    longer = [i for i, one in enumerate(tokens) if len(one) > most]
    if longer:
        more = f" (and of {len(longer) - 1} more prompts)" if len(longer) > 1 else ""
        what = _TOO_LONG if len(prompts) == 1 else f"{prompts[longer[0]].name}: {_TOO_LONG}{more}"
        has = f"; the prompt has {len(tokens[longer[0]])}"
        outline.check_length(outline.max_tokens + 1, what, has)


def short_enough(
    prompts: list[Prompt], tokens: list[list[int]], outline: Outline, options: GenerateOptions
) -> tuple[list[Prompt], list[list[int]]]:
    """Returns the prompts and tokens that the model allows, and says which it does not."""
    kept = []
    for i, (prompt, one) in enumerate(zip(prompts, tokens, strict=True)):
        try:
            check_lengths([prompt], [one], outline, options)
        except UserError as error:
            print(f"{prompt.name} is left out: {error}", file=sys.stderr, flush=True)
        else:
            kept.append(i)
    return [prompts[i] for i in kept], [tokens[i] for i in kept]
