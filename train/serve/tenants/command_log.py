"""The log of commands: each reaches the engine in order, once, and again after a restart.

Those that wait for a command that never comes get an error after a while.
"""

import dataclasses
import itertools
import json
import logging
import shutil
import time
from collections.abc import Callable, Iterator
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
    load_of,
    next_number,
)
from train.serve.tenants.parking import StateFolders, TenantParking
from train.serve.tenants.seats import Seats

_logger = logging.getLogger(__name__)
_PATIENCE = 5.0  # seconds
_AHEAD = 10_000  # a command's number is at most so far beyond the next one's


class BusyError(Exception):
    """Says that a tenant has too much in the queue; the client is to come again."""


class CommandCodec(Protocol):
    """Reads commands from the log, and writes the answers to them."""

    def read(self, row: Row) -> Command:
        """Returns the command of a row; raises a RequestError if it makes no sense."""

    def write(self, row: Row, result: CommandResult) -> bytes:
        """Returns the answer to a row's command."""


@dataclasses.dataclass(frozen=True)
class LogLimits:
    """Limits of a log of commands.

    Attributes:
      every, most_bytes: a state is saved after so many commands, or bytes of them.
      queue: the most `load` of a tenant.
    """

    every: int = 32
    most_bytes: int = 64 * 2**20
    queue: int = 1024


