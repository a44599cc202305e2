"""Reads the rows of a dataset: from files, from a folder, or from the hub; parses --dataset."""

import math
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lora_jax.buckets.copies import path_to_read
from lora_jax.buckets.store import BucketError
from lora_jax.hf.hub import probe_hub
from lora_jax.hf.images import is_image_file
from lora_jax.training.data.rows import Row, replace_values
from train.console.errors import UserError, as_user_errors
from train.data.text_files import read_csv, read_json, with_position
from train.options.paths import FILE_KINDS, kind_of

_TEXT_READERS: dict[str, Callable[[Path], list[Any]]] = {
    ".jsonl": read_json,
    ".json": read_json,
    ".ndjson": read_json,
    ".csv": read_csv,
    ".tsv": read_csv,
}
NOT_PARQUET = "cannot be read as Parquet: "  # before what pyarrow says
IMAGE_KINDS = tuple(".jpg .jpeg .png .webp .gif .bmp .tif .tiff .ppm .pgm".split())
IMAGE_FIELD = "image"  # of a folder's rows
# The splits that files are named after, by the word in their name.
_SPLITS = {"train": "train", "training": "train", "test": "test", "testing": "test"}
_SPLITS |= {name: "validation" for name in ("validation", "valid", "val", "dev", "eval")}
_WEIGHT_HINT = "Use a positive number, as in a.jsonl:3 b.jsonl:1."
_MAX_NAMED_FILES = 5  # files that a line names
_CHAT_FIELDS = ("messages", "conversations", "prompt", "completion", "tools", "documents")


def read_rows(dataset: str, *, split: str = "train", subset: str | None = None) -> list[Row]:
    """Reads the rows of a dataset.

    Args:
      dataset: a file with one of the endings `FILE_KINDS`, a folder of such files or of images
        (see `labelled_images`), a folder that `datasets` saved (`save_to_disk`), or a name on the
        hub. Files and folders may lie in a bucket (gs://).
      split: the split of a folder or of a dataset on the hub. A file in a folder belongs to the
        split in its name (`test-00.jsonl`), or else to "train".
      subset: its subset (configuration), on the hub.

    Raises:
      UserError: there is no such file or dataset, it cannot be read, or it has no rows.
    """
    if is_image_folder(dataset):
        rows = labelled_images(data_path(dataset), split)
    elif (paths := find_data_files(dataset, split)) is not None:
        rows = [row for path in paths for row in read_file(path)]
    else:
        rows = read_dataset_rows(load_dataset(dataset, split=split, subset=subset))
    if not rows:
        raise UserError(f"--dataset {dataset} has no rows. Name a data set with rows.")
    return rows


def data_path(name: str) -> Path:
    """Returns the local path of a file or a folder; downloads a copy from a bucket.

    Raises:
      UserError: there is none in the bucket, or the bucket cannot be read.
    """
    with as_user_errors(BucketError, prefix="--dataset "):
        return path_to_read(name).expanduser()


def is_image_folder(name: str) -> bool:
    """Returns True if a folder holds images and no data file such as .jsonl."""
    folder = data_path(name)
    if any(kind_of(path.name) for pattern in ("*", "*/*") for path in folder.glob(pattern)):
        return False  # it has files of rows
    is_named = any(map(_is_named_image, _visible_files(folder)))
    return is_named or any(map(is_image_file, _visible_files(folder)))  # this opens each file


def holds_images(field: str | None, dataset: str) -> bool:
    """Returns True if rows hold images: --image names their field, or --dataset their folder."""
    return field is not None or is_image_folder(dataset)


