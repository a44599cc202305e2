"""Settings that all contenders share, in JAX and on torch: the optimiser's, and their check."""

import time
from collections.abc import Callable
from typing import Any

# The optimiser's; the defaults of optax and torch differ.
LEARNING_RATE = 1e-3
BETAS = (0.9, 0.999)
EPS = 1e-8
WEIGHT_DECAY = 0.01


def checked(kind: str, run: Callable[[], Any], steps: int) -> dict[str, Any]:
    """Runs a program for what has to agree: the losses of steps, or the tokens decoded.

    Args:
      kind: the case's; "decode" has tokens.
      run: takes a step and returns its loss, or decodes; an array of either library.
      steps: how often to run it.

    Returns:
      ``losses`` or ``decoded``, and the ``seconds`` of the last run; ``first_s`` of the first.
    """
    found, seconds = [], []
    for _ in range(steps):
        began = time.perf_counter()
        found.append(run().tolist())  # waits for the device
        seconds.append(time.perf_counter() - began)
    answer = {"decoded": found[-1]} if kind == "decode" else {"losses": found}
    return {**answer, "first_s": seconds[0], "seconds": seconds[-1]}
