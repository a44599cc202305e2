"""Chats with images of any size against transformers' processor of Qwen: tokens and pixels."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from lora_jax import models, training
from lora_jax.hf.images import ImageError
from lora_jax.hf.vision.patches import PatchProcessor
from tests.support import array
from tests.train import tiny_qwen_vl as tiny
from tests.train.tiny_smolvlm import picture

# Width and height: between the bounds, too small, too large, oblong.
SIZES = [(21, 33), (9, 11), (80, 47), (130, 8), (25, 35)]


def chat(n: int) -> list[dict[str, Any]]:
    """Two questions about n images, the second ahead of the last image."""
    images = [{"type": "image"} for _ in range(n)]
    text = {"type": "text", "text": "which colours?"}
    return [
        {"role": "user", "content": [*images[:-1], text]},
        {"role": "assistant", "content": [{"type": "text", "text": "blue, it seems"}]},
        {"role": "user", "content": [text, *images[-1:]]},
        {"role": "assistant", "content": [{"type": "text", "text": "red"}]},
    ]


@pytest.mark.parity
@pytest.mark.parametrize("changes", [{}, {"min_pixels": 900, "max_pixels": 4000, "resample": 2}])
def test_tokens_and_pixels(changes: dict[str, Any], tmp_path: Path) -> None:
    import transformers
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    folder = tiny.write_qwen_vl(tmp_path / "model", **changes)
    config = models.read_config(tiny.fields(), images=True)
    tokenizer = models.load_tokenizer(folder)
    reader = models.load_image_reader(folder, tokenizer, config)
    images = [picture("blue", i, size) for i, size in enumerate(SIZES)]
    own = tiny.processor(**changes)
    del own["image_processor_type"], own["processor_class"]
    videos = transformers.Qwen3VLVideoProcessor()
    processor = transformers.Qwen3VLProcessor(
        Qwen2VLImageProcessorPil(**own), tiny.tokenizer(), videos, chat_template=tiny.TEMPLATE
    )
    processor.save_pretrained(tmp_path / "theirs")
    assert models.load_image_reader(tmp_path / "theirs", tokenizer, config).processor == (
        reader.processor
    )
    text = tokenizer.apply_chat_template(chat(len(images)), tokenize=False)
    want = processor(text=[text.rstrip()], images=images, return_tensors="np")
    row = {"messages": chat(len(images)), "images": images}
    options: dict[str, Any] = {"seq_len": 2048, "images": reader}
    batch = training.chats([row], tokenizer, train_on="all", **options).take(np.arange(1))
    (ids,) = want["input_ids"]
    np.testing.assert_array_equal(batch["ids"][0, : len(ids)], ids)
    grids = want["image_grid_thw"]
    assert len({tuple(grid) for grid in grids.tolist()}) > 2
    np.testing.assert_array_equal(batch["image_grids"][0], grids[:, 1:])
    pixels = want["pixel_values"].reshape(-1, 3, 2, 5, 5)
    got = batch["pixel_values"][0]
    assert np.abs(got[: len(pixels), :, None] - pixels).max() < 1e-5 < np.abs(pixels).max()
    assert not got[len(pixels) :].any() and len(got) % 4 == 0
    # Of all tokens those of texts count alone, and by default those of answers.
    assert config.image_token_id not in batch["targets"][batch["weights"] > 0]
    batch = training.chats([row], tokenizer, **options).take(np.arange(1))
    said = tokenizer.decode(batch["targets"][batch["weights"] > 0])
    assert said == "blue, it seems<|im_end|>red<|im_end|>"


@pytest.mark.parity
def test_the_loss_of_a_batch(tmp_path: Path) -> None:
    """Rows of one, two and no images in a batch: transformers' loss on the same answers."""
    import torch
    import transformers

    folder = tiny.write_qwen_vl(tmp_path / "model")
    model, params = models.from_pretrained(folder, images=True)
    packs = examples(folder, [row_of(n) for n in (1, 2, 0)])
    batch = packs.take(np.arange(3))
    assert batch["image_grids"].shape == (3, 2, 2) and packs.further is not None
    loss = training.losses.token_loss()
    sums = loss(model.apply, params, {name: array(x) for name, x in batch.items()})
    reference = transformers.AutoModelForImageTextToText.from_pretrained(folder).eval()
    total = 0.0
    for at in range(3):
        n = int((batch["segment_ids"][at] > 0).sum())
        ids, labels = torch.tensor(batch["ids"][at : at + 1, :n]).long(), torch.full((1, n), -100)
        where = batch["predict_at"][at][batch["weights"][at] > 0] + 1
        labels[0, where] = ids[0, where]
        grids = [grid for grid in batch["image_grids"][at].tolist() if grid[0]]
        patches = batch["pixel_values"][at, : sum(high * wide for high, wide in grids)]
        given = {}
        if grids:
            twice = np.repeat(patches[:, :, None], 2, axis=2)
            given = {
                "pixel_values": torch.tensor(twice).flatten(1),
                "image_grid_thw": torch.tensor([(1, *grid) for grid in grids]),
                "mm_token_type_ids": (ids == model.config.image_token_id).int(),
            }
        with torch.no_grad():
            total += float(reference(input_ids=ids, labels=labels, **given).loss) * len(where)
    assert abs(float(sums.total) - total) < 1e-4 * total and int(sums.count) == 3 * 5


