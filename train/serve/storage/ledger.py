"""Stores sessions, checkpoints, and the log of each tenant's commands in SQLite."""

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from train.serve.storage.database import Database, Row

# The states of a command. Refused ones were wrong on arrival; the engine never sees them.
LOGGED = "logged"
DONE = "done"
FAILED = "failed"
REFUSED = "refused"
# The kinds of commands that were given up, since they never came: the first one, and others.
DISCARD = "discard"
MISSING = "missing"
_TABLES = """
create table if not exists sessions (
    id text primary key, owner text not null, created real not null, seen real not null,
    ended real, metadata text);
create table if not exists models (
    id text primary key, session text not null, owner text not null, base text not null,
    spec text, metadata text, used real not null, ended real,
    state integer not null default -1, folder text);
create table if not exists commands (
    model text not null, seq integer not null, kind text not null, payload blob, folder text,
    target text, state text not null, answer blob, finished real, primary key (model, seq));
create table if not exists checkpoints (
    path text primary key, model text not null, owner text not null, kind text not null,
    name text not null, folder text not null, made real not null, size integer not null,
    expires real, public integer not null default 0, metadata text);
create table if not exists samplers (
    id text primary key, session text not null, owner text not null, base text not null,
    path text, folder text);
create index if not exists models_of_sessions on models (session);
create index if not exists samplers_of_sessions on samplers (session);
create index if not exists unfinished on commands (target) where state = 'logged';
create index if not exists answered on commands (finished) where answer is not null;
"""


_START = time.time() - time.monotonic()


def steady_time() -> float:
    """Returns the seconds since 1970 by a clock that ignores changes of the system's time.

    Waiting is measured by it: a wall clock that jumps makes nothing that lives look old.
    """
    return _START + time.monotonic()


