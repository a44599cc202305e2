"""The progress of a tenant."""

import dataclasses
import itertools

from train.serve.protocol.engine import TenantStatus
from train.serve.protocol.requests import ANYONE, Client, Command
from train.serve.storage.ledger import LOGGED, Row


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
    status: TenantStatus | None = None

    @property
    def is_quiet(self) -> bool:
        """True where the engine has nothing to do, nor could have."""
        return self.running == 0 and self.next not in self.waiting


def load_of(row: Row) -> int:
    """Returns what a command without an answer counts in the queue."""
    return 1 + len(row["payload"] or b"") // 2**19 if row["state"] == LOGGED else 0


def first_gap(state: int, rows: list[Row]) -> int:
    """Returns the number of the first command that did not come, after that of a state."""
    numbers = {row["seq"] for row in rows}
    return next(n for n in itertools.count(state + 1) if n not in numbers)
