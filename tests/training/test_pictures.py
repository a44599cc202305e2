"""Chats with images against transformers' processors: the same tokens, masks and pixel values."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lora_jax import models, training
from lora_jax.training.data.rows import question
from tests.support import array
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
    processor.save_pretrained(tmp_path / "theirs")
    saved = models.load_image_reader(tmp_path / "theirs", tokenizer, config)
    assert saved.processor == reader.processor
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


@pytest.mark.parity
def test_the_loss_of_a_batch(tmp_path: Path) -> None:
    """Rows of one, two and no images in a batch: transformers' loss on the same answers."""
    import torch
    import transformers

    folder = tiny.write_smolvlm(tmp_path / "model")
    model, params = models.from_pretrained(folder)
    found = examples(folder, [row_of(n) for n in (1, 2, 0)])
    batch = found.take(np.arange(3))
    assert batch["pixel_values"].shape[:2] == (3, 14) and found.further is not None
    loss = training.losses.token_loss()
    sums = loss(model.apply, params, {name: array(x) for name, x in batch.items()})
    reference = transformers.AutoModelForImageTextToText.from_pretrained(folder).eval()
    total = 0.0
    for at in range(3):
        n = int((batch["segment_ids"][at] > 0).sum())
        ids, labels = torch.tensor(batch["ids"][at : at + 1, :n]).long(), torch.full((1, n), -100)
        where = batch["predict_at"][at][batch["weights"][at] > 0] + 1
        labels[0, where] = ids[0, where]
        pixels = batch["pixel_values"][at : at + 1][:, : (7, 14, 0)[at]]
        given = {"pixel_values": torch.tensor(pixels)} if pixels.size else {}
        with torch.no_grad():
            total += float(reference(input_ids=ids, labels=labels, **given).loss) * len(where)
    assert abs(float(sums.total) - total) < 1e-4 * total and int(sums.count) == 3 * 6


def row_of(n: int, **more: Any) -> dict[str, Any]:
    """A question about n images of 21 x 13 pixels, each seven tiles, and its answer."""
    asks = {"role": "user", "content": "which colour?"}
    images = [tiny.picture("red", seed) for seed in range(n)]
    return {"messages": [asks, {"role": "assistant", "content": "blue"}], "images": images} | more


def examples(folder: Path, rows: list[dict[str, Any]], **options: Any) -> Any:
    tokenizer = models.load_tokenizer(folder)
    config = models.read_config(tiny.fields())
    reader = models.load_image_reader(folder, tokenizer, config)
    return training.chats(rows, tokenizer, **{"seq_len": 2048, "images": reader, **options})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer and a processor."""
    made = tmp_path_factory.mktemp("model")
    (made / "config.json").write_text(json.dumps(tiny.fields()))
    tiny.tokenizer().save_pretrained(made)
    (made / "preprocessor_config.json").write_text(json.dumps(tiny.processor()))
    return made


def test_where_images_stand(folder: Path, tmp_path: Path) -> None:
    """By path, bytes, or datasets' dict; in parts, or ahead of a text (TRL's convention)."""
    images = [tiny.picture("red", seed) for seed in range(2)]
    images[0].save(tmp_path / "0.png")
    images[1].save(tmp_path / "1.png")
    stored = {"bytes": (tmp_path / "1.png").read_bytes(), "path": None}
    text = {"type": "text", "text": "which colour?"}
    own = {"type": "image", "image": stored["bytes"]}
    parts = [{"type": "image", "path": str(tmp_path / "0.png")}, own, text]
    says = {"role": "assistant", "content": "blue"}
    rows = [
        row_of(2),
        row_of(2, images=[str(tmp_path / "0.png"), stored]),
        row_of(0, messages=[{"role": "user", "content": parts}, says]),
    ]
    batch = examples(folder, rows).take(np.arange(3))
    for values in batch.values():
        np.testing.assert_array_equal(values, values[:1].repeat(3, axis=0))
    assert np.abs(batch["pixel_values"][0, 0] - batch["pixel_values"][0, 7]).max() > 0.1
    changed = [row_of(2), row_of(2, images=images[::-1])]
    one, other = (examples(folder, [row]) for row in changed)
    assert one.digest() == examples(folder, changed[:1]).digest() != other.digest()


PAIR = {"prompt": "a", "chosen": "b", "rejected": "c"}
TOLD = [
    (row_of(1, images=[b"no image"]), {}, r"the rows, row 1: the image cannot be read"),
    (row_of(1, images=["no/such.png"]), {}, r"row 1, no/such.png: .*No such file"),
    ({"text": "blue", "images": ["1.png"]}, {}, "row 1 has images and a `text`"),
    (row_of(1, images=[None]), {}, "row 1 has 1 images, but 1 parts"),
    (row_of(1), {"images": None}, "row 1 has images, but only texts can be used"),
    (row_of(1), {"packing": True}, "packing=True does not work with images"),
    (
        row_of(0, messages=[{"role": "user", "content": "<image>?"}, row_of(0)["messages"][1]]),
        {},
        "row 1 has 0 images, but its rendered chat has 1 places",
    ),
]


@pytest.mark.parametrize(("row", "options", "message"), TOLD)
def test_what_cannot_be_used_is_named(
    row: dict[str, Any], options: dict[str, Any], message: str, folder: Path
) -> None:
    with pytest.raises(training.TrainingError, match=message):
        examples(folder, [row], **options)


def test_where_only_texts_are_read(folder: Path) -> None:
    row = row_of(1)
    with pytest.raises(training.TrainingError, match="has images, but only texts"):
        question({**row, "messages": row["messages"][:1]}, "a row")
    with pytest.raises(training.TrainingError, match="has images, but only texts"):
        tokenizer = models.load_tokenizer(folder)
        training.pairs([{**PAIR, "images": row["images"]}], tokenizer, seq_len=64)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_image_size": {"longest_edge": 8}}, r"makes tiles of the shape \(3, 8, 8\)"),
        ({"size": {"height": 8, "width": 8}}, "size is .*Set its longest_edge"),
        ({"do_thumbnail": True}, "do_thumbnail=True is not known"),
    ],
)
def test_a_processor_that_does_not_fit(
    changes: dict[str, Any], message: str, folder: Path, tmp_path: Path
) -> None:
    tokenizer = models.load_tokenizer(folder)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(tiny.processor(**changes)))
    with pytest.raises(models.ConfigError, match=message):
        models.load_image_reader(tmp_path, tokenizer, models.read_config(tiny.fields()))
    with pytest.raises(models.ConfigError, match="writes 0 tokens 5 .* takes 4"):
        config = models.read_config(tiny.fields(image_token_id=5))
        models.load_image_reader(folder, tokenizer, config)
