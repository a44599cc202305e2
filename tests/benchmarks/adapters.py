"""Measures many adapters over SmolLM2-135M: mixed in a batch, trained side by side, changed, kept.

    python -m tests.benchmarks.adapters [--rounds N] [--only decode train change keep] [--peft]

fp32. Contenders take turns, and ratios are medians over the rounds of a run: compare those, not
milliseconds across runs. ``--peft`` also times PEFT's mixed batch against its base, on torch with
random weights of the same sizes, and needs the extra "parity".
"""

import argparse
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import lora_jax as lj
from lora_jax import models, training
from lora_jax.bank import Bank, Tenant, Together, mixed

MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
ROWS, CACHED, SEQ = 8, 160, 128
SETTINGS: dict[str, dict[str, Any]] = {
    "r = 8 on q and v": {"targets": ["q_proj", "v_proj"], "rank": 8, "alpha": 16},
    "r = 16 on all linear": {"targets": "all-linear", "rank": 16, "alpha": 32},
}


def in_turns(runs: Mapping[str, Callable[[], None]], rounds: int) -> dict[str, list[float]]:
    """Returns the seconds of each run, in turns; the first round is left out."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(rounds + 1):
        for name in runs if number % 2 else reversed(list(runs)):
            start = time.perf_counter()
            runs[name]()
            seconds[name].append(time.perf_counter() - start)
    return {name: times[1:] for name, times in seconds.items()}


def show(title: str, seconds: Mapping[str, list[float]], reference: str) -> None:
    print(f"{title}:")
    for name, times in seconds.items():
        ratios = [a / b for a, b in zip(times, seconds[reference], strict=True)]
        spread = f"{min(ratios):.2f} to {max(ratios):.2f}"
        ratio = f"{statistics.median(ratios):.2f}x ({spread})"
        print(f"  {name:44s} {1e3 * statistics.median(times):8.1f} ms  {ratio}", flush=True)


def adapter(params: Any, seed: int, rule: Mapping[str, Any]) -> Any:
    """Returns an adapter with random factors, as training leaves them."""
    tree = lj.lorafy(params, [lj.LoraRule(**rule)], key=jax.random.key(seed))
    trained, base = lj.split(tree)
    rng = np.random.default_rng(seed)
    noise = lambda x: x + jnp.asarray(rng.standard_normal(x.shape) / 100, x.dtype)  # noqa: E731
    return lj.join(jax.tree.map(noise, trained), base)


def banks(params: Any) -> dict[str, tuple[Bank, list[str]]]:
    made = {}
    for title, rule in SETTINGS.items():
        bank = Bank(params, [lj.LoraRule(**rule)], slots=ROWS)
        for seed in range(ROWS):
            bank.add(f"{seed}", adapter(params, seed, rule))
        made[title] = bank, list(bank.names)
    return made


def decode(model: Any, params: Any, rounds: int) -> None:
    """Times one step of decoding with a cache: base, merged, one live adapter, eight mixed ones."""
    rng = np.random.default_rng(0)
    prompts = jnp.asarray(rng.integers(0, 49152, (ROWS, CACHED)), jnp.int32)
    token = jnp.asarray(rng.integers(0, 49152, (ROWS, 1)), jnp.int32)
    steps = 8

    def steps_of(apply: Callable[..., Any], tree: Any) -> Callable[[], None]:
        def step(tree: Any, cache: Any) -> Any:
            logits, cache = apply({"params": tree}, token, cache=cache)
            return jnp.argmax(logits[:, -1], -1), cache

        cache = models.init_cache(model.config, ROWS, CACHED + steps * (rounds + 2), jnp.float32)
        _, cache = jax.jit(model.apply)({"params": params}, prompts, cache=cache)
        held, compiled = [cache], jax.jit(step, donate_argnums=1)

        def run() -> None:
            for _ in range(steps):
                said, held[0] = compiled(tree, held[0])
            said.block_until_ready()

        return run

    live, many = lj.adapt(model.apply), mixed(model.apply)
    for title, (bank, names) in banks(params).items():
        one = bank.get(names[0])
        runs = {
            "base": steps_of(model.apply, params),
            "merged": steps_of(model.apply, lj.merge(one)),
            "one live adapter": steps_of(live, one),
            "eight adapters, mixed": steps_of(many, bank.choose(names)),
        }
        read = sum(x.nbytes for x in jax.tree.leaves(params))
        factors = sum(x.nbytes for x in jax.tree.leaves(lj.split(one)[0])) * ROWS
        show(
            f"{steps} steps of decoding, {ROWS} × 1 token, {title}", in_turns(runs, rounds), "base"
        )
        print(
            f"  the factors of eight add {100 * factors / read:.0f} % to the bytes of the weights"
        )


def train(model: Any, params: Any, rounds: int) -> None:
    """Times one step of eight adapters against one adapter's, at the same number of tokens."""
    rng, forward = np.random.default_rng(0), lj.adapt(model.apply)

    def batch(rows: int) -> dict[str, np.ndarray]:
        shape = (1, rows, SEQ)
        ids = rng.integers(0, 49152, shape)
        at = np.broadcast_to(np.arange(SEQ), shape)
        arrays = {"ids": ids, "targets": ids, "positions": at, "predict_at": at}
        ones = {name: np.ones(shape) for name in ("segment_ids", "weights")}
        return {name: np.array(x, np.int32) for name, x in (arrays | ones).items()}

    for title, rule in SETTINGS.items():

        def steps_of(n: int, rule: Any = rule) -> Callable[[], None]:
            together = Together(forward, params)
            schedule = optax.constant_schedule(1e-5)
            trees = {f"{seed}": adapter(params, seed, rule) for seed in range(n)}
            together.add(
                {k: Tenant(params=t, schedule=schedule, steps=99) for k, t in trees.items()}
            )
            batches = {name: batch(ROWS // n) for name in trees}
            return lambda: together.step(batches) and None  # type: ignore[func-returns-value]

        tree = adapter(params, 0, rule)
        trained, base = lj.split(tree)
        rate = optax.constant_schedule(1e-5)
        optimizer = training.make_optimizer("adamw", rate, tree)
        make = training.make_step(forward, optimizer, rate, dropout=False)
        step = jax.jit(make, donate_argnums=0)
        held, whole = [training.init_state(trained, optimizer, jax.random.key(0))], batch(ROWS)

        def alone(step: Any = step, base: Any = base, held: Any = held, whole: Any = whole) -> None:
            held[0], metrics = step(held[0], base, whole)
            jax.block_until_ready(metrics)

        runs = {"one adapter, by itself": alone, "one adapter": steps_of(1)}
        runs["eight adapters"] = steps_of(ROWS)
        show(
            f"a step on {ROWS} × {SEQ} tokens, {title}",
            in_turns(runs, rounds),
            "one adapter, by itself",
        )


def change(model: Any, params: Any, rounds: int) -> None:
    """Times choosing other adapters, and replacing one; prints what publishing copies."""
    for title, (bank, names) in banks(params).items():
        new = adapter(params, 99, SETTINGS[title])
        jax.block_until_ready(jax.tree.leaves(new))
        order = iter(range(10**9))

        def choose(bank: Bank = bank, names: Any = names, order: Any = order) -> None:
            shift = next(order) % ROWS
            jax.block_until_ready(bank.choose(names[shift:] + names[:shift]).ids)

        def replace(bank: Bank = bank, names: Any = names, new: Any = new) -> None:
            bank.replace(names[0], new)
            jax.block_until_ready(jax.tree.leaves(bank.tree))

        seconds = in_turns({"choose": choose, "replace": replace}, rounds)
        size = sum(x.nbytes for x in jax.tree.leaves(lj.split(new)[0]))
        print(f"{title}: an adapter of {size / 1e6:.1f} MB")
        for name, times in seconds.items():
            print(f"  {name:10s} {1e3 * statistics.median(times):6.2f} ms")
        together = Together(lj.adapt(model.apply), params)
        together.add({"a": Tenant(params=new, schedule=optax.constant_schedule(1e-5), steps=9)})
        trained = {id(x) for x in jax.tree.leaves(together._stack_of["a"].state.adapter)}
        read = [x for x in jax.tree.leaves(together.choose(["a"]).tree) if id(x) in trained]
        print(f"  publishing copies {0 if len(read) == len(trained) else size} bytes")


def keep(model: Any, params: Any, rounds: int) -> None:
    """Prints what N tasks take, as N full models and as one base with N adapters."""
    base = sum(x.nbytes for x in jax.tree.leaves(params))
    for title, rule in SETTINGS.items():
        trained, _ = lj.split(lj.lorafy(params, [lj.LoraRule(**rule)]))
        one = sum(x.nbytes for x in jax.tree.leaves(trained))
        print(f"{title}, in MB (fp32):")
        for n in (1, 8, 64, 512):
            full, ours = n * base / 1e6, (base + n * one) / 1e6
            print(f"  {n:4d} tasks: {full:10,.0f} as full models, {ours:8,.0f} as adapters")


def peft(rounds: int) -> None:
    """Times PEFT's decoding step by ``adapter_names`` against its base's."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

    sizes = {"vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536}
    heads = {"num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3}
    config = LlamaConfig(**sizes, **heads, tie_word_embeddings=True)
    prompts, token = torch.randint(0, 49152, (ROWS, CACHED)), torch.randint(0, 49152, (ROWS, 1))
    for title, rule in SETTINGS.items():
        settings = {"r": rule["rank"], "lora_alpha": rule["alpha"], "init_lora_weights": False}
        given = LoraConfig(target_modules=rule["targets"], **settings)
        model = get_peft_model(LlamaForCausalLM(config).eval(), given, adapter_name="0")
        for seed in range(1, ROWS):
            model.add_adapter(f"{seed}", given)
        model.eval()
        names = [f"{seed}" for seed in range(ROWS)]

        def steps_of(names: list[str] | None, model: Any = model) -> Callable[[], None]:
            cache = DynamicCache(config=config)
            with torch.no_grad(), model.disable_adapter():
                model(input_ids=prompts, past_key_values=cache)
            how = {} if names is None else {"adapter_names": names}

            def run() -> None:
                with torch.no_grad():
                    for _ in range(8):
                        model(input_ids=token, past_key_values=cache, **how)

            return run

        base, many = steps_of(["__base__"] * ROWS), steps_of(names)
        runs = {"base (as __base__)": base, "eight adapters, mixed": many}
        show(
            f"PEFT on torch, 8 steps of decoding, {title}",
            in_turns(runs, rounds),
            "base (as __base__)",
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parts = {"decode": decode, "train": train, "change": change, "keep": keep}
    parser.add_argument("--only", nargs="*", choices=list(parts), default=list(parts))
    parser.add_argument("--peft", action="store_true", help="PEFT's mixed batch as well")
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    models.fetch(MODEL)
    model, params = models.from_pretrained(MODEL, dtype="float32")
    for name in arguments.only:
        parts[name](model, params, arguments.rounds)
    if arguments.peft:
        peft(arguments.rounds)


if __name__ == "__main__":
    main()
