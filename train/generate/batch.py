"""Generates the answers of all adapters to all prompts, and keeps them when interrupted.

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
from train.console.output import opened, say, shorten
from train.console.progress import progress_of
from train.generate.answers import GeneratedAnswer, generate_answers, stream_answer
from train.generate.prompts import Prompt, PromptTokens, check_lengths, tokenize
from train.generate.shared_base import LoadedAdapters

_MIN_COLUMN_WIDTH = 30  # characters of an answer that stands beside others
_TITLE_WIDTH = 72  # characters of a prompt above its answers


class AnswerKey(NamedTuple):
    """The key of an answer: its prompt, its adapter, and its sample."""

    prompt: int
    adapter: str
    sample: int


AnswersByKey = Mapping[AnswerKey, GeneratedAnswer]


class AnswerPrinter:
    """Prints the answers in the order of the prompts."""

    def __init__(self, prompts: Sequence[Prompt], names: Sequence[str], n_samples: int) -> None:
        self._prompts = prompts
        self._names = names
        self._samples = range(n_samples)
        self._n_printed = 0  # prompts

    def print_ready(self, answers: AnswersByKey, *, incomplete: bool = False) -> None:
        """Prints the prompts whose answers are complete, in order.

        Args:
          answers: the answers so far.
          incomplete: whether a prompt is printed without some of its answers, too.
        """
        while self._n_printed < len(self._prompts):
            places = [
                AnswerKey(self._n_printed, name, sample)
                for name in self._names
                for sample in self._samples
            ]
            if not incomplete and not all(place in answers for place in places):
                return
            answers_of_prompt = {place: answers[place] for place in places if place in answers}
            if answers_of_prompt:
                self._print_answers(self._prompts[self._n_printed], answers_of_prompt)
            self._n_printed += 1

    def _print_answers(self, prompt: Prompt, answers: AnswersByKey) -> None:
        """Prints a prompt's answers as plain text, as a table, or one below the other."""
        on_terminal = sys.stdout.isatty()
        has_one_answer = len(self._names) * len(self._samples) == 1
        if has_one_answer and (not on_terminal or len(self._prompts) == 1):
            print("".join(answer.text for answer in answers.values()), flush=True)
            return
        console = Console(file=sys.stdout, highlight=False)
        title = f"{prompt.name}: {shorten(prompt.text, _TITLE_WIDTH)}"
        print(format_heading(title, 0))
        if on_terminal and 1 < len(self._names) <= console.width // _MIN_COLUMN_WIDTH:
            console.print(self._make_table(answers))
            return
        for place, answer in answers.items():
            if not has_one_answer:
                sample = f", {place.sample + 1}" if len(self._samples) > 1 else ""
                print(format_heading(f"{place.adapter}{sample}", 1))
            print(answer.text)
        print(flush=True)

    def _make_table(self, answers: AnswersByKey) -> Table:
        """Returns a table with a column for each adapter and a row for each sample."""
        table = Table(expand=True, show_lines=len(self._samples) > 1)
        prompt = next(iter(answers)).prompt
        for name in self._names:
            table.add_column(Text(name), ratio=1)
        for sample in self._samples:
            cells: list[Text] = []
            for name in self._names:
                answer = answers.get(AnswerKey(prompt, name, sample))
                cells.append(Text(answer.text if answer else ""))
            table.add_row(*cells)
        return table


def format_heading(text: str, level: int) -> str:
    """Returns the heading of a prompt's answers (level 0), or of one answer (level 1)."""
    line = f"{'##' if level == 0 else '--'} {text}"
    return f"\x1b[1m{line}\x1b[0m" if sys.stdout.isatty() else line


