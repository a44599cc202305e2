"""Reads prompts from arguments, a file or standard input, and tokenises them."""

import dataclasses
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from jinja2 import TemplateError

from lora_jax.training.data.image_parts import IMAGES, shown_images
from lora_jax.training.data.rows import Conversation, Row, check_text, question
from lora_jax.training.data.sequences import TokenSequence
from lora_jax.training.data.templates import render_prompt
from lora_jax.training.data.vision.pictures import RowImages, read_pictures
from lora_jax.training.errors import TrainingError
from train.console.errors import UserError, as_user_errors
from train.data.entries import read_entries, read_typed_lines
from train.generate.options import GenerateOptions
from train.options.paths import kind_of
from train.run.pretrained import ModelInfo

_REPEATED_FIELDS = ("messages", "prompt", "tools", IMAGES)  # of a row, in an output
_TOO_LONG = "prompt and --max-new-tokens"


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A prompt, with its name for messages.

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
        """The text of the last turn."""
        content = self.chat.messages[-1].get("content") or ""
        if isinstance(content, str):
            return content
        return " ".join(part["text"] for part in content if part["type"] == "text")

    @property
    def is_text(self) -> bool:
        """True for a plain text, False for turns."""
        return self.fields.get("prompt") == self.text


class PromptTokens(list[int]):
    """The tokens of a prompt and its images."""

    images: RowImages = RowImages(np.empty((0, 0, 0, 0), np.uint8), ())


def prompt_from_text(text: str, name: str, images: Sequence[str] = ()) -> Prompt:
    """Returns a prompt of a plain text, with images in front if there are any."""
    fields: dict[str, Any] = {"prompt": text}
    if images:
        fields[IMAGES] = [*images]
    turns, turn_images = shown_images([{"role": "user", "content": text}], fields, name)
    return Prompt(name, fields, Conversation(turns, images=turn_images))


def read_prompts(options: GenerateOptions) -> list[Prompt] | None:
    """Returns the prompts of the command line or of a file; None if neither is given.

    Raises:
      UserError: a file cannot be read, or has no prompt; names the line.
    """
    if options.prompts is not None:
        return _read_file(options.prompts)
    if not options.prompt:
        return None
    return [
        prompt_from_text(text, f"prompt {number}", options.image)
        for number, text in enumerate(options.prompt, start=1)
    ]


def read_standard_input() -> list[Prompt]:
    """Reads one prompt per line until the end of standard input.

    Raises:
      UserError: there is none, or the text is not UTF-8.
    """
    prompts = list(typed_prompts())
    if not prompts:
        raise UserError(
            "Standard input contains no prompt. Write one prompt per line, or pass --prompt."
        )
    return prompts


def typed_prompts() -> Iterator[Prompt]:
    """Yields the prompts on standard input, one per line, when they arrive."""
    lines = filter(str.strip, read_typed_lines("prompt"))
    for number, line in enumerate(lines, start=1):
        yield prompt_from_text(line.strip(), f"prompt {number}")


def _read_file(path: str) -> list[Prompt]:
    """Returns the prompts of a file with rows, or with one prompt per line."""
    make_prompt: Callable[..., Prompt] = (
        prompt_from_text if kind_of(path) is None else _prompt_from_row
    )
    entries = read_entries(path, "--prompts")
    prompts = [make_prompt(value, name) for name, value in entries if value != ""]
    if not prompts:
        raise UserError(
            f"--prompts {path} contains no prompt. Add at least one prompt to the file."
        )
    return prompts


def _prompt_from_row(row: Row, name: str) -> Prompt:
    """Returns the prompt in a row."""
    chat = question(row, name, images=True)
    repeated = {field: row[field] for field in _REPEATED_FIELDS if row.get(field)}
    if "messages" in repeated:
        repeated.pop("prompt", None)
    return Prompt(name, repeated, chat)


def check_template(options: GenerateOptions, outline: ModelInfo, prompts: Iterable[Prompt]) -> None:
    """Raises a UserError if options or prompts need a chat template that the model lacks."""
    if outline.tokenizer.chat_template is not None:
        return
    if options.interactive:
        raise UserError(
            f"--interactive needs a chat template, and {outline.name} has no chat template. Pass "
            "single texts with --prompt for the model to continue."
        )
    if options.system is not None:
        raise UserError(
            f"--system needs a chat template, and {outline.name} has no chat template. Remove "
            "--system, or write its text into the prompt."
        )
    with_turns = [prompt for prompt in prompts if not prompt.is_text]
    if with_turns:
        raise UserError(
            f"{with_turns[0].name} is a conversation, and {outline.name} has no chat template to "
            "render it. Give the text of the conversation as `prompt`."
        )


