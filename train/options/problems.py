"""Tells an error of an option in one line, with a pointer to `--help`."""

import difflib
import re
from collections.abc import Mapping, Sequence

from train.console.program import program

_MIN_LIKENESS = 0.7  # of an unknown flag and the nearest one, from 0 to 1
_FRAME = " │"  # the characters around the lines of tyro's errors
_RULE = re.compile(r"[ │╭╰]*[─-]{8,}[ │╮╯]*")  # a line between two sections
_UNRECOGNIZED = re.compile(r"Unrecognized options: ([^\s,]+)")
_MISSING = re.compile(r"Missing from [^:]*: (--[\w-]+)")
_NO_VALUE = re.compile(r"Missing value for argument '(--[\w-]+)'")
_BAD_VALUE = re.compile(r"Error parsing (--[\w-]+): (.*)|invalid choice .* argument '(--[\w-]+)'")
_OWN_REASON = re.compile(r"(Write one of|--)")  # the reasons of this project's own types


def option_problem(printed: str, args: Sequence[str], forms: Mapping[str, str], script: str) -> str:
    """Returns the message of one line for a command line that tyro refused.

    Args:
      printed: the error that tyro printed.
      args: the command line.
      forms: the form of the value of each option by its flag: {"--lr": "FLOAT", "--full": ""}.
      script: the module of the script, such as "train.export".
    """
    problem = _problem(_first_section(printed), args, forms)
    return f"{problem} {program(script)} --help explains the options."


def _problem(text: str, args: Sequence[str], forms: Mapping[str, str]) -> str:
    """Returns the problem in words, from the first section of tyro's error."""
    unrecognized = _UNRECOGNIZED.search(text)
    if unrecognized:
        return _unrecognized_problem(unrecognized[1], forms)
    missing = _MISSING.search(text)
    if missing:
        unknown_flags = [word for word in args if word.startswith("--") and not _is_in(forms, word)]
        if unknown_flags:
            return _unrecognized_problem(unknown_flags[0], forms)
        return f"{missing[1]} {forms.get(missing[1], '')} is required."
    no_value = _NO_VALUE.search(text)
    if no_value:
        name = no_value[1]
        return f"{name} needs a value: {forms.get(name) or 'TEXT'}."
    bad_value = _BAD_VALUE.search(text)
    if bad_value:
        name = bad_value[1] or bad_value[3]
        reason = bad_value[2] or ""
        if _OWN_REASON.match(reason):
            return f"{name}: {reason.rstrip('.')}."
        value = " ".join(_values(name, args))
        return f"{name} takes {forms.get(name) or 'no value'}, but got {value or 'nothing'}."
    return f"{text.rstrip('.')}."


def _unrecognized_problem(word: str, forms: Mapping[str, str]) -> str:
    """Returns the message for a word that belongs to no option."""
    if not word.startswith("-"):
        return f"{word!r} belongs to no option. A switch, such as --full, takes no value."
    flag = word.replace("_", "-")
    nearest = difflib.get_close_matches(flag, forms, 1, _MIN_LIKENESS)
    hint = f" The nearest is {nearest[0]}." if nearest else ""
    return f"there is no option {word}.{hint}"


def _is_in(forms: Mapping[str, str], word: str) -> bool:
    """Returns True if the word of a command line is a flag, perhaps with its value after "="."""
    return word.partition("=")[0].replace("_", "-") in forms


def _values(name: str, args: Sequence[str]) -> list[str]:
    """Returns the words of a command line that follow the last use of an option."""
    values: list[str] = []
    is_inside = False
    for arg in args:
        flag, equals, value = arg.partition("=")
        if flag.startswith("--"):
            is_inside = flag.replace("_", "-") == name
            if is_inside:
                values = [value] if equals else []
        elif is_inside:
            values.append(arg)
    return values


def _first_section(printed: str) -> str:
    """Returns the text of tyro's error above its explanations, in one line.

    tyro prints a title, the text, a rule, and explanations. Some terminals get a frame around it.
    """
    words: list[str] = []
    for line in printed.strip().splitlines()[1:]:
        is_rule = _RULE.fullmatch(line) is not None
        if is_rule and words:
            break
        if not is_rule:
            words += line.strip(_FRAME).split()
    return " ".join(words)
