"""Local copies of folders in buckets, for reading and writing.

A store cannot rename a folder. While this library writes a folder, the folder therefore contains a
mark (`UNFINISHED_MARK`), and a folder with the mark counts as missing. All objects of a folder are
read by the generations of one listing. A folder that is replaced meanwhile is read again.

The path of a copy is `…/lora_jax_bucket_<name>/gs/<bucket>/<path>`. `replace_copy_paths` turns it
into the address in the bucket. The *root* of a copy is its folder `lora_jax_bucket_<name>`. An
*address* names an object or a folder in a bucket.
"""

import contextlib
import functools
import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import jax
import numpy as np

from lora_jax.buckets.kept import (
    delete_unused_copies,
    drop_working_folder,
    hold_copy,
    make_working_folder,
)
from lora_jax.buckets.store import (
    BucketError,
    BucketPath,
    NotInBucket,
    ObjectChanged,
    ObjectFacts,
    bucket_path,
    delete_object,
    download,
    find_object,
    list_objects,
    write_object,
)
from lora_jax.folders import cache_folder, local_path

UNFINISHED_MARK = ".being_written"
_N_THREADS = 8  # each of which reads or writes an object
_MAX_TRIES = 5  # readings of a folder that somebody replaces meanwhile
COPY_PREFIX = "lora_jax_bucket_"  # of the names of folders that hold a copy
_COPY_IN_TEXT = re.compile(rf"[^\s'\"=]*{COPY_PREFIX}\w+/gs/")  # in a text
_COPY_PATH = re.compile(rf".*{COPY_PREFIX}\w+/gs/(.*)", re.DOTALL)  # a path, which may have spaces
_SMALL_FILE_SUFFIXES = (
    ".json",
    ".md",
    ".jinja",
    ".Modelfile",
)  # what a writer looks at in an earlier folder

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


def replace_copy_paths(text: str | os.PathLike[str]) -> str:
    """Returns a text with bucket addresses in place of the paths of local copies.

    >>> from lora_jax.buckets.copies import replace_copy_paths
    >>> replace_copy_paths("saved in /tmp/lora_jax_bucket_x1/gs/bucket/run/adapter")
    'saved in gs://bucket/run/adapter'
    """
    return _COPY_IN_TEXT.sub("gs://", os.fspath(text))


def is_copy(path: str | os.PathLike[str]) -> bool:
    """Returns True for a path in a local copy of a bucket's folder; each process has its own."""
    return bucket_address_of(path) is not None


def bucket_address_of(path: str | os.PathLike[str]) -> BucketPath | None:
    """Returns the bucket address that a local copy came from; None for other paths."""
    match = _COPY_PATH.fullmatch(os.fspath(path))
    return None if match is None else bucket_path(f"gs://{match[1]}")


def path_to_read(
    path: str | os.PathLike[str], is_wanted: Callable[[str], bool] = lambda name: True
) -> Path:
    """Returns a local path to read from: the path itself, or a copy of a bucket's folder.

    A copy is made once for each state of the folder, in the user's cache folder, where it stays
    while it is in use; see `lora_jax.buckets.kept`.

    Args:
      path: a path, or the address (gs://) of an object or a folder.
      is_wanted: picks the objects of a folder by their names within it.

    Raises:
      RemotePathError: another scheme, such as s3://.
      BucketError: there is no such object or folder, it is being written, or the bucket cannot be
        read.
    """
    address = bucket_path(path)
    if address is None:
        return local_path(path)
    for _ in range(_MAX_TRIES):
        objects_in_folder = list_finished_objects(address)
        objects = {name: facts for name, facts in objects_in_folder.items() if is_wanted(name)}
        if not objects_in_folder:
            # The address is no folder, so it must be a single object.
            facts = find_object(address)
            if facts is None:
                raise NotInBucket(
                    f"{address}: there is no such object or folder in the bucket. Check the "
                    "address."
                )
            objects = {"": facts}
        # The folder of the copy is named after the generations of its objects, so a changed folder
        # gets another copy.
        state = repr((address, sorted(objects.items())))
        digest = hashlib.sha256(state.encode()).hexdigest()[:24]
        root = cache_folder() / "buckets" / f"{COPY_PREFIX}{digest}"
        copy = path_of_copy(root, address)
        if hold_copy(root):
            return copy
        with contextlib.suppress(ObjectChanged):
            _make_copy(root, address, objects)
            hold_copy(root)
            return copy
    raise BucketError(
        f"{address} cannot be read, because another process keeps replacing it. Try again once "
        "that process has ended."
    )


