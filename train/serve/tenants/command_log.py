"""The order of commands: each reaches the engine in its turn, once, and again after a restart."""

import json
import logging
import math
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from train.serve.protocol.engine import EngineProtocol
from train.serve.protocol.requests import (
    Client,
    Command,
    Create,
    Gradient,
    Load,
    RequestError,
    Save,
    Update,
)
from train.serve.storage.database import LockedError
from train.serve.storage.ledger import REFUSED, Ledger, Row
from train.serve.storage.results import ResultWriter, error_answer
from train.serve.tenants.loading import TenantLoader
from train.serve.tenants.parking import TenantParking
from train.serve.tenants.progress import TenantProgress, first_gap, load_of
from train.serve.tenants.seats import Seats
from train.serve.tenants.states import StateFolders

_log = logging.getLogger(__name__)
_PATIENCE = 5.0  # seconds
_AHEAD = 10_000  # a command's number is at most so far beyond the next one's


class BusyError(Exception):
    """Says that a tenant has too much in the queue; the client is to come again."""


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
        read: Callable[[Row], Command],
        write: Callable[[Row, Any], bytes],
        wake: Callable[[str, bytes | None], None],
        *,
        every: int = 32,
        most_bytes: int = 64 * 2**20,
        queue: int = 1024,
        room: int | None = None,
        own_room: int | None = None,
        clock: Callable[[], float] = time.time,
    ):
        """Starts the thread that notes results.

        Args:
          engine: executes.
          ledger: remembers.
          folder: where states, snapshots and checkpoints go.
          read: makes the command of a row of the log.
          write, wake: see `ResultWriter`.
          every, most_bytes: a state is saved after so many commands, or bytes of them.
          queue: the most `load` of a tenant.
          room: tenants in the engine at once; None for any number.
          own_room: the same, of an owner.
          clock: gives the time.
        """
        self._engine, self._ledger, self.folder = engine, ledger, folder
        self._read, self._notes = read, ResultWriter(ledger, write, wake, self._remove)
        self._every, self._most_bytes, self._queue = every, most_bytes, queue
        self._turns: dict[str, TenantProgress] = {}
        self._clock, self._lock = clock, threading.RLock()
        self.states = StateFolders(ledger, folder / "states")
        shared = engine, ledger, self._notes, self._lock, self._turns, Seats(room, own_room)
        loading = TenantLoader(
            *shared,
            read,
            advance=self._advance,
            finish=self._finish,
            count_down=self._count_down,
        )
        self.parking = TenantParking(*shared, self.states, loading, advance=self._advance)

    def close(self) -> None:
        """Notes the results that there are, and stops."""
        self._notes.close()

    def name(self, folder: Path | str) -> str:
        """Returns the name by which the engine knows the adapter in a folder."""
        return str(Path(folder).relative_to(self.folder))

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
        """Commits a command, and hands over those whose turn has come.

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
                if row["kind"] != kind:
                    raise RequestError(f"seq_id {seq} is the number of a {row['kind']}")
                if row["state"] == REFUSED:
                    raise RequestError(json.loads(row["answer"])["error"])
                return f"{model}:{seq}"
            turn = self._turns.get(model, TenantProgress(0))
            if seq != 0 and model not in self._turns:
                raise RequestError(f"{model} is unloaded: load its last checkpoint")
            if not turn.next <= seq <= turn.next + _AHEAD:
                raise RequestError(f"seq_id {seq} is out of order: the next one is {turn.next}")
            fills = seq == turn.next and turn.waiting  # refused, it would block those that wait
            if turn.load >= self._queue and not fills:
                raise BusyError(f"{model} has too many commands without an answer: wait for some")
            refusal = None
            try:
                with self._ledger.transaction():
                    row = self._ledger.log(model, seq, kind, payload, *prepare())
                    command = command or self._read(row)
                if model not in self._turns:
                    turn.client = _client(self._ledger.model(model))
                self._turns[model] = turn
            except RequestError as error:
                if seq == 0:
                    raise  # there is no model, whose commands could wait
                refusal, command = error, None
                row = self._ledger.log(model, seq, kind, b"", refused=error_answer(error))
            turn.load += load_of(row)
            turn.used = self._clock()
            turn.waiting[seq] = row, command
            self._advance(model, turn)
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

    def replay(self, silent: float = math.inf) -> None:
        """Loads each tenant's last state, and executes again what was logged since.

        Args:
          silent: seconds; a tenant without a command for longer stays on disk.
        """
        with self._lock:
            self._ledger.touch()
            self._ledger.abandon(error_answer(RequestError("the model was unloaded")))
            models = self._ledger.live_models()
            for model in sorted(models, key=lambda model: model["used"], reverse=True):
                self._replay(model, self._clock() - silent)

    def _replay(self, model: Row, since: float) -> None:
        name, state = model["id"], model["state"]
        turn = self._turns[name] = TenantProgress(state + 1, _client(model), used=model["used"])
        rows = self._ledger.commands(name, state)
        self.states.tidy(model, rows)
        turn.load = sum(map(load_of, rows))
        turn.exists = model["spec"] is not None or turn.load > 0
        is_recent = model["used"] >= since and self.parking.seats.fits(turn.client)
        if turn.exists and (turn.load or is_recent):
            self.parking.seats.wait(name, turn.client)
        turn.next = first_gap(state, rows)
        self.parking.settle()

    def _advance(self, model: str, turn: TenantProgress) -> None:
        """Hands over the commands whose turn has come, once the engine has the tenant.

        A tenant that the engine does not have waits for a seat, once all its results are noted.
        """
        if turn.next not in turn.waiting:
            return
        if turn.exists and not self.parking.seats.holds(model):
            if turn.running == 0:
                self.parking.seats.wait(model, turn.client)
                self.parking.settle()
            return
        while turn.next in turn.waiting:
            row, command = turn.waiting.pop(turn.next)
            turn.next += 1
            if command is None:
                continue
            done = partial(self._notes.later, self._finish, row, command, turn)
            self._engine.submit(model, command, done, turn.client)
            turn.running += 1
            turn.handed += 1
            turn.size += len(row["payload"] or b"")
            due = turn.handed >= self._every or turn.size >= self._most_bytes
            if due and isinstance(command, Update):
                turn.handed = turn.size = 0
                turn.running += 1
                save = Save(self.states.path(model, row["seq"]), optimizer=True)
                done = partial(self._notes.later, self._finish_save, model, row["seq"], turn)
                self._engine.submit(model, save, done, turn.client)

    def _finish(
        self, row: Row, command: Command | None, turn: TenantProgress | None, result: Any
    ) -> None:
        """Notes a result, in the writer's thread; results come in the order of the commands."""
        noted, failed = False, isinstance(result, Exception)
        try:
            noted = self._notes.note(row, result)
            if not failed and turn is not None:
                self._follow(row, command, turn, noted, result)
        except LockedError:
            raise
        except Exception:  # such as a full disk: the log goes on from the state before
            _log.exception("the state of %s was not kept", row["model"])
        if turn is None:
            return
        with self._lock:
            turn.load -= load_of(row)
            if failed and row["seq"] == 0:
                turn.exists = False
                self.parking.seats.leave(row["model"])
            self._count_down(row["model"], turn)

    def _count_down(self, name: str, turn: TenantProgress) -> None:
        """Notes that the engine has a command less."""
        turn.running -= 1
        if turn.running == 0:
            self._advance(name, turn)
        self.parking.settle()

    def _follow(
        self, row: Row, command: Command | None, turn: TenantProgress, noted: bool, result: Any
    ) -> None:
        """Notes what a command changed."""
        model, seq = row["model"], row["seq"]
        if isinstance(command, Gradient):
            turn.gradient |= not command.forward_only
        elif isinstance(command, Create | Load | Update):
            turn.gradient = False
        elif isinstance(command, Save) and command.optimizer and not turn.gradient and noted:
            self.states.link(model, seq, command.path)
            try:
                self.states.keep(model, seq, turn, result)
            except LockedError:
                self._notes.later(self.states.keep, model, seq, turn, result)

    def _finish_save(self, name: str, seq: int, turn: TenantProgress, result: Any) -> None:
        """Takes a state that was saved by the way."""
        try:
            self.states.keep(name, seq, turn, result)
        except LockedError:
            raise
        except Exception:  # the log goes on from the state before
            _log.exception("the state of %s was not noted", name)
        with self._lock:
            self._count_down(name, turn)

    def leave(self, model: str) -> None:
        """Unloads a model: the commands that the engine has are executed, others never."""
        with self._lock:
            turn = self._turns.get(model)
            if turn is None:
                return
            self._ledger.end_model(model)
            del self._turns[model]
            gone = RequestError(f"{model} was unloaded")
            for row, command in turn.waiting.values():
                if command is not None:
                    self._notes.later(self._finish, row, command, None, gone)
            turn.waiting.clear()
            self.parking.unload(model, turn)

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
            return {turn.client.session for turn in self._turns.values() if not turn.is_quiet}

    def park_silent(self, seconds: float) -> None:
        """Parks the tenants of sessions that were silent for so long."""
        self.parking.park_silent(seconds, self._clock())

    def sweep(self, keep: float = 3600.0) -> None:
        """Removes what is over; call it every minute or so.

        Args:
          keep: seconds for which an answer may be fetched.
        """
        self._notes.again()
        for checkpoint in self._ledger.expired_checkpoints():
            self.delete(checkpoint)
        self._ledger.forget(keep)


def _client(model: Row | None) -> Client:
    """Returns the client whose model this is."""
    assert model is not None  # its command was logged
    return Client(model["owner"], model["session"])
