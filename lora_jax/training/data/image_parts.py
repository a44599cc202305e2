"""Reads the parts of a turn's content: texts, and the images that a row shows in them."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lora_jax.training.errors import TrainingError

IMAGES = "images"  # a row's field
_OWN = ("image", "path", "url")  # fields of a part that has its image itself
TEXTS_ONLY = (
    "images, and only texts are read here. Images go with the supervised fine-tuning of a model "
    "that reads them (SmolVLM, Qwen3.5), on rows in memory, and with its answers: leave them out "
    "otherwise"
)


def is_text(part: Any) -> bool:
    """Returns True if a part is a text."""
    return isinstance(part, Mapping) and part.get("type") == "text" and "text" in part


def is_image(part: Any) -> bool:
    """Returns True if a part shows an image."""
    return isinstance(part, Mapping) and part.get("type") == "image"


def images_in(content: Any) -> list[Any]:
    """Returns the parts of a content that show an image."""
    return [part for part in content if is_image(part)] if isinstance(content, list) else []


def has_images(row: Mapping[str, Any]) -> bool:
    """Returns True if a row of any form has images, or a turn that shows one."""
    lists = [value for value in row.values() if isinstance(value, list)]
    turns = [turn for value in lists for turn in value if isinstance(turn, Mapping)]
    return bool(row.get(IMAGES)) or any(images_in(turn.get("content")) for turn in turns)


def _located(image: Any, row: Any) -> Any:
    """Returns the path of an image as it is found from here; any other image as it is."""
    place = getattr(row, "place", None)
    if place is None or not isinstance(image, str) or Path(image).exists():
        return image
    beside = Path(place[0]).parent / image
    return str(beside) if beside.is_file() else image


def shown_images(
    turns: Sequence[Mapping[str, Any]], row: Mapping[str, Any], name: str
) -> tuple[list[dict[str, Any]], list[Any]]:
    """Returns turns as a chat template gets them, and their images in the order of their parts.

    A part has its image itself, or shows the next of the row's `images`, or the row's `image`.
    Where no part shows an image, the row's `images` come first in the first turn of the user. A
    path that is not there is one beside the row's file.

    Args:
      turns: the turns of a row.
      row: the row.
      name: what it is called in errors.

    Raises:
      TrainingError: there are fewer images than parts that show one, or more.
    """
    made, images = [dict(turn) for turn in turns], list[Any]()
    given = row.get(IMAGES)
    given = list(given) if isinstance(given, list | tuple) else [] if given is None else [given]
    parts = [part for turn in made for part in images_in(turn.get("content"))]
    if given and not parts:
        asks = next((turn for turn in made if turn["role"] == "user"), made[0])
        text = {"type": "text", "text": asks["content"]}
        parts = [{"type": "image"} for _ in given]
        asks["content"] = [*parts, text]
    elif not given and row.get("image") is not None:
        given = [row["image"]] * bool(parts)
    left = iter(given)
    for part in parts:
        own = next((part[field] for field in _OWN if part.get(field) is not None), None)
        images.append(_located(next(left, None) if own is None else own, row))
    if any(image is None for image in images) or next(left, None) is not None:
        raise TrainingError(
            f"{name} has {len(given)} images, and {len(parts)} parts of the type 'image': give an "
            "image for each of these parts"
        )
    for turn in made:
        if isinstance(turn.get("content"), list):
            turn["content"] = [
                {"type": "image"} if is_image(part) else {"type": "text", "text": part["text"]}
                for part in turn["content"]
            ]
    return made, images
