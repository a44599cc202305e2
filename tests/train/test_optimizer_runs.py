"""Runs by other optimisers than AdamW are resumed bitwise."""

import shutil

import jax
import numpy as np
import pytest

from lora_jax.training.run.checkpoints import Checkpoints
from tests.support import assert_identical, thorough
from tests.train.test_sft import adapter_of, inputs, run  # noqa: F401
from train.run.log import read_metrics


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        "--optimizer schedule-free --rank 2 --dropout 0.1 --eval-every 2 --eval-questions 2",
        *(
            pytest.param(options, marks=thorough)
            for options in (
                "--optimizer muon --rank 2 --bias adapted --train norm --lora-plus 4 "
                "--weight-decay 0.1",
                "--optimizer muon --full --weight-decay 0.1 --schedule wsd --decay 0.5 "
                "--min-lr 0.1",
                "--optimizer adafactor --full --schedule constant --warmup-ratio 0.3",
                "--optimizer lion --rank 2 --neftune 5 --freeze-a --grad-accum 2 "
                "--schedule inverse-sqrt",
            )
        ),
    ],
)
def test_optimisers_resume_bitwise(inputs, tmp_path, options, capsys):  # noqa: F811
    name, options = options.split()[1], [*options.split(), "--steps", 4, "--save-every", 2]
    options += [] if "--full" in options else ["--targets", "q_proj", "up_proj"]
    whole = run(inputs[:6], tmp_path / "whole", *options)
    shown = capsys.readouterr().out
    assert f"optimizer: {name}" in shown
    assert ("adamw on" in shown) == (name == "muon")
    # As a kill after the second step would leave it.
    parts = shutil.copytree(whole, tmp_path / "parts")
    checkpoints = Checkpoints(parts / "checkpoints", keep=1)
    checkpoints._record_files(2, [2])
    checkpoints._remove_all_but([2])
    checkpoints.close()
    run(inputs[:6], parts, *options, "--resume")
    assert "training continues after step 2" in capsys.readouterr().out
    lines, expected = read_metrics(parts), read_metrics(whole)
    for key in ("loss", "eval_loss", "lr"):
        assert [line.get(key) for line in lines] == [line.get(key) for line in expected]
    kept = adapter_of(inputs, whole)
    assert_identical(kept, adapter_of(inputs, parts))
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(kept))
