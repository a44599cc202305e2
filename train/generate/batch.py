"""Answers all prompts with all adapters, and shows or writes them; keeps them when interrupted."""

import contextlib
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence

from train.console.errors import UserError
from train.console.output import opened, say
from train.console.progress import progress_of
from train.generate.answers import answers, spoken
from train.generate.prompts import Prompt, check_lengths, tokenize
from train.generate.shared_base import Served
from train.generate.show import Place, Shown, heading, json_lines
from train.generate.text import Answer


def answer_all(served: Served, prompts: Sequence[Prompt], tokens: Sequence[list[int]]) -> None:
    """Answers prompts in batches, with one adapter after the other.

    Args:
      served: the model and the adapters.
      prompts: the prompts.
      tokens: the tokens of each.

    Raises:
      UserError: the file of --output is there, or cannot be written.
    """
    options, found = served.options, dict[Place, Answer]()
    n = options.num_samples
    rows = [one for one in tokens for _ in range(n)]
    total = len(rows) * len(served.names)
    shown = None if options.output else Shown(prompts, served.names, n)
    stopped: BaseException | None = None
    with contextlib.ExitStack() as stack:
        file = None
        if options.output:
            file = stack.enter_context(opened(options.output, options.overwrite, "--output"))
        try:
            hidden = shown is not None and sys.stdout.isatty()
            with progress_of(total, "answering", "made", "answers", hidden=hidden) as progress:
                for name, row, answer in _answers(served, rows, progress):
                    found[Place(row // n, name, row % n)] = answer
                    if shown:
                        shown.ready(found)
        except BaseException as error:  # whatever ended the rest, these are kept
            if not found:
                raise
            stopped = error
        if file:
            file.writelines(f"{line}\n" for line in json_lines(prompts, found, served.names))
    if stopped is None:
        return
    if shown:
        shown.ready(found, all_that_is_there=True)
    where = f"in {options.output}" if options.output else "above"
    say(f"\nstopped: {len(found):,} of {total:,} answers were ready; they are {where}")
    raise stopped


def _answers(
    served: Served, rows: Sequence[list[int]], progress: Callable[[int], None]
) -> Iterator[tuple[str, int, Answer]]:
    """Yields adapter, row and answer, as they are ready."""
    before = 0

    def tell(done: int) -> None:
        progress(before + done)

    for name in served.names:
        for row, answer in answers(served.speaker(name), rows, progress=tell):
            yield name, row, answer
        before += len(rows)


def answer_aloud(served: Served, prompts: Iterable[Prompt]) -> int:
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
            spoken(speaker, answer, tokens, number, lambda text: print(text, end="", flush=True))
            print(flush=True)
    return refused
