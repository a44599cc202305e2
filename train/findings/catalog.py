"""The findings that can be repeated: the published claims, and how to show the measurements."""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from train.console.errors import UserError
from train.findings.making import habit, mixture, questions, sums, vocabulary
from train.findings.making.inputs import FindingInputs
from train.findings.reporting.pivot import PivotLayout
from train.processes.session import Session

_HERE = Path(__file__).parent


@dataclasses.dataclass(frozen=True, kw_only=True)
class Finding:
    """A published finding and the comparison that repeats it.

    Attributes:
      title: in a line.
      said: what was published, and where.
      script: script whose runs are compared.
      layout: what stands where in its tables.
      measures: names of the measures that it has tables of; its picture shows the first one.
      shows: the layout of its picture; None for that of its tables.
      make: makes what it needs in a folder; None where it needs nothing.
      makes: the options that name what it makes.
    """

    title: str
    said: str
    script: Literal["sft", "classify", "grpo"] = "classify"
    layout: PivotLayout
    measures: tuple[str, ...] = ("score", "loss")
    shows: PivotLayout | None = None
    make: Callable[[Path, Session], FindingInputs] | None = None
    makes: tuple[str, ...] = ()

    @property
    def picture(self) -> PivotLayout:
        """Returns the layout of the picture."""
        return self.shows or self.layout


