"""Converts images to arrays by a preprocessor_config.json: resize, crop, rescale, normalise."""

import dataclasses
import functools
import io
import json
import os
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, TypeAlias

import numpy as np

from lora_jax.core.types import Fields
from lora_jax.folders import local_path
from lora_jax.hf.fields import ConfigError, read_json_fields
from lora_jax.hf.hub import find_model
from lora_jax.hf.tokenizer import import_transformers

ImageLike: TypeAlias = Any  # a path, bytes, a `PIL.Image.Image`, or a dict with one of them

IMAGE_PROCESSOR_FILE = "preprocessor_config.json"

_READ_FIELDS = (
    "do_resize do_center_crop do_rescale do_normalize image_mean image_std resample rescale_factor "
    "size crop_size"
).split()
# Without an effect here: every image becomes RGB, and pixels are those of Pillow.
_FIELDS_WITHOUT_EFFECT = frozenset(
    """
    image_processor_type feature_extractor_type processor_class do_convert_rgb use_fast
    default_to_square data_format input_data_format return_tensors device disable_grouping auto_map
    """.split()
)
_SHORTEST_EDGE_TYPES = (
    "Bit",
    "CLIP",
)  # of these, a size that is one number is that of the shorter edge
_MODE_OF_CHANNELS = {1: "L", 3: "RGB"}
_RESAMPLING_FILTERS = range(6)  # Pillow's filters
# Pillow's formats that begin with a mark of their own, so that no other file is taken for one.
_IMAGE_FORMATS = "JPEG PNG WEBP GIF BMP TIFF PPM AVIF HEIF JPEG2000 ICO".split()


class ImageError(ValueError):
    """An image cannot be read."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImageProcessor:
    """Converts an image to ``pixel_values`` as transformers does with Pillow.

    Attributes:
      size: (height, width) to resize to; None to keep the image's.
      shortest_edge: the length to resize the shorter edge to, instead of `size`.
      resample: Pillow's number of the filter: 2 bilinear, 3 bicubic.
      crop: (height, width) of the middle to cut out; smaller images get a black border.
      scale: the factor of values from 0 to 255; None for 1.
      mean, std: subtracted from each channel, and then its divisor.

    Raises:
      ConfigError: if images of different sizes would stay so, or for other than 1 or 3 channels.
    """

    size: tuple[int, int] | None = None
    shortest_edge: int | None = None
    resample: int = 2
    crop: tuple[int, int] | None = None
    scale: float | None = 1 / 255
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.5, 0.5, 0.5)

    def __post_init__(self) -> None:
        has_one_size = self.crop is not None or self.size is not None
        if not has_one_size:
            raise ConfigError(
                "Images of different sizes would keep different sizes. Set size (height and width) "
                "or crop_size in preprocessor_config.json."
            )
        if len(self.mean) not in _MODE_OF_CHANNELS or len(self.std) != len(self.mean):
            raise ConfigError(
                f"image_mean {self.mean} and image_std {self.std} must have one number for each "
                "channel, for 1 or 3 channels. Correct preprocessor_config.json."
            )
        if self.resample not in _RESAMPLING_FILTERS:
            raise ConfigError(
                f"resample {self.resample!r} is not a filter of Pillow. Use a number from 0 to 5."
            )

    @classmethod
    def from_hf(cls, fields: Fields) -> "ImageProcessor":
        """Reads the fields of a preprocessor_config.json of transformers 4 or 5.

        Args:
          fields: the parsed file.

        Raises:
          ConfigError: names the fields that are missing, or not known.
        """
        unknown_fields = [
            f"{name}={value!r}"
            for name, value in fields.items()
            if name not in (*_READ_FIELDS, *_FIELDS_WITHOUT_EFFECT) and value not in (None, False)
        ]
        if unknown_fields:
            raise ConfigError(
                f"{', '.join(unknown_fields)} is not known for image processors. If a field does "
                "not change the pixels, remove it from the file."
            )
        settings: dict[str, Any] = {}
        if fields.get("do_resize", True):
            settings |= _read_resize_settings(fields)
        if fields.get("do_center_crop", "crop_size" in fields):
            settings["crop"] = _read_height_and_width("crop_size", fields.get("crop_size"))
        is_rescaled = fields.get("do_rescale", True)
        settings["scale"] = fields.get("rescale_factor", cls.scale) if is_rescaled else None
        if not fields.get("do_normalize", True):
            return cls(**settings, mean=(0.0,) * 3, std=(1.0,) * 3)
        for name in ("mean", "std"):
            channel_values = fields.get(f"image_{name}")
            if not isinstance(channel_values, list):
                raise ConfigError(
                    f"image_{name} is {channel_values!r}. Set it to a list with one number for "
                    "each channel."
                )
            settings[name] = tuple(map(float, channel_values))
        return cls(**settings)

    def to_hf(self) -> dict[str, object]:
        """Returns the preprocessor_config.json fields of this processor."""
        processor_type = "ViTImageProcessor" if self.crop is None else "BitImageProcessor"
        fields: dict[str, object] = {
            "image_processor_type": processor_type,
            "do_resize": bool(self.size or self.shortest_edge),
            "do_center_crop": self.crop is not None,
            "do_rescale": self.scale is not None,
            "do_normalize": True,
            "do_convert_rgb": len(self.mean) == 3,
            "resample": self.resample,
            "rescale_factor": self.scale,
            "image_mean": list(self.mean),
            "image_std": list(self.std),
        }
        if self.shortest_edge:
            fields["size"] = {"shortest_edge": self.shortest_edge}
        elif self.size:
            fields["size"] = _size_fields(self.size)
        if self.crop:
            fields["crop_size"] = _size_fields(self.crop)
        return fields

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Writes preprocessor_config.json into an existing folder."""
        text = json.dumps(self.to_hf(), indent=2, sort_keys=True)
        (local_path(folder) / IMAGE_PROCESSOR_FILE).write_text(text + "\n", encoding="utf-8")

    @property
    def shape(self) -> tuple[int, int, int]:
        """The shape of an image's pixels: (channels, height, width)."""
        size = self.crop or self.size
        assert size is not None
        return len(self.mean), *size

    def pixels(self, image: ImageLike) -> np.ndarray:
        """Returns an image resized and cropped, [channels, height, width] uint8.

        Args:
          image: a file's path or bytes; a ``PIL.Image.Image``; or a dict with one of them, as
            `datasets` stores images: ``{"bytes": …, "path": …}``.

        Raises:
          ImageError: the image cannot be read; says why.
        """
        image = open_image(image, _MODE_OF_CHANNELS[len(self.mean)])
        layout = "channels_first" if image.mode == "L" else "channels_last"
        features = self._processor(image, input_data_format=layout)
        pixels: np.ndarray = features["pixel_values"][0]
        return pixels

    def values(self, pixels: np.ndarray) -> np.ndarray:
        """Returns fp32 pixel values from `pixels`: [..., channels, height, width]."""
        channel_indices = np.arange(len(self.mean))[:, None, None]
        values: np.ndarray = self._value_of_level[channel_indices, pixels]
        return values

    def __call__(self, images: Sequence[ImageLike]) -> np.ndarray:
        """Returns ``pixel_values`` of images, [n, channels, height, width] fp32; see `pixels`."""
        return self.values(np.stack([self.pixels(image) for image in images]))

    @functools.cached_property
    def _value_of_level(self) -> np.ndarray:
        """The pixel value of each of 256 levels, [channels, 256] fp32."""
        scale = 1.0 if self.scale is None else self.scale
        levels = (np.arange(256) * scale).astype(np.float32)
        mean = np.array(self.mean, np.float32)[:, None]
        std = np.array(self.std, np.float32)[:, None]
        return np.asarray((levels - mean) / std)

    @functools.cached_property
    def _processor(self) -> Any:
        """The transformers image processor that resizes and crops."""
        size: dict[str, int] | None = None
        if self.shortest_edge is not None:
            size = {"shortest_edge": self.shortest_edge}
        elif self.size is not None:
            size = _size_fields(self.size)
        return make_pixel_processor(
            "vit",
            "ViT",
            do_resize=size is not None,
            size=size,
            resample=self.resample,
            do_center_crop=self.crop is not None,
            crop_size=self.crop and _size_fields(self.crop),
        )


