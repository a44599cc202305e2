"""Parks tenants on disk when they are silent, or when other tenants need their memory.

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
    """The folders of tenants' states: the last state, and states that the log still needs."""

    def __init__(self, ledger: Ledger, folder: Path):
        """Stores the ledger, and the folder that contains the states.

        Args:
          ledger: notes which state is the last.
          folder: holds a folder for each tenant.
        """
        self._ledger = ledger
        self._folder = folder

    def tenant_folder(self, name: str) -> Path:
        """Returns the folder of a tenant's states."""
        return self._folder / name.replace(":", "-")

    def path(self, name: str, seq: int) -> Path:
        """Returns the folder of the state after a command."""
        return self.tenant_folder(name) / str(seq)

    def keep(self, name: str, seq: int, tenant: TenantProgress, result: CommandResult) -> None:
        """Records a saved state as a tenant's last state, unless a gradient is pending.

        Nor is it kept while the ledger lacks an answer to a command before: after a restart, only
        the command itself, executed again, could give it.

        Args:
          name: the tenant.
          seq: the number of the command after which it was saved.
          tenant: its progress.
          result: result of the `Save`; nothing is kept of one that failed.
        """
        model = self._ledger.model(name)
        folder = self.path(name, seq)
        is_complete = isinstance(result, SaveResult) and not tenant.has_gradient
        is_usable = (
            model is not None
            and not model["ended"]
            and is_complete
            and not self._ledger.owes(name, model["state"], seq)
        )
        if not is_usable:
            shutil.rmtree(folder, ignore_errors=True)
            return
        self._ledger.set_state(name, seq, folder)
        for child in list_folder(folder.parent):
            name_match = re.fullmatch(r"(?:load-)?(\d+)", child.name)
            is_older = name_match is not None and int(name_match[1]) <= seq
            if is_older and child != folder:
                shutil.rmtree(child, ignore_errors=True)

    def link(self, name: str, seq: int, source: Path) -> None:
        """Links a checkpoint with an optimizer state as the state after a command."""
        folder = self.path(name, seq)
        if not folder.exists():
            link(source, folder)

    def clear(self, name: str, seq: int) -> None:
        """Deletes a folder that an earlier attempt to save this state left."""
        shutil.rmtree(self.path(name, seq), ignore_errors=True)

    def tidy(self, model: Row, rows: list[Row]) -> None:
        """Deletes a model's files that neither its last state nor later commands need."""
        needed_folders = {model["folder"], *(row["folder"] for row in rows)}
        for child in list_folder(self.tenant_folder(model["id"])):
            if str(child) not in needed_folders:
                shutil.rmtree(child, ignore_errors=True)

    def remove(self, name: str) -> None:
        """Deletes all states of a tenant."""
        shutil.rmtree(self.tenant_folder(name), ignore_errors=True)


