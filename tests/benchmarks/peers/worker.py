"""A contender's process: answers requests, one JSON object a line, on its standard streams.

python -m tests.benchmarks.peers.worker CONTENDER   # started by `processes.Worker`
"""

import importlib
import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any

from tests.benchmarks.peers.cases import Case
from tests.benchmarks.peers.contenders import CONTENDERS
from train.processes.memory import peak_bytes


class Answers:
    """Answers the requests, each by the method of its name."""

    def __init__(self, contender: str) -> None:
        name = CONTENDERS[contender].module
        self.module = importlib.import_module(f"tests.benchmarks.peers.contenders.{name}")
        self.program: Any = None

    def load(self, case: dict[str, Any], base: str, adapter: str) -> dict[str, Any]:
        """Loads the model and the adapter, and compiles the program."""
        self.program = self.module.make(Case(**case), Path(base), Path(adapter))
        return self.program.compile()

    def check(self, steps: int) -> dict[str, Any]:
        """Returns what has to agree between contenders: losses of the first steps, or tokens."""
        return self.program.check(steps)

    def time(self, runs: int) -> dict[str, Any]:
        """Returns the seconds of that many runs."""
        return {"seconds": self.program.time(runs)}

    def memory(self) -> dict[str, Any]:
        """Returns the peaks of this process and of its device in bytes."""
        return {"process_peak": peak_bytes(), "device_peak": self.program.device_peak()}


def main() -> None:
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print goes to the log, not among the answers

    def say(answer: dict[str, Any]) -> None:
        print(json.dumps(answer), file=channel, flush=True)

    try:
        answers = Answers(sys.argv[1])
        say({"ready": True})
        for line in sys.stdin:
            request = json.loads(line)
            say(getattr(answers, request.pop("do"))(**request))
    except BaseException as error:
        traceback.print_exc()
        message = str(error).strip() or "no message"
        say({"error": f"{type(error).__name__}: {message.splitlines()[0]}"})
        raise SystemExit(1) from None


if __name__ == "__main__":
    main()
