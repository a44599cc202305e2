"""The chunked cross entropy: the plain one's values and gradients, in a fraction of the memory."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

import lora_jax as lj
from lora_jax.models import Decoder, DecoderConfig
from lora_jax.training.losses import Loss, summed_loss
from lora_jax.training.optimizer import adamw
from lora_jax.training.optimizers.schedules import warmed_up
from lora_jax.training.step import init_state, make_step
from tests.benchmarks.shapes import SMOLLM2
from tests.models import tiny, tiny_encoders
from tests.support import array, assert_close, lorafied, over, with_random_factors
from train.options.scripts.sft import SftOptimConfig

VOCAB = tiny.SIZES["vocab_size"]
BATCH, SEQ, M = 3, 17, 10


class Bag(nn.Module):
    """A bag of words whose head has a bias, or is the table of its words."""

    tied: bool = False
    vocab: int = VOCAB

    def setup(self):
        self.embed_tokens = nn.Embed(self.vocab, 13)
        if not self.tied:
            self.lm_head = nn.Dense(self.vocab)

    def __call__(self, ids, positions=None, segment_ids=None, logits_at=None, return_hidden=False):
        hidden = jnp.tanh(jnp.cumsum(self.embed_tokens(ids), axis=1))
        if logits_at is not None:
            hidden = jnp.take_along_axis(hidden, logits_at[..., None], axis=1)
        return hidden if return_hidden else self.head(hidden)

    def head(self, hidden):
        return self.embed_tokens.attend(hidden) if self.tied else self.lm_head(hidden)


def bag(tied=False, vocab=VOCAB):
    """A bag and random parameters: NumPy's, as each initializer would be a program."""
    drawn = np.random.default_rng(2).standard_normal
    params = {"embed_tokens": {"embedding": drawn((vocab, 13)) / 13**0.5}}
    if not tied:
        params["lm_head"] = {"kernel": drawn((13, vocab)) / 13**0.5, "bias": drawn(vocab)}
    return Bag(tied, vocab), jax.tree.map(array, params)


def total(*args, **options):
    return summed_loss(*args, **options).total


def lora(*targets, **options):
    return lj.LoraRule(targets=targets, rank=3, alpha=5, **options)


CASES = {
    "tied, adapted table": (lambda: tiny.decoder("smollm2"), [lora("embed_tokens", "q_proj")]),
    "tied, table in full": (lambda: bag(tied=True), [lj.TrainRule(targets=["embed_tokens"])]),
    "tied, rows of the table": (
        lambda: bag(tied=True),
        [lj.TrainRule(targets=["embed_tokens"], rows=[5, 7, 11])],
    ),
    "adapted head": (lambda: tiny.decoder("llama2"), [lora("lm_head", "down_proj")]),
    "head by DoRA": (bag, [lora("lm_head", dora=True)]),
    "head in full": (bag, [lj.TrainRule(targets=["lm_head"])]),
    "soft caps": (lambda: tiny.decoder("gemma2"), [lora("lm_head", "v_proj")]),
    "gpt2": (lambda: tiny_encoders.model("gpt2"), [lora("wte", "c_attn")]),
    "bias in the head": (bag, [lora("lm_head", train_bias=True)]),
    "tied bag": (lambda: bag(tied=True), [lora("embed_tokens")]),
}


def batch(seed=0, m=M):
    """Two sequences a row; predictions at random places, of which some do not count."""
    rng = np.random.default_rng(seed)
    segments = np.repeat([1, 2], [7, SEQ - 7])
    places = np.concatenate([np.arange(7), np.arange(SEQ - 7)])
    return {
        "ids": rng.integers(0, VOCAB, (BATCH, SEQ), np.int32),
        "segment_ids": np.broadcast_to(segments, (BATCH, SEQ)).astype(np.int32),
        "positions": np.broadcast_to(places, (BATCH, SEQ)).astype(np.int32),
        "predict_at": np.sort(rng.integers(0, SEQ - 1, (BATCH, m), np.int32), axis=1),
        "targets": rng.integers(0, VOCAB, (BATCH, m), np.int32),
        "weights": (rng.random((BATCH, m)) < 0.7).astype(np.int32),
    }


