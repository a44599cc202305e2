"""Starts scripts as processes of their own."""

import sys

# TensorBoard's writer imports torch where it is there, which takes longer than many a test.
_WITHOUT_TORCH = """
import runpy, sys
sys.modules["torch"] = None
import tensorboardX
del sys.modules["torch"]
runpy.run_module(sys.argv.pop(1), run_name="__main__", alter_sys=True)
"""


def command(script, *args):
    """Returns the words that start `python -m script` with options, without torch."""
    return [sys.executable, "-c", _WITHOUT_TORCH, script, *map(str, args)]
