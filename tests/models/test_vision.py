"""ViT and DINOv2 without a judge: tables and trees, kinds, configurations, what is refused."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lj
import lora_jax.peft as lp
from lora_jax import models
from lora_jax.models.vision.model import cubic_weights
from tests.models import tiny_vision

of_each_case = pytest.mark.parametrize("case", list(tiny_vision.CASES))


@pytest.mark.parametrize("head", ["none", "classification"])
@of_each_case
def test_the_table_is_what_init_makes(case: str, head: str) -> None:
    model, params = tiny_vision.model(case, head)
    made = jax.eval_shape(model.init, jax.random.key(0), tiny_vision.pixels(case))["params"]
    shapes = jax.tree.map(jnp.shape, params)
    assert jax.tree.map(jnp.shape, made) == shapes
    assert models.read_config(model.config.to_hf()) == model.config


@of_each_case
@pytest.mark.filterwarnings("ignore::lora_jax.LeftOutWarning")  # its classifier
def test_presets(case: str) -> None:
    """By kind and by name "all-linear" is the same: the layers of attention and MLP."""
    model, params = tiny_vision.model(case)
    kinds, rules = models.kinds(model.config), [lj.LoraRule(targets="all-linear")]
    by_kind = set(lj.split(lj.lorafy(params, rules, kinds=kinds))[0])
    assert by_kind == set(lj.split(lj.lorafy(params, rules))[0])
    assert {kinds[path] for path in by_kind} == {"attention", "mlp"}
    assert len(by_kind) == 6


def test_a_head_that_the_file_lacks_is_new(tmp_path: Path, capsys: Any) -> None:
    model, params = tiny_vision.model("dinov2", "none")
    models.save_pretrained(tmp_path / "bare", model, params)
    model, loaded = models.from_pretrained(tmp_path / "bare", head="classification", num_labels=5)
    assert "holds no classifier: freshly initialised" in capsys.readouterr().err
    assert loaded["classifier"]["kernel"].shape == (48, 5)
    assert np.array_equal(
        loaded["dinov2"]["layernorm"]["scale"], params["dinov2"]["layernorm"]["scale"]
    )


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"use_swiglu_ffn": True}, "use_swiglu_ffn=True is not supported"),
        ({"intermediate_size": 37}, "intermediate_size=37 is not known for dinov2"),
        ({"patch_size": 21}, "is smaller than patch_size"),
        ({"qkv_bias": "false"}, r"qkv_bias \('false'\) must be true or false"),
        ({"layer_norm_eps": float("nan")}, r"layer_norm_eps \(nan\) must be finite"),
        ({"num_attention_heads": 7}, "must be a multiple"),
        ({"architectures": ["Dinov2Backbone"]}, "Pass head="),
    ],
)
def test_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(models.ConfigError, match=said):
        models.read_config({**tiny_vision.fields("dinov2"), **changes})


def test_images_that_do_not_fit() -> None:
    model, params = tiny_vision.model("vit")
    for shape in ((1, 3, 20, 20), (1, 2, 20, 4)):
        with pytest.raises(ValueError, match="at least as large as a patch"):
            model.apply({"params": params}, np.zeros(shape, np.float32))


def test_positions_are_kept_where_nothing_changes() -> None:
    assert np.array_equal(cubic_weights(4, 4), np.eye(4))
    assert np.allclose(cubic_weights(5, 3).sum(1), 1)


def test_rules_by_the_names_of_either_version() -> None:
    model, _ = tiny_vision.model("vit")
    of = [
        lp.rules({"target_modules": names, "modules_to_save": ["classifier"]}, model)
        for names in (["q_proj", "v_proj"], ["query", "value"])
    ]
    assert of[0] == of[1]
    with pytest.raises(lp.PeftError, match="matches none"):
        lp.rules({"target_modules": ["c_attn"]}, model)
