"""Counts the seats of tenants in the engine, and queues the tenants that wait for one."""

import dataclasses
import enum
import time
from collections.abc import Iterable, Sequence

from train.serve.protocol.requests import Client

_RETRY_SECONDS = 60.0  # after which a tenant that could not be parked may be
_TURN_SECONDS = 10.0  # of a seat, for which a tenant that always has work is left alone


class Phase(enum.Enum):
    """The phases of a tenant that has a seat, in their order."""

    LOADING = "its state is read, if there is one; commands wait"
    READY = "the engine takes its commands"
    HELD = "what the engine has is executed; new commands wait"
    SAVING = "its state is written; commands wait"
    LEAVING = "the engine forgets it; commands wait"


@dataclasses.dataclass
class _Seat:
    """A tenant's seat: its client, its phase, and the time when it became ready."""

    client: Client
    phase: Phase = Phase.LOADING
    since: float = 0.0


class Seats:
    """The seats of tenants in the engine, and the queue for them."""

    def __init__(self, room: int | None = None, own: int | None = None) -> None:
        """Creates free seats.

        Args:
          room: tenants at once; None for any number.
          own: tenants of an owner at once; None for any number.
        """
        self._max_tenants = room
        self._max_owner_tenants = own
        self._seats: dict[str, _Seat] = {}
        self._waiting: dict[str, Client] = {}
        self._stuck: dict[str, float] = {}  # could not be parked; times of the next try
        self._problem = ""  # of the latest that could not be parked

    def phase(self, name: str) -> Phase | None:
        """Returns the phase of a tenant; None for one without a seat."""
        seat = self._seats.get(name)
        return None if seat is None else seat.phase

    def holds(self, name: str) -> bool:
        """Returns True if the engine accepts a tenant's commands."""
        return self.phase(name) is Phase.READY

    def list_phase(self, phase: Phase) -> list[str]:
        """Returns the tenants in a phase."""
        return [name for name, seat in self._seats.items() if seat.phase is phase]

    def wait(self, name: str, client: Client) -> None:
        """Adds a tenant to the end of the queue for a seat, unless it is queued already."""
        self._waiting.setdefault(name, client)

    def give_up(self, name: str) -> None:
        """Removes a tenant from the queue for a seat."""
        self._waiting.pop(name, None)

    def fits(self, client: Client) -> bool:
        """Returns True if there is a free seat for another tenant of a client."""
        has_room = self._max_tenants is None or len(self._seats) < self._max_tenants
        return has_room and self._has_own_room(client)

    def next(self) -> str | None:
        """Gives a free seat to the first queued tenant that may have it, and returns its name."""
        for name, client in self._waiting_line():
            if self.fits(client):
                del self._waiting[name]
                self._seats[name] = _Seat(client)
                return name
        return None

    def _waiting_line(self) -> list[tuple[str, Client]]:
        """Returns the queue for a seat, without tenants that still have one."""
        return [(name, client) for name, client in self._waiting.items() if name not in self._seats]

    def victim(self, quiet: Sequence[str]) -> str | None:
        """Returns a tenant to park for a queued one; None if no tenant must leave.

        If no tenant is quiet, it is the one that has had its seat longest, once its turn is over.

        Args:
          quiet: tenants without work, in the order in which they may be parked.
        """
        leaving_tenants = [
            name
            for name, seat in self._seats.items()
            if seat.phase not in (Phase.LOADING, Phase.READY)
        ]
        candidates = [*quiet, *self._long_seated()]
        parkable_tenants = [name for name in candidates if self.may_park(name)]
        for client in self._clients_in_need():
            # A tenant that leaves already makes room for one client.
            helpers = self._tenants_making_room(client, leaving_tenants)
            if helpers:
                leaving_tenants.remove(helpers[0])  # its room is for this one
                continue
            helpers = self._tenants_making_room(client, parkable_tenants)
            if helpers:
                return helpers[0]
        return None

    def _long_seated(self) -> list[str]:
        """Returns the tenants whose turn is over, the longest-seated first."""
        latest_start = time.monotonic() - _TURN_SECONDS
        start_times = {
            name: seat.since for name, seat in self._seats.items() if seat.since < latest_start
        }
        return sorted(start_times, key=start_times.__getitem__)

    def _clients_in_need(self) -> list[Client]:
        """Returns the clients of queued tenants without a seat, those at their own limit first.

        These choose first, since only the room of their owner helps them.
        """
        clients = [client for _, client in self._waiting_line() if not self.fits(client)]
        return sorted(clients, key=self._has_own_room)

    def _tenants_making_room(self, client: Client, names: Iterable[str]) -> list[str]:
        """Returns the tenants whose parking would free a seat for a client."""
        if self._has_own_room(client):
            return list(names)
        return [name for name in names if self._seats[name].client.owner == client.owner]

    def may_park(self, name: str) -> bool:
        """Returns True if a tenant with a seat may be parked."""
        return self.holds(name) and not self._is_stuck(name)

    def _is_stuck(self, name: str) -> bool:
        """Returns True if parking a tenant failed recently."""
        return self._stuck.get(name, 0.0) > time.monotonic()

    def hopeless(self) -> dict[str, str]:
        """Returns, by tenant, the reason why no seat can become free for it."""
        reasons: dict[str, str] = {}
        for name, client in self._waiting_line():
            rivals = self._tenants_making_room(client, self._seats)
            if rivals and all(map(self._is_stuck, rivals)):
                reasons[name] = (
                    f"{len(rivals)} adapters train here, and there is room for no more. None can "
                    f"be moved to the disk ({self._problem}). Solve this problem, and send "
                    "the request again."
                )
        return reasons

    def enter(self, name: str, phase: Phase) -> None:
        """Sets the phase of a tenant with a seat."""
        seat = self._seats[name]
        seat.phase = phase
        if phase is Phase.READY:
            seat.since = time.monotonic()

    def stay(self, name: str, error: Exception) -> None:
        """Marks a tenant whose state could not be saved as ready again."""
        self.enter(name, Phase.READY)
        self.give_up(name)
        self._stuck[name] = time.monotonic() + _RETRY_SECONDS
        self._problem = str(error) or type(error).__name__

    def leave(self, name: str) -> None:
        """Frees the seat of a tenant that is not in the engine."""
        self._seats.pop(name, None)
        self._stuck.pop(name, None)

    def _has_own_room(self, client: Client) -> bool:
        """Returns True if a client's owner is below its limit of tenants."""
        if self._max_owner_tenants is None:
            return True
        owners = [seat.client.owner for seat in self._seats.values()]
        return owners.count(client.owner) < self._max_owner_tenants
