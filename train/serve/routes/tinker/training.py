"""The training routes of Tinker's API: each takes a command into the log."""

import dataclasses
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from starlette.responses import Response

from train.serve.protocol.requests import RequestError, Update
from train.serve.routes.errors import json_response
from train.serve.routes.tinker import commands, wire
from train.serve.routes.tinker.bodies import Endpoint, OwnerRequest
from train.serve.routes.tinker.owner_rows import TinkerParts, spec_of
from train.serve.storage.folders import link_beside
from train.serve.storage.ledger import Row


class TrainingRoutes:
    """Takes in commands that make, train, save and load models."""

    def __init__(self, parts: TinkerParts) -> None:
        """Keeps the parts of the server."""
        self._engine, self._ledger, self._rows = parts.engine, parts.ledger, parts.rows
        self._log, self._futures = parts.log, parts.futures

    def endpoints(self) -> list[tuple[str, str, Endpoint]]:
        """Returns the path, the method and the endpoint of each route."""
        posts: dict[str, Endpoint] = {
            "create_model": self._create_model,
            "get_info": self._get_info,
            "forward_backward": self._forward_backward,
            "optim_step": self._optim_step,
            "load_weights": self._load_weights,
            "unload_model": self._unload_model,
            "save_weights": partial(self._save, "save_weights"),
            "save_weights_for_sampler": partial(self._save, "save_weights_for_sampler"),
            "save_weights_external": partial(self._save, "save_weights_external"),
        }
        return [(path, "POST", endpoint) for path, endpoint in posts.items()]

    def _submit(self, place: tuple[str, int], *rest: Any, **more: Any) -> Response:
        """Takes a command in: see `CommandLog.accept`."""
        request = self._log.accept(*place, *rest, **more)
        return json_response({"request_id": request, "model_id": place[0]})

    def _place(self, request: OwnerRequest) -> tuple[str, int]:
        model = self._rows.model(request.fields.get("model_id", str), request.owner)
        return model["id"], request.fields.get("seq_id", int, least=1)

    def _create_model(self, request: OwnerRequest) -> Response:
        fields = request.fields
        session = self._rows.open_session(fields.get("session_id", str), request.owner)
        model = f"{session}:train:{fields.get('model_seq_id', int, least=0)}"
        base, metadata = self._rows.base_name(fields.get("base_model", str)), fields.metadata()

        def prepare() -> tuple[None, None]:
            self._ledger.add_model(model, session, request.owner, base, metadata)
            return None, None

        return self._submit((model, 0), "create_model", request.body, prepare)

    def _get_info(self, request: OwnerRequest) -> Response:
        row = self._rows.model(request.fields.get("model_id", str), request.owner)
        data = {"model_name": row["base"], "arch": "lora_jax"}
        rank = spec_of(row).get("rank")
        info = {"type": "get_info", "model_id": row["id"], "model_name": row["base"]}
        return json_response({**info, "model_data": data, "is_lora": True, "lora_rank": rank})

    def _forward_backward(self, request: OwnerRequest) -> Response:
        encoding = request.http.headers.get("content-encoding", "")
        body, message = wire.parse(request.body, encoding)
        model, seq = self._rows.model(message.model_id, request.owner)["id"], message.seq_id
        if seq < 1:
            raise RequestError(f"seq_id is {seq}; a model's commands count from 1")

        try:
            command = wire.gradient_of(message, self._engine.facts)
        except RequestError as error:
            return self._submit((model, seq), "forward_backward", b"", _raiser(error))
        return self._submit((model, seq), "forward_backward", body, command=command)

    def _optim_step(self, request: OwnerRequest) -> Response:
        def prepare() -> tuple[None, None]:
            given = request.fields.object("adam_params", {})
            commands.check_numbers(given, *(number.name for number in dataclasses.fields(Update)))
            return None, None

        return self._submit(self._place(request), "optim_step", request.body, prepare)

    def _load_weights(self, request: OwnerRequest) -> Response:
        fields = request.fields
        path, session = fields.get("path", str), None
        if fields.get("session_id", str, None) is not None:
            session = self._rows.open_session(fields.get("session_id", str), request.owner)
            place = f"{session}:train:{fields.get('model_seq_id', int, least=0)}", 0
        else:
            place = self._place(request)

        def source() -> Row:
            row = self._rows.weights(path, request.owner)
            if fields.get("optimizer", bool, False) and row["kind"] != "weights":
                raise RequestError(f"{path} has no optimiser's state: load weights/…, or without")
            return row

        def prepare(files: Path) -> tuple[Path, None]:
            if session is not None:
                base = self._rows.base_of(source(), fields.get("base_model", str, None))
                self._ledger.add_model(place[0], session, request.owner, base, fields.metadata())
            if not folder.exists():
                os.rename(files, folder)
            return folder, None

        folder = self._log.states.place(place[0]) / f"load-{place[1]}"
        if self._ledger.command(*place) is not None:  # it came before
            return self._submit(place, "load_weights", request.body)
        try:
            checkpoint = Path(source()["folder"])
        except RequestError as error:
            return self._submit(place, "load_weights", request.body, _raiser(error))
        # So that the checkpoint may be deleted before a replay. A copy takes long, and nobody else
        # is to wait for it.
        with link_beside(checkpoint, folder) as files:
            return self._submit(place, "load_weights", request.body, partial(prepare, files))

    def _save(self, kind: str, request: OwnerRequest) -> Response:
        fields = request.fields
        model, seq = self._place(request)
        number = fields.get("sampling_session_seq_id", int, None, least=0)
        is_snapshot = kind == "save_weights_for_sampler" and number is not None

        def prepare() -> tuple[Path, str]:
            commands.recipients_of(fields, kind)
            if is_snapshot and fields.get("path", str, None) is None:
                target = f"{model.split(':')[0]}:sample:{number}"
                folder = self._log.place("snapshots", target)
                exists = self._ledger.sampler(target) is not None
            else:
                target = commands.path_of(fields, kind, model, seq)
                segment, name = target.split("/")[-2:]
                folder = self._log.place("checkpoints", model) / segment / f"{name}@{seq}"
                may = kind == "save_weights" and fields.get("overwrite", bool, False)
                exists = self._ledger.checkpoint(target) is not None and not may
            if exists or self._ledger.is_promised(target):
                raise RequestError(f"{target} exists already: choose another name, or delete it")
            return folder, target

        return self._submit((model, seq), kind, request.body, prepare)

    def _unload_model(self, request: OwnerRequest) -> Response:
        row = self._rows.model(request.fields.get("model_id", str), request.owner)
        request_id = f"{row['id']}:unload"
        self._log.leave(row["id"])
        if self._futures.open(request_id, request.owner):
            self._futures.resolve(request_id, {"type": "unload_model", "model_id": row["id"]})
        return json_response({"request_id": request_id})


def _raiser(error: RequestError) -> Callable[[], NoReturn]:
    def refuse() -> NoReturn:
        raise error

    return refuse
