"""The subject of an export."""

import dataclasses
from pathlib import Path

from rich.console import Console

from train.adapters.source import AdapterSource
from train.adapters.template import read_template
from train.console.output import tell
from train.export.hub import Repository
from train.export.options import ExportOptions


@dataclasses.dataclass(frozen=True)
class ExportJob:
    """The subject of an export: options, adapter, base, and the hub's repository."""

    options: ExportOptions
    console: Console
    adapter: AdapterSource
    base: str
    hub: Repository | None

    @property
    def output(self) -> Path:
        """The folder to write."""
        assert self.options.output is not None
        return Path(self.options.output).expanduser()

    @property
    def template(self) -> str | None:
        """The chat template that the adapter was trained with; None for the base's own."""
        file = self.adapter.chat_template
        return None if file is None else read_template(str(file), self.adapter.given)

    def say(self, text: str) -> None:
        """Prints a line as it is."""
        tell(self.console, text)
