"""Readers of images for language models, by the form that a model takes images in."""

from pathlib import Path
from typing import Any, Literal, Protocol, TypeAlias

from lora_jax.core.types import Fields, Tokenizer
from lora_jax.hf.fields import ConfigError, read_file
from lora_jax.hf.hub import resolve
from lora_jax.hf.images import FILE
from lora_jax.hf.vision.patches import PatchProcessor, PatchReader
from lora_jax.hf.vision.tiles import ImageReader, TileProcessor

AnyReader: TypeAlias = ImageReader | PatchReader
ImageForm: TypeAlias = Literal["tiles", "patches"]

_PROCESSOR = "processor_config.json"  # of transformers 5, with the image processor inside


class ImageModelConfig(Protocol):
    """A configuration of a language model that reads images, such as ``SmolVLMConfig``."""

    @property
    def image_token_id(self) -> int: ...
    @property
    def image_form(self) -> ImageForm:
        """The form that it takes images in: equal "tiles", or "patches" of images of any size."""

    @property
    def vision(self) -> Any: ...


def reads_images(config: Any) -> bool:
    """Returns True for the configuration of a language model that reads images."""
    return getattr(config, "image_form", None) is not None


def load_image_reader(
    name_or_path: str | Path, tokenizer: Tokenizer, config: ImageModelConfig
) -> AnyReader:
    """Loads the reader of images that goes with ``from_pretrained(name_or_path)``.

    Args:
      name_or_path: folder or hub name.
      tokenizer: the model's.
      config: a ``SmolVLMConfig`` or a ``QwenVLConfig``.

    Raises:
      ModelNotFound: if there is no such path, or the hub does not answer; says what to do.
      ConfigError: there is no preprocessor_config.json, or it does not fit the model.

    >>> from lora_jax import models, training
    >>> name = "HuggingFaceTB/SmolVLM-256M-Instruct"
    >>> tokenizer = models.load_tokenizer(name)  # doctest: +SKIP
    >>> model, params = models.from_pretrained(name)  # doctest: +SKIP
    >>> reader = models.load_image_reader(name, tokenizer, model.config)  # doctest: +SKIP
    >>> asks = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}
    >>> row = {"messages": [asks, {"role": "assistant", "content": "A cat."}], "images": ["1.jpg"]}
    >>> training.chats([row], tokenizer, seq_len=2048, images=reader)  # doctest: +SKIP
    """
    folder = resolve(name_or_path).path
    path = folder / FILE
    fields: Fields = {}
    if not path.is_file() and (folder / _PROCESSOR).is_file():
        joined = read_file(folder / _PROCESSOR, "a model of images", ConfigError)
        if fields := joined.get("image_processor") or {}:
            path = folder / _PROCESSOR
    fields = fields or read_file(path, "a model of images", ConfigError)
    if config.image_form == "patches":
        return _patch_reader(path, fields, tokenizer, config)
    return _tile_reader(path, fields, tokenizer, config)


def _tile_reader(path: Path, fields: Fields, tokenizer: Tokenizer, config: Any) -> ImageReader:
    try:
        processor = TileProcessor.from_hf(fields)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    reader = ImageReader(processor, tokenizer, config.image_token_id, config.tokens_per_image)
    shape = (config.vision.num_channels, config.vision.image_size, config.vision.image_size)
    if processor.tile.shape != shape:
        raise ConfigError(f"{path} makes tiles of {processor.tile.shape}, the model takes {shape}")
    n = int((reader.written((0, 0)) == reader.token).sum())
    if n != reader.per_tile:
        raise ConfigError(
            f"the tokenizer makes {n} tokens {reader.token} (image_token_id) of an image, and the "
            f"model takes {reader.per_tile}"
        )
    return reader


def _patch_reader(path: Path, fields: Fields, tokenizer: Tokenizer, config: Any) -> PatchReader:
    try:
        processor = PatchProcessor.from_hf(fields)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    vision = config.vision
    made = (*processor.tile.shape, processor.merge, processor.frames)
    taken = (*vision.patch_shape, vision.spatial_merge_size, vision.temporal_patch_size)
    if made != taken:
        raise ConfigError(
            f"{path} makes patches of {made} (channels, height, width, merged, frames), the model "
            f"takes {taken}"
        )
    if config.image_token_id not in set(tokenizer.get_vocab().values()):
        raise ConfigError(f"the tokenizer has no token {config.image_token_id} (image_token_id)")
    return PatchReader(processor, tokenizer, config.image_token_id)