class CommandLog:
    """Hands commands to the engine: committed first, in the order of their numbers.

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
        self._engine, self._ledger, self.folder = engine, ledger, folder
        self._codec, self._limits, self._clock = codec, limits, clock
        self._results = ResultWriter(ledger, codec.write, wake, self._remove)
        self._seats = seats or Seats()
        self._table = TenantTable(engine, self._results, self._seats)
        self._tenants, self._lock = self._table.tenants, self._table.lock
        self.states = StateFolders(ledger, folder / "states")
        loader = TenantLoader(self._table, self, codec.read)
        self.parking = TenantParking(self._table, self, loader, self.states)
        self.gaps = CommandGaps(self._table, self)

    def close(self) -> None:
        """Notes the results that there are, and stops."""
        self._results.close()

    def name(self, folder: Path | str) -> str:
        """Returns the name by which the engine knows the adapter in a folder."""
        return adapter_name(folder, self.folder)

    def place(self, room: str, model: str) -> Path:
        """Returns a model's folder in a room: snapshots or checkpoints."""
        return self.folder / room / model.replace(":", "-")

    def accept(
        self,
        model: str,
        seq: int,
        kind: str,
        payload: bytes,
        prepare: Callable[[], tuple[Path | None, str | None]] = lambda: (None, None),
        command: Command | None = None,
    ) -> str:
        """Commits a command, and submits those whose number has come.

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
            if (row := self._ledger.command(model, seq)) is not None:
                _check_repeat(row, kind)
                return f"{model}:{seq}"
            tenant = self._tenants.get(model, TenantProgress(0))
            if seq != 0 and model not in self._tenants:
                raise RequestError(f"{model} is unloaded: load its last checkpoint")
            if not tenant.next <= seq <= tenant.next + _AHEAD:
                raise RequestError(f"seq_id {seq} is out of order: the next one is {tenant.next}")
            fills = seq == tenant.next and tenant.waiting  # refused, it would block those that wait
            if tenant.load >= self._limits.queue and not fills:
                raise BusyError(f"{model} has too many commands without an answer: wait for some")
            refusal = None
            try:
                with self._ledger.transaction():
                    row = self._ledger.log(model, seq, kind, payload, *prepare())
                    command = command or self._codec.read(row)
                if model not in self._tenants:
                    tenant.client = _client(self._ledger.model(model))
                self._tenants[model] = tenant
            except RequestError as error:
                if seq == 0:
                    raise  # there is no model, whose commands could wait
                refusal, command = error, None
                row = self._ledger.log(model, seq, kind, b"", refused=error_answer(error))
            tenant.load += load_of(row)
            tenant.used = self._clock()
            self._ledger.hear(tenant.client.session)
            if not tenant.waiting:
                tenant.since = self._ledger.now()
            tenant.waiting[seq] = row, command
            self.advance(model, tenant)
        if refusal is not None:
            raise refusal
        return f"{model}:{seq}"

    @contextmanager
    def _hold_lock(self) -> Iterator[None]:
        """Holds the lock, unless others hold it for long."""
        if not self._lock.acquire(timeout=_PATIENCE):
            raise BusyError("many requests wait for the ledger")
        try:
            yield
        finally:
            self._lock.release()

    def replay(self, silent: float) -> None:
        """Loads each tenant's last state, and executes again what was logged since.

        Args:
          silent: seconds; a tenant without a command for longer stays on disk.
        """
        with self._lock:
            self._ledger.abandon(error_answer(RequestError("the model was unloaded")))
            models = self._ledger.live_models()
            for model in sorted(models, key=lambda model: model["used"], reverse=True):
                self._replay(model, self._clock() - silent)

    def _replay(self, model: Row, since: float) -> None:
        name, state = model["id"], model["state"]
        tenant = TenantProgress(
            state + 1, _client(model), used=model["used"], since=self._ledger.now()
        )
        self._tenants[name] = tenant
        rows = self._ledger.commands(name, state)
        self.states.tidy(model, rows)
        tenant.load = sum(map(load_of, rows))
        tenant.exists = model["spec"] is not None or tenant.load > 0
        is_recent = model["used"] >= since and self._seats.fits(tenant.client)
        if tenant.exists and (tenant.load or is_recent):
            self._seats.wait(name, tenant.client)
        tenant.next = next_number(state, rows)
        self.parking.settle()

    def advance(self, model: str, tenant: TenantProgress) -> None:
        """Submits the commands whose number has come, once the engine has the tenant.

        A tenant that the engine does not have waits for a seat, once all its results are noted.
        """
        if tenant.next not in tenant.waiting:
            return
        if tenant.exists and not self._seats.holds(model):
            if tenant.running == 0:
                self._seats.wait(model, tenant.client)
                self.parking.settle()
            return
        tenant.since = self._ledger.now()
        while tenant.next in tenant.waiting:
            row, command = tenant.waiting.pop(tenant.next)
            tenant.next += 1
            if command is None:
                continue
            done = partial(self._results.submit, self.finish, row, command, tenant)
            self._engine.submit(model, command, done, tenant.client)
            tenant.running += 1
            tenant.handed += 1
            tenant.size += len(row["payload"] or b"")
            due = tenant.handed >= self._limits.every or tenant.size >= self._limits.most_bytes
            if due and isinstance(command, Update):
                tenant.handed = tenant.size = 0
                tenant.running += 1
                save = Save(self.states.path(model, row["seq"]), optimizer=True)
                done = partial(self._results.submit, self._finish_save, model, row["seq"], tenant)
                self._engine.submit(model, save, done, tenant.client)

    def finish(
        self,
        row: Row,
        command: Command | None,
        tenant: TenantProgress | None,
        result: CommandResult,
    ) -> None:
        """Notes a result, in the writer's thread; results come in the order of the commands."""
        is_written, failed = False, isinstance(result, Exception)
        try:
            is_written = self._results.write(row, result)
            if not failed and tenant is not None:
                self._follow(row, command, tenant, is_written, result)
        except LockedError:
            raise
        except Exception:  # such as a full disk: the log goes on from the state before
            _logger.exception("the state of %s was not kept", row["model"])
        if tenant is None:
            return
        with self._lock:
            tenant.load -= load_of(row)
            if failed and row["seq"] == 0:
                tenant.exists = False
                self._seats.leave(row["model"])
            self.count_down(row["model"], tenant)

    def count_down(self, name: str, tenant: TenantProgress) -> None:
        """Notes that the engine has a command less."""
        tenant.running -= 1
        if tenant.running == 0:
            self.advance(name, tenant)
        self.parking.settle()

    def _follow(
        self,
        row: Row,
        command: Command | None,
        tenant: TenantProgress,
        is_written: bool,
        result: CommandResult,
    ) -> None:
        """Records the changes that a command made."""
        model, seq = row["model"], row["seq"]
        if isinstance(command, Gradient):
            tenant.gradient |= not command.forward_only
        elif isinstance(command, Create | Load | Update | Discard):
            tenant.gradient = False
        elif isinstance(command, Save) and command.optimizer and not tenant.gradient and is_written:
            self.states.link(model, seq, command.path)
            try:
                self.states.keep(model, seq, tenant, result)
            except LockedError:
                self._results.submit(self.states.keep, model, seq, tenant, result)

    def _finish_save(
        self, name: str, seq: int, tenant: TenantProgress, result: CommandResult
    ) -> None:
        """Takes a state that was saved by the way."""
        try:
            self.states.keep(name, seq, tenant, result)
        except LockedError:
            raise
        except Exception:  # the log goes on from the state before
            _logger.exception("the state of %s was not noted", name)
        with self._lock:
            self.count_down(name, tenant)

    def leave(self, model: str) -> None:
        """Unloads a model: the commands that the engine has are executed, others never."""
        with self._lock:
            tenant = self._tenants.get(model)
            if tenant is None:
                return
            self._ledger.end_model(model)
            del self._tenants[model]
            gone = RequestError(f"{model} was unloaded")
            for row, command in tenant.waiting.values():
                if command is not None:
                    self._results.submit(self.finish, row, command, None, gone)
            tenant.waiting.clear()
            self.parking.unload(model, tenant)

    def end_session(self, session: str) -> None:
        """Unloads a session's models, and forgets its snapshots."""
        for model in self._ledger.models_of(session):
            self.leave(model["id"])
        for sampler in self._ledger.end_session(session):
            self._remove(sampler["folder"])

    def delete(self, checkpoint: Row) -> None:
        """Removes a checkpoint."""
        self._ledger.drop_checkpoint(checkpoint["path"])
        self._remove(checkpoint["folder"])

    def _remove(self, folder: str) -> None:
        self._engine.drop(self.name(folder))
        shutil.rmtree(folder, ignore_errors=True)

    def busy_sessions(self) -> set[str]:
        """Returns the sessions whose tenants have something to do, or wait for that."""
        with self._lock:
            busy = [tenant for tenant in self._tenants.values() if not tenant.is_quiet]
        return {tenant.client.session for tenant in busy}

    def sweep(self, keep: float = 3600.0) -> None:
        """Removes commands that are over; call it every minute or so.

        Args:
          keep: seconds for which an answer may be fetched.
        """
        self._results.retry()
        for checkpoint in self._ledger.expired_checkpoints():
            self.delete(checkpoint)
        self._ledger.forget(keep)


