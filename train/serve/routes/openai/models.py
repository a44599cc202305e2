"""Resolves the field `model`: the base, an adapter's name or folder, or a checkpoint."""

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
from train.serve.routes.openai.pending import wait_for_result

_NAME = re.compile(r"\w[\w.-]{0,127}")  # no name leaves its folder
_TINKER = "tinker://"
_ADAPTER_FILES = ("adapter", "adapter_config.json", "lora", "best")  # an adapter's folder has one


@dataclasses.dataclass(frozen=True)
class AdapterLookup:
    """Functions that find the adapters of owners. They are called in threads.

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
        """Stores the engine, whether there are keys, and the lookup of adapters."""
        self._engine = engine
        self._has_keys = access.keyed
        self._lookup = lookup
        self._folder = lookup.folder
        self._templates: dict[str, str | None] = {}  # chat templates, by the engine's name
        self._loaded: dict[str, dict[str, Path]] = {}  # folders, by owner and the client's name
        self._lock = asyncio.Lock()  # one adapter is read at a time
        self._created = int(time.time())

    def routes(self) -> list[Route]:
        """Returns the routes about models."""
        return [
            Route("/v1/models", self._list),
            Route("/v1/models/{name:path}", self._describe),
            Route("/v1/load_lora_adapter", self._load, methods=["POST"]),
            Route("/v1/unload_lora_adapter", self._unload, methods=["POST"]),
        ]

    async def find(self, model: str, owner: str) -> str | None:
        """Returns the engine's name of an adapter, and loads it if necessary; None for the base.

        Args:
          model: the client's name: also `base;tinker://…`, as Tinker's own server takes it.
          owner: who asks.

        Raises:
          HttpError: the owner has no such model.
          RequestError: it cannot be read.
        """
        if model == self._engine.facts.model:
            return None
        adapter = await self._find_adapter(model, owner)
        if adapter is None:
            raise HttpError(
                404,
                f"there is no model {model!r}. Request /v1/models for a list of the models.",
                param="model",
                code="model_not_found",
            )
        name, folder = adapter
        if folder is not None and not self._engine.knows(name):
            async with self._lock:
                if not self._engine.knows(name):  # another request may have read it meanwhile
                    await self._adopt(name, folder)
        return name

    async def _find_adapter(self, model: str, owner: str) -> tuple[str, Path | None] | None:
        """Returns the engine's name of an adapter, and its folder if that is known."""
        path = model.removeprefix(f"{self._engine.facts.model};")
        if path.startswith(_TINKER):
            return await run_in_threadpool(self._lookup.resolve, path, owner)
        loaded_folders = self._loaded.get(owner, {})
        if model in loaded_folders:
            return self._engine_name(owner, model), loaded_folders[model]
        shared_folders = self._folders()
        if model in shared_folders:
            return model, shared_folders[model]
        is_known = self._engine.knows(model)
        if is_known and await run_in_threadpool(self._lookup.owns, owner, model):
            return model, None
        return None

    def template(self, name: str | None) -> str | None:
        """Returns the chat template of an adapter by the engine's name; None for the base's."""
        return None if name is None else self._templates.get(name)

    async def _adopt(self, name: str, folder: Path) -> None:
        """Loads an adapter into the engine, and stores its chat template."""
        self._templates[name] = await run_in_threadpool(self._lookup.template_of, folder)
        await wait_for_result(lambda done: self._engine.adopt(name, folder, done))

    def _engine_name(self, owner: str, name: str) -> str:
        """Returns the engine's name of an adapter. With keys, it includes the owner's name."""
        return f"{owner}:{name}" if self._has_keys else name

    def _folders(self) -> dict[str, Path]:
        """Returns the folders of adapters and runs in --adapters, by name."""
        if self._folder is None:
            return {}
        folders: dict[str, Path] = {}
        for path in sorted(self._folder.iterdir()):
            has_adapter = any((path / file).exists() for file in _ADAPTER_FILES)
            if has_adapter and _NAME.fullmatch(path.name):
                folders[path.name] = path
        return folders

    def _names(self, owner: str) -> list[str]:
        """Returns the model names that an owner may use."""
        loaded_names: set[str] = set()  # as the engine has them, of all owners
        for loading_owner, folders in self._loaded.items():
            loaded_names |= {self._engine_name(loading_owner, name) for name in folders}
        names = [self._engine.facts.model, *self._folders(), *self._loaded.get(owner, {})]
        for name in self._engine.status().adapters:
            if name not in loaded_names and self._lookup.owns(owner, name):
                names.append(name)
        return [*dict.fromkeys(names)]

    def _description(self, name: str) -> JsonObject:
        """Returns the description of a model for clients."""
        base = self._engine.facts.model
        return {
            "id": name,
            "object": "model",
            "created": self._created,
            "owned_by": "lora_jax",
            "root": name,
            "parent": None if name == base else base,
            "max_model_len": self._engine.facts.max_length,
        }

    async def _list(self, request: Request) -> Response:
        names = await run_in_threadpool(self._names, owner_of(request))
        return json_response(
            {"object": "list", "data": [self._description(name) for name in names]}
        )

    async def _describe(self, request: Request) -> Response:
        name = request.path_params["name"]
        owner = owner_of(request)
        if name not in await run_in_threadpool(self._names, owner):
            await self.find(name, owner)  # a checkpoint, perhaps
        return json_response(self._description(name))

    async def _load(self, request: Request) -> Response:
        """Loads the adapter in a folder under a name, like vLLM's route."""
        body = await read_body(request)
        owner = owner_of(request)
        name = read_text(body, "lora_name")
        folder = self._adapter_folder(read_text(body, "lora_path"))
        if not _NAME.fullmatch(name):
            raise field_error(
                "lora_name", name, "Use letters and digits, with . - _ only inside the name."
            )
        async with self._lock:
            engine_name = self._engine_name(owner, name)
            is_known = self._engine.knows(engine_name)
            if is_known or name in await run_in_threadpool(self._names, owner):
                raise field_error(
                    "lora_name",
                    name,
                    "There is already an adapter of this name. Unload it, or choose another name.",
                )
            await self._adopt(engine_name, folder)
            self._loaded.setdefault(owner, {})[name] = folder
        return PlainTextResponse(f"Success: LoRA adapter '{name}' added successfully.")

    def _adapter_folder(self, lora_path: str) -> Path:
        """Returns the folder of an adapter, which must be in --adapters if there are keys."""
        problem = remote_problem(lora_path)
        if problem:
            raise field_error("lora_path", lora_path, f"this {problem}")
        folder = ((self._folder or Path()) / Path(lora_path).expanduser()).resolve()
        is_inside = bool(self._folder and folder.is_relative_to(self._folder.resolve()))
        if self._has_keys and not is_inside:
            raise field_error(
                "lora_path", lora_path, "Pass a folder beneath --adapters of the server."
            )
        if not folder.is_dir():
            raise field_error("lora_path", lora_path, "This folder does not exist. Check the path.")
        return folder

    async def _unload(self, request: Request) -> Response:
        """Removes an adapter, like vLLM's route."""
        body = await read_body(request)
        owner = owner_of(request)
        name = read_text(body, "lora_name")
        loaded_folders = self._loaded.get(owner, {})
        # Without keys, anybody may unload what was read from --adapters.
        is_shared = not self._has_keys and name in self._folders() and self._engine.knows(name)
        if name not in loaded_folders and not is_shared:
            raise HttpError(
                404,
                f"there is no adapter {name!r} that you loaded. Check the name.",
                param="lora_name",
            )
        loaded_folders.pop(name, None)
        self._engine.drop(self._engine_name(owner, name))
        return PlainTextResponse(f"Success: LoRA adapter '{name}' removed successfully.")
