"""Finds an owner's sessions, models, samplers and checkpoints for Tinker's routes."""

import dataclasses
import json
from collections.abc import Sequence

from train.serve.protocol.engine import EngineProtocol
from train.serve.protocol.requests import RequestError
from train.serve.routes.errors import HttpError, JsonObject
from train.serve.routes.tinker.futures import Futures
from train.serve.storage.ledger import Ledger, Row
from train.serve.tenants.command_log import CommandLog

# Fields of the metadata that clients attach, in which they give names.
_NAME_FIELDS = ("display_name", "name", "run_name", "recipe_name")


class OwnerRows:
    """Finds rows of the ledger that belong to an owner.

    Attributes:
      names: names of the base.
    """

    def __init__(self, ledger: Ledger, names: Sequence[str]):
        """Stores the ledger, and the base names that clients may use."""
        self._ledger = ledger
        self.names = tuple(dict.fromkeys(names))

    def base_name(self, name: str) -> str:
        """Returns a name of the base; raises a RequestError for any other name."""
        if name not in self.names:
            raise RequestError(
                f"the base model {name[:200]!r} is not served here. Use {', '.join(self.names)}."
            )
        return name

    def base_of(self, checkpoint: Row, name: str | None) -> str:
        """Returns the base that a client names, or else the base of a checkpoint's model."""
        if name is not None:
            return self.base_name(name)
        model = self._ledger.model(checkpoint["model"])
        return self.base_name(model["base"] if model else "")

    def session(self, session: str, owner: str) -> Row:
        """Returns a session; raises HttpError (404) if there is none."""
        return _check_owner(owner, self._ledger.session(session), f"session {session[:200]}")

    def open_session(self, session: str, owner: str) -> str:
        """Returns the id of an open session; raises HttpError if there is none."""
        row = self.session(session, owner)
        if row["ended"]:
            raise HttpError(410, f"the session {row['id']} has ended. Create a new session.")
        return row["id"]

    def model(self, model: str, owner: str) -> Row:
        """Returns a model; raises HttpError (404) if there is none."""
        return _check_owner(owner, self._ledger.model(model), f"model {model[:200]}")

    def sampler(self, sampler: str, owner: str) -> Row:
        """Returns a sampler; raises HttpError (404) if there is none."""
        label = f"sampler {sampler[:200]}, or its session has ended"
        return _check_owner(owner, self._ledger.sampler(sampler), label)

    def weights(self, path: str, owner: str) -> Row:
        """Returns the checkpoint at a tinker:// path that is public or belongs to the owner.

        Raises:
          RequestError: There is none.
        """
        row = self._ledger.checkpoint(path)
        if row is None or not (row["public"] or row["owner"] == owner):
            raise RequestError(
                f"there is no checkpoint {path[:300]}, or it belongs to another key. Check the "
                "path."
            )
        return row

    def display_name(self, model: str) -> str | None:
        """Returns the name that the client gave to a model or to its session, or None."""
        model_row = self._ledger.model(model)
        if model_row is None:
            return None
        session_row = self._ledger.session(model_row["session"])
        return _client_given_name(model_row) or (
            None if session_row is None else _client_given_name(session_row)
        )


@dataclasses.dataclass(frozen=True)
class TinkerParts:
    """The parts of a server that Tinker's routes share.

    Attributes:
      engine: trains and draws.
      ledger: sessions, models, checkpoints and samplers.
      rows: rows of the ledger, by their owners.
      log: the log of commands.
      futures: results that clients come back for.
    """

    engine: EngineProtocol
    ledger: Ledger
    rows: OwnerRows
    log: CommandLog
    futures: Futures


def spec_of(model: Row | None) -> JsonObject:
    """Returns the fields of a model's `AdapterSpec`; {} before the model is created."""
    return json.loads(model["spec"]) if model is not None and model["spec"] else {}


def _client_given_name(row: Row) -> str | None:
    """Returns the name in a row's metadata, or None."""
    metadata = json.loads(row["metadata"] or "null") or {}
    for field in _NAME_FIELDS:
        name = metadata.get(field)
        if isinstance(name, str) and name.strip():
            return name[:200]
    return None


def _check_owner(owner: str, row: Row | None, label: str) -> Row:
    """Returns a row if it belongs to an owner; raises HttpError (404) otherwise."""
    if row is None or row["owner"] != owner:
        raise HttpError(404, f"there is no {label}")
    return row
