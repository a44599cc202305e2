"""One run over many processes, each with its own devices (`jax.distributed`).

Processes exchange JSON text: a value as ``{"value": …}``, a failure as ``{"error": message}``.
"""

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils
from rich.console import Console

from lora_jax.training.errors import Dropped, Interrupted, TrainingError
from lora_jax.training.processes import is_first
from lora_jax.training.run.stop import Stop
from train.console.errors import UserError, flag

_ROUND_BYTES = 2**24  # bytes that each process sends at once

Item = TypeVar("Item")
Result = TypeVar("Result")
_Message = dict[str, Any]


class _SharedError(UserError):
    """An error that is raised in all processes at once."""


class Processes(Protocol):
    """Options that say which processes a run has."""

    @property
    def coordinator(self) -> str | None: ...
    @property
    def distributed(self) -> bool: ...
    @property
    def num_processes(self) -> int | None: ...
    @property
    def process_id(self) -> int | None: ...
    @property
    def heartbeat_timeout(self) -> int: ...


def join_hosts(run: Processes) -> None:
    """Joins this process to the others of a run, if the options ask for it.

    Call it before JAX looks for its devices.

    Args:
      run: the options that name the coordinator and this process.

    Raises:
      UserError: the processes do not find each other.
    """
    if run.coordinator is None and not run.distributed:
        return
    if hasattr(jax.config, "jax_enable_preemption_service"):
        # JAX would handle SIGTERM in the place of the run, and only take note of it.
        jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(
            run.coordinator,
            run.num_processes,
            run.process_id,
            heartbeat_timeout_seconds=jax_timeout(run),
        )
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"The processes of this run do not find each other ({_first_line(error)}). Start the "
            "same "
            "command on every host. Pass --distributed if SLURM, a TPU pod, GKE or Open MPI "
            "numbers "
            "the processes. Otherwise pass --coordinator, --num-processes and --process-id."
        ) from error
    if _is_alone_on_its_host(os.environ):
        # JAX gives it the first GPU alone, as if there were a process for each.
        for kind in ("cuda", "rocm"):
            jax.config.update(f"jax_{kind}_visible_devices", "all")


def _is_alone_on_its_host(variables: Mapping[str, str]) -> bool:
    """Returns True if SLURM or Open MPI starts one process per host, without chosen devices."""
    if "JAX_LOCAL_DEVICE_IDS" in variables:
        return False
    slurm_tasks = variables.get("SLURM_STEP_TASKS_PER_NODE", "")
    is_single_in_slurm = re.fullmatch(r"1(\(x\d+\))?", slurm_tasks) is not None
    return is_single_in_slurm or variables.get("OMPI_COMM_WORLD_LOCAL_SIZE") == "1"


def jax_timeout(run: Processes) -> int:
    """Returns the seconds after which JAX ends processes that have lost one.

    JAX counts from a process's last heartbeat, which comes twice in that time, and ends the others
    in an error of its own. It is the last resort, after what the processes tell each other.
    """
    return 2 * run.heartbeat_timeout + 20


def console() -> Console:
    """Returns the console to print to, which is quiet except in the first process."""
    return Console(quiet=not is_first())


@contextmanager
def raise_in_every_process() -> Iterator[None]:
    """Raises a UserError that one process raises in this context in every process.

    Within, processes may communicate only through `map_over_processes` and `check_alike`: a process
    that fails sends its error to the next such exchange of the others.
    """
    try:
        yield
    except _SharedError:
        raise
    except TrainingError as error:
        if jax.process_count() > 1:
            _gather_messages(_failure(error))
        raise
    _gather_messages(_success(None))


def check_alike(options: Mapping[str, Any], **read: Any) -> None:
    """Raises a UserError unless all processes have the same options and data.

    Args:
      options: this process's options by name, as JSON, but for those that may differ.
      read: the data of this process, by name: rows, or an object with a complete `repr`.

    Raises:
      UserError: a process differs from the first; raised in all processes.
    """
    if jax.process_count() == 1:
        return
    facts = {flag(name): value for name, value in options.items()}
    for name, content in read.items():
        facts[name] = _hash_content(content)
    first_facts, *facts_of_others = _gather_messages(_success(facts))
    differences = []
    for process, other_facts in enumerate(facts_of_others, start=1):
        for name, value in other_facts.items():
            if value != first_facts[name]:
                differences.append(f"process {process} has {name} {value}, not {first_facts[name]}")
    if differences:
        raise _SharedError(
            f"The processes of this run differ: {', '.join(differences)}. Start all of them with "
            "the "
            "same options and the same files."
        )


