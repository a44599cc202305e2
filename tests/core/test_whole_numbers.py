"""A kernel of whole numbers is refused with a remedy that works."""

import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lj
from lora_jax import quantized

FLOATS = np.random.default_rng(5).normal(size=(64, 96)).astype(np.float32)


@pytest.mark.parametrize("rule", [lj.LoraRule, lj.TrainRule])
@pytest.mark.parametrize("targets", [["d"], "d/kernel"])
def test_a_rule_that_names_whole_numbers_names_the_quantizer(rule, targets):
    tree = {"d": {"bias": jnp.ones(1, jnp.int32), "kernel": jnp.ones((4, 6), jnp.int8)}}
    message = r"'d/kernel' contains integers .int8.*lora_jax\.quantized\.quantize\("
    with pytest.raises(ValueError, match=message):
        lj.lorafy(tree, [rule(targets=targets)])


def test_the_remedy_is_no_error():
    params = quantized.quantize({"d": {"kernel": jnp.asarray(FLOATS)}}, "int8")
    assert quantized.is_coded(params["d"]["kernel"])
    adapted = lj.lorafy(params, [lj.LoraRule(targets=["d"], rank=3)])
    assert [*lj.split(adapted)[0]] == ["d/kernel"]
