"""A tiny random SmolVLM with its tokenizer, template and processor, and images of colours."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerFast

from lora_jax import models
from lora_jax.hf.keys import nest_leaves
from tests.models.tiny_encoders import draw
from tests.train import tiny

# SmolVLM's own, less the default of its system prompt.
TEMPLATE = (
    "<|im_start|>{% for message in messages %}{{message['role'] | capitalize}}"
    "{% if message['content'][0]['type'] == 'image' %}{{':'}}{% else %}{{': '}}{% endif %}"
    "{% for line in message['content'] %}{% if line['type'] == 'text' %}{{line['text']}}"
    "{% elif line['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}"
    "<end_of_utterance>\n{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
ADDED = ["<image>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>"]
ADDED += [f"<row_{y}_col_{x}>" for y in (1, 2, 3) for x in (1, 2, 3)]
COLOURS = {"blue": (20, 30, 200), "green": (30, 190, 40), "red": (210, 30, 20)}
SIDE = 16


def tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, ChatML's special tokens, and those of images."""
    made: PreTrainedTokenizerFast = tiny.tokenizer(TEMPLATE)
    made.add_special_tokens(
        {"additional_special_tokens": [AddedToken(one, special=True) for one in ADDED]}
    )
    made.eos_token = "<end_of_utterance>"
    return made


def fields(kind: str = "smolvlm", **changes: Any) -> dict[str, Any]:
    """The config.json."""
    words = tokenizer()
    ids = dict(zip(ADDED, words.convert_tokens_to_ids(ADDED), strict=True))
    text = {**tiny.CONFIG, "vocab_size": len(words) + 3, "eos_token_id": ids["<end_of_utterance>"]}
    vision = {"hidden_size": 18, "intermediate_size": 31, "num_hidden_layers": 2}
    vision |= {"num_attention_heads": 3, "image_size": SIDE, "patch_size": 4}
    parts = {"text_config": text, "vision_config": vision}
    return {
        "model_type": kind,
        "tie_word_embeddings": True,
        "scale_factor": 2,
        "image_token_id": ids["<image>"],
        **parts,
        **changes,
    }


def processor(**changes: Any) -> dict[str, Any]:
    """The preprocessor_config.json: images are cut into tiles."""
    return {
        "image_processor_type": "SmolVLMImageProcessor",
        "processor_class": "SmolVLMProcessor",
        "do_convert_rgb": True,
        "do_image_splitting": True,
        "do_normalize": True,
        "do_pad": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": [0.5, 0.4, 0.6],
        "image_std": [0.5, 0.6, 0.7],
        "max_image_size": {"longest_edge": SIDE},
        "resample": 1,
        "rescale_factor": 1 / 255,
        "size": {"longest_edge": 3 * SIDE},
        "video_sampling": {"fps": 1},
        **changes,
    }


def write_smolvlm(folder: Path, **of_processor: Any) -> Path:
    """Writes the model, and what reads its inputs."""
    config = models.read_config(fields())
    rng = np.random.default_rng(5)
    drawn = ((r.path, draw(rng, r.path, r.stacked_shape)) for r in models.key_table(config))
    params = nest_leaves((path, array * 0.5 if array.ndim == 4 else array) for path, array in drawn)
    models.save_pretrained(folder, models.SmolVLM(config), params)
    tokenizer().save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(processor(**of_processor)))
    return folder


def picture(colour: str, seed: int, size: tuple[int, int] = (21, 13)) -> Image.Image:
    """A noisy image in one of the colours."""
    noise = np.random.default_rng(seed).normal(0, 25, (*size[::-1], 3)) + COLOURS[colour]
    return Image.fromarray(noise.clip(0, 255).astype(np.uint8))


def write_rows(folder: Path, n: int = 12) -> Path:
    """Writes chats about one image or two, by path, and the images beside them."""
    folder.mkdir(exist_ok=True)
    rows = []
    for i in range(n):
        colours = [[*COLOURS][(i + j) % 3] for j in range(1 + i % 2)]
        names = [f"{i}-{colour}.png" for colour in colours]
        for name, colour in zip(names, colours, strict=True):
            picture(colour, i, (21, 13) if i % 3 else (12, 23)).save(folder / name)
        shown = [{"type": "image"} for _ in names]
        asks = {"role": "user", "content": [*shown, {"type": "text", "text": "colour?"}]}
        says = {"role": "assistant", "content": [{"type": "text", "text": " ".join(colours)}]}
        rows.append({"messages": [asks, says], "images": names})
    return tiny.write_jsonl(folder / "rows.jsonl", rows)
