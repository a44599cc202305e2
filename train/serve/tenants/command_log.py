"""The command log, which passes each command to the engine once, in order, and replays it later.

Those that wait for a command that never comes get an error after a while.
"""

import dataclasses
import itertools
import json
import logging
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Protocol

from train.serve.protocol.engine import EngineProtocol
from train.serve.protocol.requests import (
    Client,
    Command,
    CommandResult,
    Create,
    Discard,
    Gradient,
    Load,
    RequestError,
    Save,
    Update,
)
from train.serve.storage.database import LockedError
from train.serve.storage.folders import adapter_name
from train.serve.storage.ledger import DISCARD, MISSING, REFUSED, Ledger, Row
from train.serve.storage.results import ResultWriter, error_answer
from train.serve.tenants.loading import (
    TenantLoader,
    TenantLog,
    TenantProgress,
    TenantTable,
    first_missing_seq,
    queue_load_of,
)
from train.serve.tenants.parking import StateFolders, TenantParking
from train.serve.tenants.seats import Seats

_logger = logging.getLogger(__name__)
_LOCK_SECONDS = 5.0  # for which a command waits for the lock
_MAX_SEQ_AHEAD = 10_000  # a command's number is at most so far beyond the next one's


class BusyError(Exception):
    """The error for a request that must be repeated later, because too many are pending."""


class CommandCodec(Protocol):
    """Reads commands from the log, and writes the answers to them."""

    def read(self, row: Row) -> Command:
        """Returns the command of a row; raises a RequestError if it is invalid."""

    def write(self, row: Row, result: CommandResult) -> bytes:
        """Returns the answer to a row's command."""


@dataclasses.dataclass(frozen=True)
class LogLimits:
    """Limits of a command log.

    Attributes:
      every, most_bytes: a state is saved after so many commands, or bytes of them.
      queue: the most `load` of a tenant.
    """

    every: int = 32
    most_bytes: int = 64 * 2**20
    queue: int = 1024


