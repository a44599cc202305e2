"""Writes a Modelfile, from which Ollama makes a model of a GGUF file."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from lora_jax.core.types import Tokenizer
from lora_jax.folders import partial_folder_of


class ChatFormat(NamedTuple):
    """A format of chats in which messages of all roles look alike.

    Attributes:
      before, after: the texts around a message's text; ``{}`` stands for its role.
      assistant: the name of the assistant's role.
      takes_system: whether a system message is a turn of the chat.
    """

    before: str
    after: str
    assistant: str = "assistant"
    takes_system: bool = True


CHAT_FORMATS = (
    ChatFormat("<|im_start|>{}\n", "<|im_end|>\n"),
    ChatFormat("<|start_header_id|>{}<|end_header_id|>\n\n", "<|eot_id|>"),
    ChatFormat("<start_of_turn>{}\n", "<end_of_turn>\n", "model", takes_system=False),
    ChatFormat("<|{}|>\n", "<|end|>\n"),
)
_SYSTEM_MESSAGE = {"role": "system", "content": "<system prompt>"}
_SAMPLE_TURNS = [
    {"role": "user", "content": "U"},
    {"role": "assistant", "content": "A"},
    {"role": "user", "content": "V"},
]


def find_chat_format(tokenizer: Tokenizer | None, template: str | None = None) -> ChatFormat | None:
    """Returns the known format that a tokenizer's template renders chats in, or None.

    Args:
      tokenizer: a transformers tokenizer.
      template: a template that replaces the tokenizer's.
    """
    if tokenizer is None or (template or tokenizer.chat_template) is None:
        return None
    bos = tokenizer.bos_token or ""  # Ollama's llama.cpp adds it itself
    for chat_format in CHAT_FORMATS:
        messages = _SAMPLE_TURNS
        if chat_format.takes_system:
            messages = [_SYSTEM_MESSAGE, *_SAMPLE_TURNS]
        try:
            text = _render_by_template(tokenizer, template, messages)
        except Exception:  # a template may raise any error
            continue
        if _render_messages(chat_format, messages) in (text, text.removeprefix(bos)):
            return chat_format
    return None


def find_default_system_prompt(
    tokenizer: Tokenizer | None, template: str | None, chat: ChatFormat | None
) -> str | None:
    """Returns the system prompt that a template adds to chats that have none.

    Args:
      tokenizer, template: see `find_chat_format`.
      chat: the result of `find_chat_format`.

    Returns:
      The prompt; "" if the template adds none, and None if the prompt cannot be determined.
    """
    if tokenizer is None:
        return None
    if (template or tokenizer.chat_template) is None:
        return ""
    try:
        text = _render_by_template(tokenizer, template, _SAMPLE_TURNS)
        with_system = _render_by_template(tokenizer, template, [_SYSTEM_MESSAGE, *_SAMPLE_TURNS])
    except Exception:  # a template may raise any error
        return None if chat is None else ""
    # The prompt is what stands where the other chat has its system message.
    before, _, after = with_system.partition(_SYSTEM_MESSAGE["content"])
    prompt = text.removeprefix(before).removesuffix(after)
    if before + prompt + after == text and '"""' not in f'{prompt}""':
        return prompt
    # If the whole text stands at the beginning and the end of the chat with a system message, the
    # template adds no prompt.
    common_start = os.path.commonprefix((text, with_system))
    common_end = os.path.commonprefix((text[::-1], with_system[::-1]))
    adds_none = len(common_start) + len(common_end) >= len(text)
    return "" if adds_none else None


def write_modelfile(
    path: Path,
    instructions: Mapping[str, Path],
    tokenizer: Tokenizer | None,
    template: str | None = None,
) -> list[str]:
    """Writes a Modelfile with the chat format and the system prompt of a template.

    If the template's format is not in `CHAT_FORMATS`, Ollama looks for a fitting format itself.

    Args:
      path: the file.
      instructions: instruction ("FROM") -> file or folder; a relative path starts at the Modelfile.
      tokenizer, template: see `find_chat_format`.

    Returns:
      A warning if the Modelfile may lack a system prompt; mostly nothing.
    """
    lines = []
    for instruction, file in instructions.items():
        name = str(file) if file.is_absolute() else f"./{file}"
        quoted_name = f'"{name}"' if " " in name else name
        lines.append(f"{instruction} {quoted_name}")
    chat = find_chat_format(tokenizer, template)
    if chat is not None:
        stop = chat.after.strip()
        lines += [f'TEMPLATE """{_go_template(chat)}"""', f'PARAMETER stop "{stop}"']
    system = find_default_system_prompt(tokenizer, template, chat)
    if system:
        lines.append(f'SYSTEM """{system}"""')
    partial = partial_folder_of(path)
    partial.write_text("\n".join(lines) + "\n", encoding="utf-8")
    os.replace(partial, path)
    if system is not None:
        return []
    return [
        f"warning: {path} has no SYSTEM, because the default system prompt of the chat template "
        "cannot be determined. If the template has one, add it to the file as SYSTEM."
    ]


def _render_by_template(
    tokenizer: Tokenizer, template: str | None, messages: Sequence[dict[str, str]]
) -> str:
    """Returns a chat as a tokenizer's template renders it."""
    return tokenizer.apply_chat_template(
        messages, chat_template=template, tokenize=False, add_generation_prompt=True
    )


def _render_messages(chat: ChatFormat, messages: Sequence[dict[str, str]]) -> str:
    """Returns a chat in a format, up to the beginning of the assistant's next turn."""
    turns = []
    for message in messages:
        role = message["role"]
        name = chat.assistant if role == "assistant" else role
        turns.append(chat.before.format(name) + message["content"] + chat.after)
    return "".join(turns) + chat.before.format(chat.assistant)


def _go_template(chat: ChatFormat) -> str:
    """Returns a chat format as a Go template, which Ollama renders chats by."""
    role = "{{ .Role }}"
    if chat.assistant != "assistant":
        role = f'{{{{ if eq .Role "assistant" }}}}{chat.assistant}{{{{ else }}}}user{{{{ end }}}}'
    turn = chat.before.format(role) + "{{ .Content }}" + chat.after
    return "{{ range .Messages }}" + turn + "{{ end }}" + chat.before.format(chat.assistant)
