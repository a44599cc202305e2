"""The objects of Google Cloud Storage: listed, read and written, each whole and by its generation.

An object appears at once or not at all, and each version of it has a number, its generation. What a
store cannot do is to rename or to append. Errors that pass (503, a connection that is cut) are
tried again for `_PATIENCE` seconds. Credentials are those of Google's own tools.
"""

import contextlib
import functools
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

_BUCKET = re.compile(
    r"gs:/{1,2}([^/]+)/*(.*)", re.IGNORECASE | re.DOTALL
)  # `pathlib` drops a slash
_TIMEOUT = (10.0, 60.0)  # seconds to connect, and between two pieces of an answer
_PATIENCE = 120.0  # seconds in which a request is tried again
ABSENT = 0  # the generation of an object that is not there


class BucketError(OSError):
    """A bucket that cannot be used, or an object or folder that is not in it."""


class NotInBucket(BucketError):
    """There is no such object or folder."""


class ObjectChanged(BucketError):
    """An object has another generation than the one that was asked for."""


class BucketPath(NamedTuple):
    """The address of an object, or of a folder of them."""

    bucket: str
    name: str  # without slashes around it; "" for the bucket itself

    def __str__(self) -> str:
        return f"gs://{self.bucket}/{self.name}".rstrip("/")

    def __truediv__(self, name: str) -> "BucketPath":
        return BucketPath(self.bucket, f"{self.name}/{name}".strip("/"))


class ObjectFacts(NamedTuple):
    """An object as the store describes it."""

    generation: int
    size: int  # bytes
    crc32c: str  # of its content, in base64


def bucket_path(path: str | os.PathLike[str]) -> BucketPath | None:
    """Returns the address in a bucket that a path names; None for other paths.

    >>> from lora_jax.buckets.store import bucket_path
    >>> bucket_path("gs://bucket/runs/mine/")
    BucketPath(bucket='bucket', name='runs/mine')
    >>> bucket_path("runs/mine") is None
    True
    """
    match = _BUCKET.fullmatch(os.fspath(path))
    return None if match is None else BucketPath(match[1], match[2].strip("/"))


def list_objects(folder: BucketPath) -> dict[str, ObjectFacts]:
    """Returns the objects under a folder, at any depth, by their names within it."""
    prefix = f"{folder.name}/" if folder.name else ""
    with _errors(folder):
        blobs = _client().list_blobs(folder.bucket, prefix=prefix, retry=_retry(), timeout=_TIMEOUT)
        objects = {blob.name.removeprefix(prefix): _facts(blob) for blob in blobs}
    outside_names = [n for n in objects if n.startswith("/") or ".." in n.split("/")]
    if outside_names:
        raise BucketError(
            f"{folder} has an object {outside_names[0]!r}, which as a file would lie outside the "
            "folder: delete or rename it"
        )
    # An object whose name ends with a slash stands for a folder.
    return {name: facts for name, facts in objects.items() if name and not name.endswith("/")}


def find_object(path: BucketPath) -> ObjectFacts | None:
    """Returns an object's facts; None if there is no such object."""
    if not path.name:
        return None
    with _errors(path):
        blob = _client().bucket(path.bucket).get_blob(path.name, retry=_retry(), timeout=_TIMEOUT)
    return None if blob is None else _facts(blob)


def read_object(path: BucketPath) -> tuple[bytes, int] | None:
    """Returns an object's content and generation; None if there is no such object."""
    while True:
        facts = find_object(path)
        if facts is None:
            return None
        with _errors(path):
            blob = _client().bucket(path.bucket).blob(path.name, generation=facts.generation)
            with contextlib.suppress(_not_there()):  # it was replaced in between
                content: bytes = blob.download_as_bytes(retry=_retry(), timeout=_TIMEOUT)
                return content, facts.generation


