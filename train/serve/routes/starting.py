"""Answers of a server that is not ready: how much of its start is done."""

import dataclasses

from train.serve.routes.errors import HttpError

_AGAIN = "2"  # seconds


@dataclasses.dataclass
class StartProgress:
    """The progress of a start; any thread may change it.

    Attributes:
      model: name of the base.
      compiled: number of parts that are compiled.
      parts: number of all parts; 0 while weights are read.
    """

    model: str
    compiled: int = 0
    parts: int = 0

    def see(self, compiled: int, parts: int) -> None:
        """Notes how far the start is."""
        self.compiled, self.parts = compiled, parts

    def refusal(self) -> HttpError:
        """Returns the answer to requests that come too early."""
        far = f"{self.compiled} of {self.parts} parts are compiled"
        said = far if self.parts else "the weights are being loaded"
        return HttpError(
            503,
            f"the server starts: {said}; ask again",
            headers={"Retry-After": _AGAIN},
            more={"starting": dataclasses.asdict(self)},
        )
