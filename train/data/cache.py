"""Tokenised rows, kept for later runs in a folder of the user's."""

import hashlib
import io
import json
import os
import tempfile
from collections.abc import Sequence
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from lora_jax.hf.packaged import cache_folder
from lora_jax.training.batches import Tokens
from lora_jax.training.data.rows import Row

OFF = "off"
_FORMAT = b"lora_jax tokens 1\n"
_PACKAGES = ("transformers", "tokenizers", "jinja2")
_FEW = 1_000  # rows that are tokenised as fast as they are found, unless a folder is named
_MOST_BYTES = 4 * 2**30  # the files unused for longest make room


def place(asked: str | None, rows: Sequence[Row], tokenizer: Any, **options: Any) -> Path | None:
    """Returns the file that keeps these rows' tokens; None where they are not to be kept.

    Its name is a hash of all that the tokens depend on: the rows, the tokenizer with its chat
    template, the options, and the packages that render and tokenise.

    Args:
      asked: the option --token-cache: a folder, "off", or None for the user's cache folder.
      rows: the rows.
      tokenizer: the model's.
      options: further options of the tokenisation.
    """
    if asked == OFF or asked is None and len(rows) < _FEW:
        return None
    folder = cache_folder() / "tokens" if asked is None else Path(asked).expanduser().absolute()
    core = tokenizer.backend_tokenizer
    core.no_padding()  # as in every call for chats
    core.no_truncation()
    template = json.dumps(tokenizer.chat_template)
    today = str(date.today()) if "strftime_now" in template else ""  # some templates tell the date
    special = repr(sorted(tokenizer.special_tokens_map.items()))
    packages = repr([version(package) for package in _PACKAGES])
    made = hashlib.sha256(_FORMAT)
    for part in (core.to_str(), template, today, special, packages, repr(sorted(options.items()))):
        made.update(hashlib.sha256(part.encode()).digest())
    for row in rows:
        made.update(json.dumps(row, default=repr).encode() + b"\n")
    return folder / f"{made.hexdigest()[:32]}.tokens"


def read(path: Path) -> list[Tokens] | None:
    """Returns the tokens that a file keeps; None if there is none, or it is damaged."""
    try:
        data = path.read_bytes()
        os.utime(path)  # so that it is not the one unused for longest
    except OSError:
        return None
    start = len(_FORMAT) + hashlib.sha256().digest_size
    body = memoryview(data)[start:]
    if data[:start] != _FORMAT + hashlib.sha256(body).digest():
        return None
    file = io.BytesIO(body)
    ids, counts, lengths, rows = (np.load(file, allow_pickle=False) for _ in range(4))
    ends = np.cumsum(lengths)
    places = zip((ends - lengths).tolist(), ends.tolist(), rows.tolist(), strict=True)
    return [Tokens(ids[a:b], counts[a:b], row) for a, b, row in places]


def write(path: Path, sequences: Sequence[Tokens]) -> None:
    """Writes tokens to a file, whole or not at all; removes old files where they grow too many.

    Raises:
      OSError: the folder cannot be written.
    """
    file = io.BytesIO()
    for array in (
        np.concatenate([tokens.ids for tokens in sequences]),
        np.concatenate([tokens.counts for tokens in sequences]),
        np.array([len(tokens) for tokens in sequences]),
        np.array([tokens.row for tokens in sequences]),
    ):
        np.save(file, array, allow_pickle=False)
    body = file.getbuffer()
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".partial", delete=False) as partial:
        try:
            partial.write(_FORMAT + hashlib.sha256(body).digest())
            partial.write(body)
            partial.close()
            Path(partial.name).replace(path)
        except BaseException:
            Path(partial.name).unlink(missing_ok=True)
            raise
    _make_room(path)


def _make_room(newest: Path) -> None:
    files = {}
    for path in newest.parent.glob("*.tokens"):
        try:
            files[path] = path.stat()
        except OSError:  # another process removed it
            continue
    total = sum(status.st_size for status in files.values())
    for path in sorted(files, key=lambda path: files[path].st_mtime):
        if total <= _MOST_BYTES or path == newest:
            break
        path.unlink(missing_ok=True)
        total -= files[path].st_size
