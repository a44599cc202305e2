""" "all-linear" adapts the same kernels as PEFT's, on models with a head of their own."""

import re

import jax
import pytest

import lora_jax as lj
from lora_jax import models
from lora_jax.models.families import family_of
from tests.models import tiny_encoders

# PEFT asks transformers for a name that transformers has renamed.
pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore::FutureWarning")]


@pytest.mark.parametrize(
    ("case", "head", "auto", "task"),
    [
        ("bert", "classification", "AutoModelForSequenceClassification", "SEQ_CLS"),
        ("bert", "masked_lm", "AutoModelForMaskedLM", None),
        ("bert", "none", "AutoModel", "FEATURE_EXTRACTION"),
        ("roberta", "classification", "AutoModelForSequenceClassification", "SEQ_CLS"),
        ("roberta", "masked_lm", "AutoModelForMaskedLM", None),
        ("gpt2", None, "AutoModelForCausalLM", "CAUSAL_LM"),
        ("gpt2 with other options", None, "AutoModelForCausalLM", "CAUSAL_LM"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*fan_in_fan_out.*")
@pytest.mark.filterwarnings("ignore::lora_jax.LeftOutWarning")  # classifiers
def test_all_linear(case, head, auto, task):
    import transformers
    from peft import LoraConfig, get_peft_model

    fields = tiny_encoders.fields(case)
    config = transformers.AutoConfig.for_model(**fields)
    base = getattr(transformers, auto).from_config(config)
    theirs = get_peft_model(base, LoraConfig(target_modules="all-linear", task_type=task))
    want = {
        re.sub(r"^base_model\.model\.|\.lora_A\.default\.weight$", "", name)
        for name, _ in theirs.named_parameters()
        if ".lora_A." in name
    }
    ours = tiny_encoders.config(case, head)
    model = family_of(ours.model_type).module(ours)
    params = jax.eval_shape(model.init, jax.random.key(0), jax.numpy.zeros((1, 1), "int32"))
    tree = lj.lorafy(params["params"], [lj.LoraRule(targets="all-linear")])
    rows = {row.path: row for row in models.key_table(ours)}
    got = {
        name.removesuffix(".weight") for path in lj.split(tree)[0] for name in rows[path].hf_names
    }
    assert got == want
