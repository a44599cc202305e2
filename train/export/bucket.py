"""An export whose folder is in a bucket: written on this machine first."""

import contextlib
import dataclasses
from collections.abc import Iterator

from lora_jax.buckets.copies import staged
from lora_jax.buckets.store import bucket_path
from train.console.errors import UserError
from train.export.options import ExportOptions


@contextlib.contextmanager
def local_output(options: ExportOptions) -> Iterator[ExportOptions]:
    """Yields the options with a folder of this machine, which is sent to the bucket at the end.

    Raises:
      UserError: the output is or holds an input.
    """
    place = None if options.output is None else bucket_path(options.output)
    if options.output is None or place is None:
        yield options
        return
    for given in (options.adapter, options.model):
        source = None if given is None else bucket_path(given)
        if source is not None and f"{source}/".startswith(f"{place}/"):
            raise UserError(f"--output {place} is or holds {given}, an input: name another one")
    with staged(options.output) as folder:
        yield dataclasses.replace(options, output=str(folder))