_BY_SIZE = PivotLayout("trained parameters", "targets", best_of_cell=True)
FINDINGS: dict[str, Finding] = {
    "rates": Finding(
        title="The best learning rate, and how much rank is enough",
        said="*LoRA Without Regret* (Schulman et al., 2025): LoRA's best learning rate is about "
        "ten times that of full fine-tuning and nearly independent of the rank, and enough rank "
        "reaches full fine-tuning's loss.",
        layout=PivotLayout("learning rate", "rank"),
    ),
    "targets": Finding(
        title="Attention, MLP or all layers",
        said="*LoRA Without Regret* (Schulman et al., 2025): LoRA on attention alone is worse than "
        "on the MLP, at equal numbers of parameters too, and attention adds nothing to the MLP.",
        layout=PivotLayout("learning rate", "targets × rank"),
        measures=("loss", "score"),
        shows=_BY_SIZE,
    ),
    "batches": Finding(
        title="Large batches",
        said="*LoRA Without Regret* (Schulman et al., 2025): LoRA loses more by large batches than "
        "full fine-tuning does, whatever its rank.",
        layout=PivotLayout("learning rate", "batch size", ("method",)),
        measures=("loss", "score"),
        shows=PivotLayout("batch size", "method", best_of_cell=True),
    ),
    "variants": Finding(
        title="Variants of LoRA, each at its best learning rate",
        said="*Learning Rate Matters* (arXiv 2602.04998): each at its best learning rate, variants "
        "of LoRA are within two percent of LoRA itself; PiSSA needs a smaller rate.",
        layout=PivotLayout("learning rate", "method"),
    ),
    "alphas": Finding(
        title="The best alpha by rank",
        said="*LoRA-α* (arXiv 2606.12883): alpha matters more than the learning rate, and the best "
        "alpha grows with the root of the rank.",
        layout=PivotLayout("learning rate", "alpha", ("rank",)),
        measures=("loss", "score"),
        shows=PivotLayout("alpha", "rank", ("learning rate",)),
    ),
    "forgetting": Finding(
        title="Intruder dimensions and forgetting",
        said="*LoRA vs Full Fine-tuning: An Illusion of Equivalence* (arXiv 2410.21228): LoRA of a "
        "low rank has strong singular vectors that the base lacks, full fine-tuning has none, and "
        "they go along with forgetting. *LoRA Learns Less and Forgets Less* (arXiv 2405.09673).",
        script="sft",
        layout=PivotLayout("learning rate", "rank"),
        measures=("forgetting", "loss", "intruders"),
        # A model of 135 million weights measures each of them after each of 18 runs.
        make=functools.partial(questions.make, test_rows=32),
        makes=("dataset", "eval_dataset"),
    ),
    "dimension": Finding(
        title="The intrinsic dimension",
        said="*Intrinsic Dimensionality Explains the Effectiveness of Language Model Fine-Tuning* "
        "(Aghajanyan et al., arXiv 2012.13255): a few hundred numbers, projected at random into "
        "all weights, reach 90% of full fine-tuning's score; fewer with a scale for each layer "
        "(SAID) than without (DID).",
        layout=PivotLayout("dimension", "method"),
    ),
    "sizes": Finding(
        title="From 13 numbers to all of them",
        said="*Learning to Reason in 13 Parameters* (arXiv 2602.04118), *LoRA-XS* (arXiv "
        "2405.17604) and *VeRA* (arXiv 2310.11454) find that far fewer numbers than LoRA trains "
        "come near full fine-tuning.",
        layout=PivotLayout("trained parameters", "method", at_best_rate=True),
    ),
    "vocabulary": Finding(
        title="A new vocabulary",
        said="Recipes for new languages and contexts train the embeddings beside LoRA, because "
        "LoRA on the layers alone falls behind full fine-tuning (*Chinese-LLaMA*, arXiv "
        "2304.08177; *LongLoRA*, arXiv 2309.12307).",
        layout=PivotLayout("learning rate", "targets"),
        make=vocabulary.make,
        makes=("model", "dataset", "test"),
    ),
    "habit": Finding(
        title="A planted habit to unlearn",
        said="A few examples and a low-rank adapter undo a habit that training put into all "
        "weights (Lermen et al., arXiv 2310.20624, on refusals), although changes by full "
        "fine-tuning have a high rank (*LoRA Learns Less and Forgets Less*, arXiv 2405.09673).",
        layout=PivotLayout("learning rate", "rank"),
        make=habit.make,
        makes=("model", "dataset", "test"),
    ),
    "moe": Finding(
        title="A mixture of experts: LoRA on the experts, or on attention alone",
        said="*LoRA Without Regret* (Schulman et al., 2025): LoRA on attention alone is worse than "
        "on the MLP, in mixtures of experts too.",
        script="sft",
        layout=PivotLayout("learning rate", "targets × rank"),
        measures=("loss",),
        shows=_BY_SIZE,
        make=mixture.make,
        makes=("model", "dataset", "eval_dataset"),
    ),
    "rl-rank": Finding(
        title="Rank and rate by rewards, from 1 to all weights",
        said="*LoRA Without Regret* (Schulman et al., 2025): by rewards, rank 1 equals full "
        "fine-tuning, at about ten times its learning rate. Another paper (arXiv 2601.09361) finds "
        "that rank 8 fails, and 256 is best.",
        script="grpo",
        layout=PivotLayout("learning rate", "rank"),
        measures=("score",),
    ),
    "rl-batches": Finding(
        title="Large batches by rewards, by rank",
        said="A paper of 2026 (OpenReview XGZHI14m8P) finds that LoRA of rank 64 has 73.1% at "
        "batch 64, and 8.7 and 6.0% at 128 and 256.",
        script="grpo",
        layout=PivotLayout("learning rate", "batch size", ("rank",)),
        measures=("score",),
        shows=PivotLayout("batch size", "rank", best_of_cell=True),
    ),
    "rl-numbers": Finding(
        title="How few numbers are enough by rewards",
        said="*Learning to Reason in 13 Parameters* (arXiv 2602.04118): by rewards, 13 trained "
        "numbers take a model of 7 billion to 91% on GSM8K.",
        script="grpo",
        layout=PivotLayout("trained parameters", "method", at_best_rate=True),
        measures=("score",),
        shows=PivotLayout("trained parameters", "method", best_of_cell=True),
    ),
    "rl-forgetting": Finding(
        title="What rewards forget beside examples, at the same score",
        said="*RL's Razor* (arXiv 2509.04259): what is forgotten follows the divergence from the "
        "base on the new task, and at the same score rewards move a model less than examples do.",
        script="grpo",
        layout=PivotLayout("learning rate", "method"),
        measures=("divergence at one score", "divergence", "score"),
        make=sums.make,
        makes=("demonstrations",),
    ),
}


def find(name: str) -> Finding:
    """Returns a finding by its name.

    Raises:
      UserError: there is none of this name.
    """
    if name not in FINDINGS:
        raise UserError(f"there is no finding {name!r}. Choose one of {', '.join(FINDINGS)}.")
    return FINDINGS[name]


def options_of(name: str) -> Path:
    """Returns the path of a finding's options file."""
    return _HERE / f"{name}.yaml"
