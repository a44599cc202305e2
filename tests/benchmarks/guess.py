"""Prints what policies of the guessing game are worth that rewards teach, beside the best one.

    python -m tests.benchmarks.guess [--ranks 1 16] [--seeds 0 1 2] [--shuffled]

A tiny decoder is first trained in full on games of a player who guesses at random: it knows what
calls and answers look like, and nothing of a strategy. `train.grpo` then trains adapters of it by
the game's reward alone. The value of a policy is its mean reward over all secrets, with the
likeliest token each time; the best policy, which halves what is left, has 6/7. `--shuffled` is the
control: each game gets the reward of another one. Further options go to `train.grpo`.
"""

import argparse
import random
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from safetensors.numpy import save_file

import lora_jax as lj
from lora_jax import models
from tests.train.live import guessing
from tests.train.live.local import LocalHost
from train import grpo
from train.adapters.source import find_adapter
from train.environments.guess import GuessingGame, best_value
from train.run.log import read_metrics
from train.tasks import tool_use

NUMBERS = len(guessing.CALLS)
TURNS, NEW, LENGTH = 8, 24, 64  # of the games to learn from; tokens of a completion; of any game
GUESSES = 4  # for which NEW tokens have room
PAD = 1
SETTINGS = {
    **{"environment": "guess", "max-new-tokens": NEW, "seq-len": 40, "targets": "all-linear"},
    **{"loss": "dr_grpo", "scale": "none", "schedule": "wsd", "warmup": 1, "lr": 1e-2},
    # One rate serves all ranks with this scale: what Adam moves adds up over the ranks.
    **{"alpha": 2, "scaling": "alpha/rank"},
    # With fewer games of a secret, some runs keep to a policy that takes two guesses more.
    **{"group": 32, "batch-size": 32 * NUMBERS, "updates": 2},
    **{"eval-questions": 0, "report-to": "none"},
}


class ShuffledGame(GuessingGame):
    """Rewards each game with the reward of an earlier one, drawn at random."""

    earned: list[float] = []  # noqa: RUF012
    draws = random.Random(0)

    def get_reward(self) -> float:
        """Returns the reward of another game."""
        self.earned.append(super().get_reward())
        return self.draws.choice(self.earned[-200:])


class Learned(NamedTuple):
    """A run's outcome.

    Attributes:
      value: the value of its policy.
      rewards: the mean reward of each step's completions.
    """

    value: float
    rewards: list[float]


def game_of(guesses: Sequence[int], secret: int) -> tuple[GuessingGame, list[dict[str, Any]]]:
    """Returns a game after some guesses, and its turns."""
    game, turns = GuessingGame(), [{"role": "user", "content": "play"}]
    game.reset(secret)
    for number in guesses:
        call = {"function": {"name": "guess", "arguments": {"number": number}}}
        turns += [
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "content": game.guess(number)},
        ]
        if number == secret:
            break
    return game, turns


def padded(ids: Sequence[int]) -> list[int]:
    """Returns ids of one length."""
    return [*ids, *[PAD] * LENGTH][:LENGTH]


def ids_of(turns: list[dict[str, Any]], **more: bool) -> list[int]:
    """Returns the tokens of a game."""
    tools = LocalHost(GuessingGame).tools
    ids = guessing.tokenizer().apply_chat_template(turns, tools=tools, return_dict=False, **more)
    return list(ids)


def random_games(n: int) -> np.ndarray:
    """Returns the tokens of games in which each guess is any number, [n, LENGTH]."""
    rng, games = random.Random(0), []
    for _ in range(n):
        guesses = [rng.randint(1, NUMBERS) for _ in range(TURNS)]
        _, turns = game_of(guesses, rng.randint(1, NUMBERS))
        games.append(padded(ids_of([*turns, {"role": "assistant", "content": ""}])))
    return np.array(games)


