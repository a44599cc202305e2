"""The order of turns of owners, their sessions, the sessions' adapters, and requests."""

from collections import Counter
from collections.abc import Hashable, Iterable, Iterator, Mapping
from typing import TypeVar

# An owner, a session of it, an adapter there, a request; or the first of these alone.
Place = TypeVar("Place")
TurnPath = tuple[Hashable, ...]
PARTY = 2  # levels that stand for people: owners, and sessions
_PATIENCE = (1, 16)  # turns without one after which an owner, or a session, has another's place


class TurnOrder:
    """Gives a turn to whoever had none for the longest time, level by level.

    Who comes anew begins at the end of the row: nobody saves up turns.
    """

    def __init__(self) -> None:
        """Begins without anybody."""
        self._now = 0
        self._last: dict[TurnPath, int] = {}  # when each had its latest turn, or came
        self._users: Counter[TurnPath] = Counter()
        self._children: Counter[TurnPath] = Counter()  # of those that are there

    def enter(self, path: TurnPath) -> None:
        """Lets somebody in."""
        for level in levels(path):
            if not self._users[level]:
                self._now += 1
                self._last[level] = self._now
                self._children[level[:-1]] += 1
            self._users[level] += 1

    def leave(self, path: TurnPath) -> None:
        """Lets somebody out who entered."""
        for level in levels(path):
            self._users[level] -= 1
            if not self._users[level]:
                del self._users[level], self._last[level]
                self._children[level[:-1]] -= 1
                if not self._children[level[:-1]]:
                    del self._children[level[:-1]]

    def note(self, paths: Iterable[TurnPath]) -> None:
        """Notes a turn that these paths had together."""
        self._now += 1
        for path in paths:
            self._last.update(dict.fromkeys(levels(path), self._now))

    def last(self, path: TurnPath) -> int:
        """Returns the time of somebody's last turn."""
        return self._last[path]

    def n_below(self, path: TurnPath) -> int:
        """Returns the number of those right beneath a path: () for owners."""
        return self._children[path]

    def order(self, path: TurnPath) -> tuple[int, ...]:
        """Returns a key to sort by: the least is next."""
        return tuple(self._last[level] for level in levels(path))

    def has_others(self, path: TurnPath) -> bool:
        """Returns True if anybody else is there at the last level of a path."""
        return self._children[path[:-1]] > (path in self._users)

    def loser(
        self, path: TurnPath, held: Mapping[Place, set[TurnPath]]
    ) -> tuple[TurnPath, list[Place]] | None:
        """Returns the owner or session that gives up a place, where no place is free.

        One with two places more than another has, loses one; and so has one of a single place, to
        one without any who waits for longer. So places are shared evenly among owners, and an
        owner's among its sessions. Requests of one session take no places from each other.

        Args:
          path: who wants a place.
          held: holders of each place.

        Returns:
          The owner or the session, and its places; None where nobody has to.
        """
        for depth in range(1, PARTY + 1):
            mine, rivals, own = path[:depth], dict[TurnPath, list[Place]](), 0
            for place, holders in held.items():
                parties_there = {holder[:depth] for holder in holders}
                own += mine in parties_there
                if len(parties_there) == 1 and (other := next(iter(parties_there))) != mine:
                    if other[:-1] == mine[:-1]:
                        rivals.setdefault(other, []).append(place)
            if not rivals:
                continue
            most = max(rivals, key=lambda other: (len(rivals[other]), self._last[other]))
            waits = self._now - self._last[mine] >= _PATIENCE[depth - 1]
            is_older = waits and self._last[mine] < self._last[most]
            if len(rivals[most]) > own + 1 or (own == 0 and is_older):
                return most, rivals[most]
        return None


def parties(path: TurnPath) -> list[TurnPath]:
    """Returns the owner and the session of a path."""
    return [*levels(path[:PARTY])]


def levels(path: TurnPath) -> Iterator[TurnPath]:
    """Yields the beginnings of a path: the owner's, the session's, and so on."""
    return (path[: n + 1] for n in range(len(path)))
