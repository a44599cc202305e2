"""A tenant: an adapter that trains, and what is to be done with it."""

from collections import deque
from collections.abc import Generator

import jax

from train.serve.engine.base import Factors, TrainingState
from train.serve.engine.turns import TurnPath
from train.serve.protocol.engine import LATEST_LOSSES
from train.serve.protocol.requests import Client, Command, CommandResult, Done


class EngineTenant:
    """An adapter that trains, and what it waits for.

    Attributes:
      client: the client that it is of.
      seconds: seconds of the engine's time that it had.
    """

    def __init__(self, name: str, client: Client) -> None:
        """Begins without an adapter."""
        self.name, self.client, self.seconds = name, client, 0.0
        self.queue: deque[tuple[Command, Done]] = deque()
        self.job: Generator[None, None, CommandResult] | None = None
        self.done: Done | None = None
        self.state: TrainingState | None = None
        self.grads: Factors | None = None
        self.summed = (0.0, 0)  # the loss and its targets since the last update
        self.losses: deque[tuple[int, float]] = deque(maxlen=LATEST_LOSSES)

    def become(self, state: TrainingState | None) -> None:
        """Goes on from a state, without a gradient; None where it leaves."""
        self.state, self.grads, self.summed = state, None, (0.0, 0)

    @property
    def path(self) -> TurnPath:
        """Its place among the turns."""
        return self.client.owner, self.client.session, self.name

    @property
    def loss(self) -> float:
        """The loss a target, since the last update."""
        return self.summed[0] / max(self.summed[1], 1)

    @property
    def is_waiting(self) -> bool:
        """True where there is something to do."""
        return self.job is not None or bool(self.queue)

    @property
    def size(self) -> int:
        """The bytes of its arrays."""
        state = self.state
        if state is None:
            return 0
        arrays = jax.tree.leaves((state.first, state.second, self.grads or {}))
        return state.adapter.size + sum(x.nbytes for x in arrays)
