"""Image readers for language models, chosen by the form in which a model takes images."""

from pathlib import Path
from typing import Any, Literal, Protocol, TypeAlias

from lora_jax.core.types import Fields, Tokenizer
from lora_jax.hf.fields import ConfigError, read_json_fields
from lora_jax.hf.hub import find_model
from lora_jax.hf.images import IMAGE_PROCESSOR_FILE
from lora_jax.hf.vision.patches import PatchProcessor, PatchReader
from lora_jax.hf.vision.tiles import ImageReader, TileProcessor

AnyReader: TypeAlias = ImageReader | PatchReader
ImageForm: TypeAlias = Literal["tiles", "patches"]

_PROCESSOR_FILE = "processor_config.json"  # of transformers 5, with the image processor inside


class ImageModelConfig(Protocol):
    """The configuration of a language model that reads images, such as ``SmolVLMConfig``."""

    @property
    def image_token_id(self) -> int: ...
    @property
    def image_form(self) -> ImageForm:
        """The form of images: equal "tiles", or "patches" of images of any size."""

    @property
    def vision(self) -> Any: ...


def reads_images(config: Any) -> bool:
    """Returns True for the configuration of a language model that reads images."""
    return getattr(config, "image_form", None) is not None


def load_image_reader(
    name_or_path: str | Path, tokenizer: Tokenizer, config: ImageModelConfig
) -> AnyReader:
    """Loads the image reader for ``from_pretrained(name_or_path)``.

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
    path, fields = _image_processor_fields(find_model(name_or_path).path)
    if config.image_form == "patches":
        return _patch_reader(path, fields, tokenizer, config)
    return _tile_reader(path, fields, tokenizer, config)


def _image_processor_fields(folder: Path) -> tuple[Path, Fields]:
    """Returns the file of a folder's image processor, and its fields."""
    path = folder / IMAGE_PROCESSOR_FILE
    processor_path = folder / _PROCESSOR_FILE
    if not path.is_file() and processor_path.is_file():
        processor = read_json_fields(processor_path, "a model of images", ConfigError)
        fields = processor.get("image_processor")
        if fields:
            return processor_path, fields
    return path, read_json_fields(path, "a model of images", ConfigError)


def _tile_reader(path: Path, fields: Fields, tokenizer: Tokenizer, config: Any) -> ImageReader:
    """Returns the tile reader; raises a ConfigError if it does not fit the model."""
    try:
        processor = TileProcessor.from_hf(fields)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    reader = ImageReader(
        processor=processor,
        tokenizer=tokenizer,
        token=config.image_token_id,
        per_tile=config.tokens_per_image,
    )
    vision = config.vision
    model_shape = (vision.num_channels, vision.image_size, vision.image_size)
    if processor.tile.shape != model_shape:
        raise ConfigError(
            f"{path} makes tiles of the shape {processor.tile.shape}, but the model takes "
            f"{model_shape}. Use the files of one model."
        )
    n_image_tokens = int((reader.written((0, 0)) == reader.token).sum())
    if n_image_tokens != reader.per_tile:
        raise ConfigError(
            f"the tokenizer writes {n_image_tokens} tokens {reader.token} (image_token_id) for an "
            f"image, but the model takes {reader.per_tile}. Use the files of one model."
        )
    return reader


def _patch_reader(path: Path, fields: Fields, tokenizer: Tokenizer, config: Any) -> PatchReader:
    """Returns the patch reader; raises a ConfigError if it does not fit the model."""
    try:
        processor = PatchProcessor.from_hf(fields)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    vision = config.vision
    patch_sizes = (*processor.tile.shape, processor.merge, processor.frames)
    model_sizes = (*vision.patch_shape, vision.spatial_merge_size, vision.temporal_patch_size)
    if patch_sizes != model_sizes:
        raise ConfigError(
            f"{path} makes patches of {patch_sizes} (channels, height, width, merged, frames), "
            f"but the model takes {model_sizes}. Use the files of one model."
        )
    if config.image_token_id not in set(tokenizer.get_vocab().values()):
        raise ConfigError(
            f"the tokenizer has no token {config.image_token_id} (image_token_id of config.json). "
            "Use the files of one model."
        )
    return PatchReader(processor, tokenizer, config.image_token_id)
