"""The adapters that samples may choose: of those in folders that never change, a few in memory."""

from collections.abc import Callable, Iterator
from pathlib import Path

from train.serve.engine.base import Adapter
from train.serve.requests import RequestError


class AdapterCache:
    """Finds adapters by name; those not asked for lately are read again.

    A client that trains and samples in turn names one at each step, and asks for few again.
    """

    def __init__(self, most: int, read: Callable[[Path], Adapter]) -> None:
        """Starts with none.

        Args:
          most: adapters in memory at most, beside those without a folder.
          read: reads the adapter in a folder, and waits while that is written.
        """
        self._most, self._read = most, read
        self._folders: dict[str, Path | None] = {}
        self._there: dict[str, Adapter] = {}  # the least recently used first

    def __contains__(self, name: str) -> bool:
        """Returns whether there is one of this name; any thread may ask."""
        return name in self._folders

    def __iter__(self) -> Iterator[str]:
        """Returns the names."""
        return iter(tuple(self._folders))

    def __len__(self) -> int:
        """Returns how many are in memory."""
        return len(self._there)

    def add(self, name: str, folder: Path | None, adapter: Adapter) -> None:
        """Names an adapter, or notes that it was used.

        Args:
          name: its name.
          folder: where it can be read again; None for one that stays in memory, since its folder
            may change.
          adapter: its arrays.
        """
        self._folders[name] = folder
        self._there.pop(name, None)
        self._there[name] = adapter
        in_folders = [name for name in self._there if self._folders[name] is not None]
        if len(in_folders) > self._most:
            del self._there[in_folders[0]]

    def drop(self, name: str) -> None:
        """Forgets an adapter, if there is one of this name."""
        self._folders.pop(name, None)
        self._there.pop(name, None)

    def find(self, name: str) -> Adapter:
        """Returns an adapter; raises a RequestError if there is none of this name."""
        if name not in self._folders:
            there = ", ".join(self) or "none"
            raise RequestError(f"there is no adapter {name!r}; there are {there}")
        folder, adapter = self._folders[name], self._there.get(name)
        if adapter is None:
            assert folder is not None
            adapter = self._read(folder)
        self.add(name, folder, adapter)
        return adapter