def folder_with_files(path: str | os.PathLike[str], names: Container[str]) -> Path:
    """Returns a local folder with these files; for a bucket, a copy of only these files.

    The folder may be missing.
    """
    if bucket_path(path) is None:
        return Path(path).expanduser()
    try:
        return path_to_read(path, lambda name: name in names)
    except NotInBucket:
        return cache_folder() / "buckets" / "none"


def path_of_copy(root: Path, address: BucketPath) -> Path:
    """Returns the path of a copy in its root folder."""
    return root / "gs" / address.bucket / address.name


def _make_copy(root: Path, address: BucketPath, objects: Mapping[str, ObjectFacts]) -> None:
    """Downloads a folder's objects, or the object at the address (""), to a new folder."""
    root.parent.mkdir(parents=True, exist_ok=True)
    delete_unused_copies(root.parent)
    partial_root = Path(tempfile.mkdtemp(prefix=".partial", dir=root.parent))
    try:
        partial_copy = path_of_copy(partial_root, address)
        is_folder = "" not in objects
        if is_folder:
            partial_copy.mkdir(parents=True)
        fetch_objects(address, objects, partial_copy)
        with contextlib.suppress(OSError):  # where another process was faster
            partial_root.rename(root)
    finally:
        shutil.rmtree(partial_root, ignore_errors=True)


def list_finished_objects(folder: BucketPath) -> dict[str, ObjectFacts]:
    """Returns the objects of a folder, without subfolders that are still being written.

    Raises:
      BucketError: the folder itself is being written, or a kill interrupted the writing.
    """
    objects = list_objects(folder)
    unfinished_folders = []
    for name in objects:
        parent, slash, file = name.rpartition("/")
        if file == UNFINISHED_MARK:
            unfinished_folders.append(parent + slash)
    if "" in unfinished_folders:
        raise BucketError(
            f"{folder} is incomplete: another process is writing it, or was stopped while it "
            "wrote. Wait until it is written, or write it again with --overwrite (overwrite=True). "
            f"The object {folder / UNFINISHED_MARK} marks it as incomplete."
        )
    prefixes = tuple(unfinished_folders)
    return {name: facts for name, facts in objects.items() if not name.startswith(prefixes)}


def fetch_objects(address: BucketPath, objects: Mapping[str, ObjectFacts], folder: Path) -> None:
    """Downloads objects of a folder ("" for the address itself) to a local folder."""

    def fetch(name: str) -> None:
        file = folder / name if name else folder
        file.parent.mkdir(parents=True, exist_ok=True)
        download(address / name, objects[name].generation, file)

    run_parallel(fetch, objects)


def run_parallel(work: Callable[[str], object], names: Iterable[str]) -> None:
    """Calls `work` for each name in several threads; raises the first error."""
    with ThreadPoolExecutor(_N_THREADS) as pool:
        tasks = [pool.submit(work, name) for name in names]
        try:
            for task in tasks:
                task.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def upload_folder(folder: Path, address: BucketPath, unchanged: Container[str] = ()) -> None:
    """Uploads a local folder to a bucket, and replaces the folder there.

    Until all files are written, the folder counts as missing; see the module.

    Args:
      folder: the folder.
      address: the address of the folder in the bucket.
      unchanged: names of files whose objects stay as they are.
    """
    files = files_in(folder)
    objects = list_objects(address)
    write_object(address / UNFINISHED_MARK, b"")
    changed_files = [name for name in files if name not in unchanged]
    run_parallel(lambda name: write_object(address / name, folder / name), changed_files)
    deleted_files = sorted(set(objects) - {*files, UNFINISHED_MARK})
    run_parallel(lambda name: delete_object(address / name), deleted_files)
    delete_object(address / UNFINISHED_MARK)


