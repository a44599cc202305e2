"""An environment with a tool: a database that a model may query before it answers a question."""

import json
from contextlib import ExitStack

from train.environments.sql.databases import open_databases
from train.environments.sql.guard import REFUSED, TIMEOUT, run
from train.environments.sql.schemas import SCHEMAS

_MAX_SHOWN_ROWS = 20  # rows
_REASONS = {
    REFUSED: "Only one SELECT on the tables of the database is allowed.",
    TIMEOUT: "The query takes too long or returns too many rows.",
}


class SqlSession:
    """Runs queries on one of the databases of a question's schema.

    The reward `sql` judges the answer on others, too.
    """

    def __init__(self) -> None:
        """Creates a session without a database."""
        self._connections = ExitStack()

    def reset(self, schema: str) -> None:
        """Opens a new database of a schema."""
        self._connections.close()
        databases = self._connections.enter_context(open_databases(SCHEMAS[schema]))
        self._database = databases[0]

    def run_query(self, sql: str) -> str:
        """Runs a query on the database, to see what it returns before you answer.

        Args:
            sql: One SELECT statement of SQLite.

        Returns:
            The rows, or the error.
        """
        errors: list[str] = []
        rows = run(self._database, str(sql), errors)
        if isinstance(rows, str):
            raise ValueError(_REASONS.get(rows) or errors[-1])
        lines = [
            json.dumps(row, ensure_ascii=False, default=repr) for row in rows[:_MAX_SHOWN_ROWS]
        ]
        if len(rows) > _MAX_SHOWN_ROWS:
            lines.append(f"and {len(rows) - _MAX_SHOWN_ROWS} more rows")
        return "\n".join(lines) or "no rows"
