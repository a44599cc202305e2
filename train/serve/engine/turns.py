"""The order in which owners, their sessions, adapters and requests take turns.

A path names one of these: its levels are an owner, a session of it, an adapter there, and a
request. A party is an owner or a session. Parties share things of which there are few, called
resources here: rows, and slots.
"""

from collections import Counter
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from typing import TypeVar

Resource = TypeVar("Resource")
TurnPath = tuple[Hashable, ...]  # an owner, a session of it, an adapter there, a request, or fewer
PARTY_LEVELS = 2
# Others' turns after which an owner, or a session, that has no resource gets one of another.
_MAX_WAIT_TURNS = (1, 16)


class TurnOrder:
    """Gives a turn to the path whose last turn is the oldest, level by level.

    Who comes anew begins at the end of the row: nobody saves up turns.
    """

    def __init__(self) -> None:
        """Creates an order without paths."""
        self._n_turns = 0
        self._last_turn: dict[TurnPath, int] = {}  # or the time of its coming
        self._users: Counter[TurnPath] = Counter()
        self._children: Counter[TurnPath] = Counter()  # of those that have users

    def enter(self, path: TurnPath) -> None:
        """Adds a user of a path and of all levels above it."""
        for level in levels(path):
            if not self._users[level]:
                self._n_turns += 1
                self._last_turn[level] = self._n_turns
                self._children[level[:-1]] += 1
            self._users[level] += 1

    def leave(self, path: TurnPath) -> None:
        """Removes a user of a path and of all levels above it."""
        for level in levels(path):
            self._users[level] -= 1
            if not self._users[level]:
                del self._users[level]
                del self._last_turn[level]
                self._children[level[:-1]] -= 1
                if not self._children[level[:-1]]:
                    del self._children[level[:-1]]

    def note(self, paths: Iterable[TurnPath]) -> None:
        """Records one turn that several paths had together."""
        self._n_turns += 1
        for path in paths:
            self._last_turn.update(dict.fromkeys(levels(path), self._n_turns))

    def last(self, path: TurnPath) -> int:
        """Returns the number of a path's last turn."""
        return self._last_turn[path]

    def n_below(self, path: TurnPath) -> int:
        """Returns the number of a path's children. The children of () are the owners."""
        return self._children[path]

    def order(self, path: TurnPath) -> tuple[int, ...]:
        """Returns a sort key for a path. The path with the smallest key is next."""
        return tuple(self._last_turn[level] for level in levels(path))

    def has_others(self, path: TurnPath) -> bool:
        """Returns True if another path has the same parent."""
        return self._children[path[:-1]] > (path in self._users)

    def loser(
        self, path: TurnPath, holders: Mapping[Resource, set[TurnPath]]
    ) -> tuple[TurnPath, list[Resource]] | None:
        """Returns the owner or session that must give up a resource when none is free.

        One with two resources more than another has, loses one; and so has one of a single
        resource, to one without any who waits for longer. So resources are shared evenly among
        owners, and an owner's among its sessions. Requests of one session take none from each
        other.

        Args:
          path: who needs a resource.
          holders: the paths that hold each resource.

        Returns:
          The owner or the session, and its resources; None where nobody has to.
        """
        for n_levels in range(1, PARTY_LEVELS + 1):
            party = path[:n_levels]
            n_own = 0
            resources_of_rivals: dict[TurnPath, list[Resource]] = {}
            for resource, paths in holders.items():
                holding_parties = {holder[:n_levels] for holder in paths}
                if party in holding_parties:
                    n_own += 1
                if len(holding_parties) != 1:  # several parties share it: none can give it up
                    continue
                (rival,) = holding_parties
                is_sibling = rival[:-1] == party[:-1]
                if is_sibling and rival != party:
                    resources_of_rivals.setdefault(rival, []).append(resource)
            if not resources_of_rivals:
                continue
            richest = self._richest(resources_of_rivals)
            has_two_more = len(resources_of_rivals[richest]) > n_own + 1
            has_waited_longer = n_own == 0 and self._has_waited_longer(party, richest)
            if has_two_more or has_waited_longer:
                return richest, resources_of_rivals[richest]
        return None

    def _richest(self, resources_of_parties: Mapping[TurnPath, Sequence[object]]) -> TurnPath:
        """Returns the party with the most resources; among equals, the one with the latest turn."""

        def wealth(party: TurnPath) -> tuple[int, int]:
            return len(resources_of_parties[party]), self._last_turn[party]

        return max(resources_of_parties, key=wealth)

    def _has_waited_longer(self, party: TurnPath, rival: TurnPath) -> bool:
        """Returns True if a party has waited long enough, and longer than a rival."""
        wait_turns = self._n_turns - self._last_turn[party]
        is_long = wait_turns >= _MAX_WAIT_TURNS[len(party) - 1]
        return is_long and self._last_turn[party] < self._last_turn[rival]


def parties(path: TurnPath) -> list[TurnPath]:
    """Returns the owner and the session of a path."""
    return [*levels(path[:PARTY_LEVELS])]


def levels(path: TurnPath) -> Iterator[TurnPath]:
    """Yields the prefixes of a path: the owner, then the session, and so on."""
    for n_levels in range(1, len(path) + 1):
        yield path[:n_levels]