def on_merged(model, params, data):
    """The judge: all logits of the merged model, and the definition of cross entropy."""
    where = {"positions": data["positions"], "segment_ids": data["segment_ids"]}
    logits = model.apply(
        {"params": lj.merge(params)}, data["ids"], logits_at=data["predict_at"], **where
    )
    log_probs = logits - jnp.log(jnp.sum(jnp.exp(logits), axis=-1, keepdims=True))
    mine = jnp.take_along_axis(log_probs, data["targets"][..., None], axis=-1)[..., 0]
    return -jnp.sum(mine * data["weights"].astype(jnp.float32))


# Chunks of 3 places a row (it does not divide 10), of one (fewer than there are rows), and of 2.
QUICK = [("tied bag", 9, 3)]
OTHERS = [("bias in the head", 1, 1), ("bias in the head", 7, 1)]
OTHERS += [(case, 9, 1) for case in CASES if case not in ("bias in the head", "tied bag")]


def called(case):
    return "-".join(map(str, case))


@over(("case", "chunk", "parts"), QUICK + OTHERS, often=map(called, QUICK), called=called)
def test_chunks_change_neither_loss_nor_gradient(case, chunk, parts):
    """Nor do the parts that rows are split into."""
    make, rules = CASES[case]
    model, plain = make()
    fresh = lj.lorafy(plain, rules)
    adapter, base = lj.split(with_random_factors(fresh))
    data, forward = batch(), lj.adapt(model.apply, strict=True)
    if parts > 1:  # a place then predicts one token only
        data["predict_at"] = np.arange(3, 3 + M, dtype=np.int32)[None].repeat(BATCH, axis=0)

    losses = (
        functools.partial(total, forward, batch=data),
        functools.partial(total, forward, batch=data, chunk=chunk, parts=parts),
        lambda params: on_merged(model, params, data),
    )

    @jax.jit
    def found(adapter):
        with_gradient = [
            jax.value_and_grad(lambda adapter, loss=loss: loss(lj.join(adapter, base)))(adapter)
            for loss in losses
        ]
        return *with_gradient, on_merged(model, fresh, data)

    whole, chunked, judge, without = found(adapter)
    assert_close(chunked, whole, 1e-5)
    assert_close(chunked, judge, 1e-4)
    assert abs(judge[0] - without) > 1e-3 * abs(without), "the factors must be seen"


def test_what_exceeds_the_batch_is_one_piece():
    model, plain = bag()
    params = lj.lorafy(plain, [lora("lm_head")])
    forward = lj.adapt(model.apply)

    def program(chunk):
        loss = functools.partial(summed_loss, forward, chunk=chunk)
        return str(jax.make_jaxpr(lambda data: loss(params, data))(batch()))

    assert program(0) == program(BATCH * M) == program(1000) != program(BATCH * M - 1)


def test_each_chunk_has_a_dropout_mask_of_its_own():
    model, plain = bag()
    rules = [lora("lm_head", dropout=0.5)]
    params = with_random_factors(lorafied(plain, rules))
    data = batch(m=4)
    data |= {name: np.full_like(data[name], 3) for name in ("predict_at", "targets")}
    loss = functools.partial(total, lj.adapt(model.apply), params, chunk=BATCH)

    @jax.jit
    def at_each_place(key):  # where hidden states and targets are the same
        weights = np.eye(4, dtype=np.int32)[:, None].repeat(BATCH, 1)
        return jax.lax.map(lambda w: loss({**data, "weights": w}, key), weights)

    key = jax.random.key(1)
    kept, dropped = np.asarray(at_each_place(None)), np.asarray(at_each_place(key))
    np.testing.assert_allclose(kept, kept[0], rtol=1e-6)
    assert len(set(dropped.tolist())) == 4
    np.testing.assert_array_equal(dropped, at_each_place(key))