class TenantParking:
    """Moves tenants from the engine to the disk, and back."""

    def __init__(
        self, table: TenantTable, log: TenantLog, loader: TenantLoader, states: StateFolders
    ) -> None:
        """Stores the tenants, their log and their states.

        Args:
          table: the tenants.
          log: submits commands.
          loader: loads tenants that have got a seat.
          states: states of the tenants on disk.
        """
        self._table = table
        self._engine = table.engine
        self._results = table.results
        self._ledger = table.results.ledger
        self._seats = table.seats
        self._log = log
        self._loader = loader
        self._states = states

    def settle(self) -> None:
        """Loads waiting tenants into free seats, and parks tenants to free seats."""
        newcomer = self._seats.next()
        while newcomer is not None:
            self._loader.resume(newcomer)
            newcomer = self._seats.next()
        victim = self._seats.victim(self._quiet_tenants())
        while victim is not None:
            self._seats.enter(victim, Phase.HELD)
            victim = self._seats.victim(self._quiet_tenants())
        for name in self._seats.list_phase(Phase.HELD):
            if self._table.tenants[name].n_running == 0:
                self._park(name)
        for name, reason in self._seats.hopeless().items():
            self._seats.give_up(name)
            self._loader.refuse(name, RequestError(reason))

    def _quiet_tenants(self) -> list[str]:
        """Returns the tenants without work in the engine, the least recently used first."""
        names = [name for name, tenant in self._table.tenants.items() if tenant.is_quiet]
        return sorted(names, key=lambda name: self._table.tenants[name].last_used)

    def _park(self, name: str) -> None:
        """Saves a tenant's state if necessary, and then removes the tenant from the engine."""
        tenant = self._table.tenants[name]
        model = self._ledger.model(name)
        assert model is not None
        seq = tenant.next_seq - 1
        is_state_on_disk = model["state"] == seq
        if is_state_on_disk or tenant.has_gradient:  # a gradient comes again from the log
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
        """Removes a tenant from the engine after its state was saved."""
        error = result if isinstance(result, Exception) else None
        try:
            self._states.keep(name, seq, tenant, result)
        except LockedError:
            raise
        except Exception as keep_error:
            error = error or keep_error
        with self._table.lock:
            is_unloaded = self._table.tenants.get(name) is not tenant
            if error is None or is_unloaded:
                self._leave_engine(name, tenant)
            else:
                _logger.error("%s cannot be moved to the disk and stays in memory: %s", name, error)
                self._seats.stay(name, error)
                self._log.advance(name, tenant)
            self.settle()

    def _leave_engine(self, name: str, tenant: TenantProgress) -> None:
        """Removes a tenant from the engine, and keeps its present status."""
        engine_status = self._engine.status().tenants.get(name)
        if engine_status is not None:
            status = _merge(tenant.status, engine_status)
            tenant.status = dataclasses.replace(status, parked=True, size=0)
        self._seats.enter(name, Phase.LEAVING)
        done = partial(self._results.submit, self._finish_leave, name)
        self._engine.submit(name, Leave(), done, tenant.client)

    def _finish_leave(self, name: str, _: CommandResult = None) -> None:
        """Frees the seat of a removed tenant, and deletes the states of an unloaded one."""
        with self._table.lock:
            if name not in self._table.tenants:
                self._states.remove(name)
            self._seats.leave(name)
            self.settle()

    def unload(self, name: str, tenant: TenantProgress) -> None:
        """Removes a tenant that is no longer in the table, and its states."""
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
            silent_sessions = set(self._ledger.idle_sessions(seconds))
            for name in self._quiet_tenants():
                is_silent = self._table.tenants[name].client.session in silent_sessions
                if is_silent and self._seats.may_park(name):
                    self._seats.enter(name, Phase.HELD)
            self.settle()

    def status(self) -> dict[str, TenantStatus]:
        """Returns the status of all tenants, including parked ones."""
        statuses = dict(self._engine.status().tenants)
        with self._table.lock:
            tenants = dict(self._table.tenants)
            leaving = set(self._seats.list_phase(Phase.LEAVING))
        for name, tenant in tenants.items():
            if name in statuses and name not in leaving:
                statuses[name] = _merge(tenant.status, statuses[name])
            else:
                parked_status = tenant.status or self._read_status(name, tenant)
                if parked_status is not None:
                    statuses[name] = parked_status
            if name in statuses:  # not when the engine had a command, such as one of parking
                statuses[name] = dataclasses.replace(statuses[name], used=tenant.last_used)
        return statuses

    def _read_status(self, name: str, tenant: TenantProgress) -> TenantStatus | None:
        """Returns the status of a tenant that was parked before the server started."""
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


def _merge(parked_status: TenantStatus | None, engine_status: TenantStatus) -> TenantStatus:
    """Returns the engine's status of a tenant, with the losses and seconds before its parking."""
    if parked_status is None:
        return engine_status
    loss_of_step = dict(parked_status.losses) | dict(engine_status.losses)
    return dataclasses.replace(
        engine_status,
        losses=sorted(loss_of_step.items())[-LATEST_LOSSES:],
        seconds=parked_status.seconds + engine_status.seconds,
    )