class CommandLog:
    """Commits commands to the ledger, and then passes them to the engine in order.

    Now and then, after an update, a tenant's state is saved, and the log before it is forgotten.
    After a restart the last state is loaded, and the commands since are executed again.

    In the same way a tenant is parked that was silent for a while, or whose room another needs: it
    leaves the engine, and comes back at its next command.
    """

    def __init__(
        self,
        engine: EngineProtocol,
        ledger: Ledger,
        folder: Path,
        codec: CommandCodec,
        wake: Callable[[str, str | None], None],
        *,
        seats: Seats | None = None,
        limits: LogLimits = LogLimits(),
        clock: Callable[[], float] = time.time,
    ):
        """Starts the thread that writes results.

        Args:
          engine: executes.
          ledger: remembers.
          folder: where states, snapshots and checkpoints go.
          codec: reads commands, and writes answers.
          wake: see `ResultWriter`.
          seats: the room for tenants in the engine; by default for any number.
          limits: limits of the log.
          clock: gives the time that is shown.
        """
        self._engine = engine
        self._ledger = ledger
        self.folder = folder
        self._codec = codec
        self._limits = limits
        self._clock = clock
        self._results = ResultWriter(ledger, codec.write, wake, self._remove)
        self._seats = seats or Seats()
        self._table = TenantTable(engine, self._results, self._seats)
        self._tenants = self._table.tenants
        self._lock = self._table.lock
        self.states = StateFolders(ledger, folder / "states")
        loader = TenantLoader(self._table, self, codec.read)
        self.parking = TenantParking(self._table, self, loader, self.states)
        self.gaps = CommandGaps(self._table, self)

    def close(self) -> None:
        """Writes the pending results, and stops."""
        self._results.close()

    def name(self, folder: Path | str) -> str:
        """Returns the engine's name of the adapter in a folder."""
        return adapter_name(folder, self.folder)

    def model_folder(self, kind: str, model: str) -> Path:
        """Returns a model's folder of checkpoints or of snapshots."""
        return self.folder / kind / model.replace(":", "-")

    def accept(
        self,
        model: str,
        seq: int,
        kind: str,
        payload: bytes,
        prepare: Callable[[], tuple[Path | None, str | None]] = lambda: (None, None),
        command: Command | None = None,
    ) -> str:
        """Commits a command, and submits all commands that are next in order.

        Args:
          model: the tenant; the ledger knows it, or `prepare` adds it for number 0.
          seq: its number.
          kind: its name.
          payload: what `read` makes it from.
          prepare: returns the folder and the target that the ledger notes.
          command: the command, if it was read already.

        Returns:
          The id of the request; that of the first if it came before.

        Raises:
          RequestError: It is wrong, or its number is. If `prepare` or `read` raised it, the number
            is used up all the same, so that later ones do not wait for it.
          BusyError: The queue is full, or many wait for the ledger.
          LockedError, FullError: the ledger cannot be written.
        """
        with self._hold_lock():
            # A command that came before has its id already.
            repeated_row = self._ledger.command(model, seq)
            if repeated_row is not None:
                _check_repeat(repeated_row, kind)
                return f"{model}:{seq}"
            tenant = self._tenants.get(model, TenantProgress(0))
            self._check_order(model, seq, tenant)
            refusal = None
            # Write the command into the ledger, or note that it was refused.
            try:
                with self._ledger.transaction():
                    folder, target = prepare()
                    row = self._ledger.log(model, seq, kind, payload, folder, target)
                    command = command or self._codec.read(row)
                if model not in self._tenants:
                    tenant.client = _client(self._ledger.model(model))
                self._tenants[model] = tenant
            except RequestError as error:
                if seq == 0:
                    raise  # there is no model, whose commands could wait
                refusal = error
                command = None
                row = self._ledger.log(model, seq, kind, b"", refused=error_answer(error))
            # Queue the command, and submit it if all before it came.
            tenant.load += queue_load_of(row)
            tenant.last_used = self._clock()
            self._ledger.hear(tenant.client.session)
            if not tenant.waiting:
                tenant.waiting_since = self._ledger.now()
            tenant.waiting[seq] = row, command
            self.advance(model, tenant)
        if refusal is not None:
            raise refusal
        return f"{model}:{seq}"

    def _check_order(self, model: str, seq: int, tenant: TenantProgress) -> None:
        """Raises an error for a number out of order, or if a tenant's queue is full."""
        if seq != 0 and model not in self._tenants:
            raise RequestError(f"{model} is unloaded. Load its last checkpoint.")
        if not tenant.next_seq <= seq <= tenant.next_seq + _MAX_SEQ_AHEAD:
            raise RequestError(
                f"seq_id {seq} is out of order, because the next one is {tenant.next_seq}. Send "
                "the commands in order."
            )
        # Without the command that others wait for, these would stay in the queue.
        unblocks_others = seq == tenant.next_seq and tenant.waiting
        if tenant.load >= self._limits.queue and not unblocks_others:
            raise BusyError(
                f"{model} has too many commands without an answer. Wait until some have finished."
            )

    @contextmanager
    def _hold_lock(self) -> Iterator[None]:
        """Holds the lock in this context; raises a BusyError if it cannot be acquired soon."""
        if not self._lock.acquire(timeout=_LOCK_SECONDS):
            raise BusyError("many requests wait for the ledger. Send the request again later.")
        try:
            yield
        finally:
            self._lock.release()

    def replay(self, silent: float) -> None:
        """Loads each tenant's last state, and executes the commands logged since then again.

        Args:
          silent: seconds; a tenant without a command for longer stays on disk.
        """
        with self._lock:
            self._ledger.abandon(
                error_answer(RequestError("the model was unloaded. Load its last checkpoint."))
            )
            models = self._ledger.live_models()
            models.sort(key=lambda model: model["used"], reverse=True)
            for model in models:
                self._queue_for_replay(model, self._clock() - silent)

    def _queue_for_replay(self, model: Row, recent_time: float) -> None:
        """Queues a tenant for a seat if it has unexecuted commands or was used recently."""
        name = model["id"]
        state_seq = model["state"]
        tenant = TenantProgress(
            next_seq=state_seq + 1,
            client=_client(model),
            last_used=model["used"],
            waiting_since=self._ledger.now(),
        )
        self._tenants[name] = tenant
        rows = self._ledger.commands(name, state_seq)
        self.states.tidy(model, rows)
        tenant.load = sum(map(queue_load_of, rows))
        tenant.exists = model["spec"] is not None or tenant.load > 0
        is_recent = model["used"] >= recent_time and self._seats.fits(tenant.client)
        if tenant.exists and (tenant.load or is_recent):
            self._seats.wait(name, tenant.client)
        tenant.next_seq = first_missing_seq(state_seq, rows)
        self.parking.settle()

    def advance(self, model: str, tenant: TenantProgress) -> None:
        """Submits a tenant's commands that are next in order, if the engine has the tenant.

        A tenant that the engine does not have waits for a seat, once all its results are noted.
        """
        if tenant.next_seq not in tenant.waiting:
            return
        has_seat = self._seats.holds(model)
        if tenant.exists and not has_seat:
            if tenant.n_running == 0:
                self._seats.wait(model, tenant.client)
                self.parking.settle()
            return
        tenant.waiting_since = self._ledger.now()
        while tenant.next_seq in tenant.waiting:
            row, command = tenant.waiting.pop(tenant.next_seq)
            tenant.next_seq += 1
            if command is not None:
                self._submit(model, tenant, row, command)

    def _submit(self, model: str, tenant: TenantProgress, row: Row, command: Command) -> None:
        """Passes a command to the engine, and saves the state after some of the updates."""
        done = partial(self._results.submit, self.finish, row, command, tenant)
        self._engine.submit(model, command, done, tenant.client)
        tenant.n_running += 1
        tenant.n_since_state += 1
        tenant.bytes_since_state += len(row["payload"] or b"")
        has_many_commands = tenant.n_since_state >= self._limits.every
        has_many_bytes = tenant.bytes_since_state >= self._limits.most_bytes
        if isinstance(command, Update) and (has_many_commands or has_many_bytes):
            self._save_state(model, tenant, row["seq"])

    def _save_state(self, model: str, tenant: TenantProgress, seq: int) -> None:
        """Requests the engine to save a tenant's state after a command."""
        tenant.n_since_state = 0
        tenant.bytes_since_state = 0
        tenant.n_running += 1
        save = Save(self.states.path(model, seq), optimizer=True)
        done = partial(self._results.submit, self._finish_save, model, seq, tenant)
        self._engine.submit(model, save, done, tenant.client)

    def finish(
        self,
        row: Row,
        command: Command | None,
        tenant: TenantProgress | None,
        result: CommandResult,
    ) -> None:
        """Stores a command's result, in the writer's thread and in the order of commands."""
        is_written = False
        has_failed = isinstance(result, Exception)
        try:
            is_written = self._results.write(row, result)
            if not has_failed and tenant is not None:
                self._record_changes(row, command, tenant, is_written, result)
        except LockedError:
            raise
        except Exception:  # such as a full disk: the log goes on from the state before
            _logger.exception("the state of %s was not kept", row["model"])
        if tenant is None:  # it was unloaded
            return
        with self._lock:
            tenant.load -= queue_load_of(row)
            if has_failed and row["seq"] == 0:
                tenant.exists = False
                self._seats.leave(row["model"])
            self.count_down(row["model"], tenant)

    def count_down(self, name: str, tenant: TenantProgress) -> None:
        """Decrements the number of a tenant's commands in the engine."""
        tenant.n_running -= 1
        if tenant.n_running == 0:
            self.advance(name, tenant)
        self.parking.settle()

    def _record_changes(
        self,
        row: Row,
        command: Command | None,
        tenant: TenantProgress,
        is_written: bool,
        result: CommandResult,
    ) -> None:
        """Updates a tenant's progress after a successful command."""
        model = row["model"]
        seq = row["seq"]
        if isinstance(command, Gradient):
            if not command.forward_only:
                tenant.has_gradient = True
            return
        if isinstance(command, Create | Load | Update | Discard):
            tenant.has_gradient = False
            return
        if not (isinstance(command, Save) and is_written):
            return
        is_full_state = command.optimizer and not tenant.has_gradient
        if is_full_state:
            self.states.link(model, seq, command.path)
            try:
                self.states.keep(model, seq, tenant, result)
            except LockedError:
                self._results.submit(self.states.keep, model, seq, tenant, result)

    def _finish_save(
        self, name: str, seq: int, tenant: TenantProgress, result: CommandResult
    ) -> None:
        """Records a state that was saved between a tenant's commands."""
        try:
            self.states.keep(name, seq, tenant, result)
        except LockedError:
            raise
        except Exception:  # the log goes on from the state before
            _logger.exception("the state of %s was not noted", name)
        with self._lock:
            self.count_down(name, tenant)

    def leave(self, model: str) -> None:
        """Unloads a model. Commands in the engine are still executed; waiting ones are refused."""
        with self._lock:
            tenant = self._tenants.get(model)
            if tenant is None:
                return
            self._ledger.end_model(model)
            del self._tenants[model]
            error = RequestError(f"{model} was unloaded. Load its last checkpoint.")
            for row, command in tenant.waiting.values():
                if command is not None:
                    self._results.submit(self.finish, row, command, None, error)
            tenant.waiting.clear()
            self.parking.unload(model, tenant)

    def end_session(self, session: str) -> None:
        """Unloads a session's models, and deletes its snapshots."""
        for model in self._ledger.models_of(session):
            self.leave(model["id"])
        for sampler in self._ledger.end_session(session):
            self._remove(sampler["folder"])

    def delete(self, checkpoint: Row) -> None:
        """Deletes a checkpoint."""
        self._ledger.drop_checkpoint(checkpoint["path"])
        self._remove(checkpoint["folder"])

    def _remove(self, folder: str) -> None:
        """Deletes the folder of an adapter, also from the engine."""
        self._engine.drop(self.name(folder))
        shutil.rmtree(folder, ignore_errors=True)

    def busy_sessions(self) -> set[str]:
        """Returns the sessions of tenants with commands that run or can run."""
        with self._lock:
            busy_tenants = [tenant for tenant in self._tenants.values() if not tenant.is_quiet]
        return {tenant.client.session for tenant in busy_tenants}

    def sweep(self, keep: float = 3600.0) -> None:
        """Deletes expired checkpoints and answers. It is called every minute.

        Args:
          keep: seconds for which an answer may be fetched.
        """
        self._results.retry()
        for checkpoint in self._ledger.expired_checkpoints():
            self.delete(checkpoint)
        self._ledger.forget(keep)


