"""Tokenises chats, or reads their cached tokens. Each process does a part of the work."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
from rich.console import Console

from lora_jax.training.data import chats
from lora_jax.training.data.sequences import MapFunction, Sequences
from train.console.output import tell
from train.console.progress import progress_of
from train.data import cache
from train.data.dataset import Dataset
from train.processes import hosts


def tokenize(
    dataset: Dataset,
    tokenizer: Any,
    *,
    work: Callable[..., Sequences] = chats.tokenize,
    write: bool = True,
    **options: Any,
) -> Sequences:
    """Returns the rows as token sequences; see `lora_jax.training.data.chats.tokenize`.

    The rows are read only where no earlier run kept their tokens.

    Args:
      dataset: the rows.
      tokenizer: the model's.
      work: tokenises the rows; `tokenize_pairs`, say.
      write: whether tokens may be kept for later runs.
      options: further options of `work`.
    """
    console, source = hosts.console(), dataset.name
    path = cache.token_file_path(
        dataset.kept_in, dataset.key, tokenizer, work=work.__qualname__, **options
    )
    cached = None if path is None else cache.read_tokens(path)
    # All processes tokenise together, or none does.
    everywhere = hosts.map_over_processes(lambda _: cached is not None, range(jax.process_count()))
    if cached is not None and all(everywhere):
        tell(console, f"The tokens of {source} come from an earlier run ({path}).")
        return cached
    if path is not None and path.exists() and cached is None:
        tell(console, f"warning: {path} is damaged, so {source} is tokenised again.")
    rows = dataset.rows()
    tokens = work(
        rows,
        tokenizer,
        source,
        mapped=_map_with_progress(console, len(rows)),
        say=lambda lines: tell(console, *lines),
        **options,
    )
    if path and write and (dataset.kept_in is not None or len(rows) >= cache.MIN_CACHED_ROWS):
        try:
            cache.write(path, tokens.as_bytes())
            tell(console, f"The tokens of {source} are cached in {path}.")
        except OSError as error:
            tell(
                console,
                f"warning: The tokens of {source} are not cached, because {path.parent} cannot be "
                f"written ({error.strerror or error}). Name another folder with --token-cache, or "
                "pass --token-cache off.",
            )
    return tokens


def _map_with_progress(console: Console, n: int) -> MapFunction:
    """Returns `map_over_processes` with a progress bar over `n` rows."""

    def mapped(work: Callable[[Any], Any], items: Sequence[Any]) -> list[Any]:
        """Maps a function over items, in all processes and with a progress bar."""
        with progress_of(n, "tokenising", "tokenised", "rows", console=console) as progress:

            def counted(item: Any) -> Any:
                result = work(item)
                progress(min(n, item + chats.BLOCK))  # the other processes are about as far
                return result

            return hosts.map_over_processes(counted, items)

    return mapped
