"""Image processors: steps by hand, files, damaged images; and transformers' Pillow back end."""

import io
import json
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from lora_jax.hf.fields import ConfigError
from lora_jax.hf.images import ImageError, ImageProcessor, load_image_processor
from lora_jax.hf.vision.tiles import TileProcessor

VIT: dict[str, Any] = {
    "image_processor_type": "ViTImageProcessor",
    "do_resize": True,
    "size": {"height": 18, "width": 13},
    "resample": 2,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.485, 0.456, 0.406],
    "image_std": [0.229, 0.224, 0.225],
}
DINO = VIT | {
    "image_processor_type": "BitImageProcessor",
    "size": {"shortest_edge": 21},
    "resample": 3,
    "do_center_crop": True,
    "crop_size": {"height": 17, "width": 11},
    "do_convert_rgb": True,
}
CASES: dict[str, dict[str, Any]] = {
    "vit": VIT,
    "dinov2": DINO,
    "a crop beyond the image": DINO | {"crop_size": {"height": 26, "width": 31}},
    "a crop beyond one side": DINO | {"crop_size": {"height": 8, "width": 61}, "resample": 1},
    "no resizing": DINO | {"do_resize": False},
    "no rescaling": VIT | {"do_rescale": False},
    "no normalising": VIT | {"do_normalize": False, "rescale_factor": 0.01},
}
SIZES = [(40, 29), (29, 40), (16, 16), (21, 50)]


def picture(width: int, height: int, mode: str = "RGB") -> Image.Image:
    """An image of random pixels, smoothed, so that filters differ."""
    shape = (height, width, len(mode)) if len(mode) > 1 else (height, width)
    noise = np.random.default_rng(width).integers(0, 256, shape, np.uint8)
    return Image.fromarray(noise)


def encoded(image: Image.Image, kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    image.save(file, kind)
    return file.getvalue()


@pytest.mark.parity
@pytest.mark.parametrize("case", CASES)
def test_pixels_are_those_of_transformers(case: str, tmp_path: Path) -> None:
    import transformers

    (tmp_path / "preprocessor_config.json").write_text(json.dumps(CASES[case]))
    name = CASES[case]["image_processor_type"] + "Pil"
    theirs = getattr(transformers, name).from_pretrained(tmp_path)
    ours = load_image_processor(tmp_path)
    (tmp_path / "again").mkdir()
    ours.save_pretrained(tmp_path / "again")
    again = getattr(transformers, name).from_pretrained(tmp_path / "again")
    for size in SIZES:
        image = picture(*size)
        want = theirs(image, return_tensors="np")["pixel_values"]
        np.testing.assert_array_equal(ours([image]), want)
        np.testing.assert_array_equal(again(image, return_tensors="np")["pixel_values"], want)
    transparent = picture(30, 20, "RGBA")
    if CASES[case].get("do_convert_rgb"):
        want = theirs(transparent, return_tensors="np")["pixel_values"]
        np.testing.assert_array_equal(ours([transparent]), want)
    for image in (transparent, transparent.convert("LA"), transparent.quantize(9)):
        (tmp_path / "image").write_bytes(encoded(image))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # Pillow's, on transparent palettes
            loaded = transformers.image_utils.load_image(str(tmp_path / "image"))
        want = theirs(loaded, return_tensors="np")["pixel_values"]
        np.testing.assert_array_equal(ours([tmp_path / "image"]), want)


@pytest.mark.parametrize("case", CASES)
def test_files_are_read_back(case: str) -> None:
    processor = ImageProcessor.from_hf(CASES[case])
    assert ImageProcessor.from_hf(processor.to_hf()) == processor
    assert processor.pixels(picture(40, 29)).shape == processor.shape


def test_steps_by_hand(tmp_path: Path) -> None:
    """From a path, from bytes and from a row of `datasets`; grey, and turned by its camera."""
    processor = ImageProcessor(size=(2, 2), resample=0, mean=(0.25,), std=(0.5,), scale=1 / 255)
    grey = Image.fromarray(np.array([[0, 255], [51, 102]], np.uint8))
    grey.save(tmp_path / "grey.png")
    want = np.array([[[[-0.5, 1.5], [-0.1, 0.3]]]])
    for image in (tmp_path / "grey.png", str(tmp_path / "grey.png"), encoded(grey), grey):
        np.testing.assert_allclose(processor([image]), want, atol=1e-6)
        row = {"bytes": image, "path": None} if isinstance(image, bytes) else {"path": image}
        np.testing.assert_allclose(processor([row]), want, atol=1e-6)
    file = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    grey.save(file, "PNG", exif=exif)
    np.testing.assert_allclose(processor([file.getvalue()]), want[..., ::-1, ::-1], atol=1e-6)


def test_the_middle_by_hand() -> None:
    """A crop takes the middle of an image; beyond a smaller image it is black."""
    image = picture(9, 6)
    pixels = np.asarray(image).transpose(2, 0, 1)
    inside = ImageProcessor(crop=(4, 5)).pixels(image)
    np.testing.assert_array_equal(inside, pixels[:, 1:5, 2:7])
    beyond = ImageProcessor(crop=(9, 4)).pixels(image)
    np.testing.assert_array_equal(beyond[:, 2:8], pixels[:, :, 2:6])
    assert not beyond[:, :2].any() and not beyond[:, 8:].any()
    # The nearest pixels of an image of half the size are those of odd rows and columns.
    half = ImageProcessor(shortest_edge=3, crop=(3, 3), resample=0).pixels(picture(10, 6))
    odd = np.asarray(picture(10, 6)).transpose(2, 0, 1)[:, 1::2, 1::2]
    np.testing.assert_array_equal(half, odd[:, :, 1:4])


def test_tiles_by_hand() -> None:
    """An image of whole tiles is cut row by row; the whole image, made smaller, comes last."""
    processor = TileProcessor(
        tile=ImageProcessor(size=(4, 4), resample=0), longest_edge=None, split=True
    )
    image = picture(12, 8)
    pixels = np.asarray(image).transpose(2, 0, 1)
    tiles, grid = processor.tiles(image)
    assert grid == (2, 3) and tiles.shape == (7, 3, 4, 4)
    for index, tile in enumerate(tiles[:6]):
        row, column = divmod(index, 3)
        cut = pixels[:, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4]
        np.testing.assert_array_equal(tile, cut)
    # The nearest pixel to the middle of each of 4 x 4 cells of 2 x 3 pixels.
    np.testing.assert_array_equal(tiles[6], pixels[:, 1::2, 1::3])
    one, grid = processor.tiles(picture(3, 4))
    assert grid == (0, 0) and one.shape == (1, 3, 4, 4)
    larger = TileProcessor(tile=processor.tile, longest_edge=12, split=True)
    _, grid = larger.tiles(picture(30, 10))  # made 12 x 4 first
    assert grid == (1, 3)


def test_sizes_of_one_number() -> None:
    square = ImageProcessor.from_hf(VIT | {"size": 9})
    assert square.size == (9, 9)
    edge = ImageProcessor.from_hf(DINO | {"size": 9, "crop_size": 5})
    assert (edge.shortest_edge, edge.crop) == (9, (5, 5))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"do_pad": True}, "do_pad=True is not known"),
        ({"size": {"shortest_edge": 5}}, "would keep different sizes"),
        ({"size": {"longest_edge": 5}}, "one number, or to a height and a width"),
        ({"image_mean": [0.5, 0.5]}, "for 1 or 3 channels"),
        ({"image_std": None}, "image_std is None"),
        ({"resample": 7}, "not a filter of Pillow"),
    ],
)
def test_refused(changes: dict[str, Any], said: str, tmp_path: Path) -> None:
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(VIT | changes))
    with pytest.raises(ConfigError, match=said) as error:
        load_image_processor(tmp_path)
    assert "preprocessor_config.json" in str(error.value)


