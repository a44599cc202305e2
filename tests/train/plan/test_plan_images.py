"""Plans of rows with images: their shapes, their work, and what is refused."""

import numpy as np
import pytest

from tests.train.plan.tiny_plans import FIELDS, asked, planned_for, write
from tests.train.tiny_smolvlm import fields
from train.console.errors import UserError
from train.plan import __main__ as plan
from train.plan.job import batch_shapes

OF_TEXT = ("--targets", ".*text_model.*q_proj/kernel")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write(tmp_path_factory.mktemp("model"), fields())


@pytest.mark.slow
def test_images_cost_one_forward_pass_of_their_encoder(model):
    """No adapter stands on it; each image has 16 patches, and 4 tokens of the row."""
    job, _, with_images = planned_for(model, *OF_TEXT, "--images", 3)
    _, _, texts = planned_for(model, *OF_TEXT)
    assert batch_shapes(job)["pixel_values"].shape == (1, 4, 3, 3, 16, 16)
    layer = 2 * 16 * (4 * 18**2 + 2 * 18 * 31) + 4 * 16**2 * 18
    image = 2 * 16 * 3 * 4**2 * 18 + 2 * layer + 2 * 4 * 4 * 18 * job.outline.config.hidden_size
    np.testing.assert_allclose(with_images.flops_per_step, texts.flops_per_step + 4 * 3 * image)
    sizes = with_images.per_chip_bytes
    assert sizes["total"] - texts.per_chip_bytes["total"] > 4 * 3 * 3 * 16**2 * 4
    for one in (with_images, texts):  # the encoder is there, whether or not a step reads it
        parts = {k: v for k, v in one.per_chip_bytes.items() if k not in ("total", "capacity")}
        assert sum(parts.values()) == one.per_chip_bytes["total"] and min(parts.values()) >= 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--images", 7], "--images 7 takes 28 tokens of a row, but --seq-len is only 24"),
        (["--images", -1], "--images -1"),
        (["--images", 1, "--task", "dpo"], "--images does not apply to train.dpo"),
    ],
)
def test_images_that_cannot_be(model, options, message):
    with pytest.raises(UserError, match=message):
        plan.check_options(asked(model, *options))
        plan.make_job(asked(model, *options).plan)


def test_a_model_of_texts_has_no_images(tmp_path):
    with pytest.raises(UserError, match="--images 1 needs a model that reads images"):
        plan.make_job(asked(write(tmp_path, FIELDS), "--images", 1).plan)
