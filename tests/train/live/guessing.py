"""A tiny model that can play the guessing game of `train.environments.guess`: a call is one token.

Its vocabulary has little else, so that a random model plays, and rewards can teach it.
"""

import json

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, pre_tokenizers
from tokenizers import models as tokenizer_models
from transformers import PreTrainedTokenizerFast

from lora_jax.models import Decoder, DecoderConfig, hf_tensors, key_table
from tests.models.tiny import draw

NUMBERS = range(1, 8)
CALLS = [
    f'<tool_call>{{"name": "guess", "arguments": {{"number": {n}}}}}</tool_call>' for n in NUMBERS
]
ENDS = ["<|end|>", "<|end2|>", "<|end3|>", "<|end4|>", "<|end5|>"]
ROLES = ["<|user|>", "<|assistant|>", "<|tool|>"]
WORDS = ["[unk]", "[pad]", "too", "low", "high", "right", "play", "guess"]
TEMPLATE = (
    "{% for t in tools or [] %}{{ t.function.name }} {% endfor %}{% for m in messages %}"
    "<|{{ m.role }}|>{{ m.content }}{% for c in m.tool_calls or [] %}"
    '<tool_call>{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}'
    "</tool_call>{% endfor %}<|end|>{% endfor %}{% if add_generation_prompt %}<|assistant|>"
    "{% endif %}"
)
VOCAB = len(WORDS) + len(ROLES) + len(ENDS) + len(CALLS)
CONFIG = {
    "model_type": "llama",
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "pad_token_id": 1,
}


def tokenizer():
    words = [*WORDS, *ROLES, *ENDS, *CALLS]
    core = Tokenizer(tokenizer_models.WordLevel({word: i for i, word in enumerate(words)}, "[unk]"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.add_special_tokens([AddedToken(token, special=True) for token in [*ROLES, *ENDS]])
    core.add_tokens([AddedToken(call, normalized=False) for call in CALLS])
    made = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="[pad]", unk_token="[unk]", eos_token=ENDS[0]
    )
    made.chat_template = TEMPLATE
    return made


def write_model(folder, scale=0.3, **fields):
    """Writes a random decoder, and its tokenizer; its probabilities are nearly uniform."""
    folder.mkdir(parents=True, exist_ok=True)
    made = tokenizer()
    fields = CONFIG | {"eos_token_id": made.convert_tokens_to_ids(ENDS)} | fields
    model = Decoder(DecoderConfig.from_hf(fields))
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    rng = np.random.default_rng(3)
    params = jax.tree_util.tree_map_with_path(
        lambda path, x: np.asarray(draw(rng, jax.tree_util.keystr(path), x.shape)), shapes
    )
    params["lm_head"] = jax.tree.map(lambda x: x * np.float32(scale), params["lm_head"])
    made.save_pretrained(folder)
    save_file(dict(hf_tensors(params, key_table(model.config))), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(fields))
    return folder


def write_rows(path):
    path.write_text("".join(f'{{"prompt": "play", "secret": {n}}}\n' for n in NUMBERS))
    return path
