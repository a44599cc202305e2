"""Computes and prints the scores of a classifier, and draws its confusion matrix as a PNG.

scikit-learn and Matplotlib take two seconds to import, so the functions import them themselves.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from train.console.output import print_figures

_N_SHOWN_MISTAKES = 8


def scores_of(
    labels: np.ndarray, predicted: np.ndarray, names: Sequence[str], unit: str = "texts"
) -> dict[str, Any]:
    """Computes accuracy, macro F1 (mean over classes), per-class scores, and the confusion matrix.

    Args:
      labels, predicted: [n], indices of `names`.
      names: the classes.
      unit: the noun for the classified things, which is also the key of their number per class.
    """
    from sklearn import metrics

    class_indices = range(len(names))
    precisions, recalls, f1_scores, counts = metrics.precision_recall_fscore_support(
        labels, predicted, labels=class_indices, zero_division=0.0
    )
    class_scores: dict[str, dict[str, Any]] = {}
    for index, name in enumerate(names):
        class_scores[name] = {
            "precision": precisions[index].item(),
            "recall": recalls[index].item(),
            "f1": f1_scores[index].item(),
            unit: counts[index].item(),
        }
    confusion = metrics.confusion_matrix(labels, predicted, labels=class_indices)
    return {
        "accuracy": float(metrics.accuracy_score(labels, predicted)),
        "macro_f1": float(f1_scores.mean()),
        "classes": class_scores,
        "confusion": confusion.tolist(),
    }


def draw_confusion(path: Path, confusion: Sequence[Sequence[int]], names: Sequence[str]) -> None:
    """Draws the confusion matrix as a PNG; rows are labels, columns are predictions."""
    from matplotlib.figure import Figure
    from sklearn.metrics import ConfusionMatrixDisplay

    matrix = np.array(confusion)
    size = 3.2 + 0.6 * len(names)
    # Without pyplot: no window, no global state.
    figure = Figure(figsize=(size + 0.8, size), layout="tight")
    axes = figure.subplots()
    shown = ConfusionMatrixDisplay(matrix, display_labels=list(names))
    rotation = "horizontal" if len(names) < 6 else "vertical"
    shown.plot(ax=axes, cmap="Blues", colorbar=False, values_format="d", xticks_rotation=rotation)
    axes.set(xlabel="predicted", ylabel="label")
    figure.savefig(path, dpi=120)


def print_scores(
    console: Console, scores_of_classifier: Mapping[str, Mapping[str, Any]], data: str
) -> None:
    """Prints a table of accuracy and macro F1 in %, with a row per classifier."""
    rows = [
        (classifier, *_percents(scores, "accuracy", "macro_f1"))
        for classifier, scores in scores_of_classifier.items()
    ]
    print_figures(console, f"{data}, in %", ("by", "accuracy", "macro F1"), rows)


def print_classes(console: Console, scores: Mapping[str, Any], unit: str) -> None:
    """Prints a table of precision, recall and F1 in %, with a row per class."""
    rows = [
        (escape(name), *_percents(row, "precision", "recall", "f1"), str(row[unit]))
        for name, row in scores["classes"].items()
    ]
    columns = ("class", "precision", "recall", "F1", unit)
    print_figures(console, "The fine-tuned model, in %", columns, rows)


def _percents(scores: Mapping[str, Any], *names: str) -> list[str]:
    """Returns scores as texts in percent."""
    return [f"{100 * scores[name]:.1f}" for name in names]


def print_mistakes(
    console: Console,
    texts: Sequence[str],
    labels: np.ndarray,
    probabilities: np.ndarray,
    names: Sequence[str],
    unit: str,
) -> None:
    """Prints a table of the mistakes with the highest predicted probability."""
    predictions = probabilities.argmax(-1)
    confidences = probabilities.max(-1)
    mistakes = np.flatnonzero(predictions != labels)
    most_confident_first = np.argsort(-confidences[mistakes], kind="stable")
    mistakes = mistakes[most_confident_first][:_N_SHOWN_MISTAKES]
    if len(mistakes) == 0:
        return
    table = Table(title="The most confident mistakes")
    table.add_column(unit.removesuffix("s"), overflow="fold", max_width=60)
    table.add_column("label")
    table.add_column("predicted")
    for index in mistakes.tolist():
        label = names[labels[index]]
        prediction = f"{names[predictions[index]]} ({100 * confidences[index]:.0f}%)"
        table.add_row(escape(texts[index]), escape(label), escape(prediction))
    console.print(table)
