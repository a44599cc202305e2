"""The phrasings of questions, for each query form.

`{things}` and `{thing}` are the rows of a table, `{owner}` and `{owners}` the rows of its parent
table, and `{name}` is the column that names a row; the other words in braces come from the form
(see `forms.py`). Words such as `{above}` fit the column: "above" a price, "after" a year.
"""

import re

N_TRAINED = 8  # the first phrasings of each form; the others are held out of training

_TEXTS = {
    "two_columns": """
        List the {name} and {other} of all {things}.
        Show the {name} and the {other} of every {thing}.
        What are the {name} and {other} of each {thing}?
        Give me the {name} and {other} for all {things}.
        For each {thing}, return its {name} and its {other}.
        I need the {name} and {other} of all our {things}.
        Which {name} and {other} does each {thing} have?
        Can you find every {thing}'s {name} together with its {other}?
        I'm putting together an overview of the {things}: {name} and {other}, please.
        Could you print a table of our {things} that has first {name}, then {other}?""",
    "lookup": """
        What is the {other} of the {thing} {value}?
        Show the {other} of the {thing} with the {name} {value}.
        Give me the {other} of {thing} {value}.
        Find the {other} of the {thing} whose {name} is {value}.
        Which {other} does the {thing} {value} have?
        I need the {other} of the {thing} called {value}.
        For the {thing} {value}, return the {other}.
        Can you look up the {other} of {value} among the {things}?
        Do you happen to know the {other} on record for our {thing} {value}?
        Tell me about the {thing} {value}: what's its {other}?""",
    "equals": """
        List the {names} of {things} with {category} {value}.
        Which {things} have the {category} {value}? Give their {names}.
        Show the {name} of every {thing} whose {category} is {value}.
        Find the {names} of all {things} where the {category} is {value}.
        What are the {names} of the {things} that have {value} as their {category}?
        For all {things} of {category} {value}, return the {name}.
        I need the {name} of each {thing} with {value} as its {category}.
        Give me all {things}, by {name}, that have the {category} {value}.
        Let's see the {things} where the {category} equals {value}, please: just their {names}.
        Could you pick out, by {name}, the {things} with {value} for {category}?""",
    "above": """
        List the {names} of {things} with a {number} {above} {value}.
        Which {things} have a {number} {above} {value}? Give their {names}.
        Show the {name} of every {thing} whose {number} is {over} {value}.
        Find the {names} of all {things} where the {number} is {above} {value}.
        What are the {names} of the {things} with a {number} {higher} than {value}?
        For every {thing} that has a {number} {over} {value}, return the {name}.
        I need the {names} of {things} whose {number} is greater than {value}.
        Give me all {things}, by {name}, that have a {number} {above} {value}.
        I'm looking for {things} with a {number} of more than {value}. Tell me their {names}.
        Could you pick out, by {name}, the {things} that exceed a {number} of {value}?""",
    "below": """
        List the {names} of {things} with a {number} {below} {value}.
        Which {things} have a {number} {below} {value}? Give their {names}.
        Show the {name} of every {thing} whose {number} is {under} {value}.
        Find the {names} of all {things} where the {number} is {below} {value}.
        What are the {names} of the {things} with a {number} {lower} than {value}?
        For every {thing} that has a {number} {under} {value}, return the {name}.
        I need the {names} of {things} whose {number} is smaller than {value}.
        Give me all {things}, by {name}, that have a {number} {below} {value}.
        I'm looking for {things} with a {number} of less than {value}. Tell me their {names}.
        Could you pick out, by {name}, the {things} that stay under a {number} of {value}?""",
    "between": """
        List the {names} of {things} with a {number} between {low} and {high}.
        Which {things} have a {number} from {low} to {high}? Give their {names}.
        Show the {name} of every {thing} whose {number} is between {low} and {high}.
        Find the {names} of all {things} where the {number} is between {low} and {high}.
        What are the {names} of the {things} with a {number} of {low} to {high}?
        For each {thing} that has a {number} from {low} up to {high}, return the {name}.
        I need the {names} of {things} whose {number} lies between {low} and {high}.
        Give me all {things}, by {name}, that have a {number} in the range {low} to {high}.
        I'm after {things} with a {number} of at least {low} but at most {high}, by {name}.
        Tell me the {names} of those {things} whose {number} falls within {low} and {high}.""",
    "contains": """
        List the {names} of {things} whose {name} contains {value}.
        Which {names} of {things} include the word {value}?
        Show every {thing}'s {name} that contains the word {value}.
        Find the {names} of all {things} with {value} in the {name}.
        What are the {names} of the {things} with the word {value} in their {name}?
        For each {thing} that has {value} in its {name}, return the {name}.
        I need the {names} of all {things} whose {name} includes {value}.
        Give me the {names} of {things} where {value} is part of the {name}.
        Could you search the {names} of our {things} for {value} and tell me what comes up?
        I only remember that the {thing}'s {name} had {value} in it. Which {names} could it be?""",
    "one_of": """
        List the {names} of {things} with {category} {value} or {value2}.
        Which {things} have the {category} {value} or {value2}? Give their {names}.
        Show the {name} of every {thing} whose {category} is {value} or {value2}.
        Find the {names} of all {things} where the {category} is either {value} or {value2}.
        What are the {names} of the {things} that have {value} or {value2} as their {category}?
        For all {things} of {category} {value} or {value2}, return the {name}.
        I need the {name} of each {thing} with either {value} or {value2} as its {category}.
        Give me all {things}, by {name}, that have the {category} {value} or {value2}.
        I don't mind if the {category} is {value} or {value2}: tell me such {things}' {names}.
        Let's see {things} where {category} equals {value} or {value2}, please: just {names}.""",
    "both_filters": """
        List the {names} of {things} with {category} {value} and a {number} {above} {bound}.
        Which {things} of {category} {value} have a {number} {above} {bound}? Give the {names}.
        Show the {names} of {things} whose {category} is {value} and {number} is {over} {bound}.
        Find {names} of {things} where {category} is {value} and {number} is {above} {bound}.
        What are {names} of {things} with {value} as {category} and a {number} {over} {bound}?
        For {things} of {category} {value} with a {number} {above} {bound}, return the {name}.
        I need {names} of {things} with {category} {value} and a {number} {higher} than {bound}.
        Give me all {things}, by {name}, with {category} {value} and a {number} {above} {bound}.
        I'm after {things} of {category} {value} and {number} of more than {bound}, by {name}.
        Pick out, by {name}, {things} of {category} {value} that exceed a {number} of {bound}.""",
    "count": """
        How many {things} have the {category} {value}?
        Count the {things} with {category} {value}.
        What is the number of {things} whose {category} is {value}?
        Give me the count of {things} where the {category} is {value}.
        How many of the {things} have {value} as their {category}?
        For {category} {value}, how many {things} are there?
        I need the number of {things} of {category} {value}.
        Show how many {things} there are with {category} {value}.
        Could you work out how many of our {things} carry {value} for {category}?
        Please tell me how large the group of {things} of {category} {value} is.""",
    "count_distinct": """
        How many different {categories} do the {things} have?
        Count the distinct {categories} of the {things}.
        What is the number of different {categories} among the {things}?
        How many distinct {categories} occur among all {things}?
        Give me the number of distinct {categories} of {things}.
        For all {things}, how many different {categories} are there?
        I need the count of different {categories} that the {things} have.
        Show how many distinct {categories} there are for the {things}.
        Leaving out repeats, how many {categories} would you see across the {things}?
        Could you work out how many unique {categories} our {things} have?""",
    "average": """
        What is the average {number} of {things} with {category} {value}?
        Find the average {number} of all {things} whose {category} is {value}.
        Compute the mean {number} of the {things} with {category} {value}.
        Show the average {number} of {things} where the {category} is {value}.
        For {things} of {category} {value}, what is the mean {number}?
        I need the mean {number} of all {things} that have {value} as their {category}.
        Give me the average of the {number} over all {things} of {category} {value}.
        What {number} do {things} with {category} {value} have on average?
        If you average the {number} over our {things} of {category} {value}, what comes out?
        Could you work out the mean {number} that our {things} of {category} {value} reach?""",
    "total": """
        What is the total {number} of {things} with {category} {value}?
        Find the sum of the {number} over all {things} whose {category} is {value}.
        Compute the total {number} of the {things} with {category} {value}.
        Add up the {number} of all {things} where the {category} is {value}.
        For {things} of {category} {value}, what is the total {number}?
        I need the sum of the {number} of all {things} that have {value} as their {category}.
        Give me the total of the {number} over all {things} of {category} {value}.
        What {number} do the {things} with {category} {value} have in total?
        Taken together, what {number} do our {things} of {category} {value} come to?
        Could you work out the total {number} that our {things} of {category} {value} reach?""",
    "ordered": """
        List the {names} of all {things} ordered by {number}, {ascending}.
        Show all {names} of {things} sorted by {number} from {first} to {last}.
        Sort the {things} by {number} in {ascending} order and give their {names}.
        Give me the {name} of every {thing}, {first} {number} first.
        What are the {names} of the {things} in {ascending} order of {number}?
        Order all {things} by {number} from {first} to {last} and return the {name}.
        I need the {names} of all {things}, with the {first} {number} first.
        Find the {names} of the {things}, ordered from {first} to {last} {number}.
        Please arrange the {things} by {number}, starting with the {first}: just their {names}.
        Could you rank our {things} by {number}, {first} at the top? Just the {names}.""",
    "top": """
        List the {names} of the {count} {things} with the {first} {number}, in order.
        Which {count} {things} have the {first} {number}? Give their {names} in order.
        Show the {names} of the first {count} {things} by {number}, from {first} to {last}.
        Find the {count} {things} with the {first} {number} and give their {names} in order.
        What are the {names} of the {count} {things} with the {first} {number}, {first} first?
        Order {things} by {number}, {first} first, and return the {name} of the first {count}.
        I need the {names} of the {count} {things} that have the {first} {number}, in order.
        Give me the {names} of the top {count} {things} by {number}, from {first} to {last}.
        Please arrange the {things} by {number}, starting with the {first}: just {count} {names}.
        Could you rank {things} by {number}, {first} at the top? Stop at {count} {names}.""",
    "group_count": """
        For each {category}, show the {category} and the number of {things}.
        How many {things} are there per {category}? Show the {category} and the count.
        Count the {things} by {category}, giving {category} and count.
        List each {category} with its number of {things}.
        What is the number of {things} for each {category}? Give {category} and number.
        Group the {things} by {category} and return the {category} and the count.
        I need every {category} together with how many {things} have it.
        Give me the number of {things} in every {category}, with the {category}.
        Please break the {things} down by {category}: each {category}, then how many we have.
        Please work out, for every {category}, how many {things} carry it, and tell me both.""",
    "group_having": """
        Which {categories} have more than {count} {things}?
        List every {category} with over {count} {things}.
        Show the {categories} that have more than {count} {things}.
        Find each {category} that more than {count} {things} have.
        What are the {categories} with more than {count} {things}?
        Group the {things} by {category} and return each {category} with more than {count}.
        I need all {categories} that over {count} {things} have.
        Give me each {category} that is shared by more than {count} {things}.
        Can you name all {categories} that exceed {count} {things}?
        Tell me which {categories} come up more than {count} times among our {things}.""",
    "join_columns": """
        List the {name} of each {thing} and the {owner_name} of its {owner}.
        Show every {thing}'s {name} together with its {owner}'s {owner_name}.
        For each {thing}, give its {name} and the {owner_name} of the {owner}.
        What are the {name} of each {thing} and the {owner_name} of its {owner}?
        I need the {name} of all {things} with the {owner_name} of their {owner}.
        Give me the {name} of every {thing} and its {owner}'s {owner_name}.
        Find all {things} with their {owners}: the {name} and the {owner_name}.
        Return each {thing}'s {name} and the {owner_name} of the {owner} that it belongs to.
        Please print a table of our {things}: first the {name}, then the {owner}'s {owner_name}.
        I'd like to see, beside each {thing}'s {name}, which {owner_name} its {owner} has.""",
    "join_filter": """
        List the {names} of {things} whose {owner} has the {owner_category} {value}.
        Which {things} belong to a {owner} with {owner_category} {value}? Give their {names}.
        Show the {name} of every {thing} whose {owner}'s {owner_category} is {value}.
        Find the {names} of all {things} where the {owner_category} of the {owner} is {value}.
        What are the {names} of the {things} of {owners} with {owner_category} {value}?
        For all {things} of a {owner} with {owner_category} {value}, return the {name}.
        I need the {name} of each {thing} that has a {owner} of {owner_category} {value}.
        Give me all {things}, by {name}, that have a {owner} with {owner_category} {value}.
        Let's pick out, by {name}, the {things} whose {owner} has {value} for {owner_category}.
        I'm after {things} that go with {owners} of {owner_category} {value}. Just {names}.""",
    "above_average": """
        List the {names} of {things} with a {number} above the average {number}.
        Which {things} have a {number} above the average of all {things}? Give their {names}.
        Show the {name} of every {thing} whose {number} is higher than the average {number}.
        Find the {names} of all {things} with more than the average {number}.
        What are the {names} of the {things} with a {number} above average?
        For every {thing} that has an above-average {number}, return the {name}.
        I need the {names} of {things} whose {number} is greater than the mean {number}.
        Give me all {things}, by {name}, that have a {number} over the average.
        Could you pick out, by {name}, the {things} that beat the average {number}?
        Please tell me the {names} of those {things} that exceed the average {number}.""",
    "at_extreme": """
        What is the {name} of the {thing} with the {first} {number}?
        Which {thing} has the {first} {number}? Give its {name}.
        Show the {name} of the {thing} whose {number} is the {first} of all.
        Find the {thing} with the {first} {number} and give its {name}.
        Give me the {name} of the {thing} that has the {first} {number}.
        I need the {name} of the {thing} with the {first} {number} of all.
        Which {thing}'s {number} is the {first}? Return the {name}.
        For the {thing} with the {first} {number}, return the {name}.
        Please tell me the {name} of the one {thing} that has our {first} {number}.
        Could you pick out the {thing} with the very {first} {number}? Its {name} will do.""",
}
PHRASINGS = {
    form: tuple(line.strip() for line in text.strip().splitlines()) for form, text in _TEXTS.items()
}


def ask(form: str, phrasing: int, words: dict[str, str]) -> str:
    """Returns the question of a phrasing, with the words filled in."""
    question = PHRASINGS[form][phrasing].format_map(words)
    question = re.sub(r"\b([Aa]) (?=[aeio])", r"\1n ", question)
    return question[0].upper() + question[1:]
