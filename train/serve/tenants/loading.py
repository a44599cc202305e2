"""The progress of tenants, and how the engine loads them: a saved state and later commands.

The log, loading and parking share the table of them.
"""

import dataclasses
import logging
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Protocol

from train.serve.protocol.engine import EngineProtocol, TenantStatus
from train.serve.protocol.requests import (
    ANYONE,
    Client,
    Command,
    CommandResult,
    Gradient,
    Load,
    RequestError,
    Save,
    SaveResult,
)
from train.serve.storage.folders import size
from train.serve.storage.ledger import DISCARD, DONE, LOGGED, Row
from train.serve.storage.results import ResultWriter
from train.serve.tenants.seats import Phase, Seats

_logger = logging.getLogger(__name__)


@dataclasses.dataclass
class TenantProgress:
    """The progress of a tenant's commands.

    Attributes:
      next_seq: the number of the command that the engine gets next.
      client: the client that it is of.
      waiting: commands that came too early; None for one that the engine does not get.
      has_gradient: whether what was executed left a gradient that no update has taken.
      n_since_state, bytes_since_state: commands, and bytes of them, since the last saved state.
      load: commands without an answer, a large one counted as one for each half MiB.
      n_running: commands that the engine has.
      exists: whether the tenant was made, or may be.
      last_used: when its last command came, in seconds since 1970.
      waiting_since: when the commands that wait began to wait for the next one, by `Ledger.now`.
      status: the state in which it was parked; None for one that never was.
    """

    next_seq: int
    client: Client = ANYONE
    waiting: dict[int, tuple[Row, Command | None]] = dataclasses.field(default_factory=dict)
    has_gradient: bool = False
    n_since_state: int = 0
    bytes_since_state: int = 0
    load: int = 0
    n_running: int = 0
    exists: bool = True
    last_used: float = 0.0
    waiting_since: float = 0.0
    status: TenantStatus | None = None

    @property
    def is_quiet(self) -> bool:
        """True if the tenant has no command that runs or can run."""
        return self.n_running == 0 and self.next_seq not in self.waiting


@dataclasses.dataclass
class TenantTable:
    """The tenants of a server, with the engine, the result writer and the seats that they share.

    Attributes:
      engine: executes commands.
      results: writes results into its ledger.
      seats: the room in the engine.
      tenants: the progress of each tenant, by name.
      lock: guards `seats` and `tenants`.
    """

    engine: EngineProtocol
    results: ResultWriter
    seats: Seats
    tenants: dict[str, TenantProgress] = dataclasses.field(default_factory=dict)
    lock: threading.RLock = dataclasses.field(default_factory=threading.RLock)


def queue_load_of(row: Row) -> int:
    """Returns the weight of a command in its tenant's queue; 0 for an answered command."""
    has_answer = row["state"] != LOGGED
    return 0 if has_answer else 1 + len(row["payload"] or b"") // 2**19


def first_missing_seq(state_seq: int, rows: list[Row]) -> int:
    """Returns the first missing sequence number after a saved state."""
    logged_seqs = {row["seq"] for row in rows}
    seq = state_seq + 1
    while seq in logged_seqs:
        seq += 1
    return seq


class TenantLog(Protocol):
    """The methods of the command log that loading and parking call."""

    def advance(self, name: str, tenant: TenantProgress) -> None:
        """Submits a tenant's commands that are next in order, if the engine has the tenant."""

    def finish(
        self,
        row: Row,
        command: Command | None,
        tenant: TenantProgress | None,
        result: CommandResult,
    ) -> None:
        """Writes the result of a command."""

    def count_down(self, name: str, tenant: TenantProgress) -> None:
        """Decrements the number of a tenant's commands in the engine."""


