"""Tenants on disk: those that were silent, and those whose room in memory others need."""

import dataclasses
import json
import logging
import shutil
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

from train.serve.database import Locked
from train.serve.ledger import Ledger
from train.serve.notes import Notes
from train.serve.requests import (
    AdapterSpec,
    Leave,
    RequestError,
    Save,
    Serving,
    TenantStatus,
)
from train.serve.seats import Seats
from train.serve.turn import Turn

_log = logging.getLogger(__name__)


class Parking:
    """Has tenants leave the engine, and come back.

    Attributes:
      seats: the room in the engine.
    """

    def __init__(
        self,
        engine: Serving,
        ledger: Ledger,
        notes: Notes,
        lock: AbstractContextManager[Any],
        turns: Mapping[str, Turn],
        seats: Seats,
        *,
        resume: Callable[[str], None],
        refuse: Callable[[str, RequestError], None],
        keep: Callable[[str, int, Path, Turn, Any], None],
        place: Callable[[str], Path],
    ):
        """Begins with an empty engine.

        Args:
          engine, ledger, notes: see `Turns`.
          lock: guards `turns` and `seats`.
          turns: the tenants, by name.
          seats: the room in the engine.
          resume: has the engine go on with a tenant.
          refuse: answers the commands of a tenant that cannot go on.
          keep: takes a saved state for the one to start from.
          place: returns the folder of a tenant's states.
        """
        self._engine, self._ledger, self._notes = engine, ledger, notes
        self._lock, self._turns, self.seats = lock, turns, seats
        self._resume, self._refuse, self._keep, self._place = resume, refuse, keep, place

    def settle(self) -> None:
        """Has the engine take in those who wait for room, and makes room for them."""
        while (model := self.seats.next()) is not None:
            self._resume(model)
        while self.seats.is_short:
            if (model := self.seats.victim(self._quiet())) is None:
                break
            self._park(model)
        for model, why in self.seats.hopeless().items():
            self.seats.give_up(model)
            self._refuse(model, RequestError(why))

    def _quiet(self) -> list[str]:
        """Returns the tenants without work in the engine, those used last at the end."""
        quiet = [name for name, turn in self._turns.items() if turn.is_quiet]
        return sorted(quiet, key=lambda name: self._turns[name].used)

    def _park(self, name: str) -> None:
        """Has a tenant leave the engine once its state is on disk."""
        turn, model = self._turns[name], self._ledger.model(name)
        assert model is not None
        self.seats.park(name)
        seq = turn.next - 1
        if turn.gradient or model["state"] == seq:  # the log has the rest
            self._leave_engine(name, turn)
            return
        folder = self._place(name) / str(seq)
        shutil.rmtree(folder, ignore_errors=True)
        done = partial(self._notes.later, self._parked, name, seq, folder, turn)
        self._engine.submit(name, Save(folder, optimizer=True), done, turn.client)

    def _parked(self, name: str, seq: int, folder: Path, turn: Turn, result: Any) -> None:
        """Takes a tenant out of the engine that was saved, unless it was used again."""
        error: Exception | None = None
        try:
            self._keep(name, seq, folder, turn, result)
        except Locked:
            raise
        except Exception as caught:
            error = caught
        with self._lock:
            if self._turns.get(name) is not turn:
                return  # it was unloaded
            if error is not None or isinstance(result, Exception):
                _log.error("%s cannot be parked, and stays in memory: %s", name, error or result)
                self.seats.stay(name, error or result)
            elif turn.next - 1 != seq or not turn.is_quiet:
                self.seats.stay(name)
            else:
                self._leave_engine(name, turn)
            self.settle()

    def _leave_engine(self, name: str, turn: Turn) -> None:
        status = self._engine.status().tenants.get(name, turn.status)
        if status is not None:
            turn.status = dataclasses.replace(status, parked=True, size=0)
        self.seats.go(name)
        self._engine.submit(name, Leave(), partial(self._notes.later, self.left, name), turn.client)

    def left(self, name: str, _: Any = None) -> None:
        """Notes that a tenant has left the engine."""
        with self._lock:
            self.seats.leave(name)
            self.settle()

    def park_silent(self, seconds: float, now: float) -> None:
        """Parks the tenants of sessions that were silent for some seconds until now."""
        with self._lock:
            silent = set(self._ledger.idle_sessions(seconds))
            before = now - seconds
            for name in self._quiet():
                turn = self._turns[name]
                is_left = turn.client.session in silent and turn.used < before
                if is_left and self.seats.may_park(name):
                    self._park(name)

    def status(self) -> dict[str, TenantStatus]:
        """Returns the state of all tenants, whether the engine has them or not."""
        found = dict(self._engine.status().tenants)
        with self._lock:
            turns = dict(self._turns)
        for name, turn in turns.items():
            before = turn.status
            if name not in found:
                if before is None:
                    before = self._on_disk(name, turn)
                if before is not None:
                    found[name] = before
            elif before is not None:  # the engine has forgotten what was before it was parked
                losses = sorted((dict(before.losses) | dict(found[name].losses)).items())
                seconds = before.seconds + found[name].seconds
                found[name] = dataclasses.replace(found[name], losses=losses, seconds=seconds)
            if name in found:  # not when the engine had a command, such as one of parking
                found[name] = dataclasses.replace(found[name], used=turn.used)
        return found

    def _on_disk(self, name: str, turn: Turn) -> TenantStatus | None:
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
