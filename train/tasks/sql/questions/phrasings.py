"""The phrasings of questions, for each query form: the lines of `phrasings.txt`.

`{things}` and `{thing}` are the rows of a table, `{owner}` and `{owners}` the rows of its parent
table, and `{name}` is the column that names a row; the other words in braces come from the form
(see `forms.py`). Words such as `{above}` fit the column: "above" a price, "after" a year.
"""

import re

from train.tasks.sql.questions.tables import read_blocks

N_TRAINED = 8  # the first phrasings of each form; the others are held out of training

PHRASINGS = {
    form: [line.strip() for line in text.splitlines()]
    for form, text in read_blocks("phrasings.txt").items()
}


def ask(form: str, phrasing: int, words: dict[str, str]) -> str:
    """Returns the question of a phrasing, with the words filled in."""
    question = PHRASINGS[form][phrasing].format_map(words)
    question = re.sub(r"\b([Aa]) (?=[aeio])", r"\1n ", question)
    return question[0].upper() + question[1:]
