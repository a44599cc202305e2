"""Tenants that come back into the engine: their last state, and what was logged since."""

import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Protocol

from train.serve.protocol.requests import (
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
from train.serve.tenants.progress import TenantProgress, TenantTable, load_of, next_number
from train.serve.tenants.seats import Phase

_logger = logging.getLogger(__name__)


class TenantLog(Protocol):
    """The log of commands, as loading and parking see it."""

    def advance(self, name: str, tenant: TenantProgress) -> None:
        """Submits the commands whose number has come, once the engine has the tenant."""

    def finish(
        self,
        row: Row,
        command: Command | None,
        tenant: TenantProgress | None,
        result: CommandResult,
    ) -> None:
        """Writes the result of a command."""

    def count_down(self, name: str, tenant: TenantProgress) -> None:
        """Counts a command less in the engine."""


class TenantLoader:
    """Has the engine load tenants that have got a seat, and answers those that it cannot take."""

    def __init__(self, table: TenantTable, log: TenantLog, read: Callable[[Row], Command]) -> None:
        """Begins with an empty engine.

        Args:
          table: the tenants.
          log: submits commands, and writes their results.
          read: makes the command of a row of the ledger.
        """
        self._engine, self._results, self._seats = table.engine, table.results, table.seats
        self._table, self._ledger, self._log = table, table.results.ledger, log
        self._read = read

    def resume(self, name: str) -> None:
        """Has the engine load a tenant that has got a seat, and then go on with it."""
        tenant = self._table.tenants[name]
        try:
            folder = self._restore(name, tenant)
        except Exception as error:  # such as a rank that this server does not take
            self._fail_load(name, error)
            return
        if folder is None:
            self._seats.enter(name, Phase.READY)
            self._log.advance(name, tenant)
            return
        tenant.running += 1
        done = partial(self._results.submit, self._finish_load, name, tenant)
        self._engine.submit(name, Load(folder, optimizer=True), done, tenant.client)

    def _restore(self, name: str, tenant: TenantProgress) -> Path | None:
        """Queues commands since a tenant's last state; returns the state's folder, if any."""
        model = self._ledger.model(name)
        assert model is not None
        rows = self._ledger.commands(name, model["state"])
        tenant.load = sum(map(load_of, rows))
        for row in rows:
            if row["seq"] not in tenant.waiting:
                is_wanted = row["state"] in (LOGGED, DONE) or row["kind"] == DISCARD
                tenant.waiting[row["seq"]] = row, self._repeat(row, tenant) if is_wanted else None
        tenant.next, tenant.gradient, tenant.handed, tenant.size = model["state"] + 1, False, 0, 0
        return None if model["folder"] is None else Path(model["folder"])

    def _finish_load(self, name: str, tenant: TenantProgress, result: CommandResult) -> None:
        """Has a tenant go on whose last state was loaded, or says why it was not."""
        with self._table.lock:
            if (
                self._table.tenants.get(name) is tenant
            ):  # else it was unloaded, and leaves the engine
                if isinstance(result, Exception):
                    self._fail_load(name, result)
                else:
                    self._seats.enter(name, Phase.READY)
            self._log.count_down(name, tenant)

    def _fail_load(self, name: str, error: Exception) -> None:
        """Answers the commands of a tenant that was not loaded; its next one tries again."""
        why = f"the state of {name} could not be loaded: {error}"
        _logger.error(why, exc_info=error)
        self._seats.leave(name)
        self.refuse(name, RequestError(why))

    def refuse(self, name: str, why: RequestError) -> None:
        """Answers the commands of a tenant that the engine does not have, and cannot take in."""
        tenant, model = self._table.tenants[name], self._ledger.model(name)
        assert model is not None
        rows = self._ledger.commands(name, model["state"])
        tenant.waiting.clear()
        tenant.next, tenant.load = next_number(model["state"], rows), sum(map(load_of, rows))
        for row in rows:
            if row["state"] == LOGGED:
                tenant.running += 1
                self._results.submit(self._log.finish, row, None, tenant, why)

    def _repeat(self, row: Row, tenant: TenantProgress) -> Command | None:
        """Returns the command of a row if it is to be executed, perhaps for a second time."""
        command = self._read(row)
        if isinstance(command, Save):
            if row["state"] == LOGGED and command.path.exists():  # written, but not noted
                self._results.submit(
                    self._log.finish, row, command, None, SaveResult(size(command.path))
                )
                tenant.load -= load_of(row)
                return None
            return command if row["state"] == LOGGED else None
        changes = not (isinstance(command, Gradient) and command.forward_only)
        return command if changes or row["state"] == LOGGED else None
