"""New adapters: which weights they adapt, what their A is drawn from, and that none compiles.

Adapters of runs: which are read, and which are refused.
"""

import jax
import numpy as np
import pytest

import lora_jax as lj
from lora_jax import models
from tests.support import variables_of
from train.serve.engine.base import ServedBase
from train.serve.protocol.requests import AdapterSpec, RequestError

FIELDS = {
    "model_type": "llama",
    "vocab_size": 37,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
INPUTS = {"down_proj": 24}  # of all others, the head among them: 16


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def base(request):
    model = models.Decoder(models.read_config(FIELDS | {"tie_word_embeddings": request.param}))
    params = variables_of(model, np.zeros((1, 2), np.int32))["params"]
    return ServedBase(model, params, "tiny", max_rank=7)


def drawn_of(adapter):
    """The factor of each weight that is not zero, by path."""
    both = {path: [np.asarray(p[n]) for n in "ab"] for path, p in adapter.factors.items()}
    assert not any(a.any() and b.any() for a, b in both.values())
    return {path: a if a.any() else b for path, (a, b) in both.items() if a.any() or b.any()}


@pytest.mark.parametrize("parts", [["attention"], ["mlp"], ["unembed"], ["mlp", "unembed"]])
def test_an_adapter_adapts_what_was_asked_for(base, parts):
    chosen = {name: name in parts for name in ("attention", "mlp", "unembed")}
    found = drawn_of(base.begin(AdapterSpec(rank=3, **chosen), seed=5))
    kinds = {"self_attn": "attention", "mlp": "mlp", "lm_head": "unembed", "embed": "unembed"}
    assert {next(kind for name, kind in kinds.items() if name in path) for path in found} == {
        *parts
    }


@pytest.mark.parametrize("rank", [1, 4, 7])
def test_a_new_a_is_uniform_at_its_own_rank(base, rank):
    adapter = base.begin(AdapterSpec(rank=rank, alpha=20), seed=5)
    for path, factor in drawn_of(adapter).items():
        axis = base.slots[path].slot_axis
        ranks = np.moveaxis(factor, axis, 0)
        assert not ranks[rank:].any()
        used = ranks[:rank] * np.sqrt(INPUTS.get(path.split("/")[-2], 16))
        assert (np.abs(used) <= 1).all() and len(np.unique(used)) > 0.99 * used.size
        spread = 4 / np.sqrt(used.size)
        assert abs(used.mean()) < spread and abs((used**2).mean() - 1 / 3) < spread
    scales = np.unique(np.concatenate([np.ravel(s) for s in adapter.scales.values()]))
    assert scales == np.float32(20 / rank)


def test_new_adapters_compile_nothing(base, caplog):
    def begin(rank, seed, **parts):
        return drawn_of(base.begin(AdapterSpec(rank=rank, **parts), seed))

    with jax.log_compiles(), caplog.at_level("WARNING"):
        jax.jit(lambda x: x + 1)(np.float32(0))
        assert "XLA compilation" in caplog.text  # so it would be seen
        one, same, other = begin(2, 1), begin(2, 1), begin(2, 2)
        caplog.clear()
        begin(5, 3, attention=False)
        assert "XLA compilation" not in caplog.text
    assert all((one[path] == same[path]).all() for path in one)
    assert all((one[path] != other[path]).any() for path in one)


def test_ranks_beyond_the_largest_are_refused(base):
    with pytest.raises(RequestError, match="ranks from 1 to 7"):
        base.begin(AdapterSpec(rank=8), seed=0)


@pytest.mark.parametrize("inside", ["adapter", "best/12", "."])
def test_the_adapter_of_a_run_is_read(base, tmp_path, inside):
    rng = np.random.default_rng(0)
    tree = lj.lorafy(base.params, [lj.LoraRule(targets=["o_proj", "up_proj"], rank=3, alpha=5)])
    adapter, rest = lj.split(tree)
    adapter = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), adapter)
    facts = {"model": "tiny"}
    lj.save_adapter(tmp_path / inside, lj.join(adapter, rest), about=facts, overwrite=True)
    found = base.read_state(tmp_path).adapter
    assert {path for path, parts in found.factors.items() if np.any(parts["b"])} == {*adapter}
    for path, parts in adapter.items():
        axis = base.slots[path].slot_axis
        for name, mine in parts.items():
            whole = np.asarray(found.factors[path][name])
            np.testing.assert_array_equal(np.take(whole, range(3), axis), mine)
    assert (found.spec.rank, found.spec.unembed) == (3, False)


def test_what_cannot_be_served_is_refused(base, tmp_path):
    tree = lj.lorafy(base.params, [lj.LoraRule(targets=["o_proj"], rank=3)])
    scaled = {"model": "tiny", "rope_scaling": {"rope_type": "linear", "factor": 2.0}}
    lj.save_adapter(tmp_path / "scaled", tree, about=scaled)
    with pytest.raises(RequestError, match="--rope-scaling"):
        base.read_state(tmp_path / "scaled")
    whole = lj.lorafy(base.params, [lj.TrainRule(targets=["norm"])])
    lj.save_adapter(tmp_path / "whole", whole, about={"model": "tiny"})
    with pytest.raises(RequestError, match="norm"):  # and no error of the server's own
        base.read_state(tmp_path / "whole")
    with pytest.raises(RequestError, match="holds no adapter"):
        base.read_state(tmp_path)


@pytest.mark.slow
def test_the_base_holds_two_codes_of_4_bits_in_a_byte():
    fields = FIELDS | {"hidden_size": 64, "intermediate_size": 128, "num_key_value_heads": 4}
    model = models.Decoder(models.read_config(fields | {"tie_word_embeddings": True}))
    params = variables_of(model, np.zeros((1, 2), np.int32))["params"]
    coded = ServedBase(model, lj.quantized.quantize(params, "int4"), "tiny", max_rank=2)
    kernels = 3 * (4 * 64 * 64 + 3 * 64 * 128)
    rest = 37 * 64 + 7 * 64
    assert coded.size == kernels // 2 + 4 * (kernels // 64 + rest)
