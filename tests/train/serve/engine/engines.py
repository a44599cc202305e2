"""Engines on tiny models, and how tests ask them."""

import contextlib
import tempfile
import threading
from concurrent.futures import Future
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lj
from lora_jax import models, peft
from lora_jax.training.layout import layout_of_one_device
from tests.models import tiny
from tests.support import thorough
from train.serve.engine.base import ServedBase
from train.serve.engine.engine import Engine
from train.serve.engine.sizes import Sizes
from train.serve.protocol.requests import (
    AdapterSpec,
    Create,
    Datum,
    Gradient,
    Leave,
    SampleRequest,
    Save,
    Update,
)

SECONDS = 300  # a loaded machine compiles slowly
VOCAB, LENGTH, CHUNK = 37, 64, 8
NAMES = (None, "one", "two")  # of the adapters of a `World`
FIELDS = {
    "model_type": "llama",
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "eos_token_id": 1,
}
# Models with linear layers, the second one with experts; sizes differ from each other.
RECURRENT = {
    case: tiny.fields(case)
    | {"vocab_size": VOCAB, "max_position_embeddings": 128, "eos_token_id": 1}
    for case in ("qwen3.5", "qwen3-next")
}


def over_families(recurrent: str) -> pytest.MarkDecorator:
    """Parametrises a test over a Llama, the base of other tests, and models with linear layers.

    Args:
      recurrent: The one of them that runs in CI: an engine of each takes long to compile.
    """
    bases = [pytest.param(None, id="llama")]
    for case in RECURRENT:
        marks = [pytest.mark.slow] + [thorough] * (case != recurrent)
        bases.append(pytest.param(case, marks=marks))
    return pytest.mark.parametrize("base", bases, indirect=True)


def text_of(ids):
    """A letter for each token."""
    return "".join(chr(65 + i) for i in ids)


def made_base(tied=True, max_rank=8, fields=FIELDS):
    """A base with weights so large that its logits differ.

    Linear layers amplify the rounding of single precision more than others: theirs are smaller.
    """
    size = 0.4 if fields is FIELDS else 0.1
    model = models.Decoder(models.read_config(fields | {"tie_word_embeddings": tied}))
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]
    rng = np.random.default_rng(3)

    def drawn(path, leaf):
        if "norm" in jax.tree_util.keystr(path):
            return np.ones(leaf.shape, leaf.dtype)
        return (rng.normal(size=leaf.shape) * size).astype(leaf.dtype)

    params = jax.tree.map(jnp.asarray, jax.tree_util.tree_map_with_path(drawn, shapes))
    return ServedBase(model, params, "tiny", max_rank)


def made_engine(base, *, tokens=128, slots=3, **options):
    """An engine that is not started."""
    sizes = Sizes(max_length=LENGTH, tokens=tokens, sequences=8, chunk=CHUNK)
    return Engine(
        base, sizes, layout_of_one_device(), eos=[1], text_of=text_of, slots=slots, **options
    )


@contextlib.contextmanager
def running(engine):
    """Has an engine compute, and ends it."""
    engine.start()
    try:
        yield engine
    finally:
        engine.close()


def asked(call):
    """A future of what `done` gets; `call` takes `done`."""
    future = Future()

    def done(result):
        if isinstance(result, Exception):
            future.set_exception(result)
        else:
            future.set_result(result)

    future.call = call(done)
    return future


def submitted(engine, tenant, command):
    """A future of a command's result."""
    return asked(lambda done: engine.submit(tenant, command, done))


def tell(engine, tenant, command):
    """A command's result."""
    return submitted(engine, tenant, command).result(SECONDS)


def begun(engine, seen=None, **fields):
    """A future of a sample's result; its `call` cancels it."""
    request = SampleRequest(**{"adapter": None} | fields)
    return asked(lambda done: engine.sample(request, done, seen))


def sampled(engine, **fields):
    """A sample's result."""
    return begun(engine, **fields).result(SECONDS)


def ids(rng, n):
    """Random tokens."""
    return rng.integers(0, VOCAB, n).astype(np.int32)


def random_data(seed, n=5, most=60, **inputs):
    """Sequences of several lengths with targets and weights."""
    rng = np.random.default_rng(seed)
    data = []
    for _ in range(n):
        length = int(rng.integers(3, most))
        weights = rng.normal(size=length).astype(np.float32)
        given = {"target_tokens": ids(rng, length), "weights": weights}
        data.append(Datum(ids(rng, length), given))
    return data


def bits(drawn):
    """All numbers of a sample's result, as bytes."""
    found = [(c.tokens.tobytes(), c.logprobs.tobytes(), c.stopped) for c in drawn.completions]
    if drawn.prompt_logprobs is not None:
        found.append(drawn.prompt_logprobs.tobytes())
    return found


@contextlib.contextmanager
def held(engine):
    """Has the engine wait while a test asks for several things."""
    inside, free = threading.Event(), threading.Event()

    def wait(_):
        inside.set()
        free.wait(SECONDS)

    engine.submit("holder", Leave(), wait)
    assert inside.wait(SECONDS)
    try:
        yield
    finally:
        free.set()


class World:
    """A running engine with two snapshots, and the model by itself."""

    def __init__(self, engine, base, folder):
        self.engine, self.base = engine, base
        self.trees = {
            None: base.tree(base.zero_adapter.factors, base.zero_adapter.scales, base.shell)
        }
        for number, name in enumerate(NAMES[1:]):
            tell(engine, "maker", Create(AdapterSpec(rank=3, seed=number, mlp=name == "one")))
            self.learn("maker", number)
            tell(engine, "maker", Save(folder / name, name=name))
            self.trees[name] = peft.load(folder / name, base.model, base.params)
        self.forward = jax.jit(lj.adapt(base.model.apply))

    def learn(self, tenant, seed):
        tell(self.engine, tenant, Gradient(random_data(seed), "cross_entropy"))
        tell(self.engine, tenant, Update(3e-2, eps=1e-8))

    def logits(self, name, tokens):
        """The logits at each place, [n, vocab] in double precision."""
        padded = np.zeros((1, LENGTH), np.int32)
        padded[0, : len(tokens)] = tokens
        found = self.forward({"params": self.trees[name]}, padded)[0]
        return np.asarray(found, np.float64)[: len(tokens)]

    def logps(self, name, tokens, temperature=1.0):
        """The log-probabilities of all tokens at each place, [n, vocab]."""
        scores = self.logits(name, tokens) / (temperature or 1.0)
        scores -= scores.max(-1, keepdims=True)
        return scores - np.log(np.exp(scores).sum(-1, keepdims=True))


def unused():
    """A folder that is not there yet."""
    return Path(tempfile.mkdtemp()) / "adapter"