class TenantLoader:
    """Loads tenants with a seat into the engine, or refuses their commands."""

    def __init__(self, table: TenantTable, log: TenantLog, read: Callable[[Row], Command]) -> None:
        """Stores the tenants, their log, and the reader of commands.

        Args:
          table: the tenants.
          log: submits commands, and writes their results.
          read: makes the command of a row of the ledger.
        """
        self._table = table
        self._engine = table.engine
        self._results = table.results
        self._ledger = table.results.ledger
        self._seats = table.seats
        self._log = log
        self._read = read

    def resume(self, name: str) -> None:
        """Loads a tenant's state into the engine, and then continues its commands."""
        tenant = self._table.tenants[name]
        try:
            folder = self._queue_commands_since_state(name, tenant)
        except Exception as error:  # such as a rank that this server does not take
            self._fail_load(name, error)
            return
        if folder is None:
            self._seats.enter(name, Phase.READY)
            self._log.advance(name, tenant)
            return
        tenant.n_running += 1
        done = partial(self._results.submit, self._finish_load, name, tenant)
        self._engine.submit(name, Load(folder, optimizer=True), done, tenant.client)

    def _queue_commands_since_state(self, name: str, tenant: TenantProgress) -> Path | None:
        """Queues the commands after a tenant's last saved state, and returns the state's folder."""
        model = self._ledger.model(name)
        assert model is not None
        # The commands after the last saved state, unless they wait already.
        rows = self._ledger.commands(name, model["state"])
        tenant.load = sum(map(queue_load_of, rows))
        for row in rows:
            if row["seq"] not in tenant.waiting:
                # A refused command keeps its number, and is not executed.
                was_valid = row["state"] in (LOGGED, DONE) or row["kind"] == DISCARD
                command = self._command_to_execute(row, tenant) if was_valid else None
                tenant.waiting[row["seq"]] = (row, command)
        # The engine continues after the state, which holds no gradient.
        tenant.next_seq = model["state"] + 1
        tenant.has_gradient = False
        tenant.n_since_state = 0
        tenant.bytes_since_state = 0
        return None if model["folder"] is None else Path(model["folder"])

    def _finish_load(self, name: str, tenant: TenantProgress, result: CommandResult) -> None:
        """Continues with a tenant whose state was loaded, or refuses its commands."""
        with self._table.lock:
            is_unloaded = self._table.tenants.get(name) is not tenant  # then it leaves the engine
            if not is_unloaded:
                if isinstance(result, Exception):
                    self._fail_load(name, result)
                else:
                    self._seats.enter(name, Phase.READY)
            self._log.count_down(name, tenant)

    def _fail_load(self, name: str, error: Exception) -> None:
        """Refuses the commands of a tenant whose state could not be loaded."""
        message = f"the state of {name} could not be loaded: {error}"
        _logger.error(message, exc_info=error)
        self._seats.leave(name)
        self.refuse(name, RequestError(message))

    def refuse(self, name: str, error: RequestError) -> None:
        """Refuses the unanswered commands of a tenant that the engine cannot load."""
        tenant = self._table.tenants[name]
        model = self._ledger.model(name)
        assert model is not None
        rows = self._ledger.commands(name, model["state"])
        tenant.waiting.clear()
        tenant.next_seq = first_missing_seq(model["state"], rows)
        tenant.load = sum(map(queue_load_of, rows))
        for row in rows:
            if row["state"] == LOGGED:
                tenant.n_running += 1
                self._results.submit(self._log.finish, row, None, tenant, error)

    def _command_to_execute(self, row: Row, tenant: TenantProgress) -> Command | None:
        """Returns the command of a row; None if the engine need not execute it again."""
        command = self._read(row)
        has_answer = row["state"] != LOGGED
        if not isinstance(command, Save):
            # Repeat what changes the tenant, and answer what has no answer yet.
            changes_tenant = not (isinstance(command, Gradient) and command.forward_only)
            return command if changes_tenant or not has_answer else None
        if has_answer:
            return None
        if command.path.exists():  # it was written, but its result was not noted
            result = SaveResult(size(command.path))
            self._results.submit(self._log.finish, row, command, None, result)
            tenant.load -= queue_load_of(row)
            return None
        return command
