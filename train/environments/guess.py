"""A guessing game whose best policy is known: halve what is left."""

import functools
import random

NUMBERS = 7  # by default, from 1 on
_GUESS_COST = 0.1  # of the reward, for each guess after the first

Row = dict[str, object]


def rows(seed: int, n: int, n_numbers: int = NUMBERS) -> list[Row]:
    """Returns games in random order. No secret repeats before each has occurred once.

    Args:
      seed: seed of the order.
      n: the number of rows.
      n_numbers: the secret is one of 1 to this.
    """
    draw = random.Random(seed)
    secrets: list[int] = []
    while len(secrets) < n:
        secrets += draw.sample(range(1, n_numbers + 1), n_numbers)
    question = f"Guess my number, which is one of 1 to {n_numbers}, with as few guesses as you can."
    return [
        {"prompt": [{"role": "user", "content": question}], "secret": secret}
        for secret in secrets[:n]
    ]


def best_value(n_numbers: int = NUMBERS) -> float:
    """Returns the mean reward of the best policy, over all secrets.

    >>> from train.environments.guess import best_value
    >>> round(7 * best_value(7), 9)  # 1 guess for one secret, 2 for two, 3 for four
    6.0
    """
    mean_guesses = _min_guesses(n_numbers) / n_numbers
    return 1 - _GUESS_COST * (mean_guesses - 1)


@functools.cache
def _min_guesses(n_secrets: int) -> int:
    """Returns the fewest total guesses over all secrets (the best search tree)."""
    if n_secrets == 0:
        return 0
    # One guess for each secret; those below and above the guess need more.
    return n_secrets + min(
        _min_guesses(n_below) + _min_guesses(n_secrets - 1 - n_below)
        for n_below in range(n_secrets)
    )


class GuessingGame:
    """A game in which a guess is answered by "too low" or "too high"."""

    def reset(self, secret: int) -> None:
        """Begins a game; `secret` is the number to find."""
        self._secret = secret
        self._n_guesses = 0
        self._is_found = False

    def guess(self, number: int) -> str:
        """Guesses the number.

        Args:
            number: The guess.

        Returns:
            "right", "too low" or "too high".
        """
        if not isinstance(number, int):
            raise TypeError(f"{number!r} is not an integer. Pass an integer.")
        if not self._is_found:  # later guesses do not count
            self._n_guesses += 1
        if number == self._secret:
            self._is_found = True
            return "right"
        return "too low" if number < self._secret else "too high"

    def get_reward(self) -> float:
        """Returns 1 minus 0.1 for each guess after the first; 0 if the number was not found."""
        if not self._is_found:
            return 0.0
        return max(0.0, 1 - _GUESS_COST * (self._n_guesses - 1))