def load_image_processor(name_or_path: str | Path) -> ImageProcessor:
    """Loads the image processor that goes with ``from_pretrained(name_or_path)``.

    Args:
      name_or_path: folder or hub name.

    Raises:
      ModelNotFound: if there is no such path, or the hub does not answer; says what to do.
      ConfigError: there is no preprocessor_config.json, or it asks for what is not supported.

    >>> from lora_jax import models
    >>> processor = models.load_image_processor("google/vit-base-patch16-224")  # doctest: +SKIP
    >>> processor(["cat.jpg", "dog.jpg"]).shape  # doctest: +SKIP
    (2, 3, 224, 224)
    """
    path = find_model(name_or_path).path / IMAGE_PROCESSOR_FILE
    try:
        return ImageProcessor.from_hf(read_json_fields(path, "a model of images", ConfigError))
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}" if str(path) not in str(error) else error) from None


def make_pixel_processor(module: str, name: str, **fields: object) -> Any:
    """Returns an image processor of transformers that uses Pillow and returns bytes.

    Args:
      module: the name of the model's package, such as "vit".
      name: the class's name ahead of ``ImageProcessorPil``, such as "ViT".
      **fields: the arguments of the class.

    Raises:
      ImportError: transformers is missing. The message says what to install.
    """
    # `transformers` itself has placeholders of some classes where torchvision is missing.
    module_name = f"transformers.models.{module}.image_processing_pil_{module}"
    processors = import_transformers(module_name, needed_by="an image processor")
    processor_class = getattr(processors, f"{name}ImageProcessorPil")
    return processor_class(do_rescale=False, do_normalize=False, **fields)


