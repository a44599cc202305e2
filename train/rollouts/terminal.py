"""Completions as text for a terminal."""

import re
from collections.abc import Iterator, Mapping, Sequence

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from train.reporters.contract import Sample
from train.rollouts.runs import PromptGroup, PromptView, turns_of

_ROLES = {"user": "prompt", "assistant": "model"}
_STYLES = {"prompt": "cyan", "model": "green", "tool": "yellow", "environment": "magenta"}
_STATES = {"cut": "cut off", "masked": "masked", "redrawn": "drawn again"}
# Characters that could move the cursor, change colours or reorder a text.
_UNSAFE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def print_views(console: Console, runs: Sequence[str], views: Sequence[PromptView]) -> None:
    """Prints completions by step and prompt; those of two runs side by side.

    Args:
      console: console to print to.
      runs: the names of the runs, one for each group of a view.
      views: the completions.
    """
    for view in views:
        first = next(group for group in view.groups if group is not None)
        title = f"step {view.step}" if first.row is None else f"step {view.step} · {first.row}"
        console.print(Text(readable(title), style="bold"))
        for turn in [*first.context, {"role": "user", "text": first.prompt}]:
            console.print(Padding(_turn_text(turn), (0, 2), expand=False))
        columns = [_group_text(group) for group in view.groups]
        if len(columns) == 1:
            console.print(Padding(columns[0], (0, 2), expand=False))
            continue
        table = Table(box=None, expand=True, padding=(0, 2))
        for run, group in zip(runs, view.groups, strict=True):
            step = "" if group is None else f", step {group.step}"
            table.add_column(Text(readable(f"{run}{step}")), ratio=1, overflow="fold")
        table.add_row(*columns)
        console.print(table)


def readable(text: str) -> str:
    """Returns a text without control characters, which a terminal would obey.

    >>> from train.rollouts.terminal import readable
    >>> readable("a\\x1b[2Jb")
    'a\\\\x1b[2Jb'
    """
    return _UNSAFE.sub(lambda match: ascii(match[0])[1:-1], text)


def _group_text(group: PromptGroup | None) -> Text:
    """Returns the completions of a group."""
    if group is None or not group.completions:
        return Text("no completion to show")
    lines = []
    for index, completion in enumerate(group.completions):
        place = index if completion.place is None else completion.place
        facts = "  ".join([f"completion {place + 1}", *_facts(completion)])
        lines.append(Text(readable(facts), style="bold"))
        lines += [_turn_text(turn) for turn in turns_of(completion)]
    return Text("\n").join(lines)


def _facts(completion: Sample) -> Iterator[str]:
    """Yields the known facts about a completion."""
    if completion.reward is not None:
        yield f"reward {completion.reward:.3g}"
    for name, value in (completion.rewards or {}).items():
        yield f"{name} {value:.3g}"
    if completion.advantage is not None:
        yield f"advantage {completion.advantage:+.3g}"
    facts = completion._asdict()
    yield from (label for name, label in _STATES.items() if facts[name])
    if completion.lost is not None:
        yield f"lost: {completion.lost}"
    for name, fact in (completion.extra or {}).items():
        yield f"{name} {fact}"


def _turn_text(turn: Mapping[str, str]) -> Text:
    """Returns a turn with its role."""
    role = _ROLES.get(turn["role"], turn["role"])
    name = f" {turn['name']}" if "name" in turn else ""
    label = Text(readable(f"{role}{name}: "), style=_STYLES.get(role, "cyan"))
    return label + Text(readable(turn["text"]))
