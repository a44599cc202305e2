import dataclasses
import json
import math

import pytest

from tests.train.compare.made_up import example, run
from train.compare.peft_experiment import read_experiment
from train.compare.reporting.peft_json import write
from train.compare.result import Arm
from train.console.errors import UserError

# The keys of a result that PEFT's own script wrote in July 2026, with 5,000 steps of MetaMathQA.
KEYS = {
    "run_info": """created_at total_time experiment_name peft_branch train_config peft_config
        error_msg""",
    "run_info.train_config": """model_id dtype max_seq_length batch_size batch_size_eval max_steps
        eval_steps compile use_gc query_template seed grad_norm_clip optimizer_type
        optimizer_kwargs lr_scheduler use_amp autocast_adapter_dtype generation_kwargs
        attn_implementation init_kv_cache_prefix""",
    "train_info": """accelerator_memory_reserved_avg accelerator_memory_max
        accelerator_memory_reserved_99th train_time file_size num_trainable_params num_total_params
        status metrics""",
    "meta_info": "model_info dataset_info package_info system_info pytorch_info",
    "meta_info.model_info": "sha created_at",
    "meta_info.system_info": "system release version machine processor accelerator",
}
# Those of its LoraConfig.
LORA = """task_type peft_type auto_mapping peft_version base_model_name_or_path revision
    inference_mode r
    target_modules exclude_modules lora_alpha lora_dropout fan_in_fan_out bias use_rslora
    modules_to_save init_lora_weights layers_to_transform layers_pattern rank_pattern alpha_pattern
    megatron_config megatron_core trainable_token_indices loftq_config eva_config corda_config
    lora_ga_config use_dora velora_config alora_invocation_tokens use_qalora qalora_group_size
    monteclora_config layer_replication lora_bias target_parameters use_bdlora arrow_config
    ensure_weight_tying"""
STEP = """step|valid accuracy|train loss|train samples|train time|eval time|tokens / sec|
    mem allocated avg|mem reserved avg|elapsed time"""
LAST = "step|test accuracy|train loss|train samples|train total tokens|forgetting"
PACKAGES = """transformers-version transformers-commit-hash peft-version peft-commit-hash
    datasets-version datasets-commit-hash bitsandbytes-version bitsandbytes-commit-hash
    torch-version torch-commit-hash"""


def strict(path):
    return json.loads(path.read_text(), parse_constant=pytest.fail)


def test_results_have_the_keys_of_peft(tmp_path):
    comparison = example()
    head = run(Arm("head-only", None, None, None, 1e-3, 8), 0, 1.0)
    waiting = run(comparison.runs[0].arm, 3, 1.0, status="waiting")
    more = dataclasses.replace(comparison, runs=(*comparison.runs, head, waiting))
    files = write(more, tmp_path / "peft")
    assert len(files) == len(set(files)) == len(comparison.runs)
    for file, made in zip(files, comparison.runs, strict=True):
        found = strict(file)
        assert list(found) == ["run_info", "train_info", "meta_info"]
        for path, names in KEYS.items():
            part = found
            for name in path.split("."):
                part = part[name]
            assert set(part) == set(names.split()), path
        assert set(PACKAGES.split()) <= set(found["meta_info"]["package_info"])
        *on_the_way, last = found["train_info"]["metrics"]
        assert set(last) == set(LAST.split("|"))
        assert all(set(one) == {name.strip() for name in STEP.split("|")} for one in on_the_way)
        assert len(on_the_way) == len(made.held_out)
        config = found["run_info"]["peft_config"]
        assert (config is None) == (made.arm.method == "full")
        assert config is None or set(config) == set(LORA.split())


def test_results_have_the_figures_of_the_runs(tmp_path):
    comparison = example()
    files = write(comparison, tmp_path)
    by_method = {made.arm.method: (strict(file), made) for file, made in zip(
        files, comparison.runs, strict=True)}  # fmt: skip
    found, made = by_method["dora"]
    trained, info = found["train_info"], found["run_info"]
    assert info["experiment_name"] == f"lora/{made.name}"
    assert trained["num_total_params"] == 1_000_000_000 + made.trained_parameters
    assert trained["accelerator_memory_max"] == made.compiled_bytes
    assert trained["metrics"][-1]["test accuracy"] == made.score
    assert trained["metrics"][-1]["train loss"] == made.losses[-1].value
    assert trained["metrics"][-1]["forgetting"] == made.forgetting.after - made.forgetting.before
    assert trained["metrics"][2]["train samples"] == made.held_out[2].step * 8
    assert (info["peft_config"]["use_dora"], info["peft_config"]["r"]) == (True, 8)
    assert by_method["full"][0]["train_info"]["num_total_params"] == 1_000_000_000
    statuses = [strict(file)["train_info"]["status"] for file in files[:4]]
    assert statuses == ["canceled", "canceled", "failed", "success"]
    assert strict(files[2])["run_info"]["error_msg"] == comparison.runs[2].error
    assert math.isnan(comparison.runs[2].losses[-1].value)
    assert strict(files[2])["train_info"]["metrics"][-1]["train loss"] is None