class Ledger:
    """Stores all data that must survive a restart. Any thread may call its methods.

    A row that a method returns is a mapping by the names of columns. Times are seconds since 1970:
    by the wall clock when something was made or used, by `clock` when something ended or will.
    """

    def __init__(self, path: Path | str, clock: Callable[[], float] = steady_time):
        """Opens or creates the file.

        Args:
          path: the file of SQLite; ":memory:" for none.
          clock: measures waiting.
        """
        self._clock = clock
        self._db = Database(path, _TABLES)
        # When a session was last heard. None could be heard before the start.
        self._heard: dict[str, float] = {}
        self._opened = clock()
        self.transaction = self._db.transaction
        self.close = self._db.close
        self._execute = self._db.execute
        self._execute_one = self._db.execute_one
        self._insert = self._db.insert
        self._page = self._db.page

    def now(self) -> float:
        """Returns the time of the clock that measures intervals."""
        return self._clock()

    # Sessions

    def open_session(self, session: str, owner: str, metadata: object = None) -> None:
        """Records a client's session."""
        now = time.time()
        values = {
            "id": session,
            "owner": owner,
            "created": now,
            "seen": now,
            "metadata": json.dumps(metadata),
        }
        self._insert("sessions", values)
        self.hear(session)

    def session(self, session: str) -> Row | None:
        """Returns a session, or None."""
        return self._execute_one("select * from sessions where id = ?", session)

    def sessions(self, owner: str, limit: int = 20, offset: int = 0) -> list[Row]:
        """Returns an owner's sessions, the newest first."""
        sql = "select * from sessions where owner = ? order by created desc, id limit ? offset ?"
        return self._execute(sql, owner, limit, offset)

    def hear(self, session: str) -> None:
        """Records in memory that a session's client is active."""
        self._heard[session] = self._clock()

    def idle_sessions(self, seconds: float) -> list[str]:
        """Returns the sessions without a sign of activity for some seconds."""
        latest_time = self._clock() - seconds
        rows = self._execute("select id from sessions where ended is null")
        return [row["id"] for row in rows if self._heard.get(row["id"], self._opened) < latest_time]

    def end_session(self, session: str) -> list[Row]:
        """Marks a session as ended; deletes and returns its samplers that own their weights."""
        self._heard.pop(session, None)
        with self.transaction():
            sql = "update sessions set ended = ? where id = ? and ended is null"
            self._execute(sql, self._clock(), session)
            owned_samplers = (
                "from samplers where session = ? and path is null and folder is not null"
            )
            samplers = self._execute(f"select * {owned_samplers}", session)
            self._execute(f"delete {owned_samplers}", session)
        return samplers

    # Models, the tenants

    def add_model(self, model: str, session: str, owner: str, base: str, metadata: object) -> None:
        """Records a new model, which the command with number 0 creates."""
        values = {
            "id": model,
            "session": session,
            "owner": owner,
            "base": base,
            "metadata": json.dumps(metadata),
            "used": time.time(),
        }
        self._insert("models", values)

    def model(self, model: str) -> Row | None:
        """Returns a model, or None."""
        return self._execute_one("select * from models where id = ?", model)

    def models(self, owner: str, limit: int = -1, offset: int = 0) -> tuple[list[Row], int]:
        """Returns a page of an owner's models, the last used first, and the number of all."""
        return self._page("models where owner = ?", "used desc, id", (owner,), limit, offset)

    def models_of(self, session: str) -> list[Row]:
        """Returns the models of a session."""
        return self._execute("select * from models where session = ? order by id", session)

    def live_models(self) -> list[Row]:
        """Returns the models that are not unloaded."""
        return self._execute("select * from models where ended is null order by id")

    def end_model(self, model: str) -> None:
        """Marks a model as unloaded, and deletes the payloads of its commands."""
        with self.transaction():
            sql = "update models set ended = ?, folder = null where id = ?"
            self._execute(sql, self._clock(), model)
            self._execute("update commands set payload = null where model = ?", model)

    def abandon(self, answer: bytes) -> None:
        """Stores an answer for all unanswered commands of unloaded models."""
        sql = (
            "update commands set state = 'failed', answer = ?, finished = ? where state = 'logged' "
            "and model in (select id from models where ended is not null)"
        )
        self._execute(sql, answer, self._clock())

    def set_state(self, model: str, seq: int, folder: Path) -> None:
        """Records the folder of the state after a command, and deletes the payloads up to it."""
        with self.transaction():
            sql = "update models set state = ?, folder = ? where id = ?"
            self._execute(sql, seq, str(folder), model)
            sql = "update commands set payload = null where model = ? and seq <= ?"
            self._execute(sql, model, seq)

    # The log

    def log(
        self,
        model: str,
        seq: int,
        kind: str,
        payload: bytes,
        folder: Path | None = None,
        target: str | None = None,
        refused: bytes | None = None,
    ) -> Row:
        """Records a command, and returns its row.

        Args:
          model, seq: its place.
          kind: its name.
          payload: what to read it from.
          folder: the one that it writes or loads.
          target: the path of the checkpoint, or the sampler's id, that it makes.
          refused: the answer, if it is wrong.
        """
        values: dict[str, object] = {
            "model": model,
            "seq": seq,
            "kind": kind,
            "payload": payload,
            "target": target,
            "state": LOGGED,
            "folder": None if folder is None else str(folder),
        }
        if refused is not None:
            values["state"] = REFUSED
            values["answer"] = refused
            values["finished"] = self._clock()
        with self.transaction():
            self._insert("commands", values)
            self._execute("update models set used = ? where id = ?", time.time(), model)
            row = self.command(model, seq)
        assert row is not None
        return row

    def command(self, model: str, seq: int) -> Row | None:
        """Returns a command, or None."""
        return self._execute_one("select * from commands where model = ? and seq = ?", model, seq)

    def commands(self, model: str, after: int) -> list[Row]:
        """Returns the commands after one, in their order."""
        sql = "select * from commands where model = ? and seq > ? order by seq"
        return self._execute(sql, model, after)

    def owes(self, model: str, after: int, until: int) -> bool:
        """Returns True if a command after number `after` and up to `until` has no answer."""
        sql = "select 1 from commands where model = ? and seq > ? and seq <= ? and state = 'logged'"
        return self._execute_one(sql, model, after, until) is not None

    def is_promised(self, target: str) -> bool:
        """Returns True if an unfinished command will create this checkpoint or sampler."""
        sql = "select 1 from commands where target = ? and state = 'logged'"
        return self._execute_one(sql, target) is not None

    def finish(
        self, model: str, seq: int, answer: bytes, failed: bool, spec: str | None = None
    ) -> bool:
        """Stores the answer of an unanswered command, and the description of a new model's adapter.

        Returns:
          Whether it had none.
        """
        with self.transaction():
            sql = (
                "update commands set state = ?, answer = ?, finished = ? "
                "where model = ? and seq = ? and state = 'logged' returning 1"
            )
            state = FAILED if failed else DONE
            had_no_answer = self._execute(sql, state, answer, self._clock(), model, seq)
            if not had_no_answer:
                return False
            if spec is not None:
                self._execute("update models set spec = ? where id = ?", spec, model)
        return True

    def forget(self, seconds: float) -> None:
        """Deletes answers older than `seconds`, and commands of models that ended before."""
        latest_time = self._clock() - seconds
        sql = "update commands set answer = null where answer is not null and finished < ?"
        self._execute(sql, latest_time)
        sql = "delete from commands where model in (select id from models where ended < ?)"
        self._execute(sql, latest_time)

    # Checkpoints

    def add_checkpoint(self, command: Row, owner: str, size: int, facts: Mapping[str, Any]) -> None:
        """Records the checkpoint that a command wrote, in place of one with the same name.

        Args:
          command: the row; its target is tinker://model/kind/name.
          owner: owner of the model.
          size: bytes.
          facts: ttl_seconds and user_metadata, or neither.
        """
        ttl_seconds = facts.get("ttl_seconds")
        kind, name = command["target"].split("/")[-2:]
        values = {
            "path": command["target"],
            "kind": kind,
            "name": name,
            "owner": owner,
            "model": command["model"],
            "folder": command["folder"],
            "size": size,
            "made": time.time(),
            "expires": None if ttl_seconds is None else self._clock() + ttl_seconds,
            "metadata": json.dumps(facts.get("user_metadata")),
        }
        self._insert("checkpoints", values, "insert or replace")

    def checkpoint(self, path: str) -> Row | None:
        """Returns a checkpoint that has not expired, or None."""
        sql = "select * from checkpoints where path = ? and (expires is null or expires > ?)"
        return self._execute_one(sql, path, self._clock())

    def checkpoints(
        self, owner: str, model: str | None = None, limit: int = -1, offset: int = 0
    ) -> tuple[list[Row], int]:
        """Returns a page of an owner's checkpoints, the newest first, and the number of all.

        Args:
          owner: owner of the checkpoints.
          model: the one that saved them; None for any.
          limit: how many are returned at most; -1 for all.
          offset: how many are left out before.
        """
        matching_rows = (
            "checkpoints where owner = ? and (?2 is null or model = ?2) "
            "and (expires is null or expires > ?)"
        )
        values = (owner, model, self._clock())
        return self._page(matching_rows, "made desc, rowid desc", values, limit, offset)

    def expired_checkpoints(self) -> list[Row]:
        """Returns the checkpoints that have expired."""
        return self._execute("select * from checkpoints where expires <= ?", self._clock())

    def drop_checkpoint(self, path: str) -> None:
        """Deletes the row of a checkpoint."""
        self._execute("delete from checkpoints where path = ?", path)

    def set_expiry(self, path: str, seconds: float | None) -> None:
        """Sets the seconds after which a checkpoint expires, or None for never."""
        expires = None if seconds is None else self._clock() + seconds
        self._execute("update checkpoints set expires = ? where path = ?", expires, path)

    def set_public(self, path: str, public: bool) -> None:
        """Makes a checkpoint readable for all owners, or only for its own."""
        self._execute("update checkpoints set public = ? where path = ?", public, path)

    # Samplers

    def add_sampler(self, sampler: str, **facts: str | None) -> None:
        """Records a session's sampler unless it exists.

        Args:
          sampler: its id.
          **facts: session, owner and base; for a checkpoint its path; for all but the base a
            folder.
        """
        self._insert("samplers", {"id": sampler, **facts}, "insert or ignore")

    def sampler(self, sampler: str) -> Row | None:
        """Returns a sampler, or None."""
        return self._execute_one("select * from samplers where id = ?", sampler)

    def samplers_of(self, session: str) -> list[Row]:
        """Returns the samplers of a session."""
        return self._execute("select * from samplers where session = ? order by id", session)
