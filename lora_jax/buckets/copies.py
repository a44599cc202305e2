"""Copies of folders in buckets on this machine, to read and to write.

A store has no renames, so a folder that this library writes has a mark (`MARK`) in it from before
its first object changes until after the last one has: with the mark, it counts as not there. Each
object is read by the generation that one listing named, so a folder that is replaced meanwhile is
read again, and never as a mixture.

A copy lies in `…/lora_jax_bucket_<name>/gs/<bucket>/<path>`: its path says where it comes from,
and `shown` writes it so.
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
    drop_working_folder,
    hold,
    make_room,
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

MARK = ".being_written"
_AT_ONCE = 8  # objects
_TRIES = 5  # readings of a folder that somebody replaces meanwhile
PREFIX = "lora_jax_bucket_"  # of the names of folders that hold a copy
_COPY = re.compile(rf"[^\s'\"=]*{PREFIX}\w+/gs/")  # in a text
_WHOLE = re.compile(rf".*{PREFIX}\w+/gs/(.*)", re.DOTALL)  # a path, which may have spaces
_SMALL = (".json", ".md", ".jinja", ".Modelfile")  # what a writer looks at in an earlier folder

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


def shown(text: str | os.PathLike[str]) -> str:
    """Returns a text with the addresses of buckets in the place of their copies' paths.

    >>> from lora_jax.buckets.copies import shown
    >>> shown("saved in /tmp/lora_jax_bucket_x1/gs/bucket/run/adapter")
    'saved in gs://bucket/run/adapter'
    """
    return _COPY.sub("gs://", os.fspath(text))


def is_copy(path: str | os.PathLike[str]) -> bool:
    """Returns True for a path in a copy, which each process has of its own."""
    return origin(path) is not None


def origin(path: str | os.PathLike[str]) -> BucketPath | None:
    """Returns the place in a bucket of which a path is a copy; None for other paths."""
    match = _WHOLE.fullmatch(os.fspath(path))
    return None if match is None else bucket_path(f"gs://{match[1]}")


def readable(
    path: str | os.PathLike[str], wanted: Callable[[str], bool] = lambda name: True
) -> Path:
    """Returns a path of this machine: a path as it is, or the copy of what lies in a bucket.

    A copy is made once for each state of the folder, in the user's cache folder, where it stays
    while it is in use; see `lora_jax.buckets.kept`.

    Args:
      path: a path, or the address (gs://) of an object or a folder.
      wanted: picks the objects of a folder by their names within it.

    Raises:
      RemotePathError: another scheme, such as s3://.
      BucketError: there is no such object or folder, it is being written, or the bucket cannot be
        read.
    """
    place = bucket_path(path)
    if place is None:
        return local_path(path)
    for _ in range(_TRIES):
        objects = whole_objects(place)
        picked = {name: facts for name, facts in objects.items() if wanted(name)}
        if not objects:
            facts = find_object(place)
            if facts is None:
                raise NotInBucket(f"{place}: there is no such object or folder in the bucket")
            picked = {"": facts}
        made = hashlib.sha256(repr((place, sorted(picked.items()))).encode()).hexdigest()[:24]
        root = cache_folder() / "buckets" / f"{PREFIX}{made}"
        copy = copy_in(root, place)
        if hold(root):
            return copy
        with contextlib.suppress(ObjectChanged):
            _make_copy(root, place, picked)
            hold(root)
            return copy
    raise BucketError(f"{place}: somebody replaces it again and again while it is read")


def glimpse(path: str | os.PathLike[str], names: Container[str]) -> Path:
    """Returns a folder of which some files are looked at: of one in a bucket, a copy of these.

    It need not be there.
    """
    if bucket_path(path) is None:
        return Path(path).expanduser()
    try:
        return readable(path, lambda name: name in names)
    except NotInBucket:
        return cache_folder() / "buckets" / "none"


def copy_in(root: Path, place: BucketPath) -> Path:
    """Returns the path of a copy in its root folder."""
    return root / "gs" / place.bucket / place.name


def _make_copy(root: Path, place: BucketPath, objects: Mapping[str, ObjectFacts]) -> None:
    root.parent.mkdir(parents=True, exist_ok=True)
    make_room(root.parent)
    partial = Path(tempfile.mkdtemp(prefix=".partial", dir=root.parent))
    try:
        if "" not in objects:
            copy_in(partial, place).mkdir(parents=True)
        fetch_objects(place, objects, copy_in(partial, place))
        with contextlib.suppress(OSError):  # where another process was faster
            partial.rename(root)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def whole_objects(folder: BucketPath) -> dict[str, ObjectFacts]:
    """Returns the objects of a folder, without folders in it that are being written.

    Raises:
      BucketError: the folder itself is being written, or a kill left it so.
    """
    objects = list_objects(folder)
    marked = [name.removesuffix(MARK) for name in objects if name.split("/")[-1] == MARK]
    if "" in marked:
        raise BucketError(
            f"{folder} is being written, or a kill left it half-written: wait, or write it again "
            f"with --overwrite (overwrite=True). Its mark is {folder / MARK}"
        )
    return {n: facts for n, facts in objects.items() if not n.startswith((*marked, "\0"))}


def fetch_objects(place: BucketPath, objects: Mapping[str, ObjectFacts], folder: Path) -> None:
    """Copies objects of a folder ("" for the place itself) to a folder of this machine."""

    def fetch(name: str) -> None:
        file = folder / name if name else folder
        file.parent.mkdir(parents=True, exist_ok=True)
        download(place / name, objects[name].generation, file)

    run_parallel(fetch, objects)


def run_parallel(work: Callable[[str], object], names: Iterable[str]) -> None:
    """Does some work for each name, several at once; raises the first error."""
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        tasks = [pool.submit(work, name) for name in names]
        try:
            for task in tasks:
                task.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def publish(folder: Path, place: BucketPath, same: Container[str] = ()) -> None:
    """Writes a folder of this machine to a bucket, in the place of what is there.

    Until all of it is there, the folder counts as not there; see the module.

    Args:
      folder: the folder.
      place: its place in the bucket.
      same: names of files whose objects stay as they are.
    """
    files = files_in(folder)
    before = list_objects(place)
    write_object(place / MARK, b"")
    changed = [name for name in files if name not in same]
    run_parallel(lambda name: write_object(place / name, folder / name), changed)
    run_parallel(lambda name: delete_object(place / name), sorted({*before} - {*files, MARK}))
    delete_object(place / MARK)


def files_in(folder: Path) -> list[str]:
    """Returns the files in a folder, at any depth, by their names within it."""
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


@contextlib.contextmanager
def staged(path: str | os.PathLike[str], *, by_all: bool = False) -> Iterator[Path]:
    """Gives a path of this machine to write a folder or a file to; one in a bucket is sent there.

    What a bucket has already is there in part, so that a writer that refuses to replace it does so,
    and one that keeps a card can read it: small files with their content, others empty.

    Args:
      path: a path, or the address (gs://) of a folder or a file.
      by_all: whether all processes write it together. Then the first one sends it to a bucket, and
        all go on once it is there; otherwise, the calling process sends it.
    """
    place = bucket_path(path)
    if place is None:
        yield local_path(path)
        return
    root = make_working_folder(PREFIX)
    try:
        copy = copy_in(root, place)
        with _barrier(place, by_all):  # before the first one changes what is there
            copy.parent.mkdir(parents=True)
            _fetch_outline(place, copy)
        before = _states(copy)
        with _barrier(place, by_all):
            yield copy
            after = _states(copy)
            same = {name for name, state in after.items() if before.get(name) == state}
            if after != before and (jax.process_index() == 0 or not by_all):
                if copy.is_file():
                    write_object(place, copy)
                else:  # what was not written is there in part alone
                    publish(copy, place, same)
    except Exception as error:
        error.args = tuple(shown(x) if isinstance(x, str) else x for x in error.args)
        raise
    finally:
        drop_working_folder(root)


@contextlib.contextmanager
def _barrier(place: BucketPath, by_all: bool) -> Iterator[None]:
    """Lets all processes end a block at once, and an error in one of them end it in all."""
    problem = None
    try:
        yield
    except Exception as error:
        problem = error
    if by_all and jax.process_count() > 1:
        from jax.experimental import multihost_utils

        failed: Any = multihost_utils.process_allgather(np.array(problem is not None))
        if problem is None and failed.any():
            raise BucketError(
                f"{place} could not be read or written by process {int(failed.argmax())}, which "
                "says why"
            )
    if problem is not None:
        raise problem


def _states(copy: Path) -> dict[str, tuple[int, int]]:
    """Returns the time of the last change and the size of each file; "" stands for the copy."""
    files = {name: copy / name for name in files_in(copy)} if copy.is_dir() else {"": copy}
    facts = {name: file.stat() for name, file in files.items() if file.is_file()}
    return {name: (stat.st_mtime_ns, stat.st_size) for name, stat in facts.items()}


def _fetch_outline(place: BucketPath, copy: Path) -> None:
    objects = list_objects(place)
    objects.pop(MARK, None)  # a kill left it: what is there may be replaced
    for name in objects:
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        (copy / name).touch()
    fetch_objects(place, {n: f for n, f in objects.items() if n.endswith(_SMALL)}, copy)
    if not objects and find_object(place) is not None:
        copy.touch()


def writes_to_buckets(
    *, by_all: bool
) -> Callable[[Callable[Arguments, Result]], Callable[Arguments, Result]]:
    """Lets a function whose first argument, the `folder`, it writes take one in a bucket, too.

    Args:
      by_all: whether all processes call the function together; see `staged`.
    """

    def decorate(save: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
        @functools.wraps(save)
        def save_anywhere(*args: Arguments.args, **options: Arguments.kwargs) -> Result:
            folder: Any = args[0] if args else options["folder"]
            if bucket_path(folder) is None:
                return save(*args, **options)
            with staged(folder, by_all=by_all) as local:
                others: Any = args[1:] if args else ()
                call: Callable[..., Result] = save
                return call(local, *others, **{k: v for k, v in options.items() if k != "folder"})

        return save_anywhere

    return decorate
