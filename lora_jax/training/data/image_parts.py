"""Reads the parts of a turn's content: texts, and references to images."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lora_jax.training.errors import TrainingError

IMAGES = "images"  # a row's field
_IMAGE_FIELDS = ("image", "path", "url")  # fields of a part that holds its image itself
TEXTS_ONLY = (
    "images, but only texts can be used here. Images work in the supervised fine-tuning of a model "
    "that reads them (SmolVLM, Qwen3.5), on rows in memory, and in its answers. Otherwise, remove "
    "the images."
)


def is_text(part: Any) -> bool:
    """Returns True if a part is a text."""
    return isinstance(part, Mapping) and part.get("type") == "text" and "text" in part


def is_image(part: Any) -> bool:
    """Returns True if a part is an image."""
    return isinstance(part, Mapping) and part.get("type") == "image"


def images_in(content: Any) -> list[Any]:
    """Returns the image parts of a content."""
    return [part for part in content if is_image(part)] if isinstance(content, list) else []


def has_images(row: Mapping[str, Any]) -> bool:
    """Returns True if a row has images, in any of its turns or fields."""
    lists = [value for value in row.values() if isinstance(value, list)]
    turns = [turn for value in lists for turn in value if isinstance(turn, Mapping)]
    return bool(row.get(IMAGES)) or any(images_in(turn.get("content")) for turn in turns)


def _resolve_image_path(image: Any, row: Any) -> Any:
    """Returns an image path relative to the row's file; other images unchanged."""
    place = getattr(row, "place", None)
    if place is None or not isinstance(image, str) or Path(image).exists():
        return image
    row_file, _ = place
    path = Path(row_file).parent / image
    return str(path) if path.is_file() else image


def shown_images(
    turns: Sequence[Mapping[str, Any]], row: Mapping[str, Any], name: str
) -> tuple[list[dict[str, Any]], list[Any]]:
    """Returns turns for a chat template, and their images in order.

    A part of the type "image" holds its image itself, or shows the next of the row's `images`, or
    the row's `image`. Where no part shows an image, the row's `images` come first in the first turn
    of the user. A relative path that does not exist is tried beside the row's file.

    Args:
      turns: the turns of a row.
      row: the row.
      name: what it is called in errors.

    Raises:
      TrainingError: there are fewer images than parts that show one, or more.
    """
    template_turns = [dict(turn) for turn in turns]
    row_images = _row_images(row)
    image_parts = [part for turn in template_turns for part in images_in(turn.get("content"))]
    if row_images and not image_parts:
        user_turns = [turn for turn in template_turns if turn["role"] == "user"]
        image_turn = user_turns[0] if user_turns else template_turns[0]
        image_parts = [{"type": "image"} for _ in row_images]
        text_part = {"type": "text", "text": image_turn["content"]}
        image_turn["content"] = [*image_parts, text_part]
    elif not row_images and image_parts and row.get("image") is not None:
        row_images = [row["image"]]
    images: list[Any] = []
    unused_images = iter(row_images)
    for part in image_parts:
        held_images = [part[field] for field in _IMAGE_FIELDS if part.get(field) is not None]
        image = held_images[0] if held_images else next(unused_images, None)
        images.append(_resolve_image_path(image, row))
    is_image_missing = any(image is None for image in images)
    if is_image_missing or next(unused_images, None) is not None:
        raise TrainingError(
            f"{name} has {len(row_images)} images, but {len(image_parts)} parts of the type "
            "'image'. Give one image for each of these parts."
        )
    for turn in template_turns:
        if isinstance(turn.get("content"), list):
            turn["content"] = [_template_part(part) for part in turn["content"]]
    return template_turns, images


def _row_images(row: Mapping[str, Any]) -> list[Any]:
    """Returns a row's `images` as a list."""
    images = row.get(IMAGES)
    if images is None:
        return []
    return list(images) if isinstance(images, list | tuple) else [images]


def _template_part(part: Mapping[str, Any]) -> dict[str, str]:
    """Returns a content part for a chat template, without the image itself."""
    if is_image(part):
        return {"type": "image"}
    return {"type": "text", "text": part["text"]}
