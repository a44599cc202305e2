"""The adapters that samples may choose: all in folders, and a few in memory."""

from collections.abc import Callable, Iterator
from pathlib import Path

from train.serve.engine.base import Adapter
from train.serve.requests import RequestError


class Named:
    """Finds adapters by name; those not asked for lately are read again.

    A client that trains and samples in turn names one at each step, and asks for few again.
    """

    def __init__(self, most: int, read: Callable[[Path], Adapter]) -> None:
        """Starts with none.

        Args:
          most: adapters in memory at most.
          read: reads the adapter in a folder, where it is written by then.
        """
        self._most, self._read = most, read
        self._folders: dict[str, Path] = {}
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

    def add(self, name: str, folder: Path, adapter: Adapter) -> None:
        """Names an adapter, or has it used last."""
        self._folders[name] = folder
        self._there.pop(name, None)
        self._there[name] = adapter
        if len(self._there) > self._most:
            del self._there[next(iter(self._there))]

    def drop(self, name: str) -> None:
        """Forgets an adapter, if there is one of this name."""
        self._folders.pop(name, None)
        self._there.pop(name, None)

    def find(self, name: str) -> Adapter:
        """Returns an adapter; raises a RequestError if there is none of this name."""
        if name not in self._folders:
            there = ", ".join(self) or "none"
            raise RequestError(f"there is no adapter {name!r}; there are {there}")
        folder = self._folders[name]
        adapter = self._there[name] if name in self._there else self._read(folder)
        self.add(name, folder, adapter)
        return adapter
