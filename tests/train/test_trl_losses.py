"""Each loss of `train.dpo`, as its script logs it, beside TRL's trainers (extra `parity`).

The rows are plain texts, of which all of TRL's trainers make the same tokens: those of ORPO and CPO
end a chat with EOS once more, after what its template writes there.
"""

import json

import numpy as np
import pytest

import lora_jax as lj
import lora_jax.peft as lp
from lora_jax import models
from lora_jax.training.losses import PREFERENCES
from tests.adapted_trees import with_random_factors
from tests.support import assert_close
from tests.train.test_trl_runs import (
    BATCH,
    IN_ORDER,
    LR,
    RULES,
    SCALE,
    SHARED,
    in_order,
    of_peft,
    ours,
    said,
    theirs,
)
from tests.train.tiny import tokenizer, write_jsonl, write_model
from train import dpo
from train.run.log import read_metrics

pytestmark = [
    pytest.mark.parity,
    pytest.mark.filterwarnings("ignore"),  # of torch, PEFT and TRL
]
PAIRS = [
    {"prompt": said(20), "chosen": said(24) + "a", "rejected": said(12) + "b"} for _ in "12345"
]
TEXTS = tokenizer(None)
STEPS = 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model without a chat template, and two adapters of PEFT's over it that are in use."""
    folder = tmp_path_factory.mktemp("inputs")
    write_model(folder / "model", None, scale=SCALE)
    model, params = models.from_pretrained(folder / "model")
    fresh = lj.lorafy(params, RULES)
    for seed, name in enumerate(("before", "used")):
        tree = with_random_factors(fresh, seed)
        lp.save(folder / name, model, tree, base_model=str(folder / "model"), task_type="CAUSAL_LM")
    return folder


def made(folder, output, start, trainer, config, **options):
    """A trainer of TRL's for an adapter and the rows in our order."""
    from datasets import Dataset

    return trainer(
        of_peft(folder, start),
        args=config(output, **SHARED | IN_ORDER | {"max_steps": STEPS} | options),
        train_dataset=Dataset.from_list(in_order(PAIRS, TEXTS)),
        processing_class=TEXTS,
    )


WITHOUT = {  # our options, the trainer of TRL's and its options
    "orpo": ([], "ORPO", {}),
    "cpo": (["--smoothing", 0.1], "CPO", {"label_smoothing": 0.1}),
    "simpo": (
        ["--nll-weight", 0.4, "--margin", 0.3],
        "CPO",
        {"loss_type": "simpo", "cpo_alpha": 0.4, "simpo_gamma": 0.3},
    ),
}


@pytest.mark.parametrize("loss", WITHOUT)
def test_losses_without_a_reference(folder, tmp_path, loss):
    from trl.experimental import cpo, orpo

    args, name, options = WITHOUT[loss]
    of = {"ORPO": orpo, "CPO": cpo}[name]
    kinds = (getattr(of, f"{name}{kind}") for kind in ("Trainer", "Config"))
    trainer = made(folder, tmp_path / "trl", "used", *kinds, beta=0.3, **options)
    args = [*args, "--loss", loss, "--beta", 0.3, "--steps", STEPS, "--batch-size", BATCH]
    lines, adapter, begun = ours(dpo, folder, tmp_path / "run", "used", PAIRS, *args)
    logged, expected = theirs(trainer)
    got, want = ([line["loss"] for line in of] for of in (lines, logged))
    assert_close(np.array(got), np.array(want), 2e-5)
    assert np.ptp(want) > 1e-3
    assert_close(adapter, expected, 2e-5)
    assert min(np.abs(adapter[name] - begun[name]).max() for name in begun) > LR


# Several losses a run, by weights that keep one from hiding another; smoothing is shared.
WITH_REFERENCE = {
    "plain": {"sigmoid": 1.0, "hinge": 2.0, "ipo": 0.1, "nca_pair": 0.5},
    "other": {"bco_pair": 1.0, "sppo_hard": 0.05, "apo_zero": 2.0, "apo_down": 0.5},
    "means": {"discopop": 1.0, "sigmoid_norm": 3.0, "sft": 0.3},
    "smoothed": {"robust": 1.0, "exo_pair": 0.5, "aot": 2.0, "aot_unpaired": 3.0},
}


def test_losses_with_a_reference(folder, tmp_path):
    """The first step of a table of runs, beside one trainer that computes all."""
    import peft
    from safetensors.torch import load_file
    from trl import DPOConfig, DPOTrainer

    known = {name for name, loss in PREFERENCES.items() if loss.nll is None}
    assert known == set().union(*WITH_REFERENCE.values()) - {"sft"}
    table = [
        {"name": name, "loss": [*terms], "loss_weights": [*terms.values()]}
        | ({"smoothing": 0.1} if name == "smoothed" else {})
        for name, terms in WITH_REFERENCE.items()
    ]
    rows = tmp_path / "runs.json"
    rows.write_text(json.dumps(table))
    line = ["--model", folder / "model", "--dataset", write_jsonl(tmp_path / "a.jsonl", PAIRS)]
    line += ["--init-adapter", folder / "used", "--reference", folder / "before", "--beta", 0.3]
    line += ["--steps", 1, "--batch-size", BATCH, "--output", tmp_path / "runs", "--many", rows]
    dpo.main([str(arg) for arg in line])

    config = {"max_steps": 1, "beta": 0.3}
    trainer = made(folder, tmp_path / "trl", "before", DPOTrainer, DPOConfig, **config)
    used = load_file(folder / "used" / "adapter_model.safetensors")
    peft.set_peft_model_state_dict(trainer.model, used)  # its reference stays as it was
    (batch, *_) = trainer.get_train_dataloader()
    for row in table:
        trainer.loss_types, trainer.loss_weights = row["loss"], row["loss_weights"]
        trainer.label_smoothing = row.get("smoothing", 0.0)
        want = trainer._compute_loss(trainer.model, batch, return_outputs=False).item()
        (first,) = read_metrics(tmp_path / "runs" / row["name"])
        assert first["loss"] == pytest.approx(want, rel=2e-5), row["name"]
