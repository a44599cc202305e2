"""Modelfiles, by which Ollama makes a model of a GGUF file."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from lora_jax.core.types import Tokenizer
from lora_jax.folders import partial_of


class ChatFormat(NamedTuple):
    """A format of chats that has one form for all roles.

    Attributes:
      before, after: around a message's text; ``{}`` is its role.
      assistant: the name of the assistant's role.
      takes_system: False if a system message has no turn of its own.
    """

    before: str
    after: str
    assistant: str = "assistant"
    takes_system: bool = True


FORMATS = (
    ChatFormat("<|im_start|>{}\n", "<|im_end|>\n"),
    ChatFormat("<|start_header_id|>{}<|end_header_id|>\n\n", "<|eot_id|>"),
    ChatFormat("<start_of_turn>{}\n", "<end_of_turn>\n", "model", takes_system=False),
    ChatFormat("<|{}|>\n", "<|end|>\n"),
)
_CHAT = (("system", "S"), ("user", "U"), ("assistant", "A"), ("user", "V"))


def format_of(tokenizer: Tokenizer | None, template: str | None = None) -> ChatFormat | None:
    """Returns the format in which a tokenizer's template renders chats; None for another one.

    Args:
      tokenizer: a transformers tokenizer.
      template: a template in the place of its own.
    """
    if tokenizer is None or (template or tokenizer.chat_template) is None:
        return None
    begins = tokenizer.bos_token or ""  # Ollama's llama.cpp adds it itself
    for each in FORMATS:
        messages = [{"role": role, "content": text} for role, text in _CHAT]
        messages = messages if each.takes_system else messages[1:]
        try:
            text = tokenizer.apply_chat_template(
                messages, chat_template=template, tokenize=False, add_generation_prompt=True
            )
        except Exception:  # of a template, anything
            continue
        if _rendered(each, messages) in (text, text.removeprefix(begins)):
            return each
    return None


def write_modelfile(path: Path, parts: Mapping[str, Path], chat: ChatFormat | None) -> None:
    """Writes a Modelfile.

    Args:
      path: the file.
      parts: instruction -> file or folder; a relative one is beside the Modelfile.
      chat: the model's format of chats; without one, Ollama looks for its own that fits the file.
    """
    files = {key: str(p) if p.is_absolute() else f"./{p}" for key, p in parts.items()}
    lines = [f'{key} "{p}"' if " " in p else f"{key} {p}" for key, p in files.items()]
    if chat is not None:
        stop = chat.after.strip()
        lines += [f'TEMPLATE """{_go_template(chat)}"""', f'PARAMETER stop "{stop}"']
    partial = partial_of(path)
    partial.write_text("\n".join(lines) + "\n", encoding="utf-8")
    os.replace(partial, path)


def _rendered(chat: ChatFormat, messages: Sequence[dict[str, str]]) -> str:
    names = {"assistant": chat.assistant}
    turns = [
        chat.before.format(names.get(m["role"], m["role"])) + m["content"] + chat.after
        for m in messages
    ]
    return "".join(turns) + chat.before.format(chat.assistant)


def _go_template(chat: ChatFormat) -> str:
    """Returns the format as a template of Go, which Ollama renders chats by."""
    role = "{{ .Role }}"
    if chat.assistant != "assistant":
        role = f'{{{{ if eq .Role "assistant" }}}}{chat.assistant}{{{{ else }}}}user{{{{ end }}}}'
    turn = chat.before.format(role) + "{{ .Content }}" + chat.after
    return "{{ range .Messages }}" + turn + "{{ end }}" + chat.before.format(chat.assistant)
