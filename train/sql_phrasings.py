"""How people ask: for each query form, the phrasings to train on and those held out.

`{things}` and `{thing}` are a table's rows, `{owner}` and `{owners}` those of the table it points
to, `{name}` is the column that names a row, and the other words in braces come from the form (see
`sql_scene.py`). Words such as `{above}` fit the column: "above" a price, "after" a year.
"""

import re
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Phrasings:
    """The phrasings of one query form; `held_out` ones never occur in training."""

    training: tuple[str, ...]
    held_out: tuple[str, ...]

    @property
    def all(self) -> tuple[str, ...]:
        """Training phrasings first: an example's `phrasing` is an index into this."""
        return self.training + self.held_out


def _phrasings(training: str, held_out: str) -> Phrasings:
    def lines(text: str) -> tuple[str, ...]:
        return tuple(line.strip() for line in text.strip().splitlines())

    return Phrasings(training=lines(training), held_out=lines(held_out))


PHRASINGS: dict[str, Phrasings] = {
    "two_columns": _phrasings(
        """List the {name} and {other} of all {things}.
        Show the {name} and the {other} of every {thing}.
        What are the {name} and {other} of each {thing}?
        Give me {name} and {other} for all {things}.""",
        """I need an overview of our {things}: first the {name}, then the {other}.
        Print every {thing}'s {name} next to its {other}.""",
    ),
    "lookup": _phrasings(
        """What is the {other} of the {thing} {value}?
        Show the {other} for the {thing} with {name} {value}.
        Give me the {other} of {thing} {value}.
        Find the {other} of the {thing} whose {name} is {value}.""",
        """Take the {thing} {value}: which {other} does our data give?
        I only know the {name}, {value}. Tell me that {thing}'s {other}.""",
    ),
    "equals": _phrasings(
        """List the {names} of {things} with {category} {value}.
        Which {things} have the {category} {value}? Give their {names}.
        Show the {name} of every {thing} whose {category} is {value}.
        Find the {names} of all {things} where the {category} equals {value}.""",
        """For {category} {value}, which {names} do the {things} carry?
        I am only interested in {value} as {category}. Identify those {things} by {name}.""",
    ),
    "above": _phrasings(
        """List the {names} of {things} with {number} {above} {value}.
        Which {things} have {number} {above} {value}? Give their {names}.
        Show the {name} of every {thing} whose {number} is {over} {value}.
        Find the {names} of all {things} where the {number} is {above} {value}.""",
        """Leave out {things} with {number} {value} or {lower}. Which {names} have the others?
        Tell me, by {name}, which {things} go beyond {value} in {number}.""",
    ),
    "below": _phrasings(
        """List the {names} of {things} with {number} {below} {value}.
        Which {things} have {number} {below} {value}? Give their {names}.
        Show the {name} of every {thing} whose {number} is {under} {value}.
        Find the {names} of all {things} where the {number} is {below} {value}.""",
        """Leave out {things} with {number} {value} or {higher}. Which {names} have the others?
        Tell me, by {name}, which {things} do not reach {value} in {number}.""",
    ),
    "between": _phrasings(
        """List the {names} of {things} with {number} between {low} and {high}.
        Which {things} have {number} from {low} to {high}? Give their {names}.
        Show the {name} of every {thing} whose {number} is between {low} and {high}.
        Find the {names} of all {things} where the {number} is between {low} and {high}.""",
        """Identify by {name} the {things} whose {number} is at least {low} but not over {high}.
        For {number} take {low} as minimum, {high} as maximum. Which {names} of {things} remain?""",
    ),
    "contains": _phrasings(
        """List the {names} of {things} whose {name} contains {value}.
        Which {names} of {things} include the word {value}?
        Show every {thing}'s {name} that contains the word {value}.
        Find the {names} of all {things} with {value} in the {name}.""",
        """I recall just a part of the {name}, {value}. Which {names} could the {thing} have?
        Search our {things} for {value} somewhere in the {name}, and print the {names}.""",
    ),
    "one_of": _phrasings(
        """List the {names} of {things} with {category} {value} or {value2}.
        Which {things} have {value} or {value2} as {category}? Give their {names}.
        Show the {name} of every {thing} whose {category} is {value} or {value2}.
        Find the {names} of all {things} where the {category} is either {value} or {value2}.""",
        """Both {value} and {value2} are fine as {category}. Which {names} do such {things} have?
        Apart from {category} {value} and {value2}, ignore all {things}. Which {names} are left?""",
    ),
    "both_filters": _phrasings(
        """List the {names} of {things} with {category} {value} and {number} {above} {bound}.
        Which {things} with {category} {value} have {number} {above} {bound}? Give their {names}.
        Show {names} of {things} whose {category} is {value} and {number} is {over} {bound}.
        Find {names} of {things} where {category} is {value} and {number} is {above} {bound}.""",
        """Of the {things} of {category} {value}, identify by {name} those past {bound} in {number}.
        Beyond {bound} in {number}, and {value} as {category}: which {names} of {things} fit?""",
    ),
    "count": _phrasings(
        """How many {things} have the {category} {value}?
        Count the {things} with {category} {value}.
        What is the number of {things} whose {category} is {value}?
        Give me the count of {things} where the {category} equals {value}.""",
        """Suppose I gather all {things} of {category} {value}: how large is that group?
        Tell me the size of the set of {things} that have {value} for {category}.""",
    ),
    "count_distinct": _phrasings(
        """How many different {categories} do the {things} have?
        Count the distinct {categories} of {things}.
        What is the number of different {categories} among the {things}?
        How many distinct {categories} occur among all {things}?""",
        """If each {category} of the {things} is counted once only, what is the count?
        How varied are our {things}: what number of unique {categories} is there?""",
    ),
    "average": _phrasings(
        """What is the average {number} of {things} with {category} {value}?
        Find the average {number} of all {things} whose {category} is {value}.
        Compute the mean {number} for {things} with {category} {value}.
        Show the average {number} where the {category} of the {things} is {value}.""",
        """For {things} of {category} {value}, what {number} is usual, as arithmetic mean?
        Sum the {number} over {things} of {category} {value} and divide by their count.""",
    ),
    "extent": _phrasings(
        """What are the {lowest} and {highest} {number} of all {things}?
        Show the {smallest} and the {largest} {number} of the {things}.
        Find the minimum and maximum {number} among the {things}.
        Give me the {lowest} and then the {highest} {number} of any {thing}.""",
        """Over all {things}, where does the {number} begin and where does it end?
        Which span, from bottom to top, does the {number} of our {things} cover?""",
    ),
    "total": _phrasings(
        """What is the total {number} of {things} with {category} {value}?
        Find the sum of {number} over all {things} whose {category} is {value}.
        Compute the total {number} for {things} with {category} {value}.
        Add up the {number} of all {things} where the {category} is {value}.""",
        """Taken together, what {number} do the {things} of {category} {value} reach?
        How much {number} do all {things} having {value} as {category} make altogether?""",
    ),
    "ordered": _phrasings(
        """List the {names} of all {things} ordered by {number}, {ascending}.
        Show all {names} of {things} sorted by {number} from {first} to {last}.
        Sort the {things} by {number} in {ascending} order and give their {names}.
        Give me the {name} of every {thing}, {first} {number} first.""",
        """Arrange our {things} so that the {firstmost} {number} leads, and read out each {name}.
        Which {names} do I get if {things} are ranked by {number}, the {lastmost} coming last?""",
    ),
    "top": _phrasings(
        """List the {names} of the {count} {things} with the {first} {number}, {first} first.
        Which {count} {things} have the {first} {number}? Give their {names} in that order.
        Show the {names} of the top {count} {things} by {number}, from {first} to {last}.
        Find the {names} of the {count} {things} that have the {first} {number}, in order.""",
        """Rank {things} by {number}, the {firstmost} leading, and keep the {names} of just {count}.
        I have room for {count} {names}, ranked: {things} of {firstmost} {number} go first.""",
    ),
    "group_count": _phrasings(
        """For each {category}, show the {category} and the number of {things}.
        How many {things} are there per {category}? Show the {category} and the count.
        Count the {things} by {category}, giving {category} and count.
        List each {category} with its number of {things}.""",
        """Break our {things} down by {category}: {category}, then how many there are.
        Next to every {category}, write how often it occurs among the {things}.""",
    ),
    "group_average": _phrasings(
        """For each {category}, show the {category} and the average {number} of its {things}.
        What is the average {number} of {things} per {category}? Show {category} and average.
        Give each {category} of {things} with the mean {number}.
        List every {category} and the average {number} of its {things}.""",
        """Compare the {categories} of {things}: {category}, then what {number} is usual (mean).
        Next to every {category} of our {things}, write the {number} averaged over it.""",
    ),
    "group_having": _phrasings(
        """Which {categories} have more than {count} {things}?
        List every {category} with over {count} {things}.
        Show the {categories} that have more than {count} {things}.
        Find each {category} that more than {count} {things} have.""",
        """Ignore any {category} that occurs among the {things} {count} times or less. What remains?
        Name the {categories} so common that they exceed {count} {things}.""",
    ),
    "join_columns": _phrasings(
        """List the {name} of each {thing} and the {owner_name} of its {owner}.
        Show every {thing}'s {name} together with its {owner}'s {owner_name}.
        For each {thing}, give its {name} and the {owner_name} of the {owner}.
        What are the {name} of each {thing} and the {owner_name} of its {owner}?""",
        """Pair the {things} with their {owners}: {name} of the one, {owner_name} of the other.
        I want a list of {things} by {name} that also tells each {owner}'s {owner_name}.""",
    ),
    "join_filter": _phrasings(
        """List the {names} of {things} whose {owner} has the {owner_category} {value}.
        Which {things} belong to a {owner} with {owner_category} {value}? Give their {names}.
        Show the {name} of every {thing} whose {owner}'s {owner_category} is {value}.
        Find the {names} of all {things} where the {owner_category} of the {owner} is {value}.""",
        """Consider only {owners} of {owner_category} {value}. Identify their {things} by {name}.
        Given {value} as the {owner_category} of their {owner}, which {names} of {things} apply?""",
    ),
    "join_two_filters": _phrasings(
        """List {names} of {things} with {number} {above} {bound} whose {owner} is {value}.
        Which {things} of the {owner} {value} have {number} {above} {bound}? Give their {names}.
        Show the {name} of each {thing} of {owner} {value} whose {number} is {over} {bound}.
        Find {names} of {things} of {owner} {value} where the {number} is {above} {bound}.""",
        """Look at the {owner} {value}: identify by {name} its {things} past {bound} in {number}.
        Of {value}'s {things}, which go past {bound} in {number}? I need the {names}.""",
    ),
    "join_average": _phrasings(
        """What is the average {number} of {things} whose {owner} has {owner_category} {value}?
        Find the average {number} of {things} where the {owner}'s {owner_category} is {value}.
        Compute the mean {number} for {things} of {owners} with {owner_category} {value}.
        Show the average {number} of all {things} whose {owner}'s {owner_category} is {value}.""",
        """For {owners} of {owner_category} {value}, what {number} is their {things}' mean?
        Sum {number} over {things} of {value} as {owner} {owner_category}, and divide by count.""",
    ),
    "join_count": _phrasings(
        """For each {owner} that has {things}, show the {owner_name} and the number of {things}.
        How many {things} has each {owner} that has any? Show the {owner_name} and the count.
        Count the {things} of each {owner} that has any, giving {owner_name} and count.
        List the {owner_name} of every {owner} that has {things}, with how many it has.""",
        """Whenever {things} refer to a {owner}, give its {owner_name} and how often they do.
        Break {things} down by {owner}: {owner_name}, then how many of them are its own.""",
    ),
    "join_top": _phrasings(
        """Which {owner} has the {thing} with the {first} {number}? Give the {owner_name}.
        Show the {owner_name} of the {owner} whose {thing} has the {first} {number}.
        Find the {owner_name} of the {owner} of the {thing} with the {first} {number}.
        What is the {owner_name} of the {owner} that has the {thing} of {first} {number}?""",
        """Rank {things}, {firstmost} {number} leading. Which {owner_name} has the {owner} on top?
        Some {owner} holds the record {thing}, {firstmost} in {number}. By which {owner_name}?""",
    ),
    "above_average": _phrasings(
        """List the {names} of {things} with {number} above the average {number}.
        Which {things} have {number} above the average of all {things}? Give their {names}.
        Show the {name} of every {thing} whose {number} is higher than the average {number}.
        Find the {names} of all {things} with more than the average {number}.""",
        """Take the mean {number} of all {things}: by {name}, which go beyond it?
        Identify by {name} the {things} that surpass what is usual (the mean) in {number}.""",
    ),
    "at_extreme": _phrasings(
        """What is the {name} of the {thing} with the {first} {number}?
        Which {thing} has the {first} {number}? Give its {name}.
        Show the {name} of the {thing} whose {number} is the {first} of all.
        Find the {thing} with the {first} {number} and give its {name}.""",
        """The {firstmost} {number} of all belongs to a single {thing}: tell me its {name}.
        Of all our {things}, the record for {firstmost} {number} is held by which {name}?""",
    ),
    "owners_with": _phrasings(
        """List the {owner_names} of {owners} that have a {thing} with {category} {value}.
        Which {owners} have at least one {thing} of {category} {value}? Give the {owner_names}.
        Show the {owner_name} of every {owner} with any {thing} of {category} {value}.
        Find the {owner_names} of {owners} with one or more {things} of {category} {value}.""",
        """One {thing} of {category} {value} is enough. Which {owner_names} of {owners} qualify?
        Where {value} occurs as {category} of {things}, which {owner_names} have the {owners}?""",
    ),
    "owners_without": _phrasings(
        """List the {owner_names} of {owners} that have no {things}.
        Which {owners} do not have any {thing}? Give their {owner_names}.
        Show the {owner_name} of every {owner} without {things}.
        Find the {owner_names} of all {owners} that have no {thing} at all.""",
        """Identify by {owner_name} each {owner} that is never mentioned among the {things}.
        Cross out any {owner} that some {thing} refers to. Which {owner_names} are left?""",
    ),
}


def ask(form: str, phrasing: int, words: dict[str, str]) -> str:
    """The question that a phrasing makes of these words."""
    question = PHRASINGS[form].all[phrasing].format_map(words)
    question = re.sub(r"\b([Aa]) (?=[aeio])", r"\1n ", question)
    return question[0].upper() + question[1:]
