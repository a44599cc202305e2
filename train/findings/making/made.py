"""The result of making: options that name files, and sentences about them."""

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple


class FindingInputs(NamedTuple):
    """Data or a base that was made for a finding.

    Attributes:
      options: options that name it, as train.compare takes them: {"dataset": "rows.csv"}.
      notes: sentences about it, with what was measured of it.
    """

    options: Mapping[str, str | Path]
    notes: tuple[str, ...] = ()
