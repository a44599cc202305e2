"""Measures what structured answers cost the server: a token of many rows, free and by a schema.

    python -m tests.benchmarks.masks --rows 32

Prints the time of the masks alone, and of a token of all rows with and without them, by a model of
SmolLM2-135M's shape with random weights and a vocabulary of its size, learned from the sources of
installed packages: neither costs a download.
"""

import argparse
import statistics
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import transformers
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers import models as tokenizer_models

from lora_jax import models
from lora_jax.models.sampling.adjust import mask_words
from lora_jax.models.sampling.grammar import GrammarCompiler
from tests.benchmarks.serving import asked
from tests.benchmarks.shapes import SMOLLM2
from train.serve.local import EngineLimits, make_engine
from train.serve.protocol.limits import TokenLimits
from train.serve.protocol.requests import SampleRequest

SHAPE = SMOLLM2 | {"max_position_embeddings": 512, "eos_token_id": 0}
ITEM = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "n": {"type": "integer"}, "kind": {"enum": ["a"]}},
    "required": ["name", "n", "kind"],
    "additionalProperties": False,
}
SCHEMA = {"type": "array", "items": ITEM, "minItems": 100}


def made_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """Returns a byte-pair tokenizer of the model's size."""
    core = Tokenizer(tokenizer_models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([AddedToken("<|end|>", special=True)])
    sources = sorted(Path(transformers.__file__).parent.rglob("modeling_*.py"))[:150]
    trainer = trainers.BpeTrainer(
        vocab_size=SHAPE["vocab_size"],
        special_tokens=["<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train([str(path) for path in sources], trainer)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|end|>")


def mask_seconds(grammar, rows: int, vocab: int, steps: int = 100) -> list[float]:
    """Returns the seconds that the masks of all rows take, at each of some tokens."""
    rng = np.random.default_rng(0)
    held, times = {i: grammar.begin() for i in range(rows)}, []
    for _ in range(steps):
        masks = np.full((rows, mask_words(vocab)), 0xFFFFFFFF, np.uint32)
        began = time.perf_counter()
        grammar.fill(held, masks)
        times.append(time.perf_counter() - began)
        bits = np.unpackbits(masks.view(np.uint8), axis=1, bitorder="little")
        for i, row in held.items():
            row.accept(int(rng.choice(np.flatnonzero(bits[i, :vocab]))))
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=32)
    rows = parser.parse_args().rows
    tokenizer, vocab = made_tokenizer(), int(SHAPE["vocab_size"])
    compiler = GrammarCompiler(tokenizer, vocab, [0])
    began = time.perf_counter()
    compiler.prepare()
    print(f"reading the vocabulary: {time.perf_counter() - began:.2f} s")
    grammar = compiler.schema(SCHEMA)
    times = mask_seconds(grammar, rows, vocab)
    print(
        f"masks of {rows} rows: {1e3 * statistics.mean(times):.2f} ms in the mean, "
        f"{1e3 * max(times):.2f} ms at most"
    )
    model = models.Decoder(models.read_config(SHAPE))
    params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]
    limits = EngineLimits(max_length=128, sequences=rows, slots=1, max_rank=8)
    options = {"eos": [0], "text_of": lambda ids: "", "limits": limits}
    engine = make_engine(model, params, "random", **options)
    engine.warm_up()
    engine.start()
    speeds: dict[str, list[float]] = {"free": [], "by a schema": []}
    for _ in range(3):  # in turns
        for name, found in speeds.items():
            limit = TokenLimits(grammar=grammar) if name != "free" else TokenLimits()
            prompts = [[5 + i, 7, 9] for i in range(rows)]
            requests = [
                SampleRequest(adapter=None, prompt=prompt, max_tokens=48, seed=i, limits=limit)
                for i, prompt in enumerate(prompts)
            ]
            found.append(1e3 * rows / asked(engine, requests)[1])
    for name, found in speeds.items():
        print(f"a token of {rows} rows, {name}: {min(found):.1f} ms")
    engine.close()


if __name__ == "__main__":
    main()
