"""Saved states of tenants, from which the engine goes on after a restart, or after parking."""

import re
import shutil
from pathlib import Path

from train.serve.protocol.requests import CommandResult, SaveResult
from train.serve.storage.folders import link, list_folder
from train.serve.storage.ledger import Ledger, Row
from train.serve.tenants.progress import TenantProgress


class StateFolders:
    """Keeps the folders of states: of each tenant the last one, and what its log needs."""

    def __init__(self, ledger: Ledger, folder: Path):
        """Begins with what there is.

        Args:
          ledger: notes which state is the last.
          folder: holds a folder for each tenant.
        """
        self._ledger, self._folder = ledger, folder

    def place(self, name: str) -> Path:
        """Returns the folder of a tenant's states."""
        return self._folder / name.replace(":", "-")

    def path(self, name: str, seq: int) -> Path:
        """Returns the folder of the state after a command."""
        return self.place(name) / str(seq)

    def keep(self, name: str, seq: int, tenant: TenantProgress, result: CommandResult) -> None:
        """Makes a saved state the last one, unless a gradient is pending, which it lacks.

        Nor is it kept while the ledger lacks an answer to a command before: after a restart, only
        the command itself, executed again, could give it.

        Args:
          name: the tenant.
          seq: the number of the command after which it was saved.
          tenant: its progress.
          result: result of the `Save`; nothing is kept of one that failed.
        """
        model, folder = self._ledger.model(name), self.path(name, seq)
        is_whole = isinstance(result, SaveResult) and not tenant.gradient
        if (
            model is None
            or model["ended"]
            or not is_whole
            or self._ledger.owes(name, model["state"], seq)
        ):
            shutil.rmtree(folder, ignore_errors=True)
            return
        self._ledger.set_state(name, seq, folder)
        for child in list_folder(folder.parent):
            number = re.fullmatch(r"(?:load-)?(\d+)", child.name)
            if number and int(number[1]) <= seq and child != folder:
                shutil.rmtree(child, ignore_errors=True)

    def link(self, name: str, seq: int, source: Path) -> None:
        """Makes a checkpoint with the optimiser's state the state after a command."""
        if not (folder := self.path(name, seq)).exists():
            link(source, folder)

    def clear(self, name: str, seq: int) -> None:
        """Makes room for the state after a command, where an earlier attempt left a folder."""
        shutil.rmtree(self.path(name, seq), ignore_errors=True)

    def tidy(self, model: Row, rows: list[Row]) -> None:
        """Removes files that neither a model's last state nor the commands since need."""
        needed = {model["folder"], *(row["folder"] for row in rows)}
        for child in list_folder(self.place(model["id"])):
            if str(child) not in needed:
                shutil.rmtree(child, ignore_errors=True)

    def remove(self, name: str) -> None:
        """Removes the states of a tenant."""
        shutil.rmtree(self.place(name), ignore_errors=True)