def labelled_images(folder: Path, split: str = "train") -> list[Row]:
    """Returns a row for each image in a folder that has a folder for each class.

    Folders of splits (train, test, validation) may lie in between: `photos/train/cat/1.jpg`. A row
    has the fields `image`, the path, and `label`, the name of the class's folder.

    Raises:
      UserError: there is no such split, or an image lies in no folder of a class.
    """
    splits = {path: _SPLITS.get(path.name.lower()) for path in _visible_folders(folder)}
    roots = [folder]
    if splits and all(splits.values()):
        roots = [path for path, name in splits.items() if name == split]
        if not roots:
            names = ", ".join(sorted({str(name) for name in splits.values()}))
            raise UserError(
                f"--split {split}: {folder} has no images of this split. Use one of its splits: "
                f"{names}."
            )
    elif split != "train":
        raise UserError(
            f"--split {split}: {folder} has folders of classes but no folders of splits. Remove "
            "--split, or sort the images into folders such as train and test."
        )
    rows: list[Row] = []
    for root in roots:
        images = _find_images(root)
        images_outside = [path for path in images if path.parent == root]
        if images_outside:
            raise UserError(
                f"{images_outside[0]} does not belong to a class. Move the images of each class "
                "into a "
                f"folder of {root} that is named after the class."
            )
        for path in images:
            rows.append({IMAGE_FIELD: str(path), "label": path.relative_to(root).parts[0]})
    return rows


def _visible_folders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir() and path.name[0] not in "._")


def _visible_files(folder: Path) -> Iterator[Path]:
    """Yields the files in a folder and its subfolders, except for hidden files."""
    for path in folder.rglob("*"):
        if path.is_file() and not _is_hidden(path, folder):
            yield path


def _is_hidden(path: Path, folder: Path) -> bool:
    """Returns True if a path or one of its parents inside the folder is hidden."""
    return any(name[0] in "._" for name in path.relative_to(folder).parts)


def _is_named_image(path: Path) -> bool:
    return path.suffix.lower() in IMAGE_KINDS


def _find_images(folder: Path) -> list[Path]:
    """Returns the images in a folder and its subfolders; prints the names of other files.

    The ending of a file or, with an unknown ending, its first bytes tell whether it is an image.
    """
    images: list[Path] = []
    skipped: list[str] = []
    for path in sorted(_visible_files(folder)):
        if _is_named_image(path) or is_image_file(path):
            images.append(path)
        else:
            skipped.append(str(path.relative_to(folder)))
    if images and skipped:
        n_unnamed = len(skipped) - _MAX_NAMED_FILES
        more = f" and {n_unnamed} more" if n_unnamed > 0 else ""
        print(
            f"{folder}: {len(skipped)} of {len(images) + len(skipped)} files are skipped, because "
            "they "
            f"are not images: {', '.join(skipped[:_MAX_NAMED_FILES])}{more}.",
            file=sys.stderr,
        )
    return images


def list_images(name: str) -> list[str]:
    """Returns the sorted paths of the images in a folder and its subfolders."""
    return sorted(map(str, _find_images(data_path(name))))


def locate_images(rows: list[Row], field: str, source: str) -> list[Row]:
    """Replaces image paths that are relative to the rows' file by paths that can be opened.

    Args:
      rows: the rows. A path that is not there is one beside the rows' file.
      field: the name of the image's field.
      source: the rows' file or folder.
    """
    folder = data_path(source)
    if not folder.is_dir():
        folder = folder.parent

    def locate(row: Row) -> Row:
        path = row[field]
        is_known = not isinstance(path, str) or Path(path).exists()
        if is_known or not (folder / path).is_file():
            return row
        return replace_values(row, {**row, field: str(folder / path)})

    return [locate(row) for row in rows]


def find_data_files(dataset: str, split: str = "train") -> list[Path] | None:
    """Finds the files of a dataset; returns None if the `datasets` library must load it.

    Raises:
      UserError: there is no such file, or none of that split in the folder.
    """
    path = data_path(dataset)
    if path.is_dir():
        is_saved = any((path / f"{name}.json").is_file() for name in ("state", "dataset_dict"))
        return None if is_saved else _find_files_of_split(path, split)
    if kind_of(dataset):
        if not path.is_file():
            raise UserError(f"--dataset {dataset} does not exist. Check the path.")
        return [path]
    if path.exists():
        kinds = ", ".join(FILE_KINDS)
        raise UserError(f"--dataset {dataset} has an unknown kind of file. Use one of: {kinds}.")
    return None


