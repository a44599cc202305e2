"""Tenants that come back into the engine: their last state, and what was logged since."""

import logging
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

from train.serve.protocol.engine import EngineProtocol
from train.serve.protocol.requests import Command, Gradient, Load, RequestError, Save, SaveResult
from train.serve.storage.folders import size
from train.serve.storage.ledger import DONE, LOGGED, Ledger, Row
from train.serve.storage.results import ResultWriter
from train.serve.tenants.progress import TenantProgress, first_gap, load_of
from train.serve.tenants.seats import Phase, Seats

_log = logging.getLogger(__name__)


class TenantLoader:
    """Has the engine load tenants that have got a seat, and answers those that it cannot take."""

    def __init__(
        self,
        engine: EngineProtocol,
        ledger: Ledger,
        notes: ResultWriter,
        lock: AbstractContextManager[Any],
        turns: Mapping[str, TenantProgress],
        seats: Seats,
        read: Callable[[Row], Command],
        *,
        advance: Callable[[str, TenantProgress], None],
        finish: Callable[[Row, Command | None, TenantProgress | None, Any], None],
        count_down: Callable[[str, TenantProgress], None],
    ):
        """Begins with an empty engine.

        Args:
          engine, ledger, notes, read: see `CommandLog`.
          lock: guards `turns` and `seats`.
          turns: the tenants, by name.
          seats: the room in the engine.
          advance: hands over the commands whose turn has come.
          finish: notes the result of a command.
          count_down: notes that the engine has a command less.
        """
        self._engine, self._ledger, self._notes, self._read = engine, ledger, notes, read
        self._lock, self._turns, self._seats = lock, turns, seats
        self._advance, self._finish, self._count_down = advance, finish, count_down

    def resume(self, name: str) -> None:
        """Has the engine load a tenant that has got a seat, and then go on with it."""
        turn = self._turns[name]
        try:
            folder = self._restore(name, turn)
        except Exception as error:  # such as a rank that this server does not take
            self._fail_load(name, error)
            return
        if folder is None:
            self._seats.enter(name, Phase.READY)
            self._advance(name, turn)
            return
        turn.running += 1
        done = partial(self._notes.later, self._finish_load, name, turn)
        self._engine.submit(name, Load(folder, optimizer=True), done, turn.client)

    def _restore(self, name: str, turn: TenantProgress) -> Path | None:
        """Queues what was logged since a tenant's last state; returns that state's folder."""
        model = self._ledger.model(name)
        assert model is not None
        for row in self._ledger.commands(name, model["state"]):
            if row["seq"] not in turn.waiting:
                is_wanted = row["state"] in (LOGGED, DONE)
                turn.waiting[row["seq"]] = row, self._again(row, turn) if is_wanted else None
        turn.next, turn.gradient, turn.handed, turn.size = model["state"] + 1, False, 0, 0
        return None if model["folder"] is None else Path(model["folder"])

    def _finish_load(self, name: str, turn: TenantProgress, result: Any) -> None:
        """Has a tenant go on whose last state was loaded, or says why it was not."""
        with self._lock:
            if self._turns.get(name) is turn:  # else it was unloaded, and leaves the engine
                if isinstance(result, Exception):
                    self._fail_load(name, result)
                else:
                    self._seats.enter(name, Phase.READY)
            self._count_down(name, turn)

    def _fail_load(self, name: str, error: Exception) -> None:
        """Answers the commands of a tenant that was not loaded; its next one tries again."""
        why = f"the state of {name} could not be loaded: {error}"
        _log.error(why, exc_info=error)
        self._seats.leave(name)
        self.refuse(name, RequestError(why))

    def refuse(self, name: str, why: RequestError) -> None:
        """Answers the commands of a tenant that the engine does not have, and cannot take in."""
        turn, model = self._turns[name], self._ledger.model(name)
        assert model is not None
        rows = self._ledger.commands(name, model["state"])
        turn.waiting.clear()
        turn.next, turn.load = first_gap(model["state"], rows), sum(map(load_of, rows))
        for row in rows:
            if row["state"] == LOGGED:
                turn.running += 1
                self._notes.later(self._finish, row, None, turn, why)

    def _again(self, row: Row, turn: TenantProgress) -> Command | None:
        """Returns the command of a row if it is to be executed, perhaps again."""
        command = self._read(row)
        if isinstance(command, Save):
            if row["state"] == LOGGED and command.path.exists():  # written, but not noted
                self._notes.later(self._finish, row, command, None, SaveResult(size(command.path)))
                turn.load -= load_of(row)
                return None
            return command if row["state"] == LOGGED else None
        changes = not (isinstance(command, Gradient) and command.forward_only)
        return command if changes or row["state"] == LOGGED else None
