"""Tools and environments that run in this very process, in the place of others'."""

import inspect
from concurrent.futures import Future

from transformers.utils import get_json_schema

from train.tools.contract import EpisodeTurn, ToolAnswer


def later(value):
    future = Future()
    future.set_result(value)
    return future


class LocalEpisode:
    """Calls tools as TRL's trainer does."""

    lost = problem = None

    def __init__(self, environment, tools, opening):
        self.environment, self.opening = environment, opening
        self.tools = {tool.__name__: tool for tool in [*tools, *methods(environment)]}

    def call(self, calls):
        return later(EpisodeTurn(tuple(map(self.answer, calls))))

    def answer(self, call):
        try:
            if call.name not in self.tools:
                raise ValueError(f"Tool {call.name} not found.")
            return ToolAnswer(call.name, str(self.tools[call.name](**call.arguments)))
        except Exception as error:
            return ToolAnswer(call.name, str({"error": str(error)}), True)

    def reward(self):
        return later(self.environment.get_reward())

    def close(self):
        pass


def methods(environment):
    """The tools of an environment."""
    named = inspect.getmembers(environment, inspect.ismethod)
    return [f for name, f in named if name not in ("reset", "get_reward") and name[0] != "_"]


class LocalHost:
    def __init__(self, environment=None, tools=()):
        self.environment, self.functions = environment, tools
        own = methods(environment()) if environment else []
        self.tools = [get_json_schema(tool) for tool in [*tools, *own]]
        self.name = environment.__name__ if environment else ""
        self.needs = [*inspect.signature(environment.reset).parameters][1:] if environment else []
        self.rewards = hasattr(environment, "get_reward")

    def open(self, rows, seeds=None, names=None):
        opened = []
        for row in rows:
            environment = self.environment and self.environment()
            opening = environment.reset(row["secret"]) if environment else None
            opened.append(later(LocalEpisode(environment, self.functions, opening)))
        return opened

    def close(self):
        pass
