"""The progress of tenants, and the table of them that the log, loading and parking share."""

import dataclasses
import itertools
import threading

from train.serve.protocol.engine import EngineProtocol, TenantStatus
from train.serve.protocol.requests import ANYONE, Client, Command
from train.serve.storage.ledger import LOGGED, Row
from train.serve.storage.results import ResultWriter
from train.serve.tenants.seats import Seats


@dataclasses.dataclass
class TenantProgress:
    """The progress of a tenant.

    Attributes:
      next: the number of the command that the engine gets next.
      client: the client that it is of.
      waiting: commands that came too early; None for one that the engine does not get.
      gradient: whether what was executed left a gradient that no update has taken.
      handed, size: commands, and bytes of them, since the last saved state.
      load: commands without an answer, a large one counted as one for each half MiB.
      running: commands that the engine has.
      exists: whether the tenant was made, or may be.
      used: when its last command came, in seconds since 1970.
      since: when the commands that wait began to wait for the next one, by `Ledger.now`.
      status: the state in which it was parked; None for one that never was.
    """

    next: int
    client: Client = ANYONE
    waiting: dict[int, tuple[Row, Command | None]] = dataclasses.field(default_factory=dict)
    gradient: bool = False
    handed: int = 0
    size: int = 0
    load: int = 0
    running: int = 0
    exists: bool = True
    used: float = 0.0
    since: float = 0.0
    status: TenantStatus | None = None

    @property
    def is_quiet(self) -> bool:
        """True where the engine has nothing to do, nor could have."""
        return self.running == 0 and self.next not in self.waiting


@dataclasses.dataclass
class TenantTable:
    """The tenants of a server, and what executes and keeps their commands.

    Attributes:
      engine: executes commands.
      results: writes results into its ledger.
      seats: the room in the engine.
      tenants: the progress of each tenant, by name.
      lock: guards `seats` and `tenants`.
    """

    engine: EngineProtocol
    results: ResultWriter
    seats: Seats
    tenants: dict[str, TenantProgress] = dataclasses.field(default_factory=dict)
    lock: threading.RLock = dataclasses.field(default_factory=threading.RLock)


def load_of(row: Row) -> int:
    """Returns the share of the queue that a command without an answer takes."""
    return 1 + len(row["payload"] or b"") // 2**19 if row["state"] == LOGGED else 0


def next_number(state: int, rows: list[Row]) -> int:
    """Returns the number of the first command that did not come, after that of a state."""
    numbers = {row["seq"] for row in rows}
    return next(n for n in itertools.count(state + 1) if n not in numbers)
