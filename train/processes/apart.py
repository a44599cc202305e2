"""Runs a function in a process of its own: a crash in native code ends only that process."""

import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any


class ProcessCrash(Exception):
    """The process of a function ended before the function returned."""


def run_apart(function: Callable[..., Any], *args: Any) -> Any:
    """Runs a function in a new process, and returns its result.

    Args:
      function: a function of a module, which the new process imports.
      *args: its arguments. They and the result must be picklable.

    Returns:
      The result of the function.

    Raises:
      ProcessCrash: the process ended, for example by a signal.
      Exception: the error that the function raised.
    """
    context = multiprocessing.get_context("spawn")  # a fork would copy the locks of JAX's threads
    with ProcessPoolExecutor(max_workers=1, mp_context=context) as executor:
        try:
            return executor.submit(function, *args).result()
        except BrokenProcessPool as error:
            raise ProcessCrash(str(error)) from error
