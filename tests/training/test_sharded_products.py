"""The form of products with sharded kernels: chosen by the mesh, and no option without effect."""

import dataclasses

import pytest

from lora_jax.models.specs import AXES
from lora_jax.training.errors import TrainingError
from lora_jax.training.layout import layout_of_one_device
from lora_jax.training.sharded_products import COMPILER_OPTIONS, choose_form
from tests.models.test_experts import OnTPU

ONE = dict.fromkeys(AXES, 1)
SHARED = ONE | {"fsdp": 4}


@pytest.mark.parametrize("axis", AXES)
def test_there_is_a_choice_where_kernels_are_sharded(axis):
    """Over data, each device has all kernels."""
    chosen = choose_form(ONE | {axis: 4}, "tpu")
    assert (chosen is None) == (axis == "data")


@pytest.mark.parametrize(
    "mesh, platform, why",
    [
        (SHARED, "cpu", "the devices are cpus"),
        (SHARED, "gpu", "the devices are gpus"),
        (ONE, "tpu", "each device has all kernels"),
        (ONE | {"data": 8}, "tpu", "each device has all kernels"),
    ],
)
def test_a_form_without_effect_is_refused(mesh, platform, why):
    assert choose_form(mesh, platform) is None
    for form in COMPILER_OPTIONS:
        with pytest.raises(TrainingError, match=f"^collective_matmul='{form}' .*{why}. Remove"):
            choose_form(mesh, platform, form)


def test_a_form_that_was_asked_for_is_taken():
    for form in COMPILER_OPTIONS:
        assert str(choose_form(SHARED, "tpu", form)) == f"{form} (as asked)"
    assert str(choose_form(SHARED, "tpu")) == "whole (the default)", "nothing was compared"


def test_a_layout_compiles_with_its_form_on_tpus():
    windowed = OnTPU(layout_of_one_device().mesh, ())
    whole = dataclasses.replace(windowed, collective_matmul="whole")
    assert whole.compiler_options == windowed.compiler_options | COMPILER_OPTIONS["whole"]
    assert whole.compiler_options != windowed.compiler_options
    assert (
        dataclasses.replace(layout_of_one_device(), collective_matmul="whole").compiler_options
        == {}
    )
