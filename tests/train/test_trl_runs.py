"""Runs of preferences and of rewards beside TRL's trainers, step by step (extra `parity`).

TRL's trainers run as they are: they tokenise the same rows, compute the reference, the loss, the
advantages and AdamW's updates with PEFT's adapter. Of GRPO, the completions alone are ours, those
that our run drew.
"""

import warnings

import numpy as np
import pytest
from safetensors.numpy import load_file

import lora_jax as lj
import lora_jax.peft as lp
from lora_jax import models, training
from lora_jax.training.data.order import Order
from tests.adapted_trees import with_random_factors
from tests.support import assert_close, but_rarely
from tests.train.tiny import CONFIG, tokenizer, write_jsonl, write_model
from train import dpo, grpo
from train.adapters.source import find_adapter
from train.live.rollouts import Rollouts
from train.run.log import read_metrics

pytestmark = [
    pytest.mark.parity,
    pytest.mark.filterwarnings("ignore"),  # of torch, PEFT and TRL
]
RULES = [lj.LoraRule(targets=["q_proj", "v_proj", "up_proj", "o_proj"], rank=3, alpha=6)]
LR, EPS = 5e-3, 1e-6  # a small gradient's sign, which AdamW turns into a step, is no noise
SCALE = 0.5  # of the weights, so that probabilities are not all near 0 or 1
BATCH, STEPS = 4, 20
ENDS = (*range(100, 124), CONFIG["eos_token_id"])  # so many that completions end in time
RNG = np.random.default_rng(5)


def said(most):
    return "".join(RNG.choice(list("abcd efgh"), RNG.integers(1, most)))


def turns(role, content):
    return [{"role": role, "content": content}]


