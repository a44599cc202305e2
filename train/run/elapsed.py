"""The time that a run takes, over all processes that work on it."""

import contextlib
import time
from collections.abc import Iterable
from pathlib import Path

from lora_jax.training.processes import write_json
from lora_jax.training.run.log import duration
from train.processes.session import Session
from train.reporters.files import read_json
from train.run.log import read_metrics
from train.run.output import FACTS, PROCESS_SECONDS


def note_seconds(folder: Path, session: Session) -> None:
    """Notes in the facts of a run how long this process has worked so far.

    A process before it that was killed worked at least until its last line of metrics. Without
    facts, or where they cannot be written, nothing is noted.

    Args:
      folder: the folder of a run that has begun.
      session: the session of this process.
    """
    facts = read_json(folder / FACTS)
    if not facts:
        return
    seconds = facts.setdefault(PROCESS_SECONDS, {})
    this_process = str(session.began_at)
    if seconds and this_process not in seconds:
        last_process = [*seconds][-1]
        ends = [line["time"] for line in read_metrics(folder)]
        spans = [end - float(last_process) for end in ends]
        seconds[last_process] = max([seconds[last_process], *spans])
    seconds[this_process] = time.monotonic() - session.began
    with contextlib.suppress(OSError):
        write_json(folder / FACTS, facts)


def whole_time(folders: Iterable[Path], session: Session) -> str:
    """Returns the time of runs in words: "3 min 20 s", or "3 min 20 s in 2 processes".

    Args:
      folders: the folders of the runs. A process that worked on several of them counts once.
      session: the session of this process, which works until now.
    """
    seconds = {str(session.began_at): time.monotonic() - session.began}
    for folder in folders:
        for process, noted in read_json(folder / FACTS).get(PROCESS_SECONDS, {}).items():
            seconds[process] = max(noted, seconds.get(process, 0))
    took = duration(sum(seconds.values()))
    return f"{took} in {len(seconds)} processes" if len(seconds) > 1 else took
