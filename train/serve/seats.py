"""Seats of tenants in the engine, and those who wait for one."""

import time
from collections.abc import Sequence

from train.serve.requests import Client

_AGAIN = 60.0  # seconds after which a tenant that could not be parked may be


class Seats:
    """Keeps count of the room for tenants."""

    def __init__(self, room: int | None, own: int | None) -> None:
        """Begins with all room free.

        Args:
          room: tenants at once; None for any number.
          own: tenants of an owner at once.
        """
        self._room, self._own = room, own
        self._taken: dict[str, Client] = {}
        self._parking: set[str] = set()  # of those that have a seat
        self._going: set[str] = set()  # of these, they get no command any more
        self._waiting: dict[str, Client] = {}
        self._stuck: dict[str, float] = {}  # could not be parked before this time
        self._problem = ""

    def holds(self, name: str) -> bool:
        """Returns whether the engine takes a tenant's commands."""
        return name in self._taken and name not in self._going

    def wait(self, name: str, client: Client) -> None:
        """Has a tenant wait for a seat."""
        self._waiting.setdefault(name, client)

    def fits(self, client: Client) -> bool:
        """Returns whether there is room for another tenant of a client."""
        return self._has_room() and self._has_own_room(client)

    def next(self) -> str | None:
        """Seats the first who waits and for whom there is room; returns the name."""
        for name, client in self._waiting.items():
            if name not in self._taken and self.fits(client):
                del self._waiting[name]
                self._taken[name] = client
                return name
        return None

    @property
    def is_short(self) -> bool:
        """True where more wait than room is being made for."""
        return len(self._wanted()) > len(self._parking)

    def _wanted(self) -> dict[str, Client]:
        return {name: c for name, c in self._waiting.items() if name not in self._taken}

    def victim(self, quiet: Sequence[str]) -> str | None:
        """Returns a tenant that has to be parked for those who wait; None for none.

        Args:
          quiet: tenants without work, in the order in which they may be parked.
        """
        free = [name for name in quiet if self.may_park(name)]
        for client in self._wanted().values():
            if not self._has_own_room(client):
                mine = [name for name in free if self._taken[name].owner == client.owner]
            else:
                mine = [] if self._has_room() else free
            if mine:
                return mine[0]
        return None

    def may_park(self, name: str) -> bool:
        """Returns whether a tenant that has a seat may lose it."""
        is_stuck = self._stuck.get(name, 0.0) > time.monotonic()
        return self.holds(name) and name not in self._parking and not is_stuck

    def hopeless(self) -> dict[str, str]:
        """Returns those who wait in vain, since nobody can be parked, and why."""
        late = time.monotonic()
        stuck = {name for name in self._taken if self._stuck.get(name, 0.0) > late}
        found = {}
        for name, client in self._waiting.items():
            rivals = set(self._taken)
            if not self._has_own_room(client):
                rivals = {each for each in rivals if self._taken[each].owner == client.owner}
            if name not in rivals and rivals and rivals <= stuck:
                found[name] = (
                    f"{len(rivals)} adapters train here, and there is room for no more: none can "
                    f"be parked on disk ({self._problem}): ask again once that is mended"
                )
        return found

    def park(self, name: str) -> None:
        """Notes that a tenant is saved, to leave then."""
        self._parking.add(name)

    def stay(self, name: str, error: Exception | None = None) -> None:
        """Notes that a tenant stays, since it is used, or could not be saved."""
        self._parking.discard(name)
        if error is not None:
            self._stuck[name] = time.monotonic() + _AGAIN
            self._problem = str(error) or type(error).__name__

    def go(self, name: str) -> bool:
        """Notes that a tenant leaves the engine; returns whether it was there."""
        self._waiting.pop(name, None)
        if not self.holds(name):
            return False
        self._parking.add(name)
        self._going.add(name)
        return True

    def leave(self, name: str) -> None:
        """Notes that a tenant has left the engine, or never came."""
        self._taken.pop(name, None)
        self._stuck.pop(name, None)
        self._parking.discard(name)
        self._going.discard(name)

    def give_up(self, name: str) -> None:
        """Notes that a tenant waits no more."""
        self._waiting.pop(name, None)

    def _has_room(self) -> bool:
        return self._room is None or len(self._taken) < self._room

    def _has_own_room(self, client: Client) -> bool:
        if self._own is None:
            return True
        return sum(each.owner == client.owner for each in self._taken.values()) < self._own
