"""Qwen3.5 with images: places of patches and tokens by hand, caches, and what is refused."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lj
import lora_jax.peft as lp
from lora_jax import models
from lora_jax.models.qwen_vl.grids import patch_places, token_places
from tests.models import tiny, tiny_vision
from tests.models import tiny_qwen_vl as tiny_qwen
from tests.support import array


def test_places_of_patches() -> None:
    """Square by square, image by image; behind the last, no image's."""
    places = jax.jit(patch_places, static_argnums=(1, 2))(array([[[2, 4], [2, 2]]]), 13, 2)
    rows = [0, 0, 1, 1, 0, 0, 1, 1, 0, 0, 1, 1]
    columns = [0, 1, 0, 1, 2, 3, 2, 3, 0, 1, 0, 1]
    np.testing.assert_array_equal(places.image[0], [0] * 8 + [1] * 4 + [2])
    np.testing.assert_array_equal(places.coordinates[0, :12], np.stack([rows, columns], axis=1))
    np.testing.assert_array_equal(places.sizes[0, :12], [[2, 4]] * 8 + [[2, 2]] * 4)


def test_places_of_tokens() -> None:
    """Text, an image of 2 x 3 tokens, text, one of 1 x 1, text; padding ahead changes nothing."""
    is_image = np.array([[0, 0, 1, 1, 1, 1, 1, 1, 0, 1, 0]], bool)
    grids = array([[[2, 3], [1, 1], [0, 0]]])
    want = np.array(
        [
            [0, 1, 2, 2, 2, 2, 2, 2, 5, 6, 7],
            [0, 1, 2, 2, 2, 3, 3, 3, 5, 6, 7],
            [0, 1, 2, 3, 4, 2, 3, 4, 5, 6, 7],
        ]
    ).T
    places = jax.jit(token_places)(is_image, np.ones((1, 11), bool), grids)
    np.testing.assert_array_equal(places[0], want)
    padded = array(np.pad(is_image, ((0, 0), (3, 0)), constant_values=True))
    places = jax.jit(token_places)(padded, np.arange(14)[None] >= 3, grids)
    np.testing.assert_array_equal(places[0, 3:], want)


@pytest.mark.slow
def test_a_cache_changes_nothing() -> None:
    model, params = tiny_qwen.made()
    given = {name: array[:1] for name, array in tiny_qwen.inputs().items()}
    whole = tiny_vision.run(model, params, **given)
    cache = models.init_cache(model.config, 1, 17, jnp.float32)
    ids, shown = given["input_ids"], {name: given[name] for name in ("pixel_values", "image_grids")}
    first, cache = tiny_vision.run(model, params, ids[:, :14], cache=cache, **shown)
    assert int(cache.length[0]) == 11  # seven of texts, three columns, and one
    rest, _ = tiny_vision.run(model, params, ids[:, 14:], cache=cache)
    tiny.assert_close(np.concatenate([first, rest], axis=1), whole, 1e-5)
    single = {
        "pixel_values": shown["pixel_values"][:, :24],
        "image_grids": shown["image_grids"][:, :1],
    }
    assert np.isnan(np.asarray(tiny_vision.run(model, params, ids, **single))[0, -1]).all()


def test_wrong_inputs() -> None:
    model, params = tiny_qwen.made()
    given = {name: array[:1] for name, array in tiny_qwen.inputs().items()}
    ids, pixels, grids = (given[name] for name in ("input_ids", "pixel_values", "image_grids"))
    shown = {"pixel_values": pixels, "image_grids": grids}
    for change, message in (
        ({"pixel_values": pixels[:, :23]}, r"Pass .*\[1, patches, 3, 5, 5\]"),
        ({"image_grids": grids[:, 0]}, r"image_grids has the shape \(1, 2\)"),
        ({"image_grids": None}, "pixel_values are given without image_grids"),
        ({"pixel_values": None}, "pixel_values has the shape None"),
    ):
        with pytest.raises(ValueError, match=message):
            jax.eval_shape(model.apply, {"params": params}, ids, **{**shown, **change})


def _changed(part: str, **changes: Any) -> dict[str, Any]:
    fields = tiny_qwen.fields()
    return {**fields, part: {**fields[part], **changes}}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (_changed("vision_config", deepstack_visual_indexes=[1]), "deepstack_visual_indexes"),
        (_changed("vision_config", num_heads=6), "heads have 6 dimensions"),
        (_changed("vision_config", num_position_embeddings=8), "num_position_embeddings is 8, but"),
        (_changed("vision_config", out_hidden_size=7), "vectors of size 7"),
        (_changed("vision_config", fps=7), "fps"),
        (_changed("vision_config", depth=0), r"depth \(0\) must be at least 1"),
        (_changed("vision_config", rope_parameters={"rope_type": "yarn"}), "yarn"),
        (
            _changed("text_config", rope_parameters={**tiny_qwen.ROPE, "mrope_interleaved": False}),
            "mrope_interleaved=False",
        ),
        ({**tiny_qwen.fields(), "vision_config": None}, "the model reads no images"),
    ],
)
def test_configurations_that_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(models.ConfigError, match=message):
        models.read_config(fields, images=True)
    if "text_config" not in message and "mrope" not in message:
        assert models.read_config(fields).model_type == "qwen3_5_text"


def test_a_configuration_is_read_back() -> None:
    config = models.read_config(tiny_qwen.fields(), images=True)
    assert models.read_config(config.to_hf(), images=True) == config
    np.testing.assert_array_equal(config.rotated_by, [0, 1, 2, 0, 1, 0])
    with pytest.raises(models.ConfigError, match="A llama model has no option images"):
        models.read_config(tiny.fields("llama2"), images=True)
    with pytest.raises(models.ConfigError, match="which reads images, is not scaled"):
        models.with_rope_scaling(config, {"rope_type": "yarn", "factor": 2.0})


def test_adapters_of_the_text_load_into_both(tmp_path: Path) -> None:
    """PEFT's folder of an adapter of the text is one of the model with images, and back."""
    model, params = tiny_qwen.made()
    text = models.Decoder(model.config.text)
    alone = {"model": params["model"]["language_model"], "lm_head": params["lm_head"]}
    rules = [lj.LoraRule(targets=["q_proj", "in_proj_qkv"], rank=3)]
    lp.save(tmp_path / "text", text, lj.lorafy(alone, rules))
    whole = lp.load(tmp_path / "text", model, params)
    lp.save(tmp_path / "whole", model, whole)
    again = lp.load(tmp_path / "whole", text, alone)
    ours, theirs = (lj.split(tree)[0] for tree in (lj.lorafy(alone, rules), again))
    assert ours.keys() == theirs.keys() and len(lj.split(whole)[0]) == len(ours) == 2
    for path, factors in ours.items():
        np.testing.assert_array_equal(factors["a"], theirs[path]["a"])
