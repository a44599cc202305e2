"""The completions in runs' folders, in groups by step and prompt."""

import itertools
import json
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lora_jax.buckets.copies import folder_with_files
from lora_jax.buckets.store import BucketError
from train.console.errors import UserError, as_user_errors
from train.reporters.contract import Sample
from train.reporters.files import METRICS, SAMPLES, read_lines
from train.run.log import sample_of
from train.run.output import FACTS
from train.settings.files import CONFIG

_RUN_FILES = (CONFIG, FACTS, METRICS, SAMPLES)


class PromptGroup(NamedTuple):
    """The completions of one prompt in one step of a run.

    Attributes:
      step: the step.
      prompt: the prompt's last turn.
      row: the name of the prompt's row in the data; None if it is not known.
      context: the turns of the prompt before its last turn.
      completions: the completions.
    """

    step: int
    prompt: str
    row: str | None
    context: Sequence[Mapping[str, str]]
    completions: Sequence[Sample]


class PromptView(NamedTuple):
    """The completions of one prompt that are shown side by side.

    Attributes:
      step: the step under which the completions are shown.
      groups: the group of each run; None for a run that drew the prompt less often.
    """

    step: int
    groups: Sequence[PromptGroup | None]


class Filter(NamedTuple):
    """The completions to show.

    Attributes:
      steps: the first and the last step; None for all steps.
      rewards: the lowest and the highest reward; None for all completions.
      words: words that must all occur in a prompt with its completion, in either case.
    """

    steps: tuple[int, int] | None = None
    rewards: tuple[float, float] | None = None
    words: Sequence[str] = ()

    def shows(self, group: PromptGroup, completion: Sample) -> bool:
        """Returns True if a completion of a group is shown."""
        if self.rewards is not None:
            reward = completion.reward
            if reward is None or not self.rewards[0] <= reward <= self.rewards[1]:
                return False
        texts = [turn["text"] for turn in (*group.context, *turns_of(completion))]
        text = "\n".join([group.prompt, *texts]).lower()
        return all(word.lower() in text for word in self.words)


def turns_of(completion: Sample) -> Sequence[Mapping[str, str]]:
    """Returns the turns of a completion; its answer as one turn if an older run wrote it."""
    if completion.turns is None:
        return [{"role": "assistant", "text": completion.answer}]
    return completion.turns


def read_groups(run: str) -> list[PromptGroup]:
    """Reads the completions of a run, which need not have ended.

    Args:
      run: the folder of the run, which may be in a bucket.

    Raises:
      UserError: there is no run, or it has no completions.
    """
    with as_user_errors(BucketError, prefix=f"{run}: "):
        folder = folder_with_files(run, _RUN_FILES)
    if not any((folder / name).is_file() for name in _RUN_FILES):
        raise UserError(f"{run} contains no run. Pass the folder of a run, its --output.")
    groups = list(_split_into_groups(read_lines(folder / SAMPLES)))
    if not groups:
        raise UserError(
            f"The run {run} has no completions in {SAMPLES}. Pass a run of train.grpo or "
            "train.distill, or a run with --sample-prompts, that has taken a step."
        )
    return groups


def _split_into_groups(lines: Sequence[Mapping[str, Any]]) -> Iterator[PromptGroup]:
    """Yields the groups of lines of samples.jsonl, which follow one another."""

    def key(line: Mapping[str, Any]) -> tuple[int, int | None, str]:
        return line["step"], line.get("group"), line["prompt"]

    samples = [dict(line) for line in lines if "answer" in line and "prompt" in line]
    for (step, _, prompt), group_lines in itertools.groupby(samples, key):
        completions = [sample_of(line) for line in group_lines]
        first = completions[0]
        yield PromptGroup(
            step=step,
            prompt=prompt,
            row=first.row,
            context=first.context or (),
            completions=completions,
        )


def arrange(
    runs: Sequence[str], groups_of_runs: Sequence[Sequence[PromptGroup]]
) -> list[PromptView]:
    """Arranges the groups of one run, or of two runs side by side, by step.

    Two runs share the prompts that both have. The first group of a prompt in one run stands beside
    the first group of the prompt in the other run, and so on.

    Args:
      runs: the folders of the runs, for messages.
      groups_of_runs: the groups of each run.

    Raises:
      UserError: the two runs have no prompt in common.
    """
    if len(groups_of_runs) == 1:
        return [PromptView(group.step, [group]) for group in groups_of_runs[0]]
    groups_of_prompts = [_groups_by_prompt(groups) for groups in groups_of_runs]
    first, second = groups_of_prompts
    views = []
    for prompt, first_groups in first.items():
        if prompt not in second:
            continue
        for pair in itertools.zip_longest(first_groups, second[prompt]):
            step = next(group.step for group in pair if group is not None)
            views.append(PromptView(step, pair))
    if not views:
        raise UserError(
            f"The runs {' and '.join(runs)} have no prompt in common. Pass one run, or two runs on "
            "the same data."
        )
    return sorted(views, key=lambda view: view.step)


def _groups_by_prompt(groups: Sequence[PromptGroup]) -> dict[str, list[PromptGroup]]:
    """Returns the groups of each prompt, by the prompt with its context."""
    groups_by_prompt: dict[str, list[PromptGroup]] = defaultdict(list)
    for group in groups:
        groups_by_prompt[json.dumps([group.prompt, [*group.context]])].append(group)
    return groups_by_prompt


def select(views: Sequence[PromptView], shown: Filter) -> list[PromptView]:
    """Returns the views with only the completions that a filter shows.

    Raises:
      UserError: no completion is left.
    """
    selected = []
    for view in views:
        if shown.steps is not None and not shown.steps[0] <= view.step <= shown.steps[1]:
            continue
        groups = [_select_completions(group, shown) for group in view.groups]
        if any(group is not None and group.completions for group in groups):
            selected.append(PromptView(view.step, groups))
    if not selected:
        raise UserError(
            "No completion fits --steps, --rewards and --words. Remove one of them, or pass other "
            "values."
        )
    return selected


def _select_completions(group: PromptGroup | None, shown: Filter) -> PromptGroup | None:
    """Returns a group with only the completions that a filter shows."""
    if group is None:
        return None
    completions = [item for item in group.completions if shown.shows(group, item)]
    return group._replace(completions=completions)


def run_names(runs: Sequence[str]) -> list[str]:
    """Returns the last parts of the folders of runs; the whole paths of two runs that share it."""
    names = [Path(run).name or run for run in runs]
    return names if len(set(names)) == len(names) else [*runs]