def open_image(image: ImageLike, mode: str = "RGB") -> ImageLike:
    """Returns an image, decoded and rotated upright, as a ``PIL.Image.Image``.

    A transparent file shows the colours beneath, as in transformers' ``load_image``. A transparent
    ``PIL.Image.Image`` gets a white background, as in transformers' image processors.

    Args:
      image: see `ImageProcessor.pixels`.
      mode: Pillow's name of the channels.

    Raises:
      ImageError: the image cannot be read, lies elsewhere (a path with a scheme, such as gs://), or
        has levels that 8 bits do not hold; says why.
    """
    pil = _import_pillow()
    source = image
    if isinstance(image, dict):
        data = image.get("bytes")
        source = image.get("path") if data is None else data
    if isinstance(source, bytes | bytearray | memoryview):
        source = io.BytesIO(source)
    is_file = isinstance(source, str | os.PathLike | io.BytesIO)
    try:
        if isinstance(source, str):
            source = local_path(source)
        opened = pil.Image.open(source) if is_file else source
        if not isinstance(opened, pil.Image.Image):
            raise TypeError(
                f"a {type(image).__name__} is not an image. Use a path, bytes or a PIL image."
            )
        decoded = _convert_to_8_bits(pil, pil.ImageOps.exif_transpose(opened))
        is_transparent = "A" in decoded.getbands() or "transparency" in decoded.info
        if mode == "RGB" and is_transparent and not is_file:
            decoded = _paste_on_white(pil, decoded)
        decoded.info.pop("transparency", None)  # Pillow would warn of it
        return decoded.convert(mode)
    except Exception as error:  # a damaged file may raise any error
        message = " ".join(str(error).split()) or type(error).__name__
        raise ImageError(f"the image cannot be read: {message}") from None


def _paste_on_white(pil: ModuleType, image: ImageLike) -> ImageLike:
    """Returns a transparent image pasted on a white background."""
    image = image.convert("RGBA")
    ground = pil.Image.new("RGBA", image.size, (255, 255, 255, 255))
    return pil.Image.alpha_composite(ground, image)


def is_image_file(path: Path) -> bool:
    """Returns True if a file starts like an image file."""
    pil = _import_pillow()
    pil.Image.init()
    formats = [name for name in _IMAGE_FORMATS if name in pil.Image.OPEN]
    try:
        with pil.Image.open(path, formats=formats):
            return True
    except Exception:  # any file may raise any error
        return False


def _convert_to_8_bits(pil: ModuleType, image: ImageLike) -> ImageLike:
    """Converts an image with 16 or 32 bits per channel to 8 bits.

    Pillow and transformers do not rescale such values: all values above 255 become white, and
    floating-point numbers from 0 to 1 become black.

    Raises:
      ValueError: values are not whole numbers from 0 to 255.
    """
    if not image.mode.startswith(("I", "F")):
        return image
    values = np.asarray(image)
    levels = np.clip(np.nan_to_num(values), 0, 255).astype(np.uint8)
    if not np.array_equal(levels, values):
        kind = "floating-point numbers" if image.mode.startswith("F") else "greys of 16 or 32 bits"
        raise ValueError(
            f"its pixels are {kind} (mode {image.mode}) from {values.min():g} to {values.max():g}, "
            "but 8 bits hold only whole numbers from 0 to 255. Save the image with 8 bits per "
            "channel and values scaled to that range"
        )
    return pil.Image.fromarray(levels)


def _read_resize_settings(fields: Fields) -> dict[str, Any]:
    """Returns the `size` or the `shortest_edge` of an `ImageProcessor`, and its `resample`."""
    resample = fields.get("resample", 2)
    size = fields.get("size")
    processor_type = (
        fields.get("image_processor_type") or fields.get("feature_extractor_type") or ""
    )
    if isinstance(size, int) and processor_type.startswith(_SHORTEST_EDGE_TYPES):
        return {"shortest_edge": size, "resample": resample}
    if isinstance(size, dict) and list(size) == ["shortest_edge"]:
        return {"shortest_edge": size["shortest_edge"], "resample": resample}
    return {"size": _read_height_and_width("size", size), "resample": resample}


def _read_height_and_width(name: str, size: object) -> tuple[int, int]:
    """Returns the height and width from a field with both, or with one for both."""
    if isinstance(size, int):
        return size, size
    if isinstance(size, dict) and {*size} == {"height", "width"}:
        return size["height"], size["width"]
    raise ConfigError(f"{name} is {size!r}. Set it to one number, or to a height and a width.")


def _size_fields(size: tuple[int, int]) -> dict[str, int]:
    return {"height": size[0], "width": size[1]}


def _import_pillow() -> ModuleType:
    """Returns the package Pillow; an ImportError says how to install it."""
    try:
        import PIL
        import PIL.Image
        import PIL.ImageOps
    except ImportError:
        raise ImportError(
            "Reading an image needs the package Pillow. Run pip install pillow, or pip install "
            "'lora_jax[models]'."
        ) from None
    return PIL
