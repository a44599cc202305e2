"""Finds what an owner may see and use: sessions, models, samplers, checkpoints."""

import json
from typing import Any

from train.serve.protocol.requests import RequestError
from train.serve.routes.tinker.bodies import Refused
from train.serve.storage.ledger import Ledger, Row

_NAMES = ("display_name", "name", "run_name", "recipe_name")  # in what clients attach


class OwnerRows:
    """Finds rows of the ledger; those of others are not there."""

    def __init__(self, ledger: Ledger):
        self._ledger = ledger

    def session(self, session: str, owner: str) -> Row:
        """Returns a session; raises `Refused` (404) if there is none."""
        return _of(owner, self._ledger.session(session), f"session {session[:200]}")

    def model(self, model: str, owner: str) -> Row:
        """Returns a model; raises `Refused` (404) if there is none."""
        return _of(owner, self._ledger.model(model), f"model {model[:200]}")

    def sampler(self, sampler: str, owner: str) -> Row:
        """Returns a sampler; raises `Refused` (404) if there is none."""
        what = f"sampler {sampler[:200]}, or its session has ended"
        return _of(owner, self._ledger.sampler(sampler), what)

    def weights(self, path: str, owner: str) -> Row:
        """Returns the checkpoint at a tinker:// path, of the owner or public.

        Raises:
          RequestError: There is none.
        """
        row = self._ledger.checkpoint(path)
        if row is None or not (row["public"] or row["owner"] == owner):
            raise RequestError(f"there is no checkpoint {path[:300]}, or it is not yours")
        return row

    def display_name(self, model: str) -> str | None:
        """Returns the name that its client gave to a model, or to its session; None for none."""
        row = self._ledger.model(model)
        session = None if row is None else self._ledger.session(row["session"])
        for one in filter(None, (row, session)):
            given = json.loads(one["metadata"] or "null") or {}
            for name in _NAMES:
                if isinstance(given.get(name), str) and given[name].strip():
                    return given[name][:200]
        return None


def spec_of(model: Row | None) -> dict[str, Any]:
    """Returns the fields of a model's `AdapterSpec`; none before it is made."""
    return json.loads(model["spec"]) if model is not None and model["spec"] else {}


def _of(owner: str, row: Row | None, what: str) -> Row:
    if row is None or row["owner"] != owner:
        raise Refused(404, f"there is no {what}")
    return row