def tokenize(
    prompts: Sequence[Prompt], outline: ModelInfo, system: str | None
) -> list[PromptTokens]:
    """Returns the tokens of each prompt, up to the start of the answer.

    Args:
      prompts: the prompts.
      outline: the model's, with its tokenizer.
      system: a system prompt; None for none.

    Raises:
      UserError: the chat template refuses a prompt or drops some of it, or it has another system
        prompt; or the model reads no images, or an image cannot be read.
    """
    with as_user_errors(TrainingError):
        for prompt in prompts:
            chat = prompt.chat._replace(images=())
            check_text(json.dumps(chat, ensure_ascii=False, default=repr), prompt.name)
        check_text(system or "", "--system")
    names_with_images = [prompt.name for prompt in prompts if prompt.chat.images]
    if names_with_images and (outline.images is None or outline.tokenizer.chat_template is None):
        raise UserError(
            f"{names_with_images[0]} has images, and the model {outline.name} reads none, or has "
            "no chat template to show them: name a model that reads images, such as SmolVLM or "
            "Qwen3.5"
        )
    if outline.tokenizer.chat_template is None:
        texts = [prompt.text for prompt in prompts]
        ids_of_prompts = outline.tokenizer(texts, verbose=False)["input_ids"]
        return [PromptTokens(ids) for ids in ids_of_prompts]
    texts = [_render_prompt(prompt, outline, system) for prompt in prompts]
    ids_of_prompts = outline.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    if not names_with_images:
        return [PromptTokens(ids) for ids in ids_of_prompts]
    return _add_images(prompts, ids_of_prompts, outline)


def _add_images(
    prompts: Sequence[Prompt], ids_of_prompts: Sequence[list[int]], outline: ModelInfo
) -> list[PromptTokens]:
    """Returns the prompts' tokens with tokens for their images, and the images."""
    assert outline.images is not None
    names = [prompt.name for prompt in prompts]
    images = [prompt.chat.images for prompt in prompts]
    tokens_with_images = []
    with as_user_errors(TrainingError):
        pictures = read_pictures(images, names, outline.images)
        for number, (ids, name) in enumerate(zip(ids_of_prompts, names, strict=True), start=1):
            sequence = TokenSequence(np.array(ids, np.int32), np.zeros(len(ids), bool), number)
            tokens = PromptTokens(pictures.expand(sequence, name).ids.tolist())
            tokens.images = RowImages(pictures.tiles_of(number), pictures.grids[number - 1])
            tokens_with_images.append(tokens)
    return tokens_with_images


def _render_prompt(prompt: Prompt, outline: ModelInfo, system: str | None) -> str:
    """Returns the text of a prompt by the chat template, after a system prompt if there is one."""
    turns = prompt.chat.messages
    if system is not None:
        if any(turn["role"] == "system" for turn in turns):
            raise UserError(
                f"{prompt.name} already contains a system prompt. Remove --system, or remove the "
                "system turn from the prompt."
            )
        turns = [{"role": "system", "content": system}, *turns]
    with (
        as_user_errors(
            TemplateError, prefix=f"{prompt.name}: The model's chat template refuses this prompt: "
        ),
        as_user_errors(TrainingError, prefix=f"{prompt.name}: "),
    ):
        return render_prompt(prompt.chat._replace(messages=turns), outline.tokenizer)


def check_lengths(
    prompts: Sequence[Prompt],
    tokens: Sequence[PromptTokens],
    outline: ModelInfo,
    options: GenerateOptions,
) -> None:
    """Raises a UserError if a prompt and its answer together are longer than the model allows."""
    most_tokens = outline.max_tokens - options.max_new_tokens
    too_long = [i for i, ids in enumerate(tokens) if len(ids) > most_tokens]
    if not too_long:
        return
    subject = _TOO_LONG
    if len(prompts) > 1:
        more = f" (and of {len(too_long) - 1} more prompts)" if len(too_long) > 1 else ""
        subject = f"{prompts[too_long[0]].name}: {_TOO_LONG}{more}"
    remark = f"; the prompt has {len(tokens[too_long[0]])}"
    outline.check_length(outline.max_tokens + 1, subject, remark)


def drop_long_prompts(
    prompts: list[Prompt], tokens: list[PromptTokens], outline: ModelInfo, options: GenerateOptions
) -> tuple[list[Prompt], list[PromptTokens]]:
    """Returns the prompts that the model allows, with their tokens; prints the other names."""
    allowed_prompts: list[Prompt] = []
    allowed_tokens: list[PromptTokens] = []
    for prompt, ids in zip(prompts, tokens, strict=True):
        try:
            check_lengths([prompt], [ids], outline, options)
        except UserError as error:
            print(f"{prompt.name} was skipped: {error}", file=sys.stderr, flush=True)
        else:
            allowed_prompts.append(prompt)
            allowed_tokens.append(ids)
    return allowed_prompts, allowed_tokens
