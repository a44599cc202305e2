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
_SYSTEM = {"role": "system", "content": "<system prompt>"}
_TURNS = [
    {"role": "user", "content": "U"},
    {"role": "assistant", "content": "A"},
    {"role": "user", "content": "V"},
]


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
        messages = [_SYSTEM, *_TURNS] if each.takes_system else _TURNS
        try:
            text = _chat_text(tokenizer, template, messages)
        except Exception:  # of a template, anything
            continue
        if _rendered(each, messages) in (text, text.removeprefix(begins)):
            return each
    return None


def default_system(
    tokenizer: Tokenizer | None, template: str | None, chat: ChatFormat | None
) -> str | None:
    """Returns the system prompt that a template adds to chats that have none.

    Args:
      tokenizer, template: see `format_of`.
      chat: what it returns.

    Returns:
      The prompt; "" if the template adds none, and None if the prompt cannot be determined.
    """
    if tokenizer is None:
        return None
    if (template or tokenizer.chat_template) is None:
        return ""
    try:
        text = _chat_text(tokenizer, template, _TURNS)
        with_system = _chat_text(tokenizer, template, [_SYSTEM, *_TURNS])
    except Exception:  # of a template, anything
        return None if chat is None else ""
    before, _, after = with_system.partition(_SYSTEM["content"])
    prompt = text.removeprefix(before).removesuffix(after)
    if before + prompt + after == text and '"""' not in f'{prompt}""':
        return prompt
    start = os.path.commonprefix((text, with_system))
    end = os.path.commonprefix((text[::-1], with_system[::-1]))
    # A template that adds nothing leaves the text that a system prompt only adds to.
    return "" if len(start) + len(end) >= len(text) else None


def write_modelfile(
    path: Path, parts: Mapping[str, Path], tokenizer: Tokenizer | None, template: str | None = None
) -> list[str]:
    """Writes a Modelfile, with the format of chats and the system prompt of a template.

    Ollama looks for a format of its own that fits the file if the template's is not known here.

    Args:
      path: the file.
      parts: instruction -> file or folder; a relative one is beside the Modelfile.
      tokenizer, template: see `format_of`.

    Returns:
      A warning if the Modelfile may lack a system prompt; mostly nothing.
    """
    files = {key: str(p) if p.is_absolute() else f"./{p}" for key, p in parts.items()}
    lines = [f'{key} "{p}"' if " " in p else f"{key} {p}" for key, p in files.items()]
    chat = format_of(tokenizer, template)
    if chat is not None:
        stop = chat.after.strip()
        lines += [f'TEMPLATE """{_go_template(chat)}"""', f'PARAMETER stop "{stop}"']
    system = default_system(tokenizer, template, chat)
    if system:
        lines.append(f'SYSTEM """{system}"""')
    partial = partial_of(path)
    partial.write_text("\n".join(lines) + "\n", encoding="utf-8")
    os.replace(partial, path)
    if system is not None:
        return []
    return [
        f"warning: {path} has no SYSTEM, because the system prompt that the chat template adds to "
        "chats without one cannot be determined. If it adds one, write it there"
    ]


def _chat_text(
    tokenizer: Tokenizer, template: str | None, messages: Sequence[dict[str, str]]
) -> str:
    """Returns a chat as a tokenizer's template renders it."""
    return tokenizer.apply_chat_template(
        messages, chat_template=template, tokenize=False, add_generation_prompt=True
    )


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
