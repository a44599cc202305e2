"""The routes that list runs, checkpoints and sessions for Tinker's RestClient; downloads."""

import datetime
import hashlib
import hmac
import json
import secrets
import time
from pathlib import Path
from urllib.parse import quote

from starlette.responses import FileResponse, Response

from train.serve.protocol.requests import RequestError
from train.serve.routes.errors import HttpError, JsonObject, json_response
from train.serve.routes.tinker.bodies import Endpoint, OwnerRequest
from train.serve.routes.tinker.owner_rows import TinkerParts, spec_of
from train.serve.storage.ledger import Row

_TYPES = {"weights": "training", "sampler_weights": "sampler", "external_weights": "external"}
_LINK_SECONDS = 3600  # for which a link to a file is valid


class RunRoutes:
    """Lists an owner's runs, checkpoints and sessions, and changes checkpoints."""

    def __init__(self, parts: TinkerParts, api: str) -> None:
        """Stores the server's parts, and draws a secret for signed links.

        Args:
          parts: the parts of the server.
          api: the path of all routes.
        """
        self._ledger = parts.ledger
        self._log = parts.log
        self._rows = parts.rows
        self._api = api
        self._secret = secrets.token_bytes(32)

    def endpoints(self) -> list[tuple[str, str, Endpoint]]:
        """Returns the path, the method and the handler of each route."""
        checkpoint = "training_runs/{model}/checkpoints/{checkpoint:path}"
        return [
            ("training_runs", "GET", self._list_runs),
            ("training_runs/{model}", "GET", self._get_run),
            ("training_runs/{model}/checkpoints", "GET", self._list_of_run),
            (f"{checkpoint}/ttl", "PUT", self._set_ttl),
            (f"{checkpoint}/publish", "POST", self._publish),
            (f"{checkpoint}/publish", "DELETE", self._publish),
            (f"{checkpoint}/external_weights_urls", "GET", self._urls),
            (checkpoint, "DELETE", self._delete),
            ("checkpoints", "GET", self._list_checkpoints),
            ("sessions", "GET", self._list_sessions),
            ("sessions/{session}", "GET", self._get_session),
            ("samplers/{sampler}", "GET", self._get_sampler),
            ("weights_info", "POST", self._weights_info),
        ]

    def _list_runs(self, request: OwnerRequest) -> Response:
        limit, offset = _read_page(request)
        rows, count = self._ledger.models(request.owner, limit, offset)
        runs = [self._describe_run(row) for row in rows]
        return json_response({"training_runs": runs, "cursor": _make_cursor(limit, offset, count)})

    def _get_run(self, request: OwnerRequest) -> Response:
        return json_response(
            self._describe_run(self._rows.model(request.path["model"], request.owner))
        )

    def _describe_run(self, model: Row) -> JsonObject:
        """Returns the description of a model in Tinker's format of a run."""
        checkpoints, _ = self._ledger.checkpoints(model["owner"], model["id"])  # newest first
        newest_of_kind = {row["kind"]: _describe_checkpoint(row) for row in reversed(checkpoints)}
        return {
            "training_run_id": model["id"],
            "base_model": model["base"],
            "model_owner": model["owner"],
            "is_lora": True,
            "lora_rank": spec_of(model).get("rank"),
            "corrupted": False,
            "last_request_time": _format_time(model["used"]),
            "last_checkpoint": newest_of_kind.get("weights"),
            "last_sampler_checkpoint": newest_of_kind.get("sampler_weights"),
            "user_metadata": _text_metadata(model),
        }

    def _list_of_run(self, request: OwnerRequest) -> Response:
        model = self._rows.model(request.path["model"], request.owner)["id"]
        rows, _ = self._ledger.checkpoints(request.owner, model)
        return json_response({"checkpoints": [_describe_checkpoint(row) for row in rows]})

    def _list_checkpoints(self, request: OwnerRequest) -> Response:
        """Answers with a page of the owner's checkpoints."""
        limit, offset = _read_page(request)
        rows, count = self._ledger.checkpoints(request.owner, None, limit, offset)
        checkpoints = [_describe_checkpoint(row) for row in rows]
        return json_response(
            {"checkpoints": checkpoints, "cursor": _make_cursor(limit, offset, count)}
        )

    def _own_checkpoint(self, request: OwnerRequest) -> Row:
        """Returns the owner's checkpoint in the path; raises HttpError if there is none."""
        path = f"tinker://{request.path['model']}/{request.path['checkpoint']}"
        checkpoint = self._ledger.checkpoint(path)
        if checkpoint is None or checkpoint["owner"] != request.owner:
            raise HttpError(404, f"there is no checkpoint {path[:300]}")
        return checkpoint

    def _delete(self, request: OwnerRequest) -> Response:
        self._log.delete(self._own_checkpoint(request))
        return json_response({})

    def _set_ttl(self, request: OwnerRequest) -> Response:
        row = self._own_checkpoint(request)
        seconds = request.fields.get("ttl_seconds", int, None, least=1, most=10 * 366 * 86400)
        self._ledger.set_expiry(row["path"], seconds)
        return json_response({})

    def _publish(self, request: OwnerRequest) -> Response:
        path = self._own_checkpoint(request)["path"]
        self._ledger.set_public(path, request.http.method == "POST")
        return json_response({})

    def _list_sessions(self, request: OwnerRequest) -> Response:
        rows = self._ledger.sessions(request.owner, *_read_page(request))
        return json_response({"sessions": [row["id"] for row in rows]})

    def _get_session(self, request: OwnerRequest) -> Response:
        """Lists the runs and samplers of a session."""
        session = self._rows.session(request.path["session"], request.owner)
        models = self._ledger.models_of(session["id"])
        samplers = self._ledger.samplers_of(session["id"])
        content = {
            "training_run_ids": [model["id"] for model in models],
            "sampler_ids": [sampler["id"] for sampler in samplers],
            "user_metadata": _text_metadata(session),
        }
        return json_response(content)

    def _get_sampler(self, request: OwnerRequest) -> Response:
        row = self._rows.sampler(request.path["sampler"], request.owner)
        sampler = {"sampler_id": row["id"], "base_model": row["base"], "model_path": row["path"]}
        return json_response(sampler)

    def _weights_info(self, request: OwnerRequest) -> Response:
        """Describes the adapter of a checkpoint."""
        path = request.fields.get("tinker_path", str)
        checkpoint = self._rows.weights(path, request.owner)
        model = self._ledger.model(checkpoint["model"])
        spec = spec_of(model)
        info = {
            "base_model": model["base"] if model else "",
            "is_lora": True,
            "lora_rank": spec.get("rank"),
            "train_unembed": spec.get("unembed"),
            "train_mlp": spec.get("mlp"),
            "train_attn": spec.get("attention"),
        }
        return json_response(info)

    # Downloads

    def _urls(self, request: OwnerRequest) -> Response:
        """Answers with signed links to an export's files, which need no key and expire."""
        checkpoint = self._own_checkpoint(request)
        path = checkpoint["path"]
        if checkpoint["kind"] != "external_weights":
            raise RequestError(f"{path} is not an export. Call save_weights_external first.")
        expires = int(time.time()) + _LINK_SECONDS
        server = f"{request.http.url.scheme}://{request.http.url.netloc}"
        folder = Path(checkpoint["folder"])
        urls: dict[str, str] = {}
        for file in sorted(file for file in folder.rglob("*") if file.is_file()):
            name = file.relative_to(folder).as_posix()
            signature = self._sign(expires, path, name)
            query = f"checkpoint={quote(path, safe='')}&file={quote(name, safe='')}"
            urls[name] = f"{server}{self._api}/files/{expires}/{signature}?{query}"
        return json_response({"urls": urls, "expires": _format_time(expires)})

    def download(self, request: OwnerRequest) -> Response:
        """Sends the file of a signed link: the endpoint of files/{expires}/{signature}."""
        query = request.http.query_params
        path = query.get("checkpoint", "")
        name = query.get("file", "")
        expires = request.path["expires"]
        signature = self._sign(expires, path, name)
        if not hmac.compare_digest(signature.encode(), request.path["signature"].encode()):
            raise HttpError(403, "the link is not valid. Request a new link.")
        checkpoint = self._ledger.checkpoint(path)
        if expires < time.time() or checkpoint is None:
            raise HttpError(
                410, "the link has expired, or the checkpoint was deleted. Request a new link."
            )
        return FileResponse(Path(checkpoint["folder"]) / name)

    def _sign(self, expires: int, path: str, name: str) -> str:
        """Returns the signature of a link to a file of a checkpoint."""
        text = json.dumps([expires, path, name]).encode()
        return hmac.new(self._secret, text, hashlib.sha256).hexdigest()


