"""The task of classifying a user's images, with a fully trained head on a ViT or DINOv2."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

from lora_jax.training.data.labelled import label_names
from lora_jax.training.data.rows import Row
from lora_jax.training.data.vision.images import Images, check_rows, images, names_of
from lora_jax.training.losses import IMAGES
from train.console.errors import UserError
from train.data.files import IMAGE_FIELD, locate_images
from train.options.scripts.classify import ClassifyDataConfig, Config
from train.run.classifiers import read_classifier_info
from train.run.pretrained import ModelInfo
from train.run.task import Data, EvaluationContext, TaskRows
from train.tasks import labelled

_HELD_OUT_ROWS = "the held-out rows"  # their name in messages


def check(config: Config) -> None:
    """Raises a UserError if no model is named, because images have no default model."""
    if not config.data.model:
        raise UserError(
            "There is no default model for images. Pass a ViT or DINOv2 with --model: its name on "
            "the hub (facebook/dinov2-small) or its folder."
        )


def field_of(data: ClassifyDataConfig) -> str:
    """Returns the name of the field that holds the image."""
    return data.image or IMAGE_FIELD


def read_images(config: Config) -> TaskRows:
    """Reads rows with an image and a label, and holds a share out, stratified by label."""
    data = config.data

    def check_source(rows: list[Row], source: str) -> None:
        check_rows(rows, source, field_of(data), data.label)

    split = functools.partial(labelled.split_by_label, data)
    train, test = labelled.read_parts(data, check_source, split)
    test_source = data.test if data.test and labelled.names_rows(data.test) else data.dataset
    return TaskRows(
        locate_images(train, field_of(data), data.dataset),
        locate_images(test, field_of(data), test_source),
    )


def outline(config: Config, rows: TaskRows) -> ModelInfo:
    """Reads the outline of the encoder, with a head for the classes of the rows."""
    data = config.data
    assert data.model is not None, "the options have no defaults yet"
    return read_classifier_info(data.model, len(label_names(rows.train, data.label)), "images")


def examples(config: Config, rows: TaskRows, outline: ModelInfo) -> Data:
    """Returns the images as arrays, with their class indices."""
    data = config.data
    names = label_names(rows.train, data.label)
    vision: Any = outline.config
    field = field_of(data)
    _, height, width = outline.tokenizer.shape
    grid_rows, grid_columns = vision.grid_of(height, width)
    length = 1 + grid_rows * grid_columns  # patches, and the token of the class

    def encode_images(image_rows: Sequence[Row], source: str) -> Images:
        """Returns the images of rows as arrays with their labels."""
        return images(
            image_rows,
            outline.tokenizer,
            names=names,
            image=field,
            label=data.label,
            length=length,
            source=source,
        )

    train = encode_images(rows.train, data.dataset)
    test = encode_images(rows.held_out, data.test or _HELD_OUT_ROWS)
    titles = names_of(rows.train, field, data.dataset)
    has_model_grid = vision.grid == (grid_rows, grid_columns)
    resampling = "" if has_model_grid else ", with resampled positions"
    return Data(
        train=train,
        held_out=test,
        measured=labelled.select_spread(test, config.run.eval_rows),
        name=titles.__getitem__,
        source="",
        facts={"labels": names, "sequence_length": length, "lengths": (length,)},
        lines=(
            *labelled.count_lines(rows, data.label, "images"),
            f"images are {height} x {width} pixels, {length} tokens{resampling}",
        ),
    )


def _held_out_names(context: EvaluationContext) -> list[str]:
    """Returns the names of the held-out images."""
    data = context.config.data
    return names_of(context.rows.held_out, field_of(data), data.test or _HELD_OUT_ROWS)


TASK = dataclasses.replace(
    labelled.TASK,
    defaults=dataclasses.replace(labelled.TASK.defaults, model=None),
    check=check,
    rows=read_images,
    outline=outline,
    examples=examples,
    loss=lambda config, layout: IMAGES,
    evaluation=functools.partial(
        labelled.ClassifierEvaluation, unit="images", titles=_held_out_names
    ),
)
