"""Caches tokenised rows for later runs, in a folder of the user."""

import hashlib
import json
import os
import tempfile
from collections.abc import Sequence
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

from lora_jax.folders import cache_folder
from lora_jax.training.data.sequences import Sequences
from lora_jax.training.data.templates import tells_today

OFF = "off"
_FORMAT = b"lora_jax tokens 6\n"
_HASH_DIGITS = 24  # of each hash in a file's name
_PACKAGES = ("transformers", "tokenizers", "jinja2")
MIN_CACHED_ROWS = (
    1_000  # fewer rows are tokenised as fast as they are found: kept only in a named folder
)
_MAX_FOLDER_BYTES = 4 * 2**30  # the files unused for longest make room


def token_file_path(
    token_cache: str | None, key: str, tokenizer: Any, **options: Any
) -> Path | None:
    """Returns the path of the file that caches the tokens of some rows; None without a cache.

    Its name has two hashes: of the rows, and of what else the tokens depend on, which is the
    tokenizer with its chat template, the options, and the packages that render and tokenise.

    Args:
      token_cache: the option: a folder, "off", or None for the user's cache folder.
      key: a hash of the rows.
      tokenizer: the model's.
      options: further options of the tokenisation.
    """
    if token_cache == OFF:
        return None
    core = tokenizer.backend_tokenizer
    core.no_padding()  # as in every call for chats
    core.no_truncation()
    template = tokenizer.chat_template  # a text, or a text for each name
    templates = template.values() if isinstance(template, dict) else [template or ""]
    dependencies = (
        core.to_str(),
        json.dumps(template),
        str(date.today()) if any(map(tells_today, templates)) else "",
        repr(sorted(tokenizer.special_tokens_map.items())),
        repr([version(package) for package in _PACKAGES]),
        repr(sorted(options.items())),
    )
    digest = hashlib.sha256(_FORMAT)
    for dependency in dependencies:
        digest.update(hashlib.sha256(dependency.encode()).digest())
    return (
        _token_folder(token_cache) / f"{_row_hash(key)}-{digest.hexdigest()[:_HASH_DIGITS]}.tokens"
    )


def has_tokens(token_cache: str | None, key: str) -> bool:
    """Returns True if an earlier run cached the tokens of these rows, which makes them valid."""
    return token_cache != OFF and any(_token_folder(token_cache).glob(f"{_row_hash(key)}-*.tokens"))


def _token_folder(token_cache: str | None) -> Path:
    """Returns the folder that holds the cached tokens."""
    if token_cache is None:
        return cache_folder() / "tokens"
    return Path(token_cache).expanduser().absolute()


def _row_hash(key: str) -> str:
    """Returns the hash with which the names of the token files of some rows begin."""
    return hashlib.sha256(_FORMAT + key.encode()).hexdigest()[:_HASH_DIGITS]


def cache_file_path(token_cache: str | None, name: str) -> Path | None:
    """Returns the path of a named file in the token cache; None without a cache."""
    return None if token_cache == OFF else _token_folder(token_cache) / f"{name}.tokens"


def read_tokens(path: Path) -> Sequences | None:
    """Reads the tokens in a cache file; None if the file is missing or damaged."""
    body = read_cache_file(path)
    return None if body is None else Sequences.from_bytes(body)


def read_cache_file(path: Path) -> memoryview | None:
    """Reads the bytes that `write` stored in a file; None if the file is missing or damaged."""
    try:
        data = path.read_bytes()
        os.utime(path)  # marks the file as recently used
    except OSError:
        return None
    # A file begins with the format and a hash of the bytes that follow.
    start = len(_FORMAT) + hashlib.sha256().digest_size
    body = memoryview(data)[start:]
    if data[:start] != _FORMAT + hashlib.sha256(body).digest():
        return None
    return body


def write(path: Path, parts: Sequence[bytes | memoryview]) -> None:
    """Writes a cache file atomically, and removes the oldest files while the folder is too large.

    Args:
      path: the file.
      parts: its content, such as `Sequences.as_bytes` returns it.

    Raises:
      OSError: the folder cannot be written.
    """
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".partial", delete=False) as partial:
        try:
            partial.write(_FORMAT + digest.digest())
            for part in parts:
                partial.write(part)
            partial.close()
            Path(partial.name).replace(path)
        except BaseException:
            Path(partial.name).unlink(missing_ok=True)
            raise
    _remove_files_over_limit(path)


def _remove_files_over_limit(newest: Path) -> None:
    """Removes the least recently used files until the folder is within its limit."""
    status_of_file = {}
    for path in newest.parent.glob("*.tokens"):
        try:
            status_of_file[path] = path.stat()
        except OSError:  # another process removed it
            continue
    total_bytes = sum(status.st_size for status in status_of_file.values())
    for path in sorted(status_of_file, key=lambda path: status_of_file[path].st_mtime):
        if total_bytes <= _MAX_FOLDER_BYTES or path == newest:
            break
        path.unlink(missing_ok=True)
        total_bytes -= status_of_file[path].st_size
