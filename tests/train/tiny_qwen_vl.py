"""A tiny random Qwen3.5 with images: its tokenizer, template and processor; images of colours."""

import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken
from transformers import PreTrainedTokenizerFast

from lora_jax import models
from lora_jax.hf.keys import nest_leaves
from tests.models import tiny_qwen_vl as tiny_model
from tests.models.tiny_encoders import draw
from tests.train import tiny

# Qwen's own, of texts and images.
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' }}"
    "{% if message.content is string %}{{ message.content }}{% else %}"
    "{% for part in message.content %}{% if part.type == 'text' %}{{ part.text }}"
    "{% elif part.type == 'image' %}{{ '<|vision_start|><|image_pad|><|vision_end|>' }}"
    "{% endif %}{% endfor %}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
ADDED = ["<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"]


def tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, ChatML's special tokens, and those of images."""
    made: PreTrainedTokenizerFast = tiny.tokenizer(TEMPLATE)
    made.add_special_tokens(
        {"additional_special_tokens": [AddedToken(token, special=True) for token in ADDED]}
    )
    return made


def fields(**changes: Any) -> dict[str, Any]:
    """The config.json."""
    words, made = tokenizer(), tiny_model.fields()
    image, video, start, end = words.convert_tokens_to_ids(ADDED)
    text = {"vocab_size": len(words) + 3, "eos_token_id": words.eos_token_id}
    text |= {"max_position_embeddings": 2048}
    made["text_config"] |= text
    ids = {"image_token_id": image, "video_token_id": video}
    ids |= {"vision_start_token_id": start, "vision_end_token_id": end}
    return {**made, **ids, "tie_word_embeddings": True, **changes}


def processor(**changes: Any) -> dict[str, Any]:
    """The preprocessor_config.json: images become 2 to 12 tokens of 2 x 2 patches."""
    return {
        "image_processor_type": "Qwen2VLImageProcessorFast",
        "processor_class": "Qwen3VLProcessor",
        "size": {"shortest_edge": 200, "longest_edge": 1200},
        "patch_size": 5,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "image_mean": [0.5, 0.4, 0.6],
        "image_std": [0.5, 0.6, 0.7],
        **changes,
    }


def write_qwen_vl(folder: Path, **of_processor: Any) -> Path:
    """Writes the model, and what reads its inputs."""
    import numpy as np

    config = models.read_config(fields(), images=True)
    rng = np.random.default_rng(5)
    drawn = ((r.path, draw(rng, r.path, r.stacked_shape)) for r in models.key_table(config))
    params = nest_leaves((path, array * 0.3 if array.ndim == 5 else array) for path, array in drawn)
    models.save_pretrained(folder, models.QwenVL(config), params)
    tokenizer().save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(processor(**of_processor)))
    return folder