def map_over_processes(work: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
    """Returns ``[work(item) for item in items]``; each process does a part of the work.

    Args:
      work: the function to apply. Its results are sent as JSON: dicts with strings as keys, lists,
        strings, numbers, booleans and None.
      items: the same in all processes.

    Raises:
      UserError: `work` failed; the error of the first such item, raised in all processes.
      TypeError: there are many processes, and JSON cannot represent a result.
    """
    n_processes = jax.process_count()
    messages: list[_Message] = []  # of the items of this process
    for item in items[jax.process_index() :: n_processes]:
        try:
            messages.append(_success(work(item)))
        except TrainingError as error:
            messages.append(_failure(error))
            break
    messages_by_process = _gather_messages(_success(messages))
    results = []
    for index in range(len(items)):
        message = messages_by_process[index % n_processes][index // n_processes]
        if "error" in message:
            raise _SharedError(message["error"])
        results.append(message["value"])
    return results


def ask_first_process(
    work: Callable[[], Item], as_json: Callable[[Item], Result], stop: Stop
) -> Result:
    """Calls a function in the first process, and returns its result in all processes.

    Args:
      work: the work, which a signal interrupts.
      as_json: returns a result as JSON; see `map_over_processes`.
      stop: tells of a signal.

    Raises:
      Dropped: a signal came to the first process, before or meanwhile; raised in all processes.
      UserError: the work failed; raised in all processes.
    """

    def attempt(_: int) -> dict[str, Any]:
        """Calls the function; returns its result, or the signal that interrupted it."""
        try:
            with stop.dropping():
                result = work()
        except Interrupted:
            return {"signal": stop.signal}
        return {"result": as_json(result)}

    (answer,) = map_over_processes(attempt, range(1))
    if "signal" in answer:
        stop.signal = stop.signal or answer["signal"]
        raise Dropped
    result: Result = answer["result"]
    return result


def _success(value: Any) -> _Message:
    return {"value": value}


def _failure(error: TrainingError) -> _Message:
    return {"error": error.said(flag)}


def _gather_messages(message: _Message) -> list[Any]:
    """Returns the value of each process's message, in the order of the processes.

    Raises:
      UserError: a process sent an error; raised in all processes.
    """
    n_processes = jax.process_count()
    messages = _send_to_all(message) if n_processes > 1 else [message]
    errors = {}
    for process, sent_message in enumerate(messages):
        if "error" in sent_message:
            errors[process] = sent_message["error"]
    if errors:
        process = min(errors)
        error = errors[process]
        is_of_all = len(errors) == n_processes and len(set(errors.values())) == 1
        raise _SharedError(error if is_of_all else f"process {process} of {n_processes}: {error}")
    return [sent_message["value"] for sent_message in messages]


def gather(value: Any) -> list[Any]:
    """Returns the values of all processes in their order. The values must be valid JSON."""
    return _gather_messages(_success(value))


def _hash_content(content: Any) -> str:
    """Returns a hash of an object's `repr`; a list's items are hashed one by one."""
    digest = hashlib.sha256()
    for item in content if isinstance(content, list) else [content]:
        digest.update(repr(item).encode())
    return digest.hexdigest()[:12]


def _encode_json(value: Any) -> bytes:
    """Returns a value as JSON text.

    Raises:
      TypeError: JSON cannot represent it, or changes it (a tuple becomes a list).
    """
    needed = (
        "processes exchange only dicts with string keys, lists, strings, numbers, booleans, None"
    )
    try:
        text = json.dumps(value, separators=(",", ":"))
    except TypeError as error:
        raise TypeError(f"{needed}: {error}") from error
    if json.loads(text) != value:
        raise TypeError(f"{needed}: JSON changes {repr(value)[:200]}")
    return text.encode()


def _send_to_all(value: Any) -> list[Any]:
    """Returns the values of all processes, in the order of the processes.

    The values are sent through the devices, `_ROUND_BYTES` bytes of each at a time.
    """
    content = np.frombuffer(_encode_json(value), np.uint8)
    # Sizes are sent in two parts, as they may exceed an int32.
    size_parts = np.array(divmod(content.size, _ROUND_BYTES), np.int32)
    all_size_parts: Any = multihost_utils.process_allgather(size_parts)
    sizes = [int(n_rounds) * _ROUND_BYTES + int(n_rest) for n_rounds, n_rest in all_size_parts]
    max_size = max(sizes)
    padded_content = np.pad(content, (0, max_size - content.size))
    rounds: list[Any] = []
    for start in range(0, max_size, _ROUND_BYTES):
        round_content = padded_content[start : start + _ROUND_BYTES]
        rounds.append(multihost_utils.process_allgather(round_content))
    contents = np.concatenate(rounds, axis=1)
    values = []
    for process_content, size in zip(contents, sizes, strict=True):
        values.append(json.loads(process_content[:size].tobytes()))
    return values


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
