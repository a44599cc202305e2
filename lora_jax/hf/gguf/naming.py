"""The name of a model in a GGUF file, by which llama.cpp chooses the spaces that it drops.

The files have no field for these spaces. llama.cpp drops those behind special tokens if the name is
one of Phi-3's, and keeps all spaces otherwise.
"""

import re

from lora_jax.core.types import Fields, Tokenizer
from lora_jax.hf.fields import ConfigError
from lora_jax.hf.gguf.tokenizer import CONTROL, UNKNOWN, USER_DEFINED

_PHI3 = "Phi-3"
_LIKE_PHI3 = re.compile("phi-?3", re.IGNORECASE)
# In a model of that name, spaces stay behind the first three and go behind the last one. A file
# whose vocabulary lacks one of the four does not load.
_KEEPING, _DROPPING = frozenset(("<unk>", "<s>", "<|endoftext|>")), frozenset(("</s>",))
_CHAT = ({"role": "user", "content": "A b"}, {"role": "assistant", "content": "C d"})


def general_name(name: str, tokenizer: Tokenizer | None, words: Fields) -> tuple[str, list[str]]:
    """Returns a model's name under which llama.cpp drops the spaces that its tokenizer drops.

    Args:
      name: the name of the model.
      tokenizer: a transformers fast tokenizer; None for one that drops no spaces.
      words: the tokenizer's metadata; see `vocabulary`.

    Returns:
      The name, and a note on spaces that llama.cpp keeps in texts other than chats; mostly none.

    Raises:
      ConfigError: under no name does llama.cpp make the same tokens of chats.
    """
    plain_name = _LIKE_PHI3.sub("phi", name)
    if tokenizer is None:
        return plain_name, []
    added = tokenizer.backend_tokenizer.get_added_tokens_decoder().values()
    spaces = {x.content: (x.lstrip, x.rstrip) for x in added if x.lstrip or x.rstrip}
    if not spaces:
        return plain_name, []
    tokens = words["tokenizer.ggml.tokens"]
    kinds = zip(tokens, words["tokenizer.ggml.token_type"], strict=True)
    special = {token for token, kind in kinds if kind in (CONTROL, USER_DEFINED, UNKNOWN)}
    of_phi3 = dict.fromkeys((special | _DROPPING) - _KEEPING, (False, True))
    if spaces == of_phi3 and (_KEEPING | _DROPPING).issubset(tokens):
        return _PHI3, []
    shown = ", ".join(sorted(spaces))
    beside = "|".join(map(re.escape, spaces))
    if re.search(rf"\s({beside})|({beside})\s", _rendered(tokenizer, words)):
        raise ConfigError(
            f"llama.cpp keeps the spaces beside {shown}, which this tokenizer drops, and so makes "
            "other tokens of chats: write safetensors (--output)"
        )
    return plain_name, [
        f"llama.cpp keeps the spaces beside {shown}, which the tokenizer drops: a message that "
        "begins or ends with spaces there has other tokens"
    ]


def _rendered(tokenizer: Tokenizer, words: Fields) -> str:
    """Returns a chat as the template renders it; "" if there is no template that does."""
    template = words.get("tokenizer.chat_template")
    try:
        text: str = tokenizer.apply_chat_template(_CHAT, chat_template=template, tokenize=False)
    except Exception:  # of a template, anything
        return ""
    return text
