"""Hides torch from processes that tests start with this folder in PYTHONPATH.

Tokenizers import torch wherever it is installed, which takes five seconds of a process.
"""

from tests.surroundings import hide_torch

hide_torch()