def _check_repeat(row: Row, kind: str) -> None:
    """Raises a RequestError if a command that comes again is another one, or was refused."""
    if row["state"] == REFUSED:
        answer = row["answer"]  # it is not kept for ever
        why = json.loads(answer)["error"] if answer else f"seq_id {row['seq']} was refused"
        raise RequestError(why)
    if row["kind"] != kind:
        raise RequestError(f"seq_id {row['seq']} is the number of a {row['kind']}")


def _client(model: Row | None) -> Client:
    """Returns the client whose model this is."""
    assert model is not None  # its command was logged
    return Client(model["owner"], model["session"])


class CommandGaps:
    """Closes gaps in the numbers of tenants' commands."""

    def __init__(self, table: TenantTable, log: TenantLog) -> None:
        """Keeps the parts of a server.

        Args:
          table: the tenants.
          log: submits commands, and writes their results.
        """
        self._table, self._log = table, log
        self._results, self._ledger = table.results, table.results.ledger

    def close(self, seconds: float) -> None:
        """Answers the commands that waited so long for a missing one with an error.

        The missing commands are refused from now on. The gradient before them is dropped: the step
        that was to take it never comes, and no other step may contain it.
        """
        latest = self._ledger.now() - seconds
        with self._table.lock:
            for name, tenant in self._table.tenants.items():
                has_gap = tenant.waiting and tenant.next not in tenant.waiting
                if has_gap and tenant.since < latest:
                    self._close(name, tenant, seconds)

    def _close(self, name: str, tenant: TenantProgress, seconds: float) -> None:
        waiting = sorted(tenant.waiting)
        last = waiting[-1]
        edges = itertools.pairwise([tenant.next - 1, *waiting])
        gaps = [(low + 1, high - 1) for low, high in edges if high - low > 1]
        missing = [seq for low, high in gaps for seq in range(low, high + 1)]
        names = ", ".join(str(low) if low == high else f"{low} to {high}" for low, high in gaps)
        error = RequestError(
            f"seq_id {names} of {name} did not come within {seconds:g} seconds. So no command from "
            f"seq_id {missing[0]} to {last} was executed, and the gradient of those before "
            f"was dropped: go on with seq_id {last + 1}, or load the last checkpoint"
        )
        answer, rows = error_answer(error), dict[int, Row]()
        with self._ledger.transaction():
            for seq in missing:
                kind = DISCARD if seq == tenant.next else MISSING
                rows[seq] = self._ledger.log(name, seq, kind, b"", refused=answer)
            for seq in waiting:
                self._ledger.finish(name, seq, answer, failed=True)
        for seq, (row, command) in tenant.waiting.items():
            tenant.waiting[seq] = row, None
            if command is not None:
                tenant.running += 1
                self._results.submit(self._log.finish, row, command, tenant, error)
        tenant.waiting |= {seq: (row, None) for seq, row in rows.items()}
        tenant.waiting[tenant.next] = rows[tenant.next], Discard()
        self._log.advance(name, tenant)
