"""Chats with images against transformers' processors: the same tokens, masks and pixel values."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lora_jax import models, training
from tests.train import tiny_smolvlm as tiny

SIZES = [(21, 13), (12, 23), (16, 16), (40, 7), (5, 9)]


def theirs(kind: str, monkeypatch: pytest.MonkeyPatch, **changes: Any) -> Any:
    """transformers' processor, its images by Pillow."""
    import transformers
    from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
    from transformers.models.smolvlm import processing_smolvlm
    from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

    fields = tiny.processor(**changes)
    for name in ("image_processor_type", "processor_class", "video_sampling"):
        del fields[name]
    if kind == "idefics3":
        images = Idefics3ImageProcessorPil(**fields)
        return transformers.Idefics3Processor(images, tiny.tokenizer(), image_seq_len=4)
    monkeypatch.setattr(processing_smolvlm, "num2words", str)  # words for videos alone
    images = SmolVLMImageProcessorPil(**fields)
    videos = transformers.SmolVLMVideoProcessor()
    return transformers.SmolVLMProcessor(images, tiny.tokenizer(), videos, image_seq_len=4)


def chat(n: int) -> list[dict[str, Any]]:
    """Two questions about n images, the second ahead of the last image."""
    images = [{"type": "image"} for _ in range(n)]
    text = {"type": "text", "text": "which colours?"}
    return [
        {"role": "user", "content": [*images[:-1], text]},
        {"role": "assistant", "content": [{"type": "text", "text": "blue, it seems"}]},
        {"role": "user", "content": [text, images[-1]]},
        {"role": "assistant", "content": [{"type": "text", "text": "red"}]},
    ]


@pytest.mark.parity
@pytest.mark.parametrize("kind", ["smolvlm", "idefics3"])
@pytest.mark.parametrize("changes", [{}, {"do_image_splitting": False}, {"do_resize": False}])
def test_tokens_and_pixels(
    kind: str, changes: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny.write_smolvlm(tmp_path / "model", **changes)
    config = models.read_config(tiny.fields(kind))
    tokenizer = models.load_tokenizer(folder)
    reader = models.load_image_reader(folder, tokenizer, config)
    images = [tiny.picture("blue", i, size) for i, size in enumerate(SIZES)]
    processor = theirs(kind, monkeypatch, **changes)
    text = tokenizer.apply_chat_template(chat(len(images)), tokenize=False)
    want = processor(text=text.rstrip(), images=[images], add_special_tokens=False)
    row = {"messages": chat(len(images)), "images": images}
    found = training.chats([row], tokenizer, seq_len=2048, train_on="all", images=reader)
    (ids,) = want["input_ids"]
    batch = found.take(np.arange(1))
    np.testing.assert_array_equal(batch["ids"][0, : len(ids)], ids)
    pixels = np.asarray(want["pixel_values"])
    assert batch["pixel_values"].shape == pixels.shape
    assert np.abs(batch["pixel_values"] - pixels).max() < 1e-5 < np.abs(pixels).max()
    # Of all tokens those of texts count alone, and by default those of answers.
    of_images = {*reader.written((3, 3)), *tokenizer("\n", add_special_tokens=False)["input_ids"]}
    targets = batch["targets"][batch["weights"] > 0]
    assert [i for i in targets if i not in of_images] == [i for i in ids[1:] if i not in of_images]
    assert not {*targets} & set(tokenizer.convert_tokens_to_ids(tiny.ADDED[:3]))
    batch = training.chats([row], tokenizer, seq_len=2048, images=reader).take(np.arange(1))
    said = tokenizer.decode(batch["targets"][batch["weights"] > 0])
    assert said == " blue, it seems<end_of_utterance> red<end_of_utterance>"
