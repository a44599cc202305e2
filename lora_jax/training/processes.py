"""Many processes as one run: who writes files, and where all of them wait for one another."""

import json
import os
from pathlib import Path
from typing import Any

import jax
from jax.experimental import multihost_utils


def is_first() -> bool:
    """Returns whether this process is the one that writes files and talks."""
    return jax.process_index() == 0


def wait_for_all(what: str) -> None:
    """Waits until all processes have come here.

    Args:
      what: a name of the point, the same in all of them.
    """
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(what)


def any_process(flag: bool) -> bool:
    """Returns whether the flag is set in one of the processes; all have to call this."""
    if jax.process_count() == 1:
        return flag
    flags: Any = multihost_utils.process_allgather(flag)
    return bool(flags.any())


def write_json(path: Path, content: Any) -> None:
    """Writes JSON; the file is there whole or not at all. Of many processes, the first one does."""
    if not is_first():
        return
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n")
    os.replace(partial, path)
