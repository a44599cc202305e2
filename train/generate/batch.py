"""Answers all prompts with all adapters; keeps the answers when interrupted.

They are shown in the order of their prompts, or written as JSON lines.
"""

import contextlib
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table
from rich.text import Text

from train.console.errors import UserError
from train.console.output import opened, say
from train.console.progress import progress_of
from train.generate.answers import GeneratedAnswer, generate_answers, stream_answer
from train.generate.prompts import Prompt, PromptTokens, check_lengths, tokenize
from train.generate.shared_base import LoadedAdapters

_COLUMN = 30  # the least characters of an answer that stands beside others
_SHOWN = 72  # characters of a prompt above its answers


class AnswerPlace(NamedTuple):
    """The place of an answer: its prompt, its adapter, and which of several samples it is."""

    prompt: int
    adapter: str
    sample: int


AnswersByPlace = Mapping[AnswerPlace, GeneratedAnswer]


class AnswerPrinter:
    """Prints the answers to each prompt once they and those to the prompts before it are there."""

    def __init__(self, prompts: Sequence[Prompt], names: Sequence[str], n_samples: int) -> None:
        self._prompts, self._names, self._samples = prompts, names, range(n_samples)
        self._next = 0

    def ready(self, answers: AnswersByPlace, *, all_that_is_there: bool = False) -> None:
        """Prints the prompts whose turn has come.

        Args:
          answers: the answers so far.
          all_that_is_there: prints those of a prompt with some answers missing, too.
        """
        while self._next < len(self._prompts):
            places = [AnswerPlace(self._next, n, i) for n in self._names for i in self._samples]
            if not all_that_is_there and not all(place in answers for place in places):
                return
            here = {place: answers[place] for place in places if place in answers}
            if here:
                self._print(self._prompts[self._next], self._next + 1, here)
            self._next += 1

    def _print(self, prompt: Prompt, number: int, here: AnswersByPlace) -> None:
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

    def _table(self, here: AnswersByPlace) -> Table:
        """Returns a table with a column an adapter, and a row a sample."""
        table = Table(expand=True, show_lines=len(self._samples) > 1)
        prompt = next(iter(here)).prompt
        for name in self._names:
            table.add_column(Text(name), ratio=1)
        for sample in self._samples:
            answers = (here.get(AnswerPlace(prompt, name, sample)) for name in self._names)
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


def json_lines(prompts: Sequence[Prompt], made: AnswersByPlace, names: Sequence[str]) -> list[str]:
    """Returns a line for each answer: by prompt, then by adapter, then by sample."""
    several = any(place.sample for place in made)
    order = sorted(made, key=lambda place: (place.prompt, names.index(place.adapter), place))
    lines = []
    for place in order:
        answer = made[place]
        fields: dict[str, Any] = {**prompts[place.prompt].fields, "adapter": place.adapter}
        if several:
            fields["sample"] = place.sample
        fields |= {"answer": answer.text, "tokens": len(answer.tokens), "ended": answer.ended}
        line = json.dumps(fields, ensure_ascii=False, default=lambda data: f"{len(data)} bytes")
        lines.append(line)
    return lines


def answer_all(
    served: LoadedAdapters, prompts: Sequence[Prompt], tokens: Sequence[PromptTokens]
) -> None:
    """Answers prompts in batches, with one adapter after the other.

    Args:
      served: the model and the adapters.
      prompts: the prompts.
      tokens: the tokens of each.

    Raises:
      UserError: the file of --output is there, or cannot be written.
    """
    options, answers = served.options, dict[AnswerPlace, GeneratedAnswer]()
    n = options.num_samples
    rows = [prompt for prompt in tokens for _ in range(n)]
    total = len(rows) * len(served.names)
    shown = None if options.output else AnswerPrinter(prompts, served.names, n)
    stopped: BaseException | None = None
    with contextlib.ExitStack() as stack:
        file = None
        if options.output:
            file = stack.enter_context(opened(options.output, options.overwrite, "--output"))
        try:
            hidden = shown is not None and sys.stdout.isatty()
            with progress_of(total, "answering", "made", "answers", hidden=hidden) as progress:
                for name, row, answer in _answers(served, rows, progress):
                    answers[AnswerPlace(row // n, name, row % n)] = answer
                    if shown:
                        shown.ready(answers)
        except BaseException as error:  # whatever ended the rest, these are kept
            if not answers:
                raise
            stopped = error
        if file:
            file.writelines(f"{line}\n" for line in json_lines(prompts, answers, served.names))
    if stopped is None:
        return
    if shown:
        shown.ready(answers, all_that_is_there=True)
    where = f"in {options.output}" if options.output else "above"
    say(f"\nstopped: {len(answers):,} of {total:,} answers were ready; they are {where}")
    raise stopped


def _answers(
    served: LoadedAdapters, rows: Sequence[PromptTokens], progress: Callable[[int], None]
) -> Iterator[tuple[str, int, GeneratedAnswer]]:
    """Yields adapter, row and answer, as they are ready."""
    before = 0

    def tell(done: int) -> None:
        progress(before + done)

    for name in served.names:
        for row, answer in generate_answers(served.speaker(name), rows, progress=tell):
            yield name, row, answer
        before += len(rows)


def stream_answers(served: LoadedAdapters, prompts: Iterable[Prompt]) -> int:
    """Answers each prompt as it comes, and prints the text as it is generated.

    Args:
      served: the model and the adapters.
      prompts: the prompts.

    Returns:
      The number of prompts that got no answer: they are too long, as a line on stderr says.
    """
    refused = 0
    for number, prompt in enumerate(prompts):
        try:
            (tokens,) = tokenize([prompt], served.outline, served.options.system)
            check_lengths([prompt], [tokens], served.outline, served.options)
        except UserError as error:
            say(f"{prompt.name} is left out: {error}")
            refused += 1
            continue
        for name in served.names:
            if len(served.names) > 1:
                print(heading(name, 1))
            speaker = served.speaker(name)
            answer = speaker.answer()
            stream_answer(
                speaker, answer, tokens, number, lambda text: print(text, end="", flush=True)
            )
            print(flush=True)
    return refused
