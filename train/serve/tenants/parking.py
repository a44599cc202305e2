"""Tenants on disk: those that were silent, and those whose room in memory others need."""

import dataclasses
import json
import logging
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

from train.serve.protocol.engine import LATEST_LOSSES, EngineProtocol, TenantStatus
from train.serve.protocol.requests import AdapterSpec, Leave, RequestError, Save
from train.serve.storage.database import LockedError
from train.serve.storage.ledger import Ledger
from train.serve.storage.results import ResultWriter
from train.serve.tenants.loading import TenantLoader
from train.serve.tenants.progress import TenantProgress
from train.serve.tenants.seats import Phase, Seats
from train.serve.tenants.states import StateFolders

_log = logging.getLogger(__name__)


class TenantParking:
    """Has tenants leave the engine, and come back.

    Attributes:
      seats: the room in the engine.
    """

    def __init__(
        self,
        engine: EngineProtocol,
        ledger: Ledger,
        notes: ResultWriter,
        lock: AbstractContextManager[Any],
        turns: Mapping[str, TenantProgress],
        seats: Seats,
        states: StateFolders,
        loading: TenantLoader,
        *,
        advance: Callable[[str, TenantProgress], None],
    ):
        """Begins with an empty engine.

        Args:
          engine, ledger, notes: see `CommandLog`.
          lock: guards `turns` and `seats`.
          turns: the tenants, by name.
          seats: the room in the engine.
          states: states of the tenants on disk.
          loading: loads tenants that have got a seat.
          advance: hands over the commands whose turn has come.
        """
        self._engine, self._ledger, self._notes = engine, ledger, notes
        self._lock, self._turns, self.seats, self._states = lock, turns, seats, states
        self._loading, self._advance = loading, advance

    def settle(self) -> None:
        """Has the engine take in those who wait for room, and makes room for them."""
        while (name := self.seats.next()) is not None:
            self._loading.resume(name)
        while (name := self.seats.victim(self._quiet())) is not None:
            self.seats.enter(name, Phase.HELD)
        for name in self.seats.in_phase(Phase.HELD):
            if self._turns[name].running == 0:
                self._park(name)
        for name, why in self.seats.hopeless().items():
            self.seats.give_up(name)
            self._loading.refuse(name, RequestError(why))

    def _quiet(self) -> list[str]:
        """Returns the tenants without work in the engine, those used last at the end."""
        quiet = [name for name, turn in self._turns.items() if turn.is_quiet]
        return sorted(quiet, key=lambda name: self._turns[name].used)

    def _park(self, name: str) -> None:
        """Has a tenant leave the engine once its state is on disk; its commands wait."""
        turn, model = self._turns[name], self._ledger.model(name)
        assert model is not None
        seq = turn.next - 1
        if turn.gradient or model["state"] == seq:  # the log has the rest
            self._leave_engine(name, turn)
            return
        self.seats.enter(name, Phase.SAVING)
        self._states.clear(name, seq)
        save = Save(self._states.path(name, seq), optimizer=True)
        done = partial(self._notes.later, self._finish_save, name, seq, turn)
        self._engine.submit(name, save, done, turn.client)

    def _finish_save(self, name: str, seq: int, turn: TenantProgress, result: Any) -> None:
        """Takes a tenant out of the engine whose state was saved."""
        error = result if isinstance(result, Exception) else None
        try:
            self._states.keep(name, seq, turn, result)
        except LockedError:
            raise
        except Exception as caught:
            error = error or caught
        with self._lock:
            if error is None or self._turns.get(name) is not turn:  # it may be unloaded by now
                self._leave_engine(name, turn)
            else:
                _log.error("%s cannot be parked, and stays in memory: %s", name, error)
                self.seats.stay(name, error)
                self._advance(name, turn)
            self.settle()

    def _leave_engine(self, name: str, turn: TenantProgress) -> None:
        if (status := self._engine.status().tenants.get(name)) is not None:
            status = _merge(turn.status, status)
            turn.status = dataclasses.replace(status, parked=True, size=0)
        self.seats.enter(name, Phase.LEAVING)
        done = partial(self._notes.later, self._finish_leave, name)
        self._engine.submit(name, Leave(), done, turn.client)

    def _finish_leave(self, name: str, _: Any = None) -> None:
        """Frees the seat of a tenant that has left the engine, and the disk if it is unloaded."""
        with self._lock:
            if name not in self._turns:
                self._states.remove(name)
            self.seats.leave(name)
            self.settle()

    def unload(self, name: str, turn: TenantProgress) -> None:
        """Has the engine forget a tenant that is no longer among the turns; removes its states."""
        self.seats.give_up(name)
        match self.seats.phase(name):
            case None:
                self._notes.later(self._finish_leave, name)
            case Phase.SAVING | Phase.LEAVING:
                pass  # it leaves, and its states are removed then
            case _:
                self._leave_engine(name, turn)

    def park_silent(self, seconds: float, now: float) -> None:
        """Parks the tenants of sessions that were silent for some seconds until now."""
        with self._lock:
            silent = set(self._ledger.idle_sessions(seconds))
            before = now - seconds
            for name in self._quiet():
                turn = self._turns[name]
                is_left = turn.client.session in silent and turn.used < before
                if is_left and self.seats.may_park(name):
                    self.seats.enter(name, Phase.HELD)
            self.settle()

    def status(self) -> dict[str, TenantStatus]:
        """Returns the state of all tenants, whether the engine has them or not."""
        found = dict(self._engine.status().tenants)
        with self._lock:
            turns = dict(self._turns)
            leaving = set(self.seats.in_phase(Phase.LEAVING))
        for name, turn in turns.items():
            if name in found and name not in leaving:
                found[name] = _merge(turn.status, found[name])
            elif (status := turn.status or self._on_disk(name, turn)) is not None:
                found[name] = status
            if name in found:  # not when the engine had a command, such as one of parking
                found[name] = dataclasses.replace(found[name], used=turn.used)
        return found

    def _on_disk(self, name: str, turn: TenantProgress) -> TenantStatus | None:
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
            queued=len(turn.waiting),
            seconds=0.0,
            client=turn.client,
            parked=True,
        )


def _merge(before: TenantStatus | None, now: TenantStatus) -> TenantStatus:
    """Returns the engine's state of a tenant, with what it has forgotten by parking."""
    if before is None:
        return now
    losses = sorted((dict(before.losses) | dict(now.losses)).items())[-LATEST_LOSSES:]
    return dataclasses.replace(now, losses=losses, seconds=before.seconds + now.seconds)
