"""The page of rollouts: one HTML file, which needs neither a server nor a network.

The completions are embedded as JSON that is compressed for each step. The script of the page
unpacks a step when it is shown, and adds all texts to the page as text nodes.
"""

import base64
import hashlib
import itertools
import json
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from train.reporters.contract import Sample
from train.rollouts.runs import PromptGroup, PromptView, turns_of

_FOLDER = Path(__file__).parent
_FACTS = ("reward", "rewards", "advantage", "redrawn", "cut", "lost", "masked", "extra")


def render_page(runs: Sequence[str], views: Sequence[PromptView]) -> Iterator[str]:
    """Yields the parts of the page.

    Args:
      runs: the names of the runs, one for each group of a view.
      views: the completions, in the order of their steps.
    """
    steps = []
    packed_steps = []
    for step, step_views in itertools.groupby(views, lambda view: view.step):
        views_of_step = list(step_views)
        steps.append(_describe_step(step, views_of_step))
        packed_steps.append(pack([_view_fields(view) for view in views_of_step]))
    index = {"runs": [*runs], "rewards": _reward_names(views), "steps": steps}
    script = (_FOLDER / "page.js").read_text(encoding="utf-8")
    style = (_FOLDER / "page.css").read_text(encoding="utf-8")
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_FOLDER), autoescape=True, undefined=jinja2.StrictUndefined
    )
    yield from environment.get_template("page.html").generate(
        runs=runs,
        script=Markup(script),
        style=Markup(style),
        script_hash=_content_hash(script),
        style_hash=_content_hash(style),
        index=pack(index),
        packed_steps=packed_steps,
    )


def pack(value: Any) -> str:
    """Returns a value as JSON that is compressed (zlib) and written in base64."""
    text = json.dumps(value, separators=(",", ":"))
    return base64.b64encode(zlib.compress(text.encode())).decode()


def _content_hash(text: str) -> str:
    """Returns the hash by which a content security policy names a script or a style."""
    digest = hashlib.sha256(text.encode()).digest()
    return f"sha256-{base64.b64encode(digest).decode()}"


def _reward_names(views: Sequence[PromptView]) -> list[str]:
    """Returns the names of all rewards."""
    names: dict[str, None] = {}
    for view in views:
        for completion in _completions_of(view):
            names |= dict.fromkeys(completion.rewards or ())
    return [*names]


def _completions_of(view: PromptView) -> Iterator[Sample]:
    """Yields the completions of all runs of a view."""
    for group in view.groups:
        if group is not None:
            yield from group.completions


def _describe_step(step: int, views: Sequence[PromptView]) -> dict[str, Any]:
    """Returns the step's number, its number of completions, and the mean reward of each run."""
    n_completions = 0
    means = []
    for groups in zip(*(view.groups for view in views), strict=True):
        completions = [
            completion for group in groups if group is not None for completion in group.completions
        ]
        n_completions += len(completions)
        rewards = [completion.reward for completion in completions if completion.reward is not None]
        means.append(sum(rewards) / len(rewards) if rewards else None)
    return {"step": step, "completions": n_completions, "means": means}


def _view_fields(view: PromptView) -> dict[str, Any]:
    """Returns a view as values for JSON."""
    first = next(group for group in view.groups if group is not None)
    groups = [None if group is None else _group_fields(group) for group in view.groups]
    return {
        "prompt": first.prompt,
        "row": first.row,
        "context": [*first.context],
        "groups": groups,
    }


def _group_fields(group: PromptGroup) -> dict[str, Any]:
    """Returns the completions of a group as values for JSON."""
    completions = []
    for index, completion in enumerate(group.completions):
        facts: Mapping[str, Any] = completion._asdict()
        fields = {name: facts[name] for name in _FACTS if facts[name] is not None}
        fields["place"] = index if completion.place is None else completion.place
        fields["turns"] = turns_of(completion)
        completions.append(fields)
    return {"step": group.step, "completions": completions}
