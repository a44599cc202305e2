"""Gemma 4's stacks, its cache, its files, and what is refused of it; see test_parity.py."""

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from lora_jax.hf.keys import WeightsError
from lora_jax.models import ConfigError, DecoderConfig, from_pretrained, init_cache
from tests.models import tiny

PLAIN, REUSING = "gemma4", "gemma4 with layers that share keys"


def test_stacks_and_a_cache_that_all_layers_fit() -> None:
    plain, reusing = map(tiny.config, (PLAIN, REUSING))
    assert plain.stacks == {"0of3": range(0, 6, 3), "1of3": range(1, 6, 3), "2of3": range(2, 6, 3)}
    assert reusing.stacks == {
        "own/0of2": range(0, 4, 2),
        "own/1of2": range(1, 4, 2),
        "reusing/0of2": range(4, 8, 2),
        "reusing/1of2": range(5, 8, 2),
    }
    assert reusing.place_of(7) == ("model/layers/reusing/1of2", 1)
    # Three heads of 6, or one of 12; one head of 6, or one of 12. Layers that reuse have none.
    assert init_cache(plain, 2, 5).key.shape == (6, 2, 3, 5, 6)
    assert init_cache(reusing, 2, 5).key.shape == (4, 2, 2, 5, 6)


@pytest.mark.slow
def test_keys_that_no_layer_uses_are_left_out(tmp_path: Path) -> None:
    """Published files have them for layers that take those of others."""
    _, params = tiny.decoder(REUSING)
    tensors = tiny.write_folder(tmp_path, REUSING, params)
    assert not any("layers.4.self_attn.k_" in name for name in tensors)
    more = {f"model.layers.4.self_attn.{n}.weight": np.zeros(3) for n in ("k_proj", "k_norm")}
    save_file(tensors | more, tmp_path / "model.safetensors")
    jax.tree.map(np.testing.assert_array_equal, from_pretrained(tmp_path)[1], params)
    save_file(
        tensors | {"model.layers.4.mlp.k_proj.weight": np.zeros(3)}, tmp_path / "model.safetensors"
    )
    with pytest.raises(WeightsError, match="(?s)1 unexpected.*layers.4.mlp.k_proj"):
        from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"enable_moe_block": True}, "enable_moe_block=True is not supported"),
        ({"use_bidirectional_attention": "all"}, "use_bidirectional_attention='all'"),
        ({"global_head_dim": 15}, "global_head_dim .15. must be a multiple of head_dim"),
        ({"num_kv_shared_layers": 7}, "num_kv_shared_layers .7. leaves no layer without a window"),
        ({"rope_parameters": {"full_attention": {"rope_type": "yarn"}}}, "'yarn' is not supported"),
        ({"per_layer_config": {"0": {"head_dim": 12}}}, "per_layer_config .* is not supported"),
    ],
)
def test_refusals_name_the_field(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        DecoderConfig.from_hf({**tiny.fields(REUSING), **changes})


def test_fields_of_images_change_nothing() -> None:
    config = tiny.config(REUSING)
    assert (
        DecoderConfig.from_hf({**config.to_hf(), "use_bidirectional_attention": "vision"}) == config
    )
    listed = {str(i): {"head_dim": 12} for i in range(1, 8, 2)}
    fields = {k: v for k, v in tiny.fields(REUSING).items() if k != "global_head_dim"}
    assert DecoderConfig.from_hf({**fields, "per_layer_config": listed}) == config