def experiment(root, config=None, **params):
    """Writes an experiment as PEFT's repository has them, and returns its folder."""
    defaults = {
        **{"model_id": "meta-llama/Llama-3.2-3B", "dtype": "bfloat16", "max_seq_length": 768},
        **{"batch_size": 4, "batch_size_eval": 51, "max_steps": 5000, "eval_steps": 250},
        **{"compile": False, "use_gc": False, "seed": 0, "grad_norm_clip": 1.0},
        **{"optimizer_type": "AdamW", "optimizer_kwargs": {"lr": 1e-4, "weight_decay": 0.1}},
        **{"lr_scheduler": "cosine", "use_amp": False, "autocast_adapter_dtype": True},
        **{"generation_kwargs": {}, "query_template": "{query}", "attn_implementation": None},
    }
    folder = root / "experiments" / "lora" / "made-up"
    folder.mkdir(parents=True, exist_ok=True)
    (root / "default_training_params.json").write_text(json.dumps(defaults))
    (folder / "training_params.json").write_text(json.dumps(params))
    if config is not None:
        plain = {"peft_type": "LORA", "r": 32, "lora_alpha": 64, "target_modules": None}
        (folder / "adapter_config.json").write_text(json.dumps(plain | config))
    return folder


def test_an_experiment_is_an_arm_with_options(tmp_path):
    found = read_experiment(experiment(tmp_path, {"lora_dropout": 0.05}, batch_size=2))
    assert found.arm == Arm("lora", 32, ("q_proj", "v_proj"), 64.0, 1e-4, 2)
    assert found.seed == 0
    assert found.options == {
        **{"model": "meta-llama/Llama-3.2-3B", "dtype": "bfloat16", "seq_len": 768},
        **{"steps": 5000, "eval_every": 250, "grad_clip": 1.0, "schedule": "cosine"},
        **{"warmup": 500, "weight_decay": 0.1, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8},
        "dropout": 0.05,
    }


@pytest.mark.parametrize(
    ("config", "params", "method"),
    [
        ({"use_dora": True, "target_modules": ["up_proj"]}, {}, "dora"),
        ({"use_rslora": True}, {}, "rslora"),
        ({"init_lora_weights": "pissa"}, {}, "pissa"),
        (
            {},
            {"optimizer_type": "lora-fa", "optimizer_kwargs": {"r": 32, "lora_alpha": 64, "lr": 1}},
            "lora-fa",
        ),
        (
            {},
            {
                "optimizer_type": "lora+",
                "optimizer_kwargs": {"optimizer_kwargs": {"lr": 1e-4}, "loraplus_lr_ratio": 16},
            },
            "lora-plus",
        ),
    ],
)
def test_variants_are_methods(tmp_path, config, params, method):
    assert read_experiment(experiment(tmp_path, config, **params)).arm.method == method


def test_an_experiment_without_an_adapter_trains_in_full_with_torchs_decay(tmp_path):
    found = read_experiment(experiment(tmp_path, optimizer_kwargs={"lr": 1e-5}))
    assert found.arm == Arm("full", None, None, None, 1e-5, 4)
    assert found.options["weight_decay"] == 0.01


@pytest.mark.parametrize(
    ("config", "params", "said"),
    [
        ({"peft_type": "LOHA"}, {}, "peft_type is 'LOHA'"),
        ({"rank_pattern": {"q_proj": 4}}, {}, "rank_pattern="),
        ({"use_dora": True, "use_rslora": True}, {}, "dora and rslora together"),
        ({"init_lora_weights": "eva"}, {}, "init_lora_weights='eva'"),
        ({"target_modules": ".*_proj"}, {}, "target_modules='.*_proj'"),
        ({}, {"model_id": "made/up"}, "target_modules is null"),
        ({}, {"optimizer_type": "riemannian"}, "optimizer_type='riemannian'"),
        ({}, {"use_amp": True}, "use_amp=True"),
        ({}, {"dtype": "int4"}, "dtype='int4'"),
        ({}, {"colour": 1}, "colour=1: is not known"),
        ({}, {"max_steps": "many"}, "max_steps='many'"),
        ({}, {"optimizer_kwargs": {"lr": 1e-4, "amsgrad": True}}, "amsgrad: not known"),
        ({}, {"optimizer_kwargs": {}}, "lr must be a number"),
        (None, {"optimizer_type": "lora-fa"}, "trains adapters alone"),
    ],
)
def test_what_cannot_be_done_is_refused_by_name(tmp_path, config, params, said):
    with pytest.raises(UserError) as error:
        read_experiment(experiment(tmp_path, config, **params))
    assert said in str(error.value)


def test_missing_files_and_fields_are_named(tmp_path):
    with pytest.raises(UserError, match="neither adapter_config.json nor"):
        read_experiment(tmp_path)
    folder = experiment(tmp_path, {}, optimizer_kwargs={"lr": 1e-4})
    (tmp_path / "default_training_params.json").unlink()
    with pytest.raises(UserError, match="max_steps is missing"):
        read_experiment(folder)
