"""The names that transformers, PEFT, TRL and axolotl have for options of the scripts."""

from collections.abc import Collection, Sequence

from train.console.errors import UserError, flag
from train.options.field import given_options

# The other tool's name -> the option of this library, and its difference in parentheses.
_OPTIONS_BY_OTHER_NAME = {
    **dict.fromkeys(("model_name_or_path", "base_model"), "--model"),
    **dict.fromkeys(("adapter_name_or_path", "lora_model_dir"), "--init-adapter"),
    **dict.fromkeys(("dataset_name", "datasets", "train_file"), "--dataset"),
    **dict.fromkeys(("dataset_config", "dataset_config_name"), "--subset"),
    "dataset_train_split": "--split",
    "dataset_test_split": "--eval-split",
    "dataset_text_field": "--fields text=NAME",
    "max_train_samples": "--rows",
    "val_set_size": "--eval-every (it holds rows out)",
    "output_dir": "--output",
    **dict.fromkeys(("r", "lora_r", "lora_rank"), "--rank"),
    "lora_alpha": "--alpha",
    "lora_dropout": "--dropout",
    **dict.fromkeys(("target_modules", "lora_target_modules"), "--targets"),
    "lora_target_linear": "--targets all-linear",
    **dict.fromkeys(("modules_to_save", "lora_modules_to_save"), "--train"),
    "layers_to_transform": "--layers",
    "trainable_token_indices": "--train-tokens",
    "init_lora_weights": "--init",
    **dict.fromkeys(("use_dora", "peft_use_dora"), "--dora"),
    **dict.fromkeys(("use_rslora", "peft_use_rslora"), "--scaling 'alpha/sqrt(rank)'"),
    "loraplus_lr_ratio": "--lora-plus",
    "learning_rate": "--lr",
    **dict.fromkeys(("num_train_epochs", "num_epochs"), "--epochs"),
    "max_steps": "--steps",
    **dict.fromkeys(
        ("per_device_train_batch_size", "micro_batch_size"),
        "--batch-size (the rows on all devices together)",
    ),
    "gradient_accumulation_steps": "--grad-accum",
    "gradient_checkpointing": "--remat",
    "optim": "--optimizer",
    **dict.fromkeys(("lr_scheduler_type", "lr_scheduler"), "--schedule"),
    "warmup_steps": "--warmup",
    "max_grad_norm": "--grad-clip",
    "adam_beta1": "--beta1",
    "adam_beta2": "--beta2",
    "adam_epsilon": "--eps",
    "neftune_noise_alpha": "--neftune",
    **dict.fromkeys(("max_seq_length", "max_seq_len", "sequence_len", "max_length"), "--seq-len"),
    "sample_packing": "--packing",
    "attn_implementation": "--attention",
    "load_in_4bit": "--quantize nf4",
    "load_in_8bit": "--quantize int8",
    **dict.fromkeys(("torch_dtype", "bf16"), "--dtype bfloat16"),
    "logging_steps": "--log-every",
    "save_steps": "--save-every",
    "save_total_limit": "--keep",
    "eval_steps": "--eval-every",
    "load_best_model_at_end": "--keep-best loss",
    "early_stopping_patience": "--patience",
    "resume_from_checkpoint": "--resume",
    "overwrite_output_dir": "--overwrite",
    "loss_type": "--loss",
    "label_smoothing": "--smoothing",
    "cpo_alpha": "--nll-weight",
    "simpo_gamma": "--margin",
    "reward_funcs": "--reward",
    "num_generations": "--group",
    "num_iterations": "--updates",
    **dict.fromkeys(("max_completion_length", "max_tokens"), "--max-new-tokens"),
    "epsilon": "--clip",
    "epsilon_high": "--clip-high",
    "max_model_len": "--max-length",
    "max_lora_rank": "--max-rank",
}
# The other tool's name -> answers, each for scripts that have a certain option.
_ANSWERS_BY_OTHER_NAME = {
    "use_peft": {"full": "the default (--full trains without an adapter)"},
    "fp16": {"merged": "--dtype float16", "dtype": "--dtype bfloat16 (there is no float16)"},
}


def check_names(args: Sequence[str], known: Collection[str]) -> None:
    """Raises a UserError with the script's option for each option that has another tool's name.

    Args:
      args: the command line.
      known: the names of the script's options.
    """
    renamed = []
    for name in sorted(given_options(args)):
        option = own_name(name, known)
        if option:
            renamed.append(f"{flag(name)} is {option}")
    if renamed:
        raise UserError(
            "Other tools call some options differently. Use the names of this script instead: "
            f"{', '.join(renamed)}."
        )


def own_name(name: str, known: Collection[str]) -> str | None:
    """Returns the script's option that corresponds to another tool's option.

    The result is None if the script has no such option, or has an option with the other tool's
    name.

    Args:
      name: the other tool's name, with underscores.
      known: the names of the script's options.
    """
    if name in known:
        return None
    for option, answer in _ANSWERS_BY_OTHER_NAME.get(name, {}).items():
        if option in known:
            return answer
    text = _OPTIONS_BY_OTHER_NAME.get(name)
    if text is None:
        return None
    option = text.split()[0].removeprefix("--").replace("-", "_")
    return text if option in known else None