def _describe_checkpoint(row: Row) -> JsonObject:
    """Returns the description of a checkpoint in Tinker's format."""
    return {
        "checkpoint_id": f"{row['kind']}/{row['name']}",
        "checkpoint_type": _TYPES[row["kind"]],
        "time": _format_time(row["made"]),
        "tinker_path": row["path"],
        "size_bytes": row["size"],
        "public": bool(row["public"]),
        "expires_at": None if row["expires"] is None else _format_time(row["expires"]),
        "user_metadata": _text_metadata(row),
    }


def _text_metadata(row: Row) -> dict[str, str] | None:
    """Returns a client's metadata with all values as texts, as the SDK requires."""
    metadata = json.loads(row["metadata"] or "null")
    if not metadata:
        return None
    texts: dict[str, str] = {}
    for name, value in metadata.items():
        texts[name] = value if isinstance(value, str) else json.dumps(value)
    return texts


def _format_time(seconds: float) -> str:
    return datetime.datetime.fromtimestamp(seconds, datetime.UTC).isoformat()


def _read_page(request: OwnerRequest) -> tuple[int, int]:
    """Returns the limit and the offset in a request for a list."""
    limit = _read_query_integer(request, "limit", default=20, max_value=1000)
    offset = _read_query_integer(request, "offset", default=0, max_value=10**9)
    return limit, offset


def _read_query_integer(request: OwnerRequest, name: str, default: int, max_value: int) -> int:
    """Returns an integer in a request's query; raises a RequestError for other values."""
    text = request.http.query_params.get(name, str(default))
    is_number = text.isascii() and text.isdigit()
    if not is_number or int(text[:12]) > max_value:
        raise RequestError(
            f"{name} is out of range or has the wrong type. Pass an integer up to {max_value}."
        )
    return int(text)


def _make_cursor(limit: int, offset: int, count: int) -> dict[str, int]:
    return {"limit": limit, "offset": offset, "total_count": count}
