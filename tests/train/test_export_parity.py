"""Exports as transformers and PEFT read them: our logits, nothing missing, nothing left over."""

import json
import re

import jax
import numpy as np
import pytest

import lora_jax as lj
import lora_jax.peft as lp
from lora_jax import models
from tests.parity import PARITY
from tests.peft_adapters.models import FAMILIES, IDS, logits_of, with_adapter, write_model
from tests.support import assert_close, with_random_factors
from train.export.__main__ import main

pytestmark = PARITY
HEAD = lj.TrainRule(targets=["classifier"])
RULES = {
    "llama": [lj.LoraRule(targets="all-linear", rank=3, alpha=7)],
    "bert": [HEAD, lj.LoraRule(targets=["query", "value"], rank=3, alpha=7)],
    "roberta": [HEAD, lj.LoraRule(targets=["query", "value"], rank=3, alpha=7)],
}


@pytest.fixture(params=RULES)
def family(request):
    return request.param


@pytest.fixture
def exported(family, tmp_path):
    """Exports an adapter of the family; returns (what was written, our logits)."""

    def export(*args):
        base = tmp_path / family
        write_model(family, base)
        model, params = models.from_pretrained(base)
        tree = with_random_factors(lj.lorafy(params, RULES[family]))
        lj.save_adapter(tmp_path / "adapter", tree)
        options = ["--adapter", tmp_path / "adapter", "--model", base, "--output", tmp_path / "out"]
        main([str(arg) for arg in [*options, *args]])
        ids = np.asarray(IDS, np.int32)
        expected = np.asarray(jax.jit(lj.adapt(model.apply))({"params": tree}, ids))
        base_alone = jax.jit(model.apply)({"params": params}, ids)
        assert np.abs(expected - base_alone).max() > 1e-2
        return tmp_path / "out", expected

    return export


def auto_class(family, package, prefix):
    kind = "CausalLM" if family == "llama" else "SequenceClassification"
    return getattr(package, f"{prefix}For{kind}")


def test_peft_runs_the_adapter(family, exported, tmp_path):
    import peft
    import transformers
    from safetensors.numpy import load_file

    output, expected = exported("--base-name", tmp_path / family)
    auto = auto_class(family, peft, "AutoPeftModel").from_pretrained(
        output, **({} if family == "llama" else {"num_labels": 3})
    )
    assert_close(logits_of(auto.eval()), expected, 1e-4)
    name = json.loads((output / "adapter_config.json").read_text())["base_model_name_or_path"]
    base = getattr(transformers, FAMILIES[family][1]).from_pretrained(name)
    model = peft.PeftModel.from_pretrained(base, output).eval()
    assert_close(logits_of(model), expected, 1e-4)
    tensors = set(load_file(output / "adapter_model.safetensors"))
    assert set(peft.get_peft_model_state_dict(model)) == tensors, "missing or unexpected"


def test_transformers_runs_the_merged_model(family, exported, capsys):
    import transformers

    output, expected = exported("--merged")
    auto = auto_class(family, transformers, "AutoModel")
    model, info = auto.from_pretrained(output, output_loading_info=True)
    assert not any(info[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert_close(logits_of(model.eval()), expected, 1e-4)
    assert f'{auto.__name__}.from_pretrained("{output}")' in capsys.readouterr().out


def test_a_classifier_of_peft_on_a_base_without_its_head(tmp_path, capsys):
    import peft
    import transformers
    from peft import AutoPeftModelForSequenceClassification

    trained = write_model("bert", tmp_path / "with head")
    trained.bert.save_pretrained(tmp_path / "base")
    options = {"target_modules": ["query"], "task_type": "SEQ_CLS"}
    theirs = with_adapter(trained, options)
    expected = logits_of(theirs)
    theirs.save_pretrained(tmp_path / "adapter")
    args = ["--adapter", tmp_path / "adapter", "--model", tmp_path / "base", "--num-labels", 3]
    main([str(arg) for arg in [*args, "--output", tmp_path / "merged", "--merged"]])
    auto = transformers.AutoModelForSequenceClassification
    assert_close(logits_of(auto.from_pretrained(tmp_path / "merged").eval()), expected, 1e-4)
    named = ["--base-name", tmp_path / "base", "--output", tmp_path / "again"]
    main([str(arg) for arg in [*args, *named]])
    assert lp.serving_problems(tmp_path / "again") == []
    line = re.findall(r"Load it with: (.*)", capsys.readouterr().out)[-1]
    shown = eval(line, {"PeftModel": peft.PeftModel, auto.__name__: auto})
    assert_close(logits_of(shown.eval()), expected, 1e-4)
    again = AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "again", num_labels=3)
    assert_close(logits_of(again.eval()), expected, 1e-4)
