"""The arrangement of runs over one base: what differs between a single run and runs side by side.

It holds the console of each run, says which errors stay with their run, and drives the steps. Both
kinds have the same methods.
"""

from train.stages.alone import Alone
from train.stages.beside import SideBySide

Arrangement = Alone | SideBySide