def write_player(folder: Path, steps: int = 600, batch: int = 64) -> None:
    """Writes a decoder that guesses at random, trained in full on random games."""
    guessing.write_model(folder, 1.0)
    model, params = models.from_pretrained(folder)
    optimizer = optax.adamw(optax.cosine_decay_schedule(3e-3, steps), weight_decay=0.0)

    @jax.jit
    def step(params: Any, state: Any, ids: jax.Array) -> tuple[Any, Any]:
        def loss(params: Any) -> jax.Array:
            logits = model.apply({"params": params}, ids[:, :-1])
            each = optax.softmax_cross_entropy_with_integer_labels(logits, ids[:, 1:])
            return jnp.mean(each, where=ids[:, 1:] != PAD)

        updates, state = optimizer.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    games, state, order = random_games(2048), optimizer.init(params), np.random.default_rng(0)
    for _ in range(steps):
        params, state = step(params, state, games[order.integers(0, len(games), batch)])
    tensors = models.hf_tensors(jax.tree.map(np.asarray, params), models.key_table(model.config))
    save_file(dict(tensors), folder / "model.safetensors")


def value_of(logits_of: Callable[[np.ndarray], jax.Array]) -> float:
    """Returns the mean reward, over all secrets, of a policy that takes the likeliest token."""
    numbers = guessing.tokenizer().convert_tokens_to_ids(guessing.CALLS)
    rewards = []
    for secret in range(1, NUMBERS + 1):
        guesses: list[int] = []
        while len(guesses) < GUESSES and secret not in guesses:
            ids = ids_of(game_of(guesses, secret)[1], add_generation_prompt=True)
            token = int(jnp.argmax(logits_of(np.array([padded(ids)]))[0, len(ids) - 1]))
            if token not in numbers:
                break
            guesses.append(1 + numbers.index(token))
        rewards.append(game_of(guesses, secret)[0].get_reward())
    return float(np.mean(rewards))


def learn(base: Path, output: Path, game: type[GuessingGame], settings: dict[str, Any]) -> Learned:
    """Trains an adapter by rewards."""
    tool_use.find_tools = lambda data: LocalHost(game)  # type: ignore[assignment]
    line = {"model": base, "dataset": base.parent / "rows.jsonl", "output": output, **settings}
    grpo.main([str(word) for name, value in line.items() for word in (f"--{name}", value)])
    model, params = models.from_pretrained(base)
    tree = find_adapter(str(output)).load(model, params, "the base")
    forward = jax.jit(lj.adapt(model.apply))
    value = value_of(lambda ids: forward({"params": tree}, ids))
    return Learned(value, [line["reward"] for line in read_metrics(output)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=256)
    parser.add_argument("--shuffled", action="store_true", help="rewards of other games")
    parser.add_argument("--base", type=Path, help="a folder that keeps the player for later calls")
    given, more = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = given.base or Path(temporary)
        if not (folder / "rows.jsonl").exists():
            write_player(folder / "model")
            guessing.write_rows(folder / "rows.jsonl")
        names = [name.removeprefix("--") for name in more[::2]]
        changed = dict(zip(names, more[1::2], strict=True))
        game, best, table = (ShuffledGame if given.shuffled else GuessingGame), best_value(), []
        for rank in given.ranks:
            for seed in given.seeds:
                own = {"rank": rank, "seed": seed, "steps": given.steps}
                begun = time.perf_counter()
                output = Path(temporary) / f"{rank}-{seed}"
                value, rewards = learn(folder / "model", output, game, SETTINGS | own | changed)
                first, last = np.mean(rewards[:3]), np.mean(rewards[-5:])
                table.append(
                    f"| {rank} | {seed} | {value:.4f} | {100 * value / best:.1f}% "
                    f"| {first:.2f} to {last:.2f} | {time.perf_counter() - begun:.0f} s |"
                )
                print(f"RESULT {table[-1]}", flush=True)
    print(f"best: {best:.4f}\n\n| rank | seed | value | of the best | reward in training | time |")
    print("\n".join(["|---|---|---|---|---|---|", *table]))


if __name__ == "__main__":
    main()
