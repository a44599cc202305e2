"""Answers on standard output, in the order of their prompts, and as JSON lines."""

import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table
from rich.text import Text

from train.generate.prompts import Prompt
from train.generate.text import Answer

_COLUMN = 30  # the least characters of an answer that stands beside others
_SHOWN = 72  # characters of a prompt above its answers


class Place(NamedTuple):
    """The place of an answer: its prompt, its adapter, and which of several samples it is."""

    prompt: int
    adapter: str
    sample: int


Found = Mapping[Place, Answer]


class Shown:
    """Prints the answers to each prompt once they and those to the prompts before it are there."""

    def __init__(self, prompts: Sequence[Prompt], names: Sequence[str], n_samples: int) -> None:
        self._prompts, self._names, self._samples = prompts, names, range(n_samples)
        self._next = 0

    def ready(self, found: Found, *, all_that_is_there: bool = False) -> None:
        """Prints the prompts whose turn has come.

        Args:
          found: the answers so far.
          all_that_is_there: prints those of a prompt with some answers missing, too.
        """
        while self._next < len(self._prompts):
            places = [Place(self._next, n, i) for n in self._names for i in self._samples]
            if not all_that_is_there and not all(place in found for place in places):
                return
            here = {place: found[place] for place in places if place in found}
            if here:
                self._print(self._prompts[self._next], self._next + 1, here)
            self._next += 1

    def _print(self, prompt: Prompt, number: int, here: Found) -> None:
        on_terminal, alone = sys.stdout.isatty(), len(self._names) * len(self._samples) == 1
        if alone and (not on_terminal or len(self._prompts) == 1):
            print("".join(answer.text for answer in here.values()), flush=True)
            return
        console = Console(file=sys.stdout, highlight=False)
        title = f"{prompt.name}: {first_line(prompt.text)}"
        print(heading(title, 0))
        if on_terminal and 1 < len(self._names) <= console.width // _COLUMN:
            console.print(self._table(here))
            return
        for place, answer in here.items():
            if not alone:
                sample = f", {place.sample + 1}" if len(self._samples) > 1 else ""
                print(heading(f"{place.adapter}{sample}", 1))
            print(answer.text)
        print(flush=True)

    def _table(self, here: Found) -> Table:
        """Returns a table with a column an adapter, and a row a sample."""
        table = Table(expand=True, show_lines=len(self._samples) > 1)
        prompt = next(iter(here)).prompt
        for name in self._names:
            table.add_column(Text(name), ratio=1)
        for sample in self._samples:
            answers = (here.get(Place(prompt, name, sample)) for name in self._names)
            table.add_row(*(Text(answer.text if answer else "") for answer in answers))
        return table


def heading(text: str, level: int) -> str:
    """Returns a line above a prompt's answers (level 0), or above one of them (1)."""
    line = f"{'##' if level == 0 else '--'} {text}"
    return f"\x1b[1m{line}\x1b[0m" if sys.stdout.isatty() else line


def first_line(text: str) -> str:
    """Returns the beginning of a text, in one line."""
    line = " ".join(text.split())
    return line if len(line) <= _SHOWN else f"{line[: _SHOWN - 1]}…"


def json_lines(prompts: Sequence[Prompt], found: Found, names: Sequence[str]) -> list[str]:
    """Returns a line for each answer: by prompt, then by adapter, then by sample."""
    several = any(place.sample for place in found)
    order = sorted(found, key=lambda place: (place.prompt, names.index(place.adapter), place))
    lines = []
    for place in order:
        answer = found[place]
        fields: dict[str, Any] = {**prompts[place.prompt].fields, "adapter": place.adapter}
        if several:
            fields["sample"] = place.sample
        fields |= {"answer": answer.text, "tokens": len(answer.tokens), "ended": answer.ended}
        lines.append(json.dumps(fields, ensure_ascii=False))
    return lines
