"""Lists, reads and writes objects of Google Cloud Storage, with checks of their generations.

An object appears at once or not at all, and each version of it has a number, its generation. A
store cannot rename or append. Requests with passing errors (503, a lost connection) are repeated
for `_RETRY_SECONDS`. Credentials are those of Google's own tools.
"""

import contextlib
import functools
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

_BUCKET_ADDRESS = re.compile(
    r"gs:/{1,2}([^/]+)/*(.*)", re.IGNORECASE | re.DOTALL
)  # `pathlib` drops a slash
_TIMEOUT_SECONDS = (10.0, 60.0)  # seconds to connect, and between two pieces of an answer
_RETRY_SECONDS = 120.0  # seconds in which a request is tried again
ABSENT = 0  # the generation of an object that is not there


class BucketError(OSError):
    """A bucket cannot be used, or it lacks an object or folder."""


class NotInBucket(BucketError):
    """An object or folder does not exist."""


class ObjectChanged(BucketError):
    """An object's generation differs from the requested one."""


class BucketPath(NamedTuple):
    """The address of an object, or of a folder of objects."""

    bucket: str
    name: str  # without slashes around it; "" for the bucket itself

    def __str__(self) -> str:
        return f"gs://{self.bucket}/{self.name}".rstrip("/")

    def __truediv__(self, name: str) -> "BucketPath":
        return BucketPath(self.bucket, f"{self.name}/{name}".strip("/"))


class ObjectFacts(NamedTuple):
    """The metadata of an object in the store."""

    generation: int
    size: int  # bytes
    crc32c: str  # of its content, in base64


def bucket_path(path: str | os.PathLike[str]) -> BucketPath | None:
    """Returns the parsed gs:// address, or None for other paths.

    >>> from lora_jax.buckets.store import bucket_path
    >>> bucket_path("gs://bucket/runs/mine/")
    BucketPath(bucket='bucket', name='runs/mine')
    >>> bucket_path("runs/mine") is None
    True
    """
    match = _BUCKET_ADDRESS.fullmatch(os.fspath(path))
    return None if match is None else BucketPath(match[1], match[2].strip("/"))


def list_objects(folder: BucketPath) -> dict[str, ObjectFacts]:
    """Returns the objects in a folder, at any depth, by their relative names."""
    prefix = f"{folder.name}/" if folder.name else ""
    with _explain_client_errors(folder):
        blobs = _client().list_blobs(
            folder.bucket, prefix=prefix, retry=_retry_policy(), timeout=_TIMEOUT_SECONDS
        )
        objects = {blob.name.removeprefix(prefix): _facts_of_blob(blob) for blob in blobs}
    outside_names = [n for n in objects if n.startswith("/") or ".." in n.split("/")]
    if outside_names:
        raise BucketError(
            f"{folder} has an object {outside_names[0]!r}, whose file would lie outside the "
            "folder. Delete or rename the object."
        )
    # An object whose name ends with a slash stands for a folder.
    return {name: facts for name, facts in objects.items() if name and not name.endswith("/")}


def find_object(path: BucketPath) -> ObjectFacts | None:
    """Returns an object's metadata; None if the object does not exist."""
    if not path.name:
        return None
    with _explain_client_errors(path):
        blob = (
            _client()
            .bucket(path.bucket)
            .get_blob(path.name, retry=_retry_policy(), timeout=_TIMEOUT_SECONDS)
        )
    return None if blob is None else _facts_of_blob(blob)


def read_object(path: BucketPath) -> tuple[bytes, int] | None:
    """Returns an object's content and generation; None if the object does not exist."""
    while True:
        facts = find_object(path)
        if facts is None:
            return None
        with _explain_client_errors(path):
            blob = _client().bucket(path.bucket).blob(path.name, generation=facts.generation)
            with contextlib.suppress(_not_found_error()):  # it was replaced meanwhile: try again
                content: bytes = blob.download_as_bytes(
                    retry=_retry_policy(), timeout=_TIMEOUT_SECONDS
                )
                return content, facts.generation


def download(path: BucketPath, generation: int, file: Path) -> None:
    """Downloads an object to a file, and checks its content against the store's checksum.

    Raises:
      ObjectChanged: the object has another generation by now, or is gone.
    """
    with _explain_client_errors(path):
        blob = _client().bucket(path.bucket).blob(path.name, generation=generation)
        try:
            blob.download_to_filename(
                file, retry=_retry_policy(), timeout=_TIMEOUT_SECONDS, checksum="crc32c"
            )
        except _not_found_error():
            raise ObjectChanged(
                f"{path} was replaced or deleted while it was read. Read it again."
            ) from None