def load_dataset(dataset: str, *, split: str, subset: str | None) -> Any:
    """Loads a folder that `datasets` saved, or a dataset on the hub."""
    path = data_path(dataset)
    return _load_saved(path, split) if path.is_dir() else _load_hub(dataset, split, subset)


def read_file(path: Path) -> list[Row]:
    """Reads the rows of a file with one of the endings `FILE_KINDS`.

    Raises:
      UserError: the file cannot be read.
    """
    kind = kind_of(path.name)
    assert kind is not None, "not a file that read_rows takes"
    if kind == ".parquet":
        return _read_parquet(path)
    return _TEXT_READERS[kind.removesuffix(".gz")](path)


def _read_parquet(path: Path) -> list[Row]:
    """Reads the rows of a Parquet file."""
    import pyarrow
    import pyarrow.parquet

    with as_user_errors(pyarrow.ArrowException, OSError, prefix=f"{path} {NOT_PARQUET}"):
        rows = pyarrow.parquet.read_table(path).to_pylist()
    return [
        with_position(without_arrow_nulls(row), path, f"row {n}")
        for n, row in enumerate(rows, start=1)
    ]


def _find_files_of_split(folder: Path, split: str) -> list[Path]:
    """Returns the sorted paths of the data files of a split in a folder."""
    paths = sorted(path for path in _visible_files(folder) if kind_of(path.name))
    if not paths:
        raise UserError(
            f"--dataset {folder} holds no data. Name a folder that `datasets` saved, or a folder "
            "with "
            f"files of one of these kinds: {', '.join(FILE_KINDS)}."
        )
    splits = {path: _split_from_path(path.relative_to(folder)) for path in paths}
    chosen = [path for path in paths if splits[path] == split]
    if not chosen:
        present = ", ".join(sorted({*splits.values()}))
        raise UserError(
            f"--split {split}: {folder} has no files of this split. Use one of its splits: "
            f"{present}."
        )
    return chosen


def _split_from_path(path: Path) -> str:
    """Returns the split that the name of a file, or of the nearest folder above it, contains."""
    for name in (path.name, *path.parent.parts[::-1]):
        for word in re.split(r"[^a-z]+", name.lower()):
            if word in _SPLITS:
                return _SPLITS[word]
    return "train"


def _load_saved(folder: Path, split: str) -> Any:
    """Loads the split of a dataset that `datasets` saved in a folder."""
    import datasets

    problem = f"--dataset {folder} cannot be read as a saved dataset. Save the folder again. "
    with as_user_errors(Exception, prefix=problem):  # of a damaged folder, anything
        saved = datasets.load_from_disk(str(folder))
    if not isinstance(saved, datasets.DatasetDict):
        return saved
    if split not in saved:
        raise UserError(
            f"--split {split}: {folder} does not have this split. Use one of: {', '.join(saved)}."
        )
    return saved[split]


def _load_hub(name: str, split: str, subset: str | None) -> Any:
    """Loads a split of a dataset on the hub, or of its cached copy if the hub is unreachable."""
    import datasets
    import huggingface_hub

    # Without an answer, datasets would try again for half a minute before it looks into its cache.
    problem = probe_hub(name, kind="dataset")
    constants: Any = huggingface_hub.constants
    was_offline = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = problem is not None
    try:
        return datasets.load_dataset(name, subset, split=split)
    except Exception as error:  # any error of the hub's layers is about the given name
        raise UserError(
            f"--dataset {name} is not a file, and it cannot be loaded from the hub "
            f"(--split {split}, --subset {subset}): {problem or error}. Name a file, a dataset in "
            "the local cache, or a dataset on the hub that can be reached."
        ) from error
    finally:
        constants.HF_HUB_OFFLINE = was_offline


