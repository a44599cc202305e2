"""A guessing game whose best policy is known: halve what is left."""

import functools
import random

NUMBERS = 7  # by default, from 1 on
_A_GUESS = 0.1  # of the reward, for each guess after the first

Row = dict[str, object]


def rows(seed: int, n: int, numbers: int = NUMBERS) -> list[Row]:
    """Returns games in the order of a seed, with each secret once before any comes again.

    Args:
      seed: seed of the order.
      n: the number of rows.
      numbers: the secret is one of 1 to this.
    """
    order, secrets = random.Random(seed), list[int]()
    while len(secrets) < n:
        secrets += order.sample(range(1, numbers + 1), numbers)
    question = f"Guess my number, which is one of 1 to {numbers}, with as few guesses as you can."
    return [
        {"prompt": [{"role": "user", "content": question}], "secret": secret}
        for secret in secrets[:n]
    ]


def best_value(numbers: int = NUMBERS) -> float:
    """Returns the mean reward of the best policy, over all secrets.

    >>> from train.environments.guess import best_value
    >>> round(7 * best_value(7), 9)  # 1 guess for one secret, 2 for two, 3 for four
    6.0
    """
    return 1 - _A_GUESS * (_guesses(numbers) / numbers - 1)


@functools.cache
def _guesses(n: int) -> int:
    """Returns the fewest guesses for all of n secrets together: those of the best search tree."""
    if n == 0:
        return 0
    return n + min(_guesses(below) + _guesses(n - 1 - below) for below in range(n))


class GuessingGame:
    """Thinks of a number, and says of each guess whether it is too low or too high."""

    def reset(self, secret: int) -> None:
        """Begins a game; `secret` is the number to find."""
        self._secret, self._n, self._found = secret, 0, False

    def guess(self, number: int) -> str:
        """Guesses the number.

        Args:
            number: The guess.

        Returns:
            "right", "too low" or "too high".
        """
        if not isinstance(number, int):
            raise TypeError(f"{number!r} is no whole number")
        self._n += not self._found
        self._found |= number == self._secret
        if number == self._secret:
            return "right"
        return "too low" if number < self._secret else "too high"

    def get_reward(self) -> float:
        """Returns 1 for a number that was found, less 0.1 for each guess after the first, or 0."""
        return max(0.0, 1 - _A_GUESS * (self._n - 1)) if self._found else 0.0
