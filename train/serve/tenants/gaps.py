"""Commands that never come: those that wait for one get an error after a while."""

import itertools

from train.serve.protocol.requests import Discard, RequestError
from train.serve.storage.ledger import DISCARD, MISSING, Row
from train.serve.storage.results import error_answer
from train.serve.tenants.loading import TenantLog
from train.serve.tenants.progress import TenantProgress, TenantTable


class CommandGaps:
    """Closes gaps in the numbers of tenants' commands."""

    def __init__(self, table: TenantTable, log: TenantLog) -> None:
        """Keeps the parts of a server.

        Args:
          table: the tenants.
          log: submits commands, and writes their results.
        """
        self._table, self._log = table, log
        self._results, self._ledger = table.results, table.results.ledger

    def close(self, seconds: float) -> None:
        """Answers the commands that waited so long for a missing one with an error.

        The missing commands are refused from now on. The gradient before them is dropped: the step
        that was to take it never comes, and no other step may contain it.
        """
        latest = self._ledger.now() - seconds
        with self._table.lock:
            for name, tenant in self._table.tenants.items():
                has_gap = tenant.waiting and tenant.next not in tenant.waiting
                if has_gap and tenant.since < latest:
                    self._close(name, tenant, seconds)

    def _close(self, name: str, tenant: TenantProgress, seconds: float) -> None:
        waiting = sorted(tenant.waiting)
        last = waiting[-1]
        edges = itertools.pairwise([tenant.next - 1, *waiting])
        gaps = [(low + 1, high - 1) for low, high in edges if high - low > 1]
        missing = [seq for low, high in gaps for seq in range(low, high + 1)]
        names = ", ".join(str(low) if low == high else f"{low} to {high}" for low, high in gaps)
        error = RequestError(
            f"seq_id {names} of {name} did not come within {seconds:g} seconds. So no command from "
            f"seq_id {missing[0]} to {last} was executed, and the gradient of those before "
            f"was dropped: go on with seq_id {last + 1}, or load the last checkpoint"
        )
        answer, rows = error_answer(error), dict[int, Row]()
        with self._ledger.transaction():
            for seq in missing:
                kind = DISCARD if seq == tenant.next else MISSING
                rows[seq] = self._ledger.log(name, seq, kind, b"", refused=answer)
            for seq in waiting:
                self._ledger.finish(name, seq, answer, failed=True)
        for seq, (row, command) in tenant.waiting.items():
            tenant.waiting[seq] = row, None
            if command is not None:
                tenant.running += 1
                self._results.submit(self._log.finish, row, command, tenant, error)
        tenant.waiting |= {seq: (row, None) for seq, row in rows.items()}
        tenant.waiting[tenant.next] = rows[tenant.next], Discard()
        self._log.advance(name, tenant)