def test_chunks_stay_spread_over_devices():
    model, plain = bag()
    rules = [lora("lm_head")]
    adapter, base = lj.split(lj.lorafy(plain, rules))
    forward = lj.adapt(model.apply)
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    data = {name: jax.device_put(np.tile(x[:2], (4, 1)), rows) for name, x in batch().items()}

    def loss(adapter, data, chunk):
        return total(forward, lj.join(adapter, base), data, chunk=chunk)

    gradient = jax.jit(jax.grad(loss), static_argnums=2)
    chunked, whole = (gradient.lower(adapter, data, chunk).compile() for chunk in (16, 0))
    sizes = [8 * 2 * VOCAB, 2 * 2 * VOCAB, 2 * M * VOCAB]  # of a chunk, and of a device's part
    found = [
        [bool(arrays_of_size(step.as_text(), size)) for size in sizes] for step in (chunked, whole)
    ]
    assert found == [[False, True, False], [False, False, True]]
    assert_close(chunked(adapter, data), whole(adapter, data), 1e-5)


@pytest.mark.slow
def test_twenty_lean_steps_have_the_plain_ones_losses():
    """Compares steps of which each accumulates three parts."""
    model, plain = tiny.decoder("smollm2")
    params = lj.lorafy(plain, [lora("q_proj", "o_proj", "down_proj")])
    schedule = warmed_up(3e-3, 20, kind="constant", warmup=0)
    optimizer = adamw(schedule, b2=0.99)

    def step_of(model, chunk):
        loss = Loss(functools.partial(summed_loss, chunk=chunk))
        forward = lj.adapt(model.apply)
        return jax.jit(make_step(forward, optimizer, schedule, dropout=False, loss=loss))

    def losses_of(step, params):
        adapter, base = lj.split(params)
        state, losses = init_state(adapter, optimizer, jax.random.key(0)), []
        for number in range(20):
            parts = [batch(3 * number + part) for part in range(3)]
            data = {name: np.stack([part[name] for part in parts]) for name in parts[0]}
            state, metrics = step(state, base, data)
            losses.append(float(metrics["loss"]))
        return losses

    step = step_of(model, 0)
    kept = losses_of(step, params)
    lean = losses_of(step_of(model.clone(remat=True), 7), params)
    np.testing.assert_allclose(lean, kept, rtol=1e-5)
    other = losses_of(step, with_random_factors(params))
    assert not np.allclose(other, kept, rtol=1e-3)


def compiled_step(remat, chunk, shape=(4, 128)):
    """The step on abstract parameters, all places of the batch counted."""
    model = Decoder(DecoderConfig.from_hf(SMOLLM2), remat=remat)
    plain = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    params = lj.lorafy(plain, [lj.LoraRule(targets="all-linear", rank=16, alpha=32)])
    adapter, base = lj.split(params)
    optimizer = optax.adam(1e-3)
    key = jax.random.key(0)
    state = jax.eval_shape(lambda adapter: init_state(adapter, optimizer, key), adapter)
    ints = jax.ShapeDtypeStruct((1, *shape), jnp.int32)
    loss = Loss(functools.partial(summed_loss, chunk=chunk))
    schedule = optax.constant_schedule(1e-3)
    step = make_step(lj.adapt(model.apply), optimizer, schedule, dropout=False, loss=loss)
    lowered = jax.jit(step, donate_argnums=0).lower(state, base, dict.fromkeys(batch(), ints))
    return lowered.compile()


def arrays_of_size(hlo, size):
    """The fp32 arrays of so many elements in optimised HLO, by their shapes."""
    shapes = set(re.findall(r"\bf32\[([\d,]+)\]", hlo))
    return {shape for shape in shapes if math.prod(map(int, shape.split(","))) == size}


@pytest.mark.slow
def test_a_lean_step_takes_a_fraction_of_the_memory():
    def is_lean(step, reference, share):
        used, most = (s.memory_analysis().temp_size_in_bytes for s in (step, reference))
        all_logits = arrays_of_size(step.as_text(), 4 * 128 * SMOLLM2["vocab_size"])
        print(f"{used / 1e6:.1f} of {most / 1e6:.1f} MB: {used / most:.3f}; {all_logits}")
        return used <= share * most and not all_logits

    chunk = SftOptimConfig().loss_chunk
    plain, remade = compiled_step(False, 0), compiled_step(True, 0)
    lean = compiled_step(True, chunk)
    assert is_lean(lean, plain, 0.5)
    assert not is_lean(plain, plain, 0.5)
    # Each does its part: rematerialisation alone still holds all logits.
    assert is_lean(lean, remade, 0.7) and not is_lean(remade, plain, 0.5)
    assert is_lean(compiled_step(False, chunk), plain, 0.95)