PAIRS = [
    {
        "prompt": turns("user", said(20)),
        "chosen": turns("assistant", said(24) + "a"),
        "rejected": turns("assistant", said(12) + "b"),
    }
    for _ in range(26)  # no multiple of the batch
]
LABELLED = [
    {"prompt": row["prompt"], "completion": row[side], "label": side == "chosen"}
    for row, side in zip(PAIRS, RNG.choice(["chosen", "rejected"], len(PAIRS)), strict=True)
]
PROMPTS = [{"prompt": turns("user", said(9)), "letter": said(2)} for _ in range(7)]
SHARED = {
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "report_to": [],
    "save_strategy": "no",
    "logging_steps": 1,
    "disable_tqdm": True,
    "learning_rate": LR,
    "lr_scheduler_type": "constant",
    "adam_epsilon": EPS,
    "max_grad_norm": 0.0,
}
IN_ORDER = {
    "per_device_train_batch_size": BATCH,
    "max_steps": STEPS,
    "train_sampling_strategy": "sequential",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model, and two adapters of PEFT's over it: one as it begins, one that is in use."""
    folder = tmp_path_factory.mktemp("inputs")
    write_model(folder / "model", scale=SCALE, eos_token_id=ENDS)
    model, params = models.from_pretrained(folder / "model")
    fresh = lj.lorafy(params, RULES)
    for name, tree in (("fresh", fresh), ("used", with_random_factors(fresh))):
        lp.save(folder / name, model, tree, base_model=str(folder / "model"), task_type="CAUSAL_LM")
    return folder


def ours(script, folder, output, start, rows, *args):
    """Runs a script from an adapter; returns its metrics, its adapter and the first, as PEFT's."""
    line = ["--model", folder / "model", "--init-adapter", folder / start, "--output", output]
    line += ["--dataset", write_jsonl(output.parent / f"{output.name}.jsonl", rows)]
    line += ["--lr", LR, "--eps", EPS, "--schedule", "constant", "--warmup", 0, "--grad-clip", 0]
    script.main([str(arg) for arg in [*line, *args]])
    model, params = models.from_pretrained(folder / "model")
    exported = output / "of PEFT"
    lp.save(exported, model, find_adapter(str(output)).load(model, params, "the base"))
    ends = (load_file(of / "adapter_model.safetensors") for of in (exported, folder / start))
    return read_metrics(output), *ends


def of_peft(folder, start):
    import peft
    import transformers

    base = transformers.AutoModelForCausalLM.from_pretrained(folder / "model")
    return peft.PeftModel.from_pretrained(base, folder / start, is_trainable=True)


def theirs(trainer):
    """Trains; returns what a trainer of TRL logged of each step, and its adapter."""
    import peft

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.train()
    state = peft.get_peft_model_state_dict(trainer.model, adapter_name="default")
    lines = [line for line in trainer.state.log_history if "loss" in line]
    return lines, {name: tensor.numpy() for name, tensor in state.items()}


def assert_same_runs(ours, theirs, names, tolerance=2e-5):
    """Every step's numbers by our names and theirs, and the adapters, which have moved."""
    (lines, adapter, begun), (logged, expected) = ours, theirs
    assert len(lines) == len(logged)
    for name, other in names.items():
        both = [(a[name], b[other]) for a, b in zip(lines, logged, strict=True) if other in b]
        got, want = zip(*both, strict=True)
        assert_close(np.array(got), np.array(want), tolerance)
        assert np.ptp(want) > 100 * tolerance, f"{name} never changes"
    assert_close(adapter, expected, tolerance)
    moved = [np.abs(adapter[name] - begun[name]).max() for name in begun]
    assert min(moved) > 2 * LR


NAMES = {"loss": "loss", "chosen": "rewards/chosen", "rejected": "rewards/rejected"}
OF_PAIRS = NAMES | {
    "margin": "rewards/margins",
    "accuracy": "rewards/accuracies",
    "logps_chosen": "logps/chosen",
    "logps_rejected": "logps/rejected",
}
WAYS = {  # start, our options, TRL's
    "sigmoid": ("used", [], {}),
    "sigmoid from a fresh adapter": ("fresh", ["--reference-logps", "live"], {}),
    "ipo, accumulated": (
        "used",
        ["--loss", "ipo", "--beta", "0.2", "--batch-size", BATCH // 2, "--grad-accum", 2],
        {
            "loss_type": "ipo",
            "beta": 0.2,
            "per_device_train_batch_size": BATCH // 2,
            "gradient_accumulation_steps": 2,
        },
    ),
    "robust and sft": (
        "used",
        ["--loss", "robust", "sft", "--smoothing", "0.1", "--loss-weights", "1", "0.3"],
        {"loss_type": ["robust", "sft"], "label_smoothing": 0.1, "loss_weights": [1.0, 0.3]},
    ),
}


def in_order(rows, made=None, **options):
    """The rows of all steps, one after another; those of a step in their order in the data."""
    examples = training.pairs(rows, made or tokenizer(), seq_len=128, **options)
    order = Order.of(examples, 0, BATCH)
    return [rows[row] for step in range(STEPS) for row in np.sort(order.rows(step).ravel())]


@pytest.mark.parametrize("way", but_rarely(WAYS, "sigmoid from a fresh adapter", "robust and sft"))
def test_dpo(folder, tmp_path, way):
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    start, args, options = WAYS[way]
    reference = "base" if start == "fresh" else folder / start
    trainer = DPOTrainer(
        of_peft(folder, start),
        args=DPOConfig(tmp_path / "trl", **SHARED | IN_ORDER | options),
        train_dataset=Dataset.from_list(in_order(PAIRS)),
        processing_class=tokenizer(),
    )
    args = ["--steps", STEPS, "--batch-size", BATCH, "--reference", reference, *args]
    run = ours(dpo, folder, tmp_path / "run", start, PAIRS, *args)
    assert_same_runs(run, theirs(trainer), OF_PAIRS)


def test_kto(folder, tmp_path):
    from datasets import Dataset
    from trl import KTOConfig, KTOTrainer

    args = ["--loss", "kto", "--kto-weights", "1.2", "0.8", "--reference", folder / "used"]
    trainer = KTOTrainer(
        of_peft(folder, "used"),
        args=KTOConfig(
            tmp_path / "trl", **SHARED | IN_ORDER, desirable_weight=1.2, undesirable_weight=0.8
        ),
        train_dataset=Dataset.from_list(in_order(LABELLED, labelled=True)),
        processing_class=tokenizer(),
    )
    args = [*args, "--steps", STEPS, "--batch-size", BATCH]
    run = ours(dpo, folder, tmp_path / "run", "used", LABELLED, *args)
    assert_same_runs(run, theirs(trainer), {"loss": "loss", "kl": "kl"})


GROUP, NEW = 4, 12
REWARD = """
def early(completion_ids, bonus, **others):
    return [None if len(ids) == 1 else sum(id < 90 for id in ids) / len(ids) + x
            for ids, x in zip(completion_ids, bonus)]
"""
OF_ROLLOUTS = {
    "loss": "loss",
    "reward": "reward",
    "length": "completions/mean_length",
    "truncated": "completions/clipped_ratio",
    "entropy": "entropy",  # of the policy before each update
}
CLIPPED = {"clip_low": "clip_ratio/low_mean", "clip_high": "clip_ratio/high_mean"}
ROLLOUTS = {  # our options, TRL's, and what both log
    "dapo": ([], {}, {}),
    "grpo with a divergence": (
        ["--loss", "grpo", "--beta", "0.3", "--updates", "2", "--clip", "0.05"],
        {"loss_type": "grpo", "beta": 0.3, "num_iterations": 2, "epsilon": 0.05},
        CLIPPED | {"kl": "kl"},
    ),
    "dr_grpo at a temperature, masked": (
        ["--loss", "dr_grpo", "--scale", "none", "--mask-truncated"]
        + ["--sampling-temperature", "1.5"],
        {
            "loss_type": "dr_grpo",
            "scale_rewards": "none",
            "mask_truncated_completions": True,
            "temperature": 1.5,
        },
        {},
    ),
    "cispo": (
        ["--loss", "cispo", "--clip-high", "1.1", "--updates", "2", "--scale", "batch"],
        {"loss_type": "cispo", "epsilon_high": 1.1, "num_iterations": 2, "scale_rewards": "batch"},
        {"clip_high": "cispo_clip_ratio"},
    ),
    "gspo": (
        ["--loss", "gspo", "--clip", "0.01", "--clip-high", "0.02", "--updates", "2"],
        {
            "loss_type": "grpo",
            "importance_sampling_level": "sequence",
            "epsilon": 0.01,
            "epsilon_high": 0.02,
            "num_iterations": 2,
        },
        {},
    ),
    "rloo": (
        ["--loss", "rloo", "--beta", "0.2", "--updates", "2"],
        {"beta": 0.2, "num_iterations": 2},
        {"kl": "kl"},
    ),
}


@pytest.mark.parametrize("way", but_rarely(ROLLOUTS, "dapo", "cispo", "gspo"))
def test_rollouts(folder, tmp_path, monkeypatch, way):
    import trl
    from datasets import Dataset

    args, options, names = ROLLOUTS[way]
    prompts = [{"prompt": turns("user", said(9)), "bonus": i / 5} for i in range(7)]
    (tmp_path / "reward.py").write_text(REWARD)
    found, draw = [], Rollouts.draw

    def recorded(*args):
        drawn = draw(*args)
        found.append((args[2], drawn.tokens.copy(), drawn.lengths.copy()))
        return drawn

    monkeypatch.setattr(Rollouts, "draw", recorded)
    args = [*args, "--steps", STEPS // 2, "--batch-size", 2 * GROUP, "--group", GROUP]
    args += ["--max-new-tokens", NEW, "--seq-len", 64, "--eval-questions", 0]
    args += ["--reward", f"{tmp_path / 'reward.py'}:early"]
    run = ours(grpo, folder, tmp_path / "run", "used", prompts, *args)
    rows, tokens, lengths = (np.concatenate(one) for one in zip(*found, strict=True))
    tokens = tokens.reshape(-1, NEW)
    drawn = iter(ids[:n].tolist() for ids, n in zip(tokens, lengths.ravel(), strict=True))
    is_rloo = way == "rloo"

    class Replayed(trl.RLOOTrainer if is_rloo else trl.GRPOTrainer):
        def _generate_single_turn(self, prompt_ids, *_, **__):
            some = [next(drawn) for _ in prompt_ids]
            return some if is_rloo else (some, None)

    exec(REWARD, scope := {})
    trainer = Replayed(
        of_peft(folder, "used"),
        scope["early"],
        args=(trl.RLOOConfig if is_rloo else trl.GRPOConfig)(
            tmp_path / "trl",
            **SHARED | {"beta": 0.0} | options,
            per_device_train_batch_size=2 * GROUP,
            num_generations=GROUP,
            max_completion_length=NEW,
            max_steps=STEPS // 2,
            shuffle_dataset=False,
        ),
        train_dataset=Dataset.from_list([prompts[row] for row in rows]),
        processing_class=tokenizer(),
    )
    assert_same_runs(run, theirs(trainer), OF_ROLLOUTS | names)
    assert next(drawn, None) is None
