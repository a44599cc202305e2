"""Results as a picture: horizontal bars of ratios, a panel for each case."""

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from tests.benchmarks.peers.contenders import CONTENDERS


def draw(results: dict[str, Any], file: Path) -> None:
    """Draws the medians of all ratios, with whiskers from the least to the largest.

    Raises:
      ValueError: no ratio was measured.
    """
    panels = []
    for result in results["cases"]:
        entries = {n: e for n, e in result["contenders"].items() if "ratio" in e}
        if entries:
            panels.append((result, entries))
    if not panels:
        raise ValueError("no ratio was measured, so there is nothing to draw")
    heights = [0.9 + 0.34 * len(entries) for _, entries in panels]
    figure, axes = plt.subplots(
        len(panels),
        1,
        figsize=(9, sum(heights) + 0.4),
        height_ratios=heights,
        layout="constrained",
        squeeze=False,
    )
    for axis, (result, entries) in zip(axes[:, 0], panels, strict=True):
        _panel(axis, result, entries)
    axes[-1, 0].set_xlabel("time of the first ÷ time of the bar's contender")
    figure.savefig(file, dpi=150)
    plt.close(figure)


def _panel(axis: Any, result: dict[str, Any], entries: dict[str, Any]) -> None:
    ratios = [entry["ratio"] for entry in entries.values()]
    medians = [found["median"] for found in ratios]
    whiskers = [
        [found["median"] - found["min"] for found in ratios],
        [found["max"] - found["median"] for found in ratios],
    ]
    colours = ["tab:green" if median < 1 else "tab:orange" for median in medians]
    axis.barh(range(len(medians)), medians, xerr=whiskers, color=colours, capsize=3)
    right = max(1.25, 1.18 * max(found["max"] for found in ratios))
    for i, found in enumerate(ratios):
        axis.text(found["max"] + 0.01 * right, i, f" {found['median']:.2f}", va="center")
    axis.set_yticks(range(len(medians)), [CONTENDERS[name].title for name in entries])
    axis.invert_yaxis()
    axis.axvline(1, color="black", linewidth=1)
    axis.set_xlim(0, right)
    axis.spines[["top", "right"]].set_visible(False)
    first = CONTENDERS[result["reference"]].title
    axis.set_title(f"{result['case']['title']}: {first} ÷ …", loc="left", fontsize=10)
