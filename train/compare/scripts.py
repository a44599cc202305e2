"""The scripts whose runs are compared, and the options of a comparison of each."""

import dataclasses

from train import classify, grpo, sft
from train.compare.options import CompareConfig
from train.compare.trials import ComparedScript
from train.console.help import HelpPage
from train.options.scripts import classify as classify_options
from train.options.scripts import grpo as grpo_options
from train.options.scripts import sft as sft_options

OUTPUT = "runs/compare"


@dataclasses.dataclass(frozen=True, kw_only=True)
class SftCompareRun(sft_options.SftRunConfig):
    """Evaluation and output."""

    output: str = OUTPUT
    """The output folder of the comparison: its report, its measurements, and a folder a run."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SftCompare(sft_options.Config):
    """Compare LoRA and full fine-tuning of a language model."""

    HELP = HelpPage(
        "model dataset output methods ranks lrs seeds quick topology resume",
        "--model Qwen/Qwen3-0.6B --dataset chats.jsonl --ranks 1 8 64 --quick",
    )

    compare: CompareConfig = CompareConfig()
    run: SftCompareRun = SftCompareRun()


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClassifyCompare(classify_options.Config):
    """Compare LoRA and full fine-tuning of a classifier."""

    HELP = HelpPage(
        "model dataset output methods ranks lrs seeds quick topology resume",
        "--methods lora dora full head-only --quick",
    )

    compare: CompareConfig = CompareConfig()
    run: classify_options.ClassifyRunConfig = classify_options.ClassifyRunConfig(output=OUTPUT)


@dataclasses.dataclass(frozen=True, kw_only=True)
class GrpoCompareRun(grpo_options.GrpoRunConfig):
    """Evaluation and output."""

    output: str = OUTPUT
    """The output folder of the comparison: its report, its measurements, and a folder a run."""
    score_every: int = 0
    """Steps between measurements of the reward on held-out prompts, by which hopeless settings are
    stopped early. By default an eighth of a run."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class GrpoCompare(grpo_options.Config):
    """Compare LoRA and full fine-tuning of a language model on rewards of its completions."""

    HELP = HelpPage(
        "model dataset reward output methods ranks lrs batch_sizes quick resume",
        "--model Qwen/Qwen3-0.6B --dataset prompts.jsonl --reward judge.py:judge --ranks 1 16",
    )

    compare: CompareConfig = CompareConfig()
    run: GrpoCompareRun = GrpoCompareRun()


CompareOptions = SftCompare | ClassifyCompare | GrpoCompare
SCRIPTS = {
    "sft": ComparedScript(
        name="train.sft",
        compared=SftCompare(),
        plain=sft_options.Config(run=sft_options.SftRunConfig(eval_questions=64)),
        task_of=sft.task_of,
        check=sft.check,
        with_defaults=sft.SCRIPT.completed,
        quick={
            "steps": 8,
            "warmup": 2,
            "batch_size": 2,
            "seeds": (0, 1),
            "eval_every": 2,
            "eval_questions": 8,
        },
        quick_full=(1.0, 3.0),
    ),
    "classify": ComparedScript(
        name="train.classify",
        compared=ClassifyCompare(),
        plain=classify_options.Config(),
        task_of=classify.task_of,
        check=classify.check,
        with_defaults=classify.SCRIPT.completed,
        quick={"epochs": 1.0, "seeds": (0, 1)},
        quick_full=(1.0, 3.0, 9.0),
    ),
    "grpo": ComparedScript(
        name="train.grpo",
        compared=GrpoCompare(),
        plain=grpo_options.Config(),
        task_of=grpo.task_of,
        check=grpo.check,
        with_defaults=grpo.completed,
        quick={"steps": 120, "warmup": 10, "seeds": (0, 1), "eval_questions": 128},
        quick_full=(1.0, 3.0),
        every="score_every",
    ),
}
_BY_REWARDS = {
    "demonstrations": "the rows of --dataset are demonstrations already; they are for grpo",
    "kl": "it is measured on held-out prompts, which grpo has",
}
NOT_OF = {  # options of a comparison that some scripts do not take
    "sft": _BY_REWARDS,
    "classify": {
        **_BY_REWARDS,
        "outside": "a classifier has no loss on text, so that nothing tells what it forgets",
        "topology": "train.plan plans language models, not classifiers",
    },
    "grpo": {"topology": "train.plan plans steps on rows, not the drawing of completions"},
}
