"""Adapters that PEFT trained and wrote: the scripts give PEFT's answers, and train them on."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lj
from lora_jax.models import load_tokenizer
from tests.parity import PARITY
from tests.support import assert_close
from tests.train.scripts import begun
from tests.train.tiny import decoder, write_model, write_rows
from train import sft
from train.generate import __main__ as generate
from train.run.log import read_metrics

pytestmark = PARITY
PROMPT = "3 plus 4?"
CONFIGS = {
    "linear": {"target_modules": ["q_proj", "down_proj"], "r": 3, "lora_alpha": 17},
    "DoRA and rsLoRA": {"target_modules": "all-linear", "use_dora": True, "use_rslora": True},
    "a bias on B": {"target_modules": ["q_proj"], "lora_bias": True, "lora_alpha": 70},
    "PiSSA": {"target_modules": ["v_proj"], "init_lora_weights": "pissa", "r": 2},
    "a tied table": {"target_modules": ["embed_tokens", "v_proj"], "r": 4},
    "a saved norm": {"target_modules": ["o_proj"], "modules_to_save": ["norm"]},
}


@pytest.fixture(params=CONFIGS)
def theirs(request, tmp_path):
    """PEFT's model with random factors, and the folder that it wrote."""
    import torch
    import transformers
    from peft import LoraConfig, get_peft_model

    base = transformers.AutoModelForCausalLM.from_pretrained(write_model(tmp_path / "base"))
    options = {"r": 5, "lora_alpha": 11, "task_type": "CAUSAL_LM"} | CONFIGS[request.param]
    model = get_peft_model(base, LoraConfig(**options)).eval()
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path / "peft")
    return model, tmp_path / "peft"


def chat(*turns, **options):
    tokenizer = load_tokenizer(options.pop("base"))
    made = [{"role": role, "content": text} for role, text in turns]
    return tokenizer, tokenizer.apply_chat_template(made, return_dict=False, **options)


def test_greedy_answers_are_those_of_peft(theirs, tmp_path, capsys):
    import torch

    model, folder = theirs
    generate.main(["--adapter", str(folder), "--prompt", PROMPT, "--max-new-tokens", "12"])
    tokenizer, ids = chat(("user", PROMPT), base=tmp_path / "base", add_generation_prompt=True)

    new = model.generate(
        input_ids=torch.tensor([ids]),
        attention_mask=torch.ones(1, len(ids)),
        do_sample=False,
        max_new_tokens=12,
    )
    said = capsys.readouterr().out.strip()
    assert said == tokenizer.decode(new[0, len(ids) :], skip_special_tokens=True).strip()
    generate.main(["--model", str(tmp_path / "base"), "--prompt", PROMPT, "--max-new-tokens", "12"])
    assert capsys.readouterr().out.strip() != said


@functools.partial(jax.jit, static_argnames="asked")
def loss_of(params, ids, asked):
    """Our loss of the tokens after the first `asked`, but for the last."""
    log_probs = jax.nn.log_softmax(lj.adapt(decoder()[0].apply)({"params": params}, ids)[0])
    each = jnp.take_along_axis(log_probs[:-1], ids[0, 1:, None], axis=-1)[asked - 1 : -1]
    return -each.mean()


def test_a_run_begins_with_pefts_loss(theirs, tmp_path, request):
    import torch

    model, folder = theirs
    rows = write_rows(tmp_path / "rows.jsonl", n=1)
    args = ["--init-adapter", folder, "--dataset", rows, "--output", tmp_path / "run"]
    args += ["--steps", 1, "--batch-size", 1]
    turns = ("user", "0 plus 0?"), ("assistant", "0")
    _, whole = chat(*turns, base=tmp_path / "base")
    _, asked = chat(turns[0], base=tmp_path / "base", add_generation_prompt=True)
    labels = [-100] * len(asked) + whole[len(asked) :]
    labels[-1] = -100  # the line break after the end of the turn
    with torch.no_grad():
        want = model(input_ids=torch.tensor([whole]), labels=torch.tensor([labels])).loss
    found = loss_of(begun(sft.main, *args), np.array([whole]), len(asked))
    assert_close(found, want.numpy(), 1e-4)
    if "PiSSA" in request.node.name:  # the others would be trained alike
        sft.main([str(arg) for arg in args])
        assert_close(np.array(read_metrics(tmp_path / "run")[0]["loss"]), want.numpy(), 1e-4)