def format_json_lines(
    prompts: Sequence[Prompt], answers: AnswersByKey, names: Sequence[str]
) -> list[str]:
    """Returns a JSON line for each answer, ordered by prompt, adapter and sample."""
    has_samples = any(place.sample for place in answers)
    order = sorted(answers, key=lambda place: (place.prompt, names.index(place.adapter), place))
    lines = []
    for place in order:
        answer = answers[place]
        fields: dict[str, Any] = {**prompts[place.prompt].fields, "adapter": place.adapter}
        if has_samples:
            fields["sample"] = place.sample
        fields |= {"answer": answer.text, "tokens": len(answer.tokens), "ended": answer.ended}
        line = json.dumps(fields, ensure_ascii=False, default=lambda data: f"{len(data)} bytes")
        lines.append(line)
    return lines


def answer_all(
    adapters: LoadedAdapters, prompts: Sequence[Prompt], tokens: Sequence[PromptTokens]
) -> None:
    """Answers prompts in batches with each adapter in turn.

    Args:
      adapters: the model and the adapters.
      prompts: the prompts.
      tokens: the tokens of each.

    Raises:
      UserError: the file of --output is there, or cannot be written.
    """
    options = adapters.options
    n_samples = options.num_samples
    rows = [prompt for prompt in tokens for _ in range(n_samples)]
    total = len(rows) * len(adapters.names)
    answers: dict[AnswerKey, GeneratedAnswer] = {}
    printer = None if options.output else AnswerPrinter(prompts, adapters.names, n_samples)
    interruption: BaseException | None = None
    with contextlib.ExitStack() as stack:
        file = None
        if options.output:
            file = stack.enter_context(opened(options.output, options.overwrite, "--output"))
        try:
            hides_bar = printer is not None and sys.stdout.isatty()
            with progress_of(total, "answering", "made", "answers", hidden=hides_bar) as progress:
                for name, row, answer in _generate_for_adapters(adapters, rows, progress):
                    answers[AnswerKey(row // n_samples, name, row % n_samples)] = answer
                    if printer:
                        printer.print_ready(answers)
        except BaseException as error:  # whatever ended the rest, these are kept
            if not answers:
                raise
            interruption = error
        if file:
            file.writelines(
                f"{line}\n" for line in format_json_lines(prompts, answers, adapters.names)
            )
    if interruption is None:
        return
    if printer:
        printer.print_ready(answers, incomplete=True)
    where = f"in {options.output}" if options.output else "above"
    say(f"\nStopped after {len(answers):,} of {total:,} answers. The finished answers are {where}.")
    raise interruption


def _generate_for_adapters(
    adapters: LoadedAdapters, rows: Sequence[PromptTokens], progress: Callable[[int], None]
) -> Iterator[tuple[str, int, GeneratedAnswer]]:
    """Yields the adapter, the row and the answer of each finished answer."""
    n_earlier = 0  # answers of the adapters before

    def count(n_done: int) -> None:
        progress(n_earlier + n_done)

    for name in adapters.names:
        for row, answer in generate_answers(adapters.generator(name), rows, progress=count):
            yield name, row, answer
        n_earlier += len(rows)


def stream_answers(adapters: LoadedAdapters, prompts: Iterable[Prompt]) -> int:
    """Answers each prompt on its arrival, and prints the text while it is generated.

    Args:
      adapters: the model and the adapters.
      prompts: the prompts.

    Returns:
      The number of prompts that got no answer: they are too long, as a line on stderr says.
    """
    n_refused = 0
    for number, prompt in enumerate(prompts):
        try:
            (tokens,) = tokenize([prompt], adapters.outline, adapters.options.system)
            check_lengths([prompt], [tokens], adapters.outline, adapters.options)
        except UserError as error:
            say(f"{prompt.name} was skipped: {error}")
            n_refused += 1
            continue
        for name in adapters.names:
            if len(adapters.names) > 1:
                print(format_heading(name, 1))
            generator = adapters.generator(name)
            stream_answer(generator, generator.answer(), tokens, number, _print_text)
            print(flush=True)
    return n_refused


def _print_text(text: str) -> None:
    """Prints a piece of an answer."""
    print(text, end="", flush=True)
