"""A small ViT that knows the digits 0 to 4 learns 5 to 9: by its head alone, LoRA, and in full.

`THOROUGH=1 pytest -m slow -s tests/training/test_digits.py` prints the table of three seeds. Half
of scikit-learn's digits are held out. LoRA trains a fraction of the parameters and has to come
within two points of full fine-tuning; logistic regression on the pixels shows how hard they are.
"""

from typing import Any

import jax
import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import train_test_split

import lora_jax as lj
from lora_jax import models, training
from tests.support import THOROUGH

pytestmark = pytest.mark.slow
SEEDS = (0, 1, 2) if THOROUGH else (0,)
BASE = {"lr": 2e-3, "epochs": 35} if THOROUGH else {"lr": 4e-3, "epochs": 20}
EPOCHS = 20 if THOROUGH else 12  # of each way
PROCESSOR = models.ImageProcessor(size=(8, 8), mean=(0.5,), std=(0.5,))
FIELDS: dict[str, Any] = {
    "model_type": "vit",
    "image_size": 8,
    "patch_size": 2,
    "num_channels": 1,
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "initializer_range": 0.1,
}
HEAD = lj.TrainRule(targets=["classifier"])
WAYS: dict[str, tuple[list[Any], float]] = {
    "head only": ([HEAD], 3e-2),
    "LoRA, r = 8": ([HEAD, lj.LoraRule(targets="all-linear", rank=8, alpha=16)], 5e-3),
    "full": ([lj.TrainRule(targets=".*")], 1e-3),
}


def rows_of(digits: range, seed: int) -> tuple[Any, Any]:
    """Rows of some digits to train on, and as many to test on."""
    found = load_digits()
    pixels = (found.images * 15.9).astype(np.uint8)
    rows = [
        {"image": Image.fromarray(image), "label": int(label)}
        for image, label in zip(pixels, found.target, strict=True)
        if label in digits
    ]
    labels = [row["label"] for row in rows]
    return train_test_split(rows, test_size=0.5, random_state=seed, stratify=labels)


def learned(model: Any, params: Any, rules: Any, rows: Any, seed: int, **how: Any) -> Any:
    """The tree that learned half of the rows, and its accuracy on the other half, in %."""
    train, test = (training.images(part, PROCESSOR) for part in rows)
    tree, _ = training.finetune(
        model, params, train, rules, batch_size=64, warmup=10, log=None, seed=seed, **how
    )
    found = training.predict(lj.adapt(model.apply), tree, test, 128).argmax(-1)
    return tree, 100 * float(np.mean(found == test.labels))


def accuracies(seed: int) -> dict[str, float]:
    """The accuracy of each way on held-out digits from 5 to 9, in %."""
    config = models.read_config(FIELDS, head="classification", num_labels=5)
    model = models.VisionEncoder(config)
    empty = np.zeros((1, 1, 8, 8), np.float32)
    fresh = model.init(jax.random.key(seed), empty)["params"]
    everything = [lj.TrainRule(targets=".*")]
    base, first = learned(model, fresh, everything, rows_of(range(5), seed), seed, **BASE)
    params = lj.merge(base) | {"classifier": fresh["classifier"]}
    rows = rows_of(range(5, 10), seed)
    found = {"the base, on 0 to 4": first}
    pixels = [np.array([np.asarray(row["image"]).ravel() for row in part]) / 255 for part in rows]
    labels = [[row["label"] for row in part] for part in rows]
    regression = LogisticRegression(max_iter=2000).fit(pixels[0], labels[0])
    found["logistic regression on pixels"] = 100 * regression.score(pixels[1], labels[1])
    for way, (rules, lr) in WAYS.items():
        _, found[way] = learned(model, params, rules, rows, seed, lr=lr, epochs=EPOCHS)
    return found


def test_lora_is_within_two_points_of_full_fine_tuning() -> None:
    found = [accuracies(seed) for seed in SEEDS]
    means = {way: np.mean([of_seed[way] for of_seed in found]) for way in found[0]}
    for way, mean in means.items():
        print(f"{way:30}", *(f"{of_seed[way]:6.1f}" for of_seed in found), f"{mean:8.2f}")
    assert means["LoRA, r = 8"] > means["full"] - 2
    assert all(of_seed["LoRA, r = 8"] > of_seed["head only"] + 5 for of_seed in found)
    assert all(of_seed["the base, on 0 to 4"] > 95 for of_seed in found)
