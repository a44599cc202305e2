"""Measures the sampler of several turns beside `models.generate`, where no row waits.

    python -m tests.benchmarks.turns --rows 16 --tokens 128

The model has the shapes of SmolLM2-135M, an adapter and random weights (`--layers 2 --width 64`,
say, for one so small that the host's part shows). The same rows draw the same tokens both ways; by
the sampler of `train.grpo --tools`, their episodes call nothing. Prints the CPU seconds of each and
the median of their ratios over rounds in turn: to the first tokens, behind them, and in all.
"""

import argparse
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import lora_jax as lj
from lora_jax import models
from lora_jax.models.sampling.choice import row_keys
from lora_jax.models.sampling.text import StopTexts
from lora_jax.training.layout import layout_of_one_device
from lora_jax.training.run.stop import Stop
from tests.benchmarks.shapes import SMOLLM2
from train.live.turns.episodes import Listener
from train.live.turns.programs import TurnPrograms
from train.live.turns.rows import TurnLimits, TurnRequest
from train.live.turns.sampler import Drawing, TurnSampler

KEY = jax.random.key(0)


class Silent:
    """An episode in which nothing is called, the host of such, and a tokenizer without words."""

    tools: Any = ()
    name, rewards, needs = "", False, ()
    lost = problem = opening = None

    def open(self, rows: Any, seeds: Any = None, names: Any = None) -> list[Future[Any]]:
        """Opens an episode for each row."""
        opened: list[Future[Any]] = [Future() for _ in rows]
        for future in opened:
            future.set_result(self)
        return opened

    def close(self) -> None:
        """Ends the episode."""

    def decode(self, ids: Any, skip_special_tokens: bool = True) -> str:
        """Returns no text."""
        return ""


def made_model(shape: dict[str, Any], rank: int) -> tuple[Any, Any, Any]:
    """Returns a model of small random weights, them with an adapter, and what runs both."""
    model = models.Decoder(models.read_config(shape))
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda x: jnp.asarray(rng.normal(size=x.shape).astype(x.dtype) * 0.02), shapes
    )
    params = lj.lorafy(params, [lj.LoraRule(targets="all-linear", rank=rank)])
    return model, params, lj.adapt(model.apply)


def ways(
    made: tuple[Any, Any, Any], prompts: np.ndarray, temperature: float
) -> dict[str, Callable[[int], np.ndarray]]:
    """Returns functions of a number of tokens that draw so many of each row, [rows, n]."""
    model, params, apply = made
    rows, seq = prompts.shape
    programs = TurnPrograms(model, apply, layout_of_one_device())
    keys = row_keys(KEY, np.arange(rows))

    def generated(n: int) -> np.ndarray:
        how = {"max_new_tokens": n, "temperature": temperature, "key": keys}
        return np.asarray(
            models.generate(model, params, prompts, **how, eos_token_id=[], apply=apply)
        )

    def by_turns(n: int) -> np.ndarray:
        sampler = TurnSampler(
            programs,
            Drawing(temperature, 1.0, None, ()),
            TurnLimits(n, seq + n),
            StopTexts(Silent(), ()),
            lambda ids, before: ("", ()),
            model.config.vocab_size,
        )
        asked = [TurnRequest(i, {}, f"row {i}", ids) for i, ids in enumerate(prompts.tolist())]
        listener = Listener(Silent(), None, lambda asked, row: [], Stop())
        drawn = sampler.draw(params, asked, KEY, listener, n_rows=rows, max_prompt_tokens=seq)
        return np.array([each.ids for each in drawn])

    return {"generate": generated, "turns": by_turns}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--width", type=int, default=SMOLLM2["hidden_size"])
    parser.add_argument("--vocab", type=int, default=SMOLLM2["vocab_size"])
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--alike", action="store_true", help="all rows have one prompt")
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    shape = SMOLLM2 | {"num_hidden_layers": given.layers, "vocab_size": given.vocab}
    shape |= {"hidden_size": given.width, "intermediate_size": given.width * 8 // 3}
    prompts = np.random.default_rng(0).integers(5, given.vocab, (given.rows, given.prompt))
    if given.alike:
        prompts[:] = prompts[0]
    draws = ways(made_model(shape, given.rank), prompts, given.temperature)
    n = given.tokens
    one, other = (draw(n) for draw in draws.values())
    print(f"{(one == other).mean():.1%} of the tokens are the same")
    spent: dict[str, list[np.ndarray]] = {way: [] for way in draws}
    for number in range(-1, given.rounds):
        for way in [*draws][:: 1 if number % 2 else -1]:
            clock = [time.process_time()]
            for tokens in (1, n):
                draws[way](tokens)
                clock.append(time.process_time())
            if number >= 0:  # the first round compiles
                first, whole = np.diff(clock)
                spent[way].append(np.array([first, whole - first, whole]))
    ratios = np.array(spent["turns"]) / np.array(spent["generate"])
    for i, what in enumerate(("to the first tokens", "the tokens behind them", "in all")):
        seconds = (f"{way} {np.median(times, axis=0)[i]:.3f} s" for way, times in spent.items())
        low, middle, high = np.quantile(ratios[:, i], (0, 0.5, 1))
        print(f"{what}: {', '.join(seconds)}: {middle:.2f} times ({low:.2f} to {high:.2f})")


if __name__ == "__main__":
    main()