def test_what_is_transparent() -> None:
    """In a file, the colours beneath show; an image that was opened before gets a white ground."""
    processor = ImageProcessor(size=(1, 2), resample=0)
    image = Image.fromarray(np.array([[[9, 8, 7, 0], [1, 2, 3, 255]]], np.uint8))
    for given in (encoded(image), {"bytes": encoded(image)}):
        np.testing.assert_array_equal(processor.pixels(given)[:, 0].T, [[9, 8, 7], [1, 2, 3]])
    np.testing.assert_array_equal(processor.pixels(image)[:, 0].T, [[255] * 3, [1, 2, 3]])


@pytest.mark.parametrize(
    ("values", "kind", "said"),
    [
        (np.array([[0, 65535]], np.uint16), "PNG", "greys of 16 .* from 0 to 65535, but 8"),
        (np.array([[7, 300]], np.int32), "TIFF", "greys of 16 or 32 bits .* from 7 to 300"),
        (np.array([[0, 0.5]], np.float32), "TIFF", "floating-point .*F. from 0 to 0.5, but"),
        (np.array([[-1, 255]], np.float32), "TIFF", "floating-point .* from -1 to 255"),
        (np.array([[np.nan, 255]], np.float32), "TIFF", "floating-point numbers"),
    ],
)
def test_levels_that_8_bits_do_not_hold_are_refused(values: Any, kind: str, said: str) -> None:
    """Pillow cuts them off: greys of 16 bits would be white, and floats up to 1 black."""
    processor = ImageProcessor(size=(1, 2), resample=0)
    with pytest.raises(ImageError, match=said):
        processor.pixels(encoded(Image.fromarray(values), kind))
    small = np.array([[0, 255]], values.dtype)  # as some tools write masks
    pixels = processor.pixels(encoded(Image.fromarray(small), kind))
    np.testing.assert_array_equal(pixels[:, 0], [[0, 255]] * 3)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "BMP", "WEBP"])
def test_damaged_images(kind: str) -> None:
    """Cut off anywhere, an image is refused, never completed in grey."""
    processor, whole = ImageProcessor.from_hf(VIT), encoded(picture(40, 29), kind)
    assert processor.pixels(whole).any()
    for part in (0, 3, len(whole) // 4, len(whole) // 2):
        with pytest.raises(ImageError, match="cannot be read"):
            processor.pixels(whole[:part])


def test_what_is_no_image(tmp_path: Path) -> None:
    processor = ImageProcessor.from_hf(VIT)
    for image in ("missing.jpg", tmp_path, 3, None, {"bytes": None, "path": None}, b"text"):
        with pytest.raises(ImageError, match="cannot be read"):
            processor.pixels(image)


@pytest.mark.parametrize(
    ("image", "remedy"),
    [
        ("https://example.org/cat.png", "Copy the files to this machine, or mount them"),
        ({"bytes": None, "path": "gs://bucket/cat.png"}, "gcsfuse BUCKET FOLDER"),
    ],
)
def test_an_image_that_lies_elsewhere(image: Any, remedy: str) -> None:
    with pytest.raises(ImageError, match=f"//.*cat.png is no path of this machine. .*{remedy}"):
        ImageProcessor.from_hf(VIT).pixels(image)


def test_without_pillow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(ImportError, match="pip install pillow"):
        ImageProcessor.from_hf(VIT).pixels("cat.jpg")


def test_without_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers.models.vit.image_processing_pil_vit", None)
    with pytest.raises(ImportError, match=r"an image processor needs .*\[models\]"):
        ImageProcessor.from_hf(VIT).pixels(picture(4, 3))