def read_dataset_rows(dataset: Any) -> list[Row]:
    """Returns the rows of a loaded dataset, and replaces class numbers by class names.

    Images stay as they are stored: a dict with their file's bytes or path.
    """
    import datasets

    # Keep images undecoded.
    kinds = dataset.features or {}
    stored = datasets.Image(decode=False)
    for name, kind in kinds.items():
        if isinstance(kind, datasets.Image):
            dataset = dataset.cast_column(name, stored)
        elif isinstance(getattr(kind, "feature", None), datasets.Image):
            dataset = dataset.cast_column(name, datasets.List(stored))
    classes = {n: kind for n, kind in kinds.items() if isinstance(kind, datasets.ClassLabel)}
    return [{**without_arrow_nulls(row), **_name_classes(row, classes)} for row in dataset]


def _name_classes(row: Row, classes: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the class names of a row's class numbers, without the number -1 (no class)."""
    names: dict[str, Any] = {}
    for field, feature in classes.items():
        number = row[field]
        if number is not None and number >= 0:
            names[field] = feature.int2str(number)
    return names


def without_arrow_nulls(row: Row) -> dict[str, Any]:
    """Removes the null fields that Arrow adds to the objects in chats."""
    return {
        name: _without_nulls(value) if name in _CHAT_FIELDS else value
        for name, value in row.items()
    }


def _without_nulls(value: Any) -> Any:
    """Removes null fields at any depth of a chat, except for a null content."""
    if isinstance(value, list):
        return [_without_nulls(element) for element in value]
    if isinstance(value, dict):
        return {
            name: _without_nulls(element)
            for name, element in value.items()
            if element is not None or name == "content"
        }
    return value


class NamedDataset(NamedTuple):
    """A data set's name or path, and its weight, which may be None."""

    name: str
    weight: float | None


def parse_datasets(values: Sequence[str]) -> list[NamedDataset]:
    """Returns the data sets that --dataset names: `a.jsonl`, or `a.jsonl:3 b.jsonl:1`.

    A colon belongs to the name if a file or a folder has that name, or if part of a path follows
    it rather than a number.

    Raises:
      UserError: none is named, one is named twice, a weight is not a positive number, or only
        some have weights.
    """
    named_datasets = [_parse_dataset(value) for value in values]
    names = [dataset.name for dataset in named_datasets]
    if not named_datasets:
        raise UserError(
            "--dataset names no data set. Name a file, a folder, or a dataset on the hub."
        )
    repeated_names = [name for name in names if names.count(name) > 1]
    if repeated_names:
        raise UserError(
            f"--dataset names {repeated_names[0]} twice. Name it once, and give it a larger weight "
            "if training should see it more often."
        )
    without_weight = [dataset.name for dataset in named_datasets if dataset.weight is None]
    if len(named_datasets) == 1 and not without_weight:
        raise UserError(
            f"--dataset {values[0]}: The weight has no effect on a single data set. Remove it "
            f"(--dataset {names[0]}), or name further data sets."
        )
    if 0 < len(without_weight) < len(named_datasets):
        raise UserError(
            f"--dataset {' '.join(values)}: {', '.join(without_weight)} has no weight, but other "
            "data "
            "sets do. Give all of them a weight, or none. Without weights, each row comes once per "
            "epoch."
        )
    return named_datasets


def _parse_dataset(text: str) -> NamedDataset:
    """Parses one value of --dataset into a name and a weight."""
    name, colon, weight = text.rpartition(":")
    if not colon or Path(text).expanduser().exists():
        return NamedDataset(text, None)
    try:
        number = float(weight)
    except ValueError:
        if kind_of(weight) or "/" in weight or "\\" in weight:
            return NamedDataset(text, None)
        raise UserError(
            f"--dataset {text}: {weight!r} is not a weight of {name}. {_WEIGHT_HINT}"
        ) from None
    if not (math.isfinite(number) and number > 0):
        raise UserError(f"--dataset {text}: The weight cannot be {weight}. {_WEIGHT_HINT}")
    if not name:
        raise UserError(
            f"--dataset {text} has a weight but no name. Put the name before the colon."
        )
    return NamedDataset(name, number)
