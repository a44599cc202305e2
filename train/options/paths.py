"""Options that take paths. Paths with a scheme, such as s3://, are refused before any work.

Every text that an option takes may be a path, or contain one (name=folder, file.py:function),
unless its type is `Words`. A path whose type is `Place` may be in a Google Cloud bucket, gs://.
"""

import dataclasses
import re
import typing
from collections.abc import Iterable, Iterator, Mapping
from typing import Annotated, Any

from lora_jax.buckets.store import bucket_path
from lora_jax.folders import remote_problem
from train.console.errors import UserError, flag

_TEXT_FILE_KINDS = (".jsonl", ".json", ".ndjson", ".csv", ".tsv")
# The endings of files of rows.
FILE_KINDS = (*_TEXT_FILE_KINDS, ".parquet", *(f"{kind}.gz" for kind in _TEXT_FILE_KINDS))
_NO_PATH, _IN_BUCKET = "no path", "may lie in a bucket"
# The type of a text that names no file: a prompt, an address. JAX reads schemes itself.
Words = Annotated[str, _NO_PATH]
Place = Annotated[str, _IN_BUCKET]  # the type of a path that may lie in a bucket, gs://
_NAME_PREFIX = re.compile(r"[\w.-]+=")  # the name in --adapter name=folder and in --fields


def check_paths(options: Any, lines: Mapping[str, int] | None = None, file: str = "") -> None:
    """Raises a UserError for an option whose value is a path with a scheme.

    Args:
      options: a dataclass of options, or of groups of options.
      lines: the options in a file, with the line of each.
      file: the name of that file.
    """
    for name, values, in_bucket in _options_with_texts(options):
        where = f" (line {lines[name]} of {file})" if lines and name in lines else ""
        check_local(name, values, where, in_bucket=in_bucket)


def check_local(
    name: str, values: Iterable[str], where: str = "", *, in_bucket: bool = False
) -> None:
    """Raises a UserError if one of an option's values is a path with a scheme.

    Args:
      name: the option.
      values: its values.
      where: the location of the option in a file, for the message; empty for the command line.
      in_bucket: whether the paths may be in a bucket, gs://.
    """
    for value in values:
        path = _NAME_PREFIX.sub("", value, count=1)
        if in_bucket and bucket_path(path):
            continue
        problem = remote_problem(path)
        if problem:
            raise UserError(f"{flag(name, value)}{where} {problem}")


def path_options(options: Any) -> Iterator[tuple[str, list[str]]]:
    """Yields each option that may take paths, with its texts."""
    for name, values, _ in _options_with_texts(options):
        yield name, values


def _options_with_texts(options: Any) -> Iterator[tuple[str, list[str], bool]]:
    """Yields each option that may take paths, its texts, and whether they may be in a bucket."""
    kinds = typing.get_type_hints(type(options), include_extras=True)
    for field in dataclasses.fields(options):
        value = getattr(options, field.name)
        if dataclasses.is_dataclass(value):
            yield from _options_with_texts(value)
            continue
        kind = kinds[field.name]
        components = list(_type_components(kind))
        takes_paths = str in components and _NO_PATH not in components
        if kind is Any or takes_paths:
            values = value if isinstance(value, tuple) else (value,)
            texts = [item for item in values if isinstance(item, str)]
            yield field.name, texts, _IN_BUCKET in components


def _type_components(kind: Any) -> Iterator[Any]:
    """Yields a type, its annotations and the types of its arguments. Values of a Literal are no
    components."""
    yield kind
    if typing.get_origin(kind) is typing.Literal:
        return
    if typing.get_origin(kind) is Annotated:
        yield from kind.__metadata__
    for argument in typing.get_args(kind):
        if isinstance(argument, type) or typing.get_origin(argument) is not None:
            yield from _type_components(argument)


def kind_of(name: str) -> str | None:
    """Returns the ending of `FILE_KINDS` that a file name has, in any case; None without one."""
    for kind in FILE_KINDS:
        if name.lower().endswith(kind):
            return kind
    return None
