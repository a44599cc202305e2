"""The names that `model` may have: the base, adapters by name or folder, and checkpoints."""

import asyncio
import dataclasses
import re
import time
from collections.abc import Callable
from pathlib import Path

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from lora_jax.folders import remote_problem
from train.serve.protocol.engine import EngineProtocol
from train.serve.routes.access import Access, owner_of
from train.serve.routes.errors import HttpError, JsonObject, json_response
from train.serve.routes.openai.fields import field_error, read_body, read_text
from train.serve.routes.openai.pending import result_of

_NAME = re.compile(r"\w[\w.-]{0,127}")  # no name leaves its folder
_TINKER = "tinker://"
_OF_ADAPTERS = ("adapter", "adapter_config.json", "lora", "best")  # one is in such a folder


@dataclasses.dataclass(frozen=True)
class AdapterLookup:
    """Finds adapters for owners. Its functions are called in threads.

    Attributes:
      folder: that of --adapters.
      resolve: returns the engine's name of the adapter at a tinker:// path, and its folder; None
        where the owner has no such one.
      owns: returns True if an owner may see a tenant, or an adapter that the engine knows.
      template_of: returns the chat template of the adapter in a folder, None for the base's.
    """

    folder: Path | None = None
    resolve: Callable[[str, str], tuple[str, Path] | None] = lambda path, owner: None
    owns: Callable[[str, str], bool] = lambda owner, name: True
    template_of: Callable[[Path], str | None] = lambda folder: None


