"""Engines on tiny models, and how tests ask them."""

import contextlib
import threading
from concurrent.futures import Future

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax import models
from lora_jax.training.layout import one_device
from train.serve.engine.base import Base
from train.serve.engine.engine import Engine
from train.serve.engine.sizes import Sizes
from train.serve.requests import Datum, Leave, Sample

SECONDS = 300  # a loaded machine compiles slowly
VOCAB = 37
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


def text_of(ids):
    """A letter for each token."""
    return "".join(chr(65 + i) for i in ids)


def made_base(tied=True, max_rank=8):
    """A base with weights so large that its logits differ."""
    model = models.Decoder(models.read_config(FIELDS | {"tie_word_embeddings": tied}))
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]
    rng = np.random.default_rng(3)

    def drawn(path, leaf):
        if "norm" in jax.tree_util.keystr(path):
            return np.ones(leaf.shape, leaf.dtype)
        return (rng.normal(size=leaf.shape) * 0.4).astype(leaf.dtype)

    params = jax.tree.map(jnp.asarray, jax.tree_util.tree_map_with_path(drawn, shapes))
    return Base(model, params, "tiny", max_rank)


def made_engine(base, *, max_length=64, tokens=128, sequences=8, chunk=8, slots=3, **options):
    """An engine that is not started."""
    sizes = Sizes(max_length=max_length, tokens=tokens, sequences=sequences, chunk=chunk)
    return Engine(base, sizes, one_device(), eos=[1], text_of=text_of, slots=slots, **options)


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
    request = Sample(**{"adapter": None} | fields)
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
