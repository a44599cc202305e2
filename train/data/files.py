"""Reads the rows of a dataset: from files, from a folder, or from the hub; parses --dataset."""

import math
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lora_jax.buckets.copies import readable
from lora_jax.buckets.store import BucketError
from lora_jax.hf.hub import probe_hub
from lora_jax.hf.images import is_image_file
from lora_jax.training.data.rows import Row, replace_values
from train.console.errors import UserError, as_user_errors
from train.data.text_files import placed, read_csv, read_json
from train.options.paths import FILE_KINDS, kind_of

_TEXTS: dict[str, Callable[[Path], list[Any]]] = {
    ".jsonl": read_json,
    ".json": read_json,
    ".ndjson": read_json,
    ".csv": read_csv,
    ".tsv": read_csv,
}
NO_PARQUET = "cannot be read as Parquet: "  # before what pyarrow says
IMAGE_KINDS = tuple(".jpg .jpeg .png .webp .gif .bmp .tif .tiff .ppm .pgm".split())
IMAGE_FIELD = "image"  # of a folder's rows
# The splits that files are named after, by the word in their name.
_SPLITS = {"train": "train", "training": "train", "test": "test", "testing": "test"}
_SPLITS |= {name: "validation" for name in ("validation", "valid", "val", "dev", "eval")}
_WEIGHT_FORM = "a weight is a positive number, such as a.jsonl:3 b.jsonl:1"
_MOST_NAMED = 5  # files that a line names
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
    elif (paths := files_of(dataset, split)) is not None:
        rows = [row for path in paths for row in read_file(path)]
    else:
        rows = rows_of(load(dataset, split=split, subset=subset))
    if not rows:
        raise UserError(f"--dataset {dataset} has no rows")
    return rows


def data_path(name: str) -> Path:
    """Returns the path of a file or a folder of data: of one in a bucket, that of its copy.

    Raises:
      UserError: there is none in the bucket, or the bucket cannot be read.
    """
    with as_user_errors(BucketError, prefix="--dataset "):
        return readable(name).expanduser()


def is_image_folder(name: str) -> bool:
    """Returns True if a folder holds images, and no file of rows."""
    folder = data_path(name)
    if any(kind_of(path.name) for pattern in ("*", "*/*") for path in folder.glob(pattern)):
        return False  # it has files of rows
    is_named = any(map(_is_named_image, _files_under(folder)))
    return is_named or any(map(is_image_file, _files_under(folder)))  # this opens each file


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
    splits = {path: _SPLITS.get(path.name.lower()) for path in _folders_in(folder)}
    roots = [folder]
    if splits and all(splits.values()):
        roots = [path for path, name in splits.items() if name == split]
        if not roots:
            names = ", ".join(sorted({str(name) for name in splits.values()}))
            raise UserError(f"--split {split}: the images in {folder} are of the splits {names}")
    elif split != "train":
        raise UserError(f"--split {split}: {folder} has a folder for each class, and no splits")
    rows: list[Row] = []
    for root in roots:
        images = _images_in(root)
        images_outside = [path for path in images if path.parent == root]
        if images_outside:
            raise UserError(
                f"{images_outside[0]} lies in no folder of a class: {root} needs one for each "
                "class, with its images"
            )
        for path in images:
            rows.append({IMAGE_FIELD: str(path), "label": path.relative_to(root).parts[0]})
    return rows


def _folders_in(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir() and path.name[0] not in "._")


def _files_under(folder: Path) -> Iterator[Path]:
    """Yields the files in a folder, at any depth, but for those that are hidden."""
    for path in folder.rglob("*"):
        if path.is_file() and not _is_hidden(path, folder):
            yield path


def _is_hidden(path: Path, folder: Path) -> bool:
    """Returns True if a path below a folder, or a folder on the way to it, is hidden."""
    return any(name[0] in "._" for name in path.relative_to(folder).parts)


def _is_named_image(path: Path) -> bool:
    return path.suffix.lower() in IMAGE_KINDS


def _images_in(folder: Path) -> list[Path]:
    """Returns the images in a folder, at any depth; says on stderr which files are none.

    A file is one by its ending or, with another ending or none, by how it begins.
    """
    images: list[Path] = []
    skipped: list[str] = []
    for path in sorted(_files_under(folder)):
        if _is_named_image(path) or is_image_file(path):
            images.append(path)
        else:
            skipped.append(str(path.relative_to(folder)))
    if images and skipped:
        n_unnamed = len(skipped) - _MOST_NAMED
        more = f" and {n_unnamed} more" if n_unnamed > 0 else ""
        print(
            f"{folder}: left out {len(skipped)} of {len(images) + len(skipped)} files, from which "
            f"no image can be read: {', '.join(skipped[:_MOST_NAMED])}{more}",
            file=sys.stderr,
        )
    return images


def images_of(name: str) -> list[str]:
    """Returns the paths of the images in a folder, at any depth, in their order."""
    return sorted(map(str, _images_in(data_path(name))))


