"""Tenants on disk: those that were silent, and those whose room in memory others need.

The engine goes on from their saved states, after parking or after a restart.
"""

import dataclasses
import json
import logging
import re
import shutil
from functools import partial
from pathlib import Path

from train.serve.protocol.engine import LATEST_LOSSES, TenantStatus
from train.serve.protocol.requests import (
    AdapterSpec,
    CommandResult,
    Leave,
    RequestError,
    Save,
    SaveResult,
)
from train.serve.storage.database import LockedError
from train.serve.storage.folders import link, list_folder
from train.serve.storage.ledger import Ledger, Row
from train.serve.tenants.loading import TenantLoader, TenantLog, TenantProgress, TenantTable
from train.serve.tenants.seats import Phase

_logger = logging.getLogger(__name__)


class StateFolders:
    """Keeps the folders of states: of each tenant the last one, and what its log needs."""

    def __init__(self, ledger: Ledger, folder: Path):
        """Begins with what there is.

        Args:
          ledger: notes which state is the last.
          folder: holds a folder for each tenant.
        """
        self._ledger, self._folder = ledger, folder

    def place(self, name: str) -> Path:
        """Returns the folder of a tenant's states."""
        return self._folder / name.replace(":", "-")

    def path(self, name: str, seq: int) -> Path:
        """Returns the folder of the state after a command."""
        return self.place(name) / str(seq)

    def keep(self, name: str, seq: int, tenant: TenantProgress, result: CommandResult) -> None:
        """Makes a saved state the last one, unless a gradient is pending, which it lacks.

        Nor is it kept while the ledger lacks an answer to a command before: after a restart, only
        the command itself, executed again, could give it.

        Args:
          name: the tenant.
          seq: the number of the command after which it was saved.
          tenant: its progress.
          result: result of the `Save`; nothing is kept of one that failed.
        """
        model, folder = self._ledger.model(name), self.path(name, seq)
        is_whole = isinstance(result, SaveResult) and not tenant.gradient
        if (
            model is None
            or model["ended"]
            or not is_whole
            or self._ledger.owes(name, model["state"], seq)
        ):
            shutil.rmtree(folder, ignore_errors=True)
            return
        self._ledger.set_state(name, seq, folder)
        for child in list_folder(folder.parent):
            number = re.fullmatch(r"(?:load-)?(\d+)", child.name)
            if number and int(number[1]) <= seq and child != folder:
                shutil.rmtree(child, ignore_errors=True)

    def link(self, name: str, seq: int, source: Path) -> None:
        """Makes a checkpoint with the optimiser's state the state after a command."""
        if not (folder := self.path(name, seq)).exists():
            link(source, folder)

    def clear(self, name: str, seq: int) -> None:
        """Makes room for the state after a command, where an earlier attempt left a folder."""
        shutil.rmtree(self.path(name, seq), ignore_errors=True)

    def tidy(self, model: Row, rows: list[Row]) -> None:
        """Removes files that neither a model's last state nor the commands since need."""
        needed = {model["folder"], *(row["folder"] for row in rows)}
        for child in list_folder(self.place(model["id"])):
            if str(child) not in needed:
                shutil.rmtree(child, ignore_errors=True)

    def remove(self, name: str) -> None:
        """Removes the states of a tenant."""
        shutil.rmtree(self.place(name), ignore_errors=True)