class Models:
    """Finds the adapters that an owner may use, and loads them."""

    def __init__(self, engine: EngineProtocol, access: Access, lookup: AdapterLookup) -> None:
        """Keeps the engine, whether there are keys, and where adapters are found."""
        self._engine, self._keyed = engine, access.keyed
        self._lookup, self._folder = lookup, lookup.folder
        self._templates: dict[str, str | None] = {}  # chat templates, by the engine's name
        self._loaded: dict[str, dict[str, Path]] = {}  # folders, by owner and the client's name
        self._lock = asyncio.Lock()  # one adapter is read at a time
        self._created = int(time.time())

    def routes(self) -> list[Route]:
        """Returns the routes about models."""
        return [
            Route("/v1/models", self._list),
            Route("/v1/models/{name:path}", self._one),
            Route("/v1/load_lora_adapter", self._load, methods=["POST"]),
            Route("/v1/unload_lora_adapter", self._unload, methods=["POST"]),
        ]

    async def find(self, model: str, owner: str) -> str | None:
        """Returns the engine's name of an adapter, which it reads if need be; None for the base.

        Args:
          model: the client's name: also `base;tinker://…`, as Tinker's own server takes it.
          owner: who asks.

        Raises:
          HttpError: the owner has no such model.
          RequestError: it cannot be read.
        """
        if model == self._engine.facts.model:
            return None
        adapter: tuple[str, Path | None] | None = None
        path = model.removeprefix(f"{self._engine.facts.model};")
        if path.startswith(_TINKER):
            adapter = await run_in_threadpool(self._lookup.resolve, path, owner)
        elif model in self._loaded.get(owner, {}):
            adapter = self._named(owner, model), self._loaded[owner][model]
        elif (folder := self._folders().get(model)) is not None:
            adapter = model, folder
        elif self._engine.knows(model) and await run_in_threadpool(self._lookup.owns, owner, model):
            adapter = model, None
        if adapter is None:
            raise HttpError(
                404,
                f"there is no model {model!r}: /v1/models lists those that there are",
                param="model",
                code="model_not_found",
            )
        name, place = adapter
        if place is not None and not self._engine.knows(name):
            async with self._lock:
                if not self._engine.knows(name):
                    await self._adopt(name, place)
        return name

    def template(self, name: str | None) -> str | None:
        """Returns the chat template of an adapter, by the engine's name; None for the base's."""
        return None if name is None else self._templates.get(name)

    async def _adopt(self, name: str, folder: Path) -> None:
        self._templates[name] = await run_in_threadpool(self._lookup.template_of, folder)
        await result_of(lambda done: self._engine.adopt(name, folder, done))

    def _named(self, owner: str, name: str) -> str:
        """Returns the engine's name of an adapter that an owner loaded: owners share no names."""
        return f"{owner}:{name}" if self._keyed else name

    def _folders(self) -> dict[str, Path]:
        """Returns the adapters' and runs' folders beneath --adapters, by name."""
        paths = sorted(self._folder.iterdir()) if self._folder is not None else []
        named = {path.name: path for path in paths if _NAME.fullmatch(path.name)}
        return {
            name: path
            for name, path in named.items()
            if any((path / inside).exists() for inside in _OF_ADAPTERS)
        }

    def _names(self, owner: str) -> list[str]:
        """Returns the names that there are for an owner."""
        loaded = {
            self._named(other, name) for other, names in self._loaded.items() for name in names
        }
        others = [name for name in self._engine.status().adapters if name not in loaded]
        own = [name for name in others if self._lookup.owns(owner, name)]
        shared = [self._engine.facts.model, *self._folders()]
        return [*dict.fromkeys([*shared, *self._loaded.get(owner, {}), *own])]

    def _about(self, name: str) -> JsonObject:
        base = self._engine.facts.model
        known = {"id": name, "object": "model", "created": self._created, "owned_by": "lora_jax"}
        return known | {
            "root": name,
            "parent": None if name == base else base,
            "max_model_len": self._engine.facts.max_length,
        }

    async def _list(self, request: Request) -> Response:
        names = await run_in_threadpool(self._names, owner_of(request))
        return json_response({"object": "list", "data": [self._about(name) for name in names]})

    async def _one(self, request: Request) -> Response:
        name, owner = request.path_params["name"], owner_of(request)
        if name not in await run_in_threadpool(self._names, owner):
            await self.find(name, owner)  # a checkpoint, perhaps
        return json_response(self._about(name))

    async def _load(self, request: Request) -> Response:
        body, owner = await read_body(request), owner_of(request)
        name, path = read_text(body, "lora_name"), self._inside(read_text(body, "lora_path"))
        if not _NAME.fullmatch(name):
            raise field_error("lora_name", name, "letters, digits, and . - _ within are needed")
        async with self._lock:
            known = self._engine.knows(self._named(owner, name))
            if known or name in await run_in_threadpool(self._names, owner):
                raise field_error(
                    "lora_name", name, "there is one already; unload it, or take another"
                )
            await self._adopt(self._named(owner, name), path)
            self._loaded.setdefault(owner, {})[name] = path
        return PlainTextResponse(f"Success: LoRA adapter '{name}' added successfully.")

    def _inside(self, given: str) -> Path:
        """Returns the folder of an adapter; with keys, one beneath --adapters."""
        if problem := remote_problem(given):
            raise field_error("lora_path", given, f"this {problem}")
        path = ((self._folder or Path()) / Path(given).expanduser()).resolve()
        if self._keyed and not (self._folder and path.is_relative_to(self._folder.resolve())):
            raise field_error(
                "lora_path", given, "a folder beneath --adapters of the server is needed"
            )
        if not path.is_dir():
            raise field_error("lora_path", given, "there is no such folder")
        return path

    async def _unload(self, request: Request) -> Response:
        body, owner = await read_body(request), owner_of(request)
        name = read_text(body, "lora_name")
        mine = self._loaded.get(owner, {})
        shared = not self._keyed and name in self._folders() and self._engine.knows(name)
        if name not in mine and not shared:
            raise HttpError(404, f"there is no adapter {name!r} that you loaded", param="lora_name")
        mine.pop(name, None)
        self._engine.drop(self._named(owner, name))
        return PlainTextResponse(f"Success: LoRA adapter '{name}' removed successfully.")