def _check_repeat(row: Row, kind: str) -> None:
    """Raises a RequestError if a repeated command has another kind or was refused."""
    if row["state"] == REFUSED:
        answer = row["answer"]  # it is not kept for ever
        reason = json.loads(answer)["error"] if answer else f"seq_id {row['seq']} was refused"
        raise RequestError(reason)
    if row["kind"] != kind:
        raise RequestError(
            f"seq_id {row['seq']} already belongs to a {row['kind']}. Use the next seq_id."
        )


def _client(model: Row | None) -> Client:
    """Returns the client that a model belongs to."""
    assert model is not None  # its command was logged
    return Client(model["owner"], model["session"])


class CommandGaps:
    """Closes gaps in the sequence numbers of tenants' commands."""

    def __init__(self, table: TenantTable, log: TenantLog) -> None:
        """Stores the tenants and their log.

        Args:
          table: the tenants.
          log: submits commands, and writes their results.
        """
        self._table = table
        self._log = log
        self._results = table.results
        self._ledger = table.results.ledger

    def close(self, seconds: float) -> None:
        """Refuses the commands that have waited too long for a missing command.

        The missing commands are refused from now on. The gradient before them is dropped: the step
        that was to take it never comes, and no other step may contain it.
        """
        latest_start = self._ledger.now() - seconds
        with self._table.lock:
            for name, tenant in self._table.tenants.items():
                has_gap = tenant.waiting and tenant.next_seq not in tenant.waiting
                if has_gap and tenant.waiting_since < latest_start:
                    self._close_gap(name, tenant, seconds)

    def _close_gap(self, name: str, tenant: TenantProgress, seconds: float) -> None:
        """Refuses a tenant's missing commands, and all commands that wait for them."""
        waiting_seqs = sorted(tenant.waiting)
        last_seq = waiting_seqs[-1]
        gaps = _gaps_between([tenant.next_seq - 1, *waiting_seqs])
        missing_seqs = [seq for gap in gaps for seq in gap]
        gap_names = ", ".join(_gap_name(gap) for gap in gaps)
        error = RequestError(
            f"seq_id {gap_names} of {name} did not come within {seconds:g} seconds. So no command "
            f"from seq_id {missing_seqs[0]} to {last_seq} was executed, and the gradient of those "
            f"before was dropped. To continue, go on with seq_id {last_seq + 1}, or load the last "
            "checkpoint."
        )
        answer = error_answer(error)
        missing_rows: dict[int, Row] = {}
        with self._ledger.transaction():
            for seq in missing_seqs:
                kind = DISCARD if seq == tenant.next_seq else MISSING
                missing_rows[seq] = self._ledger.log(name, seq, kind, b"", refused=answer)
            for seq in waiting_seqs:
                self._ledger.finish(name, seq, answer, failed=True)
        for seq, (row, command) in tenant.waiting.items():
            tenant.waiting[seq] = (row, None)
            if command is not None:
                tenant.n_running += 1
                self._results.submit(self._log.finish, row, command, tenant, error)
        for seq, row in missing_rows.items():
            tenant.waiting[seq] = (row, None)
        tenant.waiting[tenant.next_seq] = (missing_rows[tenant.next_seq], Discard())
        self._log.advance(name, tenant)


def _gaps_between(seqs: Sequence[int]) -> list[range]:
    """Returns the ranges of numbers that are missing in an ascending sequence."""
    gaps = [range(seq + 1, next_seq) for seq, next_seq in itertools.pairwise(seqs)]
    return [gap for gap in gaps if gap]


def _gap_name(gap: range) -> str:
    """Returns the sequence numbers of a gap as text, such as "3" or "3 to 5"."""
    return str(gap[0]) if len(gap) == 1 else f"{gap[0]} to {gap[-1]}"