class TenantParking:
    """Has tenants leave the engine, and come back."""

    def __init__(
        self, table: TenantTable, log: TenantLog, loader: TenantLoader, states: StateFolders
    ) -> None:
        """Begins with an empty engine.

        Args:
          table: the tenants.
          log: submits commands.
          loader: loads tenants that have got a seat.
          states: states of the tenants on disk.
        """
        self._engine, self._results, self._seats = table.engine, table.results, table.seats
        self._table, self._ledger, self._log = table, table.results.ledger, log
        self._loader, self._states = loader, states

    def settle(self) -> None:
        """Has the engine take in those who wait for room, and makes room for them."""
        while (name := self._seats.next()) is not None:
            self._loader.resume(name)
        while (name := self._seats.victim(self._quiet())) is not None:
            self._seats.enter(name, Phase.HELD)
        for name in self._seats.list_phase(Phase.HELD):
            if self._table.tenants[name].running == 0:
                self._park(name)
        for name, why in self._seats.hopeless().items():
            self._seats.give_up(name)
            self._loader.refuse(name, RequestError(why))

    def _quiet(self) -> list[str]:
        """Returns the tenants without work in the engine, those used last at the end."""
        quiet = [name for name, tenant in self._table.tenants.items() if tenant.is_quiet]
        return sorted(quiet, key=lambda name: self._table.tenants[name].used)

    def _park(self, name: str) -> None:
        """Has a tenant leave the engine once its state is on disk; its commands wait."""
        tenant, model = self._table.tenants[name], self._ledger.model(name)
        assert model is not None
        seq = tenant.next - 1
        if tenant.gradient or model["state"] == seq:  # the log has the rest
            self._leave_engine(name, tenant)
            return
        self._seats.enter(name, Phase.SAVING)
        self._states.clear(name, seq)
        save = Save(self._states.path(name, seq), optimizer=True)
        done = partial(self._results.submit, self._finish_save, name, seq, tenant)
        self._engine.submit(name, save, done, tenant.client)

    def _finish_save(
        self, name: str, seq: int, tenant: TenantProgress, result: CommandResult
    ) -> None:
        """Takes a tenant out of the engine whose state was saved."""
        error = result if isinstance(result, Exception) else None
        try:
            self._states.keep(name, seq, tenant, result)
        except LockedError:
            raise
        except Exception as caught:
            error = error or caught
        with self._table.lock:
            is_unloaded = self._table.tenants.get(name) is not tenant
            if error is None or is_unloaded:
                self._leave_engine(name, tenant)
            else:
                _logger.error("%s cannot be parked, and stays in memory: %s", name, error)
                self._seats.stay(name, error)
                self._log.advance(name, tenant)
            self.settle()

    def _leave_engine(self, name: str, tenant: TenantProgress) -> None:
        if (status := self._engine.status().tenants.get(name)) is not None:
            status = _merge(tenant.status, status)
            tenant.status = dataclasses.replace(status, parked=True, size=0)
        self._seats.enter(name, Phase.LEAVING)
        done = partial(self._results.submit, self._finish_leave, name)
        self._engine.submit(name, Leave(), done, tenant.client)

    def _finish_leave(self, name: str, _: CommandResult = None) -> None:
        """Frees the seat of a tenant that has left the engine, and the disk if it is unloaded."""
        with self._table.lock:
            if name not in self._table.tenants:
                self._states.remove(name)
            self._seats.leave(name)
            self.settle()

    def unload(self, name: str, tenant: TenantProgress) -> None:
        """Has the engine forget a tenant that is no longer in the table; removes its states."""
        self._seats.give_up(name)
        match self._seats.phase(name):
            case None:
                self._results.submit(self._finish_leave, name)
            case Phase.SAVING | Phase.LEAVING:
                pass  # it leaves, and its states are removed then
            case _:
                self._leave_engine(name, tenant)

    def park_silent(self, seconds: float) -> None:
        """Parks the tenants of sessions that were silent for some seconds."""
        with self._table.lock:
            silent = set(self._ledger.idle_sessions(seconds))
            for name in self._quiet():
                is_left = self._table.tenants[name].client.session in silent
                if is_left and self._seats.may_park(name):
                    self._seats.enter(name, Phase.HELD)
            self.settle()

    def status(self) -> dict[str, TenantStatus]:
        """Returns the state of all tenants, whether the engine has them or not."""
        statuses = dict(self._engine.status().tenants)
        with self._table.lock:
            tenants = dict(self._table.tenants)
            leaving = set(self._seats.list_phase(Phase.LEAVING))
        for name, tenant in tenants.items():
            if name in statuses and name not in leaving:
                statuses[name] = _merge(tenant.status, statuses[name])
            elif (status := tenant.status or self._read_status(name, tenant)) is not None:
                statuses[name] = status
            if name in statuses:  # not when the engine had a command, such as one of parking
                statuses[name] = dataclasses.replace(statuses[name], used=tenant.used)
        return statuses

    def _read_status(self, name: str, tenant: TenantProgress) -> TenantStatus | None:
        """Returns the state of a tenant that was parked before the server was started."""
        model = self._ledger.model(name)
        if model is None or model["spec"] is None:
            return None
        spec = AdapterSpec(**json.loads(model["spec"]))
        return TenantStatus(
            spec=spec,
            steps=None,
            losses=(),
            size=0,
            queued=len(tenant.waiting),
            seconds=0.0,
            client=tenant.client,
            parked=True,
        )


def _merge(before: TenantStatus | None, now: TenantStatus) -> TenantStatus:
    """Returns the engine's state of a tenant, with what it has forgotten by parking."""
    if before is None:
        return now
    losses = sorted((dict(before.losses) | dict(now.losses)).items())[-LATEST_LOSSES:]
    return dataclasses.replace(now, losses=losses, seconds=before.seconds + now.seconds)