def files_in(folder: Path) -> list[str]:
    """Returns the files in a folder, at any depth, as paths relative to it."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return sorted(path.relative_to(folder).as_posix() for path in files)


@contextlib.contextmanager
def path_to_write(path: str | os.PathLike[str], *, by_all: bool = False) -> Iterator[Path]:
    """Yields a local path to write to, and uploads what was written for a bucket.

    The path shows what the bucket contains already: small files have their content, and others are
    empty. A writer can thus refuse to replace a folder, or read its card.

    Args:
      path: a path, or the address (gs://) of a folder or a file.
      by_all: whether all processes write it together. Then the first one sends it to a bucket, and
        all go on once it is there; otherwise, the calling process sends it.
    """
    address = bucket_path(path)
    if address is None:
        yield local_path(path)
        return
    root = make_working_folder(COPY_PREFIX)
    try:
        copy = path_of_copy(root, address)
        with _barrier(address, by_all):  # all read the bucket before the first process changes it
            copy.parent.mkdir(parents=True)
            _fetch_outline(address, copy)
        fetched_states = _file_states(copy)
        is_sender = jax.process_index() == 0 or not by_all  # the only one that changes the bucket
        with _barrier(address, by_all):
            yield copy
            states = _file_states(copy)
            if states != fetched_states and is_sender:
                if copy.is_file():
                    write_object(address, copy)
                else:
                    # Of the files that were not written, the copy may have the names alone.
                    unchanged = {n for n, state in states.items() if fetched_states.get(n) == state}
                    upload_folder(copy, address, unchanged)
    except Exception as error:
        error.args = tuple(
            replace_copy_paths(arg) if isinstance(arg, str) else arg for arg in error.args
        )
        raise
    finally:
        drop_working_folder(root)


@contextlib.contextmanager
def _barrier(address: BucketPath, by_all: bool) -> Iterator[None]:
    """Makes all processes leave a block together; an error in one is raised in all."""
    problem = None
    try:
        yield
    except Exception as error:
        problem = error
    if by_all and jax.process_count() > 1:
        from jax.experimental import multihost_utils

        has_failed = np.array(problem is not None)
        failed_processes: Any = multihost_utils.process_allgather(has_failed)
        if problem is None and failed_processes.any():
            raise BucketError(
                f"Process {int(failed_processes.argmax())} could not read or write {address}. See "
                "the message of that process."
            )
    if problem is not None:
        raise problem


def _file_states(copy: Path) -> dict[str, tuple[int, int]]:
    """Returns the mtime and size of each file; "" stands for the copy itself."""
    paths = {"": copy}
    if copy.is_dir():
        paths = {name: copy / name for name in files_in(copy)}
    states = {}
    for name, path in paths.items():
        if path.is_file():
            status = path.stat()
            states[name] = (status.st_mtime_ns, status.st_size)
    return states


def _fetch_outline(address: BucketPath, copy: Path) -> None:
    """Creates the files of a bucket's folder locally; only small files get their content."""
    objects = list_objects(address)
    objects.pop(UNFINISHED_MARK, None)  # a kill left the mark, so the folder may be replaced
    for name in objects:
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        (copy / name).touch()
    small_objects = {
        name: facts for name, facts in objects.items() if name.endswith(_SMALL_FILE_SUFFIXES)
    }
    fetch_objects(address, small_objects, copy)
    is_file = not objects and find_object(address) is not None
    if is_file:
        copy.touch()


def writes_to_buckets(
    *, by_all: bool
) -> Callable[[Callable[Arguments, Result]], Callable[Arguments, Result]]:
    """Decorates a function so that its first argument `folder` may be a gs:// address.

    Args:
      by_all: whether all processes call the function together; see `path_to_write`.
    """

    def decorate(save: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
        """Returns the decorated function."""

        @functools.wraps(save)
        def save_anywhere(*args: Arguments.args, **options: Arguments.kwargs) -> Result:
            """Calls the function with a local folder, and uploads it."""
            folder: Any = args[0] if args else options["folder"]
            if bucket_path(folder) is None:
                return save(*args, **options)
            other_args: Any = args[1:]
            other_options = {name: value for name, value in options.items() if name != "folder"}
            save_to: Callable[..., Result] = save
            with path_to_write(folder, by_all=by_all) as local_folder:
                return save_to(local_folder, *other_args, **other_options)

        return save_anywhere

    return decorate
