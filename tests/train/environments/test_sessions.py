"""The environments of ours: a database to ask, and a game with a known best policy."""

import itertools
from types import SimpleNamespace

import pytest

from train.environments import guess
from train.environments.guess import GuessingGame, best_value
from train.environments.sql.databases import open_databases
from train.environments.sql.examples import training_examples
from train.environments.sql.schemas import SCHEMAS
from train.environments.sql.session import SqlSession
from train.tasks.tool_use import find_tools
from train.tools.contract import ToolCall

EXAMPLE = training_examples(1, seed=3)[0]


def played(secret, policy, numbers):
    """The reward of a policy, which maps the bounds of what is left to a guess."""
    game, low, high = GuessingGame(), 1, numbers
    game.reset(secret)
    while True:
        number = policy(low, high)
        match game.guess(number):
            case "right":
                return game.get_reward()
            case "too low":
                low = number + 1
            case "too high":
                high = number - 1


@pytest.mark.parametrize("numbers", [1, 2, 7, 10])
def test_halving_earns_the_best_value_and_no_policy_more(numbers):
    secrets = range(1, numbers + 1)
    halving = [played(s, lambda low, high: (low + high) // 2, numbers) for s in secrets]
    assert sum(halving) / numbers == pytest.approx(best_value(numbers), abs=1e-9)
    in_turn = [played(s, lambda low, high: low, numbers) for s in secrets]
    assert sum(in_turn) / numbers == pytest.approx(max(0, 1 - 0.05 * (numbers - 1)), abs=1e-9)


def test_no_search_tree_of_four_numbers_is_better():
    def values(low, high, n):
        """The rewards, summed over the secrets, of all trees from the n-th guess on."""
        if low > high:
            return [0.0]
        return [
            1 - 0.1 * n + below + above
            for at in range(low, high + 1)
            for below, above in itertools.product(
                values(low, at - 1, n + 1), values(at + 1, high, n + 1)
            )
        ]

    assert max(values(1, 4, 0)) == pytest.approx(4 * best_value(4))


def test_a_game_that_is_not_won_earns_nothing():
    game = GuessingGame()
    game.reset(3)
    assert game.get_reward() == 0 and game.guess(9) == "too high" and game.get_reward() == 0
    with pytest.raises(TypeError, match="'3' is not an integer"):
        game.guess("3")
    assert [game.guess(3), game.guess(1)] == ["right", "too low"]
    assert game.get_reward() == pytest.approx(0.9)  # by the second guess, whatever comes later


def test_rows_have_each_secret_as_often():
    secrets = [row["secret"] for row in guess.rows(5, 14)]
    assert sorted(secrets) == sorted([*range(1, 8)] * 2) and secrets != sorted(secrets)
    assert guess.rows(5, 14) == guess.rows(5, 20)[:14] != guess.rows(6, 14)


def test_queries_return_rows_or_what_sqlite_says():
    session, table = SqlSession(), SCHEMAS[EXAMPLE.schema].tables[0].name
    session.reset(EXAMPLE.schema)
    with open_databases(SCHEMAS[EXAMPLE.schema]) as (database, *_):
        (n,) = database.execute(f"SELECT count(*) FROM {table}").fetchone()
    assert session.run_query(f"SELECT count(*), 'ü' FROM {table}") == f'[{n}, "ü"]'
    assert session.run_query(f"SELECT 1 FROM {table} WHERE 0") == "no rows"
    pairs = session.run_query(f"SELECT 1 FROM {table} a, {table} b").splitlines()
    assert len(pairs) == 21 and pairs[-1] == f"and {n * n - 20} more rows"
    for sql, names in [
        ("SELECT lost", "no such column: lost"),
        ("SELEC 1", 'near "SELEC": syntax error'),
        (f"DELETE FROM {table}", "Only one SELECT"),
        ("WITH RECURSIVE c(n) AS (SELECT 1 UNION ALL SELECT n FROM c) SELECT n FROM c", "too long"),
    ]:
        with pytest.raises(ValueError, match=names):
            session.run_query(sql)
    assert session.run_query(f"SELECT count(*) FROM {table}") == f"[{n}]"


@pytest.mark.slow
def test_they_run_in_processes_by_their_names():
    for name, row, call, answer in [
        ("guess", {"secret": 4, "prompt": "?"}, ("guess", {"number": 4}), "right"),
        ("sql", {"schema": EXAMPLE.schema}, ("run_query", {"sql": "SELECT 1"}), "[1]"),
    ]:
        host = find_tools(SimpleNamespace(tools=(), environment=name, tool_timeout=60.0))
        try:
            (future,) = host.open([row])
            episode = future.result(60)
            turn = episode.call([ToolCall(*call)]).result(60)
            assert [each.content for each in turn.answers] == [answer]
            assert host.rewards == (name == "guess")
        finally:
            host.close()
