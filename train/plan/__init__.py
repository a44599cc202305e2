"""Plans a run, or a function that a user wrote: memory, FLOPs, time and traffic.

``train.plan.function(fn, *args, topology=…)`` is `train.plan.user_function.plan_function`, which is
imported at its first use.
"""

import importlib
from typing import Any


def __getattr__(name: str) -> Any:
    if name != "function":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return importlib.import_module(f"{__name__}.user_function").plan_function
