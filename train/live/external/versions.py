"""Writes versions of a run's adapter for a server, and loads and unloads them."""

import contextlib
import re
import shutil
import threading
import uuid
from pathlib import Path

import jax
import jax.numpy as jnp

import lora_jax as lj
from lora_jax import peft
from lora_jax.core.types import Tree
from lora_jax.peft.errors import PeftError
from lora_jax.training.processes import is_first
from train.console.errors import as_user_errors
from train.live.sampler_server import SamplerServer
from train.processes import hosts
from train.run.output import SAMPLER
from train.run.task import ModelContext

_MAX_STEM_CHARS = 64  # characters of the run's name in the names of adapters


class AdapterVersion:
    """The adapter before a certain step.

    Attributes:
      name: the adapter's name on the server.
      step: the number of the step.
      last: the last step for which the version draws a batch.
      adapter: a copy of its arrays if they are needed again; else None.
    """

    def __init__(self, name: str, folder: Path, server_path: str, adapter: Tree | None) -> None:
        """Keeps the name, the folder, the folder's path on the server, and the arrays."""
        self.name = name
        self.adapter = adapter
        self.step = -1
        self.last = -1
        self._folder = folder
        self._server_path = server_path
        self._lock = threading.Lock()
        self._n_loads = 0  # -1 once it is dropped

    def load(self, server: SamplerServer, lost_load: int = 0) -> int:
        """Loads the adapter on the server once for all threads, and returns the number of the load.

        Args:
          server: the server.
          lost_load: the number of the load that the server has lost, for example by a restart; 0
            before the first load.
        """
        with self._lock:
            is_dropped = self._n_loads < 0
            was_lost = self._n_loads == lost_load  # otherwise another thread loaded it again
            if was_lost and not is_dropped:
                server.load(self.name, self._server_path)
                self._n_loads += 1
            return self._n_loads

    def drop(self, server: SamplerServer) -> None:
        """Deletes the adapter's folder, and unloads the adapter from the server."""
        with self._lock:
            if is_first():
                shutil.rmtree(self._folder, ignore_errors=True)
            if self._n_loads > 0:
                server.unload(self.name)
            self._n_loads = -1


class Publisher:
    """Writes versions of an adapter to a folder that the server reads."""

    def __init__(self, context: ModelContext) -> None:
        """Finds the folder for the adapters of a run, and deletes what a killed run left in it."""
        data = context.config.data
        self._context = context
        folder = Path(data.sampler_folder or context.folder / SAMPLER)
        self._folder = folder.expanduser().absolute()
        self._is_ours = data.sampler_folder is None
        if self._is_ours and is_first():
            shutil.rmtree(self._folder, ignore_errors=True)
        self._server_folder = (data.sampler_mount or str(self._folder)).rstrip("/")
        run_name = re.sub(r"[^\w.-]+", "-", context.folder.name)[:_MAX_STEM_CHARS].lstrip(".-")
        # Adapters of different runs in one folder must have different names.
        self._stem = f"{run_name or 'run'}-{uuid.uuid4().hex[:8]}"
        self._replicate = jax.jit(lambda arrays: arrays, out_shardings=context.layout.whole)
        self._copy = jax.jit(lambda arrays: jax.tree.map(jnp.copy, arrays))

    def publish(self, params: Tree, label: str, *, keeps: bool = False) -> AdapterVersion:
        """Writes an adapter in the first process. All processes must call it.

        Args:
          params: the adapted tree.
          label: the name of the version, such as "step12".
          keeps: whether to keep a copy of the arrays.

        Raises:
          UserError: PEFT's format does not support the adapter, or the folder cannot be written;
            raised in all processes.
        """
        adapter, base = lj.split(params)
        with jax.set_mesh(self._context.layout.mesh):
            replicated = self._replicate(adapter)
            copy = self._copy(adapter) if keeps else None
        name = f"{self._stem}-{label}"

        def write(_: int) -> None:
            """Writes the adapter as PEFT files into its folder."""
            problem = f"--sampler-folder {self._folder} cannot be written: "
            with (
                as_user_errors(PeftError, prefix="--sampler: no server can load this adapter: "),
                as_user_errors(OSError, prefix=problem, suffix=". Pass another folder."),
            ):
                peft.save(
                    self._folder / name,
                    self._context.model,
                    lj.join(jax.device_get(replicated), base),
                    base_model=self._context.outline.name,
                    task_type="CAUSAL_LM",
                    embedding_layers=False,
                    for_serving=True,
                )

        hosts.map_over_processes(write, range(1))
        return AdapterVersion(
            name=name,
            folder=self._folder / name,
            server_path=f"{self._server_folder}/{name}",
            adapter=copy,
        )

    def close(self) -> None:
        """Removes the folder if it is empty and not the user's own."""
        if self._is_ours:
            with contextlib.suppress(OSError):
                self._folder.rmdir()
