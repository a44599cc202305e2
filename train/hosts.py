"""Many processes, each with its own devices, as one run: `jax.distributed`, and who does what."""

import hashlib
import pickle
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils
from rich.console import Console

from train.errors import UserError
from train.options import Options, RunConfig, as_json, flag

_ROUND = 2**24  # bytes of each process that are sent at once
_OF_ONE_PROCESS = ("coordinator", "process_id")  # whose options may differ from the others'

Item = TypeVar("Item")
Result = TypeVar("Result")


class _OfAll(UserError):
    """One that all processes raise at once."""


def join_hosts(run: RunConfig) -> None:
    """Makes this process one of many, if the options say so; before JAX looks for its devices.

    Raises UserError where the processes do not find each other.
    """
    if run.coordinator is None and not run.distributed:
        return
    try:
        jax.distributed.initialize(run.coordinator, run.num_processes, run.process_id)
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"the processes of this run do not find each other ({_first_line(error)}). Start "
            "the same command on every host: with --distributed where SLURM, a TPU pod, GKE or "
            "Open MPI says who is who, else with --coordinator, --num-processes, --process-id"
        ) from error


def is_first() -> bool:
    """Whether this process is the one that writes files and talks."""
    return jax.process_index() == 0


def console() -> Console:
    """Where to talk to; only the first process is heard."""
    return Console(quiet=not is_first())


def wait_for_all(what: str) -> None:
    """Returns when all processes have come here; `what` names the place."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(what)


def any_of_all(flag: bool) -> bool:
    """Whether the flag is set in one of the processes; all have to ask."""
    if jax.process_count() == 1:
        return flag
    flags: Any = multihost_utils.process_allgather(flag)
    return bool(flags.any())


@contextmanager
def together() -> Iterator[None]:
    """What one process cannot do, all leave: its UserError within is raised in each of them.

    Within, processes may meet in `shared_out` and `check_alike` alone: one that fails goes to the
    next meeting, wherever that is for the others, to say so.
    """
    try:
        yield
    except _OfAll:
        raise
    except UserError as error:
        if jax.process_count() > 1:
            _met(error)
        raise
    _met(None)


def check_alike(options: Options, **read: Any) -> None:
    """Raises UserError, in all processes, where one was started otherwise than the first.

    Args:
      read: what each has read, by name: rows, or whatever else shows all of itself as a text.
    """
    if jax.process_count() == 1:
        return
    given = as_json(options).items()
    facts = {flag(name): value for name, value in given if name not in _OF_ONE_PROCESS}
    facts |= {name: _digest(content) for name, content in read.items()}
    first, *others = _met(facts)
    differing = [
        f"process {number} has {name} {value}, not {first[name]}"
        for number, theirs in enumerate(others, start=1)
        for name, value in theirs.items()
        if value != first[name]
    ]
    if differing:
        raise _OfAll(
            f"the processes of this run were not started alike: {'; '.join(differing)}. All need "
            "the same options, and the same files"
        )


def shared_out(work: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
    """``[work(item) for item in items]``: each process works on its part, and all have the results.

    Raises the UserError of the first item that has one, in all processes.
    """
    n = jax.process_count()
    own: list[Any] = []
    for item in items[jax.process_index() :: n]:
        try:
            own.append(work(item))
        except UserError as error:
            own.append(error)
            break
    parts = _met(own)
    results = []
    for place in range(len(items)):
        result = parts[place % n][place // n]
        if isinstance(result, UserError):
            raise _OfAll(str(result))
        results.append(result)
    return results


def _met(own: Any) -> list[Any]:
    """What each process gave, in their order.

    Raises UserError, in all processes, where one gave that.
    """
    n = jax.process_count()
    parts = _exchanged(own) if n > 1 else [own]
    failed = {number: part for number, part in enumerate(parts) if isinstance(part, UserError)}
    if failed:
        number, error = next(iter(failed.items()))
        alike = len({str(error) for error in failed.values()}) == 1 and len(failed) == n
        raise _OfAll(str(error) if alike else f"process {number} of {n}: {error}")
    return parts


def _digest(content: Any) -> str:
    """Of a list's items, one by one, or of anything else."""
    made = hashlib.sha256()
    for item in content if isinstance(content, list) else [content]:
        made.update(repr(item).encode())
    return made.hexdigest()[:12]


def _exchanged(own: Any) -> list[Any]:
    """What each process gave, in their order; sent by way of the devices, a little at a time."""
    sent = np.frombuffer(pickle.dumps(own), np.uint8)
    counted: Any = multihost_utils.process_allgather(np.array(divmod(sent.size, _ROUND), np.int32))
    sizes = [int(rounds) * _ROUND + int(rest) for rounds, rest in counted]
    filled = np.pad(sent, (0, max(sizes) - sent.size))
    starts = range(0, max(sizes), _ROUND)
    rounds: Any = [
        multihost_utils.process_allgather(filled[start : start + _ROUND]) for start in starts
    ]
    received = np.concatenate(rounds, axis=1)
    return [pickle.loads(row[:size].tobytes()) for row, size in zip(received, sizes, strict=True)]


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
