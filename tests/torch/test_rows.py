"""Rows of torch modules: packed ones, padding, masks that are no arrays, and the head by itself."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.torch.checks import distance, random_model, tiny_configs
from tests.torch.small import IDS

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]
torch = pytest.importorskip("torch")
pytest.importorskip("lora_jax.torch", exc_type=ImportError)

from lora_jax.torch import TorchConfig, TorchModelError, attention, from_torch  # noqa: E402
from lora_jax.torch.module import build_module  # noqa: E402


def test_rows_that_are_packed_or_padded_are_those_alone(llama):
    fn, params = from_torch(llama[0])

    def run(ids, **where):
        return jax.jit(fn.apply)({"params": params}, ids, **where)

    alone = jax.jit(fn)(params, IDS)
    flat = IDS.reshape(1, -1)
    positions = jnp.tile(jnp.arange(12, dtype=jnp.int32), (1, 4))
    segments = jnp.repeat(jnp.arange(1, 5, dtype=jnp.int32), 12)[None]
    packed = run(flat, positions=positions, segment_ids=segments)
    assert distance(packed[0].reshape(alone.shape), alone) <= 1e-5
    assert distance(run(flat, segment_ids=segments), packed) == 0
    together = run(flat, positions=positions)
    assert distance(together[0].reshape(alone.shape), alone) > 1e-3
    ids, mask = (jnp.pad(x, ((0, 0), (3, 0))) for x in (IDS, jnp.ones_like(IDS)))
    for segments in (None, jnp.ones_like(mask)):
        padded = run(ids, attention_mask=mask, segment_ids=segments)
        assert distance(padded[:, 3:], alone) <= 1e-5
    assert distance(run(ids)[:, 3:], alone) > 1e-3


def test_attention_without_padding_has_no_array_for_a_mask(llama, monkeypatch):
    calls, attend = [], attention.attend
    monkeypatch.setattr(attention, "attend", lambda *a, **k: calls.append(1) or attend(*a, **k))
    fn, params = from_torch(llama[0])
    ways = {"call": lambda p: fn(p, IDS), "apply": lambda p: fn.apply({"params": p}, IDS)}
    ways["mask"] = lambda p: fn.apply({"params": p}, IDS, attention_mask=jnp.ones_like(IDS))
    for way, run in ways.items():
        calls.clear()
        jax.eval_shape(run, params)
        assert bool(calls) == (way != "mask"), way


def test_the_head_by_itself():
    """Asks a model that calls an inner part of its trunk for hidden states and their logits."""
    fn, params = from_torch(random_model("opt"))
    at = jnp.array([[3, 5]] * 4)

    @jax.jit
    def compare(params):
        variables = {"params": params}
        hidden = fn.apply(variables, IDS, logits_at=at, return_hidden=True)
        by_head = fn.apply(variables, hidden, method="head")
        return fn(params, IDS), fn.apply(variables, IDS, logits_at=at), by_head

    whole, some, by_head = compare(params)
    for logits in (some, by_head):
        assert distance(logits, whole[:, [3, 5]]) <= 1e-6
        assert distance(logits, whole[:, [4, 6]]) > 1e-2


@pytest.mark.parametrize("model_type", ["rwkv", "falcon_mamba"])
def test_a_module_that_cannot_pack_refuses_segments(model_type):
    """States go on from one sequence of a row to the next one."""
    fn, params = from_torch(random_model(model_type))
    variables, ids = {"params": params}, jnp.pad(IDS, ((0, 0), (0, 3)))
    segments = jnp.pad(jnp.ones_like(IDS), ((0, 0), (0, 3)))
    with pytest.raises(TorchModelError, match=f"{model_type}.*segment_ids"):
        fn.apply(variables, ids, segment_ids=segments)
    single = fn.clone(one_sequence=True)

    @jax.jit
    def run(params):
        return fn(params, IDS), single.apply({"params": params}, ids, segment_ids=segments)

    alone, padded = run(params)
    assert distance(padded[:, :12], alone) <= 1e-6


def test_a_module_that_packs_keeps_segments_apart_in_any_case(llama):
    fn, params = from_torch(llama[0])
    flat, single = IDS.reshape(1, -1), fn.clone(one_sequence=True)
    segments = jnp.repeat(jnp.arange(1, 5, dtype=jnp.int32), 12)[None]
    variables, where = {"params": params}, {"segment_ids": segments}
    packed = jax.jit(fn.apply)(variables, flat, **where)
    assert distance(jax.jit(single.apply)(variables, flat, **where), packed) == 0
    cache = fn.config.empty_cache(1, 48)
    for places in (where, {"positions": segments}):
        with pytest.raises(TorchModelError, match=f"{next(iter(places))}.*cache"):
            fn.apply(variables, flat, cache=cache, **places)


@pytest.mark.parametrize("model_type", ["camembert", "llama4_text", "gemma2"])
def test_sequences_of_a_row_have_their_own_positions(model_type):
    """CamemBERT begins behind padding's position; Llama 4 has chunks of six, and Gemma windows."""
    module, ids = random_model(model_type), np.maximum(IDS, 3)  # none of padding
    with torch.no_grad():
        alone = module(torch.tensor(ids, dtype=torch.long), use_cache=False).logits
    fn, params = from_torch(module)
    positions = jnp.tile(jnp.arange(12, dtype=jnp.int32), (4, 1))
    lengths = jnp.array([4, 12, 12, 12, 12])  # the first is padding
    segments = jnp.repeat(jnp.arange(5, dtype=jnp.int32), lengths, total_repeat_length=52)[None]
    flat = jnp.pad(ids.reshape(1, -1), ((0, 0), (4, 0)), constant_values=5)

    @jax.jit
    def run(params):
        variables, mask = {"params": params}, (segments > 0).astype(jnp.int32)
        packed = fn.apply(variables, flat, segment_ids=segments)
        masked = fn.apply(variables, flat, segment_ids=segments, attention_mask=mask)
        return fn.apply(variables, ids, positions=positions), packed[0, 4:], masked[0, 4:]

    for logits in run(params):
        assert distance(logits.reshape(alone.shape), alone) <= 1e-5


def test_tokens_that_are_compressed_together_are_not_packed():
    fields = next(tiny_configs("deepseek_v4")).to_dict()
    config = TorchConfig.from_hf(fields, scan=False)
    assert build_module(config).attends and not config.packs
