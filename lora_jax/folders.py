"""Local paths, and folders that are written atomically.

A folder is written under a hidden name beside its path, the **partial** folder, and renamed then.
"""

import contextlib
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

TEMPLATE_FILE = "chat_template.jinja"  # name that transformers reads, of a model or an adapter
# A scheme of two letters at least: C: is a drive. `pathlib` writes one slash for two.
_SCHEME = re.compile(r"([a-z][a-z0-9+.-]+):(//?)", re.IGNORECASE)
_HUB = re.compile(
    r"(?:hf://?|https?://?(?:www\.)?(?:huggingface\.co|hf\.co)/)"
    r"(?:(datasets|models|spaces)/)?([\w.-]+/[\w.-]+)",
    re.IGNORECASE,
)
_MOUNT_COMMANDS = {
    "gs": "gcsfuse BUCKET FOLDER",
    "s3": "mount-s3 BUCKET FOLDER",
    **dict.fromkeys(("az", "abfs", "abfss", "wasb", "wasbs"), "blobfuse2 mount FOLDER"),
}
_KNOWN_SCHEMES = {*_MOUNT_COMMANDS, *"file hf http https hdfs ftp s3a r2 oci".split()}


class RemotePathError(ValueError):
    """A path has a scheme, such as gs://, where a local path is needed."""


def local_path(path: str | os.PathLike[str]) -> Path:
    """Returns a local path.

    Raises:
      RemotePathError: it has a scheme; the message says what to do.

    >>> from lora_jax.folders import local_path
    >>> local_path("gs://bucket/run")
    Traceback (most recent call last):
        ...
    lora_jax.folders.RemotePathError: gs://bucket/run is no path of this machine. Mount the bucket \
with `gcsfuse BUCKET FOLDER`, and pass the mounted folder.
    """
    problem = remote_problem(path)
    if problem is not None:
        raise RemotePathError(f"{os.fspath(path)} {problem}")
    return Path(path)


def remote_problem(path: str | os.PathLike[str]) -> str | None:
    """Returns the end of an error message about a path with a scheme; None without a scheme.

    The message begins with the path.
    """
    text = os.fspath(path)
    match = _SCHEME.match(text)
    if match is None:
        return None
    scheme = match[1].lower()
    has_one_slash = match[2] == "/"  # a name before a colon, unless it is a known scheme
    if has_one_slash and scheme not in _KNOWN_SCHEMES:
        return None
    problem = "is no path of this machine."
    if scheme == "file":
        path_after_scheme = text[match.end() :].lstrip("/")
        return f"{problem} Remove the scheme, and pass /{path_after_scheme}."
    hub_match = _HUB.match(text)
    if hub_match:
        repository_kind, repository_name = hub_match.groups()
        if repository_kind is not None and repository_kind.lower() == "spaces":
            return (
                f"{problem} A space of the Hub is neither a model nor data. Clone the space to use "
                "its files."
            )
        return f"{problem} Pass a name of the Hub without a scheme, {repository_name}."
    mount_command = _MOUNT_COMMANDS.get(scheme)
    if mount_command:
        return f"{problem} Mount the bucket with `{mount_command}`, and pass the mounted folder."
    return (
        f"{problem} Copy the files to this machine, or mount them (a bucket with gcsfuse), and "
        "pass that path."
    )


def cache_folder() -> Path:
    """Returns the folder ``lora_jax`` in XDG_CACHE_HOME, or in ~/.cache."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "lora_jax"


@contextlib.contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Yields a partial folder to write to, and renames it to `folder` at the end.

    After an error, `folder` is unchanged, and the partial folder is deleted.
    """
    partial = partial_folder_of(folder)
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        yield partial
        replace_folder(partial, folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def check_writable(folder: Path, overwrite: bool, marker: str, kind: str) -> None:
    """Checks that a folder may be created or replaced.

    Args:
      folder: the folder.
      overwrite: whether an existing folder may be replaced.
      marker: the file that every folder of this kind has; a folder without it is not replaced.
      kind: "a model" or "an adapter", for messages.

    Raises:
      FileExistsError: the folder exists, or is of another kind.
    """
    if not folder.exists():
        return
    if not overwrite:
        raise FileExistsError(
            f"{folder} already exists. Name another folder, or pass overwrite=True to replace it."
        )
    if not folder.is_dir() or (any(folder.iterdir()) and not (folder / marker).exists()):
        raise FileExistsError(
            f"{folder} does not contain {marker}, so it is not the folder of {kind}, and "
            "overwrite=True would delete its files. Name another folder."
        )


def partial_folder_of(folder: Path) -> Path:
    """Returns the path of the hidden partial folder beside a folder."""
    return folder.with_name(f".{folder.name}.partial")


def replace_folder(partial: Path, folder: Path) -> None:
    """Renames `partial` to `folder`, and deletes the folder that was there before."""
    if not folder.exists():
        partial.rename(folder)
        return
    # Move the old folder aside, and back if the new one cannot be put in its place.
    replaced_folder = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(replaced_folder, ignore_errors=True)
    folder.rename(replaced_folder)
    try:
        partial.rename(folder)
    except BaseException:
        if not folder.exists():
            replaced_folder.rename(folder)
        raise
    shutil.rmtree(replaced_folder)
