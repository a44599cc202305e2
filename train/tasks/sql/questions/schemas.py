"""The schemas of the SQL task, for training and for testing; no table is in both.

They stand in `training_schemas.txt` and `test_schemas.txt`; see `tables.py` for the notation.
"""

from collections.abc import Sequence

from train.tasks.sql.questions.draw import Draw
from train.tasks.sql.questions.tables import Schema, parse_schema, read_blocks

# Suffixes of table names (see `tables.py`); those of the test schemas never occur in training.
_TRAINING_SUFFIXES = """
    Data List Table Log Set File Line Store View Map Base Entry Slot Main Item Block Sheet Pool
    Cache Group Index Stack Page Unit
""".split()
_TEST_SUFFIXES = "Info Tab Record Book Core Array Card Master Node Report Bank Live".split()


def _schemas(texts: dict[str, str], suffixes: Sequence[str]) -> tuple[Schema, ...]:
    """Parses schemas; uses each suffix about equally often."""
    waiting: list[str] = []
    schemas = []
    draw = Draw("suffixes")
    for name, text in texts.items():
        waiting = waiting or draw.shuffled(suffixes)
        schemas.append(parse_schema(name, text, waiting.pop()))
    return tuple(schemas)


TRAINING_SCHEMAS = _schemas(read_blocks("training_schemas.txt"), _TRAINING_SUFFIXES)
TEST_SCHEMAS = _schemas(read_blocks("test_schemas.txt"), _TEST_SUFFIXES)
SCHEMAS: dict[str, Schema] = {s.name: s for s in TRAINING_SCHEMAS + TEST_SCHEMAS}