def write_object(path: BucketPath, content: bytes | Path, generation: int | None = None) -> int:
    """Writes an object atomically, and returns its generation.

    Args:
      path: the address of the object.
      content: its content, or the file that holds it.
      generation: the generation that it must have until then, `ABSENT` for none; None for any.

    Raises:
      ObjectChanged: it has another one.
    """
    with _explain_client_errors(path):
        blob = _client().bucket(path.bucket).blob(path.name)
        is_in_memory = isinstance(content, bytes)
        upload = blob.upload_from_string if is_in_memory else blob.upload_from_filename
        upload(
            content,
            checksum="crc32c",
            retry=_retry_policy(),
            timeout=_TIMEOUT_SECONDS,
            if_generation_match=generation,
        )
    return int(blob.generation)


def delete_object(path: BucketPath, generation: int | None = None) -> bool:
    """Deletes an object; returns False if it does not exist or its generation differs."""
    try:
        with _explain_client_errors(path):
            blob = _client().bucket(path.bucket).blob(path.name)
            try:
                blob.delete(
                    retry=_retry_policy(), timeout=_TIMEOUT_SECONDS, if_generation_match=generation
                )
            except _not_found_error():
                return False
    except ObjectChanged:
        return False
    return True


def _facts_of_blob(blob: Any) -> ObjectFacts:
    return ObjectFacts(
        generation=int(blob.generation), size=int(blob.size or 0), crc32c=blob.crc32c or ""
    )


@functools.cache
def _client() -> Any:
    """Returns the storage client, which is created once and keeps its connections open."""
    return _storage_module().Client(project=None)  # a project is needed to make buckets alone


def _storage_module() -> Any:
    """Returns the module of Google's client; raises a BucketError if it is not installed."""
    try:
        from google.cloud import storage
    except ImportError:
        raise BucketError(
            "gs:// needs Google's client, which is not installed. Run pip install 'lora_jax[gcs]', "
            "or mount the bucket (gcsfuse BUCKET FOLDER) and name the folder where it is mounted."
        ) from None
    return storage


def _retry_policy() -> Any:
    from google.cloud.storage.retry import DEFAULT_RETRY

    return DEFAULT_RETRY.with_timeout(_RETRY_SECONDS)


def _not_found_error() -> type[Exception]:
    """Returns the class of the client's error for an object that does not exist."""
    from google.api_core.exceptions import NotFound

    error_class: type[Exception] = NotFound
    return error_class


@contextlib.contextmanager
def _explain_client_errors(path: BucketPath) -> Iterator[None]:
    """Converts the client's errors in a block to a BucketError with a remedy."""
    _storage_module()
    import requests
    from google.api_core import exceptions
    from google.auth.exceptions import DefaultCredentialsError, GoogleAuthError
    from google.cloud.storage.exceptions import DataCorruption

    try:
        yield
    except exceptions.PreconditionFailed:
        raise ObjectChanged(
            f"{path} was not written, because another process has changed it meanwhile. Try again."
        ) from None
    except exceptions.NotFound as error:
        raise BucketError(
            f"{path}: there is no bucket {path.bucket}, or your credentials may not see it. Check "
            "the name of the bucket and the credentials."
        ) from error
    except DefaultCredentialsError as error:
        raise BucketError(
            f"{path}: there are no credentials for Google Cloud Storage. Run `gcloud auth "
            "application-default login`, or set GOOGLE_APPLICATION_CREDENTIALS to the path of a "
            "service account's key."
        ) from error
    except (exceptions.Forbidden, exceptions.Unauthorized, GoogleAuthError) as error:
        raise BucketError(
            f"Google Cloud Storage refused access to {path} ({_first_line(error)}). Give your "
            f"credentials the role Storage Object User on the bucket {path.bucket}."
        ) from error
    except (exceptions.GoogleAPIError, requests.RequestException, DataCorruption) as error:
        raise BucketError(
            f"{path}: Google Cloud Storage did not answer within {_RETRY_SECONDS:.0f} seconds, or "
            f"refused ({_first_line(error)}). Run the same command again later."
        ) from error


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
