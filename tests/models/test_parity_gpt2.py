"""GPT-2 against transformers on torch: the same tiny weights, the same logits and text."""

import functools
import tempfile
from typing import Any

import numpy as np
import pytest

from lora_jax.models import from_pretrained, hf_tensors, init_cache, key_table
from lora_jax.models.layers.blockwise import Blockwise
from tests.models import tiny, tiny_encoders
from tests.models.test_parity import check_greedy_generation, padded, reference_logits

pytestmark = pytest.mark.parity


of_each_case = pytest.mark.parametrize("case", list(tiny_encoders.GPT2S))


@functools.cache
def made(case: str) -> Any:
    """(torch's model, ours, its parameters), through a folder that transformers wrote."""
    import torch
    import transformers

    config = transformers.AutoConfig.for_model(**tiny_encoders.fields(case))
    reference = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    model, params = tiny_encoders.model(case)
    tensors = dict(hf_tensors(params, key_table(model.config)))
    own = dict(reference.named_parameters())
    assert set(tensors) == set(own)
    with torch.no_grad():
        for name, tensor in tensors.items():
            own[name].copy_(torch.from_numpy(tensor.copy()))
    with tempfile.TemporaryDirectory() as folder:
        reference.eval().save_pretrained(folder)
        return reference, *from_pretrained(folder)


@pytest.mark.parametrize("attention", ["dense", Blockwise(block=4, spans=2)], ids=str)
@pytest.mark.parametrize("side", ["left", "right"])
@of_each_case
def test_logits(case: str, side: str, attention: Any) -> None:
    reference, model, params = made(case)
    ids, mask = padded(side)
    want = reference_logits(reference, ids, mask)[mask == 1]
    run = model.clone(attention=attention)
    got = np.asarray(tiny.run(run, params, ids, mask))[mask == 1]
    assert np.abs(want).max() > 1
    print(f"{side}: max |difference| {np.abs(got - want).max():.1e} of {np.abs(want).max():.1f}")
    tiny.assert_close(got, want)


@pytest.mark.parametrize("side", ["left", "right"])
@of_each_case
def test_cached_decoding(case: str, side: str) -> None:
    """Prefill of seven slots, then one token at a time."""
    reference, model, params = made(case)
    ids, mask = padded(side)
    mask[:, 7:] = 1
    cache = init_cache(model.config, 3, 11)
    logits, cache = tiny.run(model, params, ids[:, :7], mask[:, :7], cache=cache)
    parts = [logits]
    for i in range(7, 11):
        logits, cache = tiny.run(model, params, ids[:, i : i + 1], mask[:, i : i + 1], cache=cache)
        parts.append(logits)
    got = np.concatenate(parts, axis=1)
    want = reference_logits(reference, ids, mask)
    print(f"{side}: max |difference| {np.abs(got - want)[mask == 1].max():.1e}")
    tiny.assert_close(got[mask == 1], want[mask == 1])


def test_greedy_generation() -> None:
    check_greedy_generation(*made("gpt2 with other options"))