def download(path: BucketPath, generation: int, file: Path) -> None:
    """Writes an object to a file, after checking what came against the store's checksum.

    Raises:
      ObjectChanged: the object has another generation by now, or is gone.
    """
    with _errors(path):
        blob = _client().bucket(path.bucket).blob(path.name, generation=generation)
        try:
            blob.download_to_filename(file, retry=_retry(), timeout=_TIMEOUT, checksum="crc32c")
        except _not_there():
            raise ObjectChanged(f"{path} was replaced or deleted while it was read") from None


def write_object(path: BucketPath, content: bytes | Path, generation: int | None = None) -> int:
    """Writes an object, which appears whole; returns its generation.

    Args:
      path: the address of the object.
      content: its content, or the file that holds it.
      generation: the generation that it must have until then, `ABSENT` for none; None for any.

    Raises:
      ObjectChanged: it has another one.
    """
    with _errors(path):
        blob = _client().bucket(path.bucket).blob(path.name)
        is_in_memory = isinstance(content, bytes)
        upload = blob.upload_from_string if is_in_memory else blob.upload_from_filename
        upload(
            content,
            checksum="crc32c",
            retry=_retry(),
            timeout=_TIMEOUT,
            if_generation_match=generation,
        )
    return int(blob.generation)


def delete_object(path: BucketPath, generation: int | None = None) -> bool:
    """Deletes an object; returns False where it is gone, or has another generation."""
    try:
        with _errors(path):
            blob = _client().bucket(path.bucket).blob(path.name)
            try:
                blob.delete(retry=_retry(), timeout=_TIMEOUT, if_generation_match=generation)
            except _not_there():
                return False
    except ObjectChanged:
        return False
    return True


def _facts(blob: Any) -> ObjectFacts:
    return ObjectFacts(
        generation=int(blob.generation), size=int(blob.size or 0), crc32c=blob.crc32c or ""
    )


@functools.cache
def _client() -> Any:
    """Returns the client, made once: it keeps its connections open."""
    return _storage().Client(project=None)  # a project is needed to make buckets alone


def _storage() -> Any:
    """Returns the module of Google's client; a BucketError says how to install it."""
    try:
        from google.cloud import storage
    except ImportError:
        raise BucketError(
            "gs:// needs Google's client: pip install 'lora_jax[gcs]', or mount the bucket "
            "(gcsfuse BUCKET FOLDER), and name the folder where it is mounted"
        ) from None
    return storage


def _retry() -> Any:
    from google.cloud.storage.retry import DEFAULT_RETRY

    return DEFAULT_RETRY.with_timeout(_PATIENCE)


def _not_there() -> type[Exception]:
    """Returns the client's error for an object that is not there."""
    from google.api_core.exceptions import NotFound

    error_class: type[Exception] = NotFound
    return error_class


@contextlib.contextmanager
def _errors(path: BucketPath) -> Iterator[None]:
    """Turns the client's errors within into a BucketError that names the path and a remedy."""
    _storage()
    import requests
    from google.api_core import exceptions
    from google.auth.exceptions import DefaultCredentialsError, GoogleAuthError
    from google.cloud.storage.exceptions import DataCorruption

    try:
        yield
    except exceptions.PreconditionFailed:
        raise ObjectChanged(f"{path} was changed by somebody else") from None
    except exceptions.NotFound as error:
        raise BucketError(
            f"{path}: there is no bucket {path.bucket}, or none that these credentials may see"
        ) from error
    except DefaultCredentialsError as error:
        raise BucketError(
            f"{path}: there are no credentials for Google Cloud Storage: run `gcloud auth "
            "application-default login`, or give the path of a service account's key in "
            "GOOGLE_APPLICATION_CREDENTIALS"
        ) from error
    except (exceptions.Forbidden, exceptions.Unauthorized, GoogleAuthError) as error:
        raise BucketError(
            f"{path} is refused ({_first_line(error)}): give these credentials the role Storage "
            f"Object User on the bucket {path.bucket}"
        ) from error
    except (exceptions.GoogleAPIError, requests.RequestException, DataCorruption) as error:
        raise BucketError(
            f"{path}: the store did not answer for {_PATIENCE:.0f} seconds or refused "
            f"({_first_line(error)}): run the same command again once it does"
        ) from error


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