def row_of(n: int, **more: Any) -> dict[str, Any]:
    """A question about n images of different sizes, and its answer."""
    asks = {"role": "user", "content": "which colour?"}
    images = [picture("red", seed, SIZES[seed]) for seed in range(n)]
    return {"messages": [asks, {"role": "assistant", "content": "blue"}], "images": images} | more


def examples(folder: Path, rows: list[dict[str, Any]], **options: Any) -> Any:
    tokenizer = models.load_tokenizer(folder)
    config = models.read_config(tiny.fields(), images=True)
    reader = models.load_image_reader(folder, tokenizer, config)
    return training.chats(rows, tokenizer, **{"seq_len": 512, "images": reader, **options})


def test_a_row_that_is_left_out_takes_no_room(tmp_path: Path) -> None:
    """The control: with it, each row has room for its patches."""
    folder, rows = tiny.write_qwen_vl(tmp_path / "model"), [row_of(1), row_of(4)]
    alone = examples(folder, rows[:1])
    cut = {"seq_len": alone.lengths[-1]}
    with pytest.raises(training.TrainingError, match="tokens of images, reduce longest_edge"):
        examples(folder, rows, **cut)
    short = examples(folder, rows, truncate=True, **cut)
    shapes = [packs.take(np.arange(1))["pixel_values"].shape for packs in (alone, short)]
    assert len(short) == 1 and shapes[0] == shapes[1]
    assert shapes[0][1] < examples(folder, rows).take(np.arange(1))["pixel_values"].shape[1]


def test_sizes_by_hand() -> None:
    """Whole squares of patches, between the bounds; what is too long is named."""
    processor = PatchProcessor.from_hf(tiny.processor())
    sizes = {(33, 21): (30, 20), (11, 9): (20, 20), (47, 80): (20, 40)}  # 200 to 1,200 pixels
    for (height, width), (fitted_height, fitted_width) in sizes.items():
        _, grid = processor.tiles(Image.new("RGB", (width, height)))
        assert grid == (fitted_height // 5, fitted_width // 5)
    patches, grid = processor.tiles(Image.new("RGB", (1, 1)))
    assert grid == (4, 4) and patches.shape == (16, 3, 5, 5)
    with pytest.raises(ImageError, match="201 x 1 pixels, but an edge may be at most 200 times"):
        processor.tiles(Image.new("RGB", (201, 1)))


def test_patches_by_hand() -> None:
    """An image that fits is cut as it is: by squares of 2 x 2 patches, row by row in each."""
    processor = PatchProcessor.from_hf(tiny.processor())
    pixels = np.random.default_rng(1).integers(0, 256, (20, 30, 3), np.uint8)
    patches, grid = processor.tiles(Image.fromarray(pixels))
    corners = [
        (square_row + row, square_column + column)
        for square_row in (0, 2)
        for square_column in (0, 2, 4)
        for row in (0, 1)
        for column in (0, 1)
    ]
    assert grid == (4, 6) and len(patches) == len(corners)
    for patch, (row, column) in zip(patches, corners, strict=True):
        cut = pixels[5 * row : 5 * row + 5, 5 * column : 5 * column + 5]
        np.testing.assert_array_equal(patch, cut.transpose(2, 0, 1))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"patch_size": 4}, r"makes patches of \(3, 4, 4, 2, 2\) .* takes \(3, 5, 5, 2, 2\)"),
        ({"size": {"height": 8, "width": 8}}, "size is .*Set shortest_edge and longest_edge"),
        ({"do_resize": False}, "do_resize=False"),
        ({"min_pixels": -1}, "min_pixels .* positive integer"),
        ({"do_thumbnail": True}, "do_thumbnail=True is not known"),
    ],
)
def test_a_processor_that_does_not_fit(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    config = models.read_config(tiny.fields(), images=True)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(tiny.processor(**changes)))
    with pytest.raises(models.ConfigError, match=message):
        models.load_image_reader(tmp_path, tiny.tokenizer(), config)


def test_a_processor_config_that_says_nothing_of_images(tmp_path: Path) -> None:
    config = models.read_config(tiny.fields(), images=True)
    (tmp_path / "processor_config.json").write_text('{"processor_class": "P", "image_seq_len": 64}')
    with pytest.raises(models.ConfigError, match=r"preprocessor_config.json is missing"):
        models.load_image_reader(tmp_path, tiny.tokenizer(), config)
