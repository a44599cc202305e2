"""The training routes of Tinker's API, each of which adds a command to the log."""

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
    """The routes that create, train, save and load models."""

    def __init__(self, parts: TinkerParts) -> None:
        """Stores the server's parts."""
        self._engine = parts.engine
        self._ledger = parts.ledger
        self._rows = parts.rows
        self._log = parts.log
        self._futures = parts.futures

    def endpoints(self) -> list[tuple[str, str, Endpoint]]:
        """Returns the path, the method and the handler of each route."""
        posts: dict[str, Endpoint] = {
            "create_model": self._create_model,
            "get_info": self._get_info,
            "forward_backward": self._forward_backward,
            "optim_step": self._optim_step,
            "load_weights": self._load_weights,
            "unload_model": self._unload_model,
            "save_weights": partial(self._save_checkpoint, "save_weights"),
            "save_weights_for_sampler": partial(self._save_checkpoint, "save_weights_for_sampler"),
            "save_weights_external": partial(self._save_checkpoint, "save_weights_external"),
        }
        return [(path, "POST", endpoint) for path, endpoint in posts.items()]

    def _submit(
        self, model: str, seq: int, kind: str, payload: bytes, *rest: Any, **options: Any
    ) -> Response:
        """Adds a command to the log; see `CommandLog.accept`."""
        request_id = self._log.accept(model, seq, kind, payload, *rest, **options)
        return json_response({"request_id": request_id, "model_id": model})

    def _model_and_seq(self, request: OwnerRequest) -> tuple[str, int]:
        """Returns a request's model and the command's sequence number."""
        model = self._rows.model(request.fields.get("model_id", str), request.owner)
        return model["id"], request.fields.get("seq_id", int, least=1)

    def _create_model(self, request: OwnerRequest) -> Response:
        """Creates a model in a session."""
        fields = request.fields
        session = self._rows.open_session(fields.get("session_id", str), request.owner)
        model = f"{session}:train:{fields.get('model_seq_id', int, least=0)}"
        base = self._rows.base_name(fields.get("base_model", str))
        metadata = fields.metadata()

        def prepare() -> tuple[None, None]:
            self._ledger.add_model(model, session, request.owner, base, metadata)
            return None, None

        return self._submit(model, 0, "create_model", request.body, prepare)

    def _get_info(self, request: OwnerRequest) -> Response:
        """Answers with a description of a model."""
        model = self._rows.model(request.fields.get("model_id", str), request.owner)
        info = {
            "type": "get_info",
            "model_id": model["id"],
            "model_name": model["base"],
            "model_data": {"model_name": model["base"], "arch": "lora_jax"},
            "is_lora": True,
            "lora_rank": spec_of(model).get("rank"),
        }
        return json_response(info)

    def _forward_backward(self, request: OwnerRequest) -> Response:
        """Adds the gradient of some data to a model's gradient."""
        encoding = request.http.headers.get("content-encoding", "")
        with wire.unpacking_turn(encoding):
            return self._submit_gradient(request, encoding)

    def _submit_gradient(self, request: OwnerRequest, encoding: str) -> Response:
        """Reads the body of a forward_backward, and queues its command."""
        body, message = wire.parse(request.body, encoding)
        model = self._rows.model(message.model_id, request.owner)["id"]
        seq = message.seq_id
        if seq < 1:
            raise RequestError(
                f"seq_id is {seq}, but the commands of a model count from 1. Pass 1 or more."
            )
        try:
            command = wire.gradient_of(message, self._engine.facts)
        except RequestError as error:
            return self._submit(model, seq, "forward_backward", b"", _make_raiser(error))
        return self._submit(model, seq, "forward_backward", body, command=command)

    def _optim_step(self, request: OwnerRequest) -> Response:
        """Updates a model by its gradient."""

        def prepare() -> tuple[None, None]:
            adam_params = request.fields.object("adam_params", {})
            names = [field.name for field in dataclasses.fields(Update)]
            commands.check_numbers(adam_params, *names)
            return None, None

        model, seq = self._model_and_seq(request)
        return self._submit(model, seq, "optim_step", request.body, prepare)

    def _load_weights(self, request: OwnerRequest) -> Response:
        """Loads a checkpoint into a model, or into a new one of a session."""
        fields = request.fields
        path = fields.get("path", str)
        session = None
        if fields.get("session_id", str, None) is not None:  # makes a model
            session = self._rows.open_session(fields.get("session_id", str), request.owner)
            model = f"{session}:train:{fields.get('model_seq_id', int, least=0)}"
            seq = 0
        else:
            model, seq = self._model_and_seq(request)

        folder = self._log.states.tenant_folder(model) / f"load-{seq}"

        def find_checkpoint() -> Row:
            """Returns the checkpoint to load, with an optimizer state if that is requested."""
            checkpoint = self._rows.weights(path, request.owner)
            if fields.get("optimizer", bool, False) and checkpoint["kind"] != "weights":
                raise RequestError(
                    f"{path} has no state of an optimizer. Load a checkpoint of weights/…, or load "
                    "this one without the optimizer."
                )
            return checkpoint

        def prepare(linked_folder: Path) -> tuple[Path, None]:
            """Records a new model, and renames the linked files to the checkpoint's folder."""
            if session is not None:
                base = self._rows.base_of(find_checkpoint(), fields.get("base_model", str, None))
                self._ledger.add_model(model, session, request.owner, base, fields.metadata())
            if not folder.exists():
                os.rename(linked_folder, folder)
            return folder, None

        is_repeat = self._ledger.command(model, seq) is not None
        if is_repeat:
            return self._submit(model, seq, "load_weights", request.body)
        try:
            checkpoint_folder = Path(find_checkpoint()["folder"])
        except RequestError as error:
            return self._submit(model, seq, "load_weights", request.body, _make_raiser(error))
        # So that the checkpoint may be deleted before a replay. A copy takes long, and nobody else
        # is to wait for it.
        with link_beside(checkpoint_folder, folder) as linked_folder:
            return self._submit(
                model, seq, "load_weights", request.body, partial(prepare, linked_folder)
            )

    def _save_checkpoint(self, kind: str, request: OwnerRequest) -> Response:
        """Saves a model as a checkpoint, or as a snapshot for a sampler of its session."""
        fields = request.fields
        model, seq = self._model_and_seq(request)
        sampler_seq = fields.get("sampling_session_seq_id", int, None, least=0)
        is_for_sampler = kind == "save_weights_for_sampler" and sampler_seq is not None

        def prepare() -> tuple[Path, str]:
            """Returns the folder and the name of a save; raises an error if the name exists."""
            commands.recipients_of(fields, kind)
            is_snapshot = is_for_sampler and fields.get("path", str, None) is None
            if is_snapshot:
                target = f"{model.split(':')[0]}:sample:{sampler_seq}"
                folder = self._log.model_folder("snapshots", target)
                exists = self._ledger.sampler(target) is not None
            else:
                target = commands.path_of(fields, kind, model, seq)
                segment, name = target.split("/")[-2:]
                folder = self._log.model_folder("checkpoints", model) / segment / f"{name}@{seq}"
                may_overwrite = kind == "save_weights" and fields.get("overwrite", bool, False)
                exists = self._ledger.checkpoint(target) is not None and not may_overwrite
            if exists or self._ledger.is_promised(target):
                raise RequestError(f"{target} exists already. Choose another name, or delete it.")
            return folder, target

        return self._submit(model, seq, kind, request.body, prepare)

    def _unload_model(self, request: OwnerRequest) -> Response:
        """Unloads a model, and answers with a request id whose result is ready."""
        row = self._rows.model(request.fields.get("model_id", str), request.owner)
        request_id = f"{row['id']}:unload"
        self._log.leave(row["id"])
        if self._futures.open(request_id, request.owner):
            self._futures.resolve(request_id, {"type": "unload_model", "model_id": row["id"]})
        return json_response({"request_id": request_id})


def _make_raiser(error: RequestError) -> Callable[[], NoReturn]:
    """Returns a function that raises an error, for a command that the log records as refused."""

    def refuse() -> NoReturn:
        raise error

    return refuse