def locate_images(rows: list[Row], field: str, source: str) -> list[Row]:
    """Returns rows with the paths of their images as they are found from here.

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


def files_of(dataset: str, split: str = "train") -> list[Path] | None:
    """Returns the files that a dataset is made of; None if `datasets` has to load it.

    Raises:
      UserError: there is no such file, or none of that split in the folder.
    """
    path = data_path(dataset)
    if path.is_dir():
        is_saved = any((path / f"{name}.json").is_file() for name in ("state", "dataset_dict"))
        return None if is_saved else _files_in(path, split)
    if kind_of(dataset):
        if not path.is_file():
            raise UserError(f"--dataset {dataset}: there is no such file")
        return [path]
    if path.exists():
        kinds = ", ".join(FILE_KINDS)
        raise UserError(f"--dataset {dataset}: a file of one of the kinds {kinds} is needed")
    return None


def load(dataset: str, *, split: str, subset: str | None) -> Any:
    """Loads by `datasets` a folder that it saved, or a dataset on the hub."""
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
    return _TEXTS[kind.removesuffix(".gz")](path)


def _read_parquet(path: Path) -> list[Row]:
    import pyarrow
    import pyarrow.parquet

    with as_user_errors(pyarrow.ArrowException, OSError, prefix=f"{path} {NO_PARQUET}"):
        rows = pyarrow.parquet.read_table(path).to_pylist()
    return [placed(rows_of_arrow(row), path, f"row {n}") for n, row in enumerate(rows, start=1)]


def _files_in(folder: Path, split: str) -> list[Path]:
    """Returns the files of a folder that are of a split, in the order of their names."""
    paths = sorted(path for path in _files_under(folder) if kind_of(path.name))
    if not paths:
        raise UserError(
            f"--dataset {folder}: the folder has no file of one of the kinds "
            f"{', '.join(FILE_KINDS)}, and is none that `datasets` saved"
        )
    splits = {path: _split_of(path.relative_to(folder)) for path in paths}
    chosen = [path for path in paths if splits[path] == split]
    if not chosen:
        present = ", ".join(sorted({*splits.values()}))
        raise UserError(f"--split {split}: the files in {folder} are of the splits {present}")
    return chosen


def _split_of(path: Path) -> str:
    """Returns the split that a file's name, or else the name of a folder above it, has in it."""
    for name in (path.name, *path.parent.parts[::-1]):
        for word in re.split(r"[^a-z]+", name.lower()):
            if word in _SPLITS:
                return _SPLITS[word]
    return "train"


def _load_saved(folder: Path, split: str) -> Any:
    import datasets

    problem = f"--dataset {folder} cannot be read as a saved dataset: "
    with as_user_errors(Exception, prefix=problem):  # of a damaged folder, anything
        saved = datasets.load_from_disk(str(folder))
    if not isinstance(saved, datasets.DatasetDict):
        return saved
    if split not in saved:
        raise UserError(f"--split {split}: {folder} has the splits {', '.join(saved)}")
    return saved[split]


def _load_hub(name: str, split: str, subset: str | None) -> Any:
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
            f"--dataset {name} is neither a file nor a dataset that can be loaded from the hub "
            f"(--split {split}, --subset {subset}): {problem or error}. Give a file, a dataset "
            "that is in the local cache, or a name on the hub that can be reached"
        ) from error
    finally:
        constants.HF_HUB_OFFLINE = was_offline


def rows_of(dataset: Any) -> list[Row]:
    """Returns the rows of a loaded dataset, with names in the place of class numbers.

    Images stay as they are stored: a dict with their file's bytes or path.
    """
    import datasets

    kinds = dataset.features or {}
    stored = datasets.Image(decode=False)
    for name, kind in kinds.items():
        if isinstance(kind, datasets.Image):
            dataset = dataset.cast_column(name, stored)
        elif isinstance(getattr(kind, "feature", None), datasets.Image):
            dataset = dataset.cast_column(name, datasets.List(stored))
    classes = {n: kind for n, kind in kinds.items() if isinstance(kind, datasets.ClassLabel)}
    return [{**rows_of_arrow(row), **_class_names(row, classes)} for row in dataset]


def _class_names(row: Row, classes: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the row's class numbers as the dataset's class names; leaves out -1 (no class)."""
    names: dict[str, Any] = {}
    for field, feature in classes.items():
        number = row[field]
        if number is not None and number >= 0:
            names[field] = feature.int2str(number)
    return names


def rows_of_arrow(row: Row) -> dict[str, Any]:
    """Returns a row without the null fields that Arrow adds to the objects in chats."""
    return {
        name: _without_nulls(value) if name in _CHAT_FIELDS else value
        for name, value in row.items()
    }


def _without_nulls(value: Any) -> Any:
    """Returns a value of a chat's field without null fields, at any depth; a null content stays."""
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
    """A data set's name or path, and its weight; None where none was given."""

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
        raise UserError("--dataset names no data set: give a file, a folder, or a name on the hub")
    repeated_names = [name for name in names if names.count(name) > 1]
    if repeated_names:
        raise UserError(
            f"--dataset names {repeated_names[0]} twice: give it once, with a larger weight if it "
            "is to be seen more often"
        )
    without_weight = [dataset.name for dataset in named_datasets if dataset.weight is None]
    if len(named_datasets) == 1 and not without_weight:
        raise UserError(
            f"--dataset {values[0]}: a weight has no effect on a single data set; name "
            f"{names[0]} alone, or others beside it"
        )
    if 0 < len(without_weight) < len(named_datasets):
        raise UserError(
            f"--dataset {' '.join(values)}: {', '.join(without_weight)} has no weight, and others "
            "have: give all of them a weight, or none (each row then comes once an epoch)"
        )
    return named_datasets


def _parse_dataset(text: str) -> NamedDataset:
    """Returns the data set that one value of --dataset names, with its weight."""
    name, colon, weight = text.rpartition(":")
    if not colon or Path(text).expanduser().exists():
        return NamedDataset(text, None)
    try:
        number = float(weight)
    except ValueError:
        if kind_of(weight) or "/" in weight or "\\" in weight:
            return NamedDataset(text, None)
        raise UserError(
            f"--dataset {text}: {weight!r} is not a weight of {name}; {_WEIGHT_FORM}"
        ) from None
    if not (math.isfinite(number) and number > 0):
        raise UserError(f"--dataset {text}: {_WEIGHT_FORM}, not {weight}")
    if not name:
        raise UserError(f"--dataset {text} has a weight and no name")
    return NamedDataset(name, number)
