"""Results as text for a terminal, and as the README's Markdown."""

import re
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.benchmarks.peers.contenders import CONTENDERS
from tests.benchmarks.peers.machine import PACKAGES, peak_of

BEGIN, END = "<!-- benchmarks: begin -->", "<!-- benchmarks: end -->"
STEPS = ("train", "classify")


def ratio(entry: dict[str, Any]) -> str:
    """Returns "0.95 (0.93–0.97)": the median over rounds, the least and the largest."""
    found = entry["ratio"]
    return f"{found['median']:.2f} ({found['min']:.2f}–{found['max']:.2f})"


def in_order(result: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Returns (contender, entry), the reference first."""
    found = result["contenders"]
    return [(name, found[name]) for name in result["case"]["contenders"] if name in found]


def flops_ratio(result: dict[str, Any], name: str) -> float | None:
    """Returns the reference's FLOPs over a contender's, of a step; None if one is not counted."""
    if result["case"]["kind"] not in STEPS:
        return None
    ours = result["contenders"].get(result["reference"], {}).get("flops")
    counted = "full" if CONTENDERS[name].group == "full" else name  # torch does the same work
    theirs = result["contenders"].get(counted, {}).get("flops")
    return ours / theirs if ours and theirs else None


def size(count: float) -> str:
    """Returns bytes for people: "1.93 GB" or "259 MB"."""
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:,.0f} MB"


def duration(seconds: float) -> str:
    """Returns seconds for people: "2.81 s" or "12.3 ms"."""
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1e3 * seconds:.1f} ms"


def median_seconds(entry: dict[str, Any]) -> float | None:
    """Returns the median seconds of a run, of all turns; None if it was not timed."""
    times = entry.get("seconds")
    return statistics.median(times) if times else None


def speed(result: dict[str, Any], entry: dict[str, Any]) -> str:
    """Returns tokens/s, and the share of the device's peak (MFU) on a GPU."""
    seconds, tokens = median_seconds(entry), entry.get("tokens")
    if not seconds or not tokens:
        return ""
    text = f"{tokens / seconds:,.0f} tokens/s"
    if entry.get("device") != "gpu":
        return text
    flops = result["contenders"].get(result["reference"], {}).get("model_flops")
    peak = peak_of(entry.get("device_kind", ""))
    if not flops or result["case"]["dtype"] != "bfloat16":
        return text
    return f"{text}, MFU {flops / seconds / peak:.1%}" if peak else f"{text}, MFU unknown"


def text(results: dict[str, Any]) -> str:
    """Returns all results for a terminal."""
    lines = []
    for result in results["cases"]:
        reference = CONTENDERS[result["reference"]].title
        lines.append(f"\n{result['case']['title']}  [{result['case']['name']}]")
        lines.append(f"  {'':22s}{reference + ' takes':26s}{'time':>9s}  details")
        for name, entry in in_order(result):
            lines.append(f"  {CONTENDERS[name].title:22s}{_line(result, name, entry)}")
    return "\n".join(lines)


def _line(result: dict[str, Any], name: str, entry: dict[str, Any]) -> str:
    if entry["status"] not in ("measured", "compiled"):
        return f"{entry['status']}: {entry['reason']}"
    found = "1" if name == result["reference"] else ""
    if "ratio" in entry:
        found = ratio(entry) + " of its time"
    seconds = median_seconds(entry)
    shown = duration(seconds) if seconds else ""
    return f"{found:26s}{shown:>9s}  {'; '.join(_details(result, name, entry))}"


def _details(result: dict[str, Any], name: str, entry: dict[str, Any]) -> Iterator[str]:
    flops = flops_ratio(result, name)
    if flops and name != result["reference"]:
        yield f"FLOPs {flops:.3f}"
    if spoken := speed(result, entry):
        yield spoken
    for key, what in (
        ("process_peak", "peak of the process"),
        ("device_peak", "peak of the device"),
        ("temporaries", "compiled temporaries"),
    ):
        if entry.get(key):
            yield f"{what} {size(entry[key])}"
    parts = {"ready_s": "imports", "load_s": "load", "trace_s": "trace", "compile_s": "compile"}
    parts["first_s"] = "first step"
    times = [f"{what} {entry[key]:.2f}" for key, what in parts.items() if key in entry]
    if times:
        yield f"{', '.join(times)} s"


def markdown(results: dict[str, Any]) -> str:
    """Returns the README's block: ratios of steps, memory, the rest, and where it was measured."""
    steps = [r for r in results["cases"] if r["case"]["kind"] in STEPS]
    rest = [r for r in results["cases"] if r["case"]["kind"] not in STEPS]
    blocks = []
    if steps:
        columns = _columns(steps)
        blocks.append("A step of lora_jax takes so many times the step of (below 1: it is faster):")
        blocks.append(_grid(steps, columns[1:], _time_cell))
        blocks.append("Peak memory of the process (GPU: of the device), and compiled temporaries:")
        blocks.append(_grid(steps, columns, _memory_cell))
    if rest:
        blocks.append("Beside the step, the time of the first is so many times that of the second:")
        rows = [
            f"| {result['case']['title']} | {CONTENDERS[result['reference']].title} | "
            f"{CONTENDERS[name].title} | {_time_cell(result, name)} |"
            for result in rest
            for name in result["contenders"]
            if name != result["reference"]
        ]
        blocks.append("\n".join(["| case | first | second | times |", "|---|---|---|---|", *rows]))
    reasons = _reasons(results)
    if reasons:
        blocks.append("\n".join(f"- {reason}" for reason in reasons))
    blocks.append(provenance(results))
    return "\n\n".join(blocks)


def provenance(results: dict[str, Any]) -> str:
    """Returns where, when and with which versions the figures were measured."""
    machine = results["machine"]
    entries = [entry for result in results["cases"] for entry in result["contenders"].values()]
    kinds = {entry["device_kind"] for entry in entries if entry.get("device") == "gpu"}
    where = f"{machine['cpu']}, {machine['cores']} cores"
    if kinds:
        where += f", {' and '.join(sorted(kinds))}"
    counts = {len(entry["ratios"]) for entry in entries if "ratio" in entry} or {0}
    rounds = " to ".join(str(n) for n in sorted({min(counts), max(counts)}))
    versions = machine["versions"]
    named = [f"{n} {versions[n]}" for n in ("Python", *PACKAGES) if n in versions]
    busy = "; the machine was not idle" if results["warnings"] else ""
    return (
        f"Medians over rounds taken in turns ({rounds} of them), least and largest in parentheses"
        f"{busy}. {where}; {', '.join(named)}; {machine['date']}, commit {machine['commit']}."
    )


def _columns(steps: list[dict[str, Any]]) -> list[str]:
    """Returns the contenders that any of the cases has a figure of, in the registry's order."""
    shown = {
        name
        for result in steps
        for name, entry in result["contenders"].items()
        if entry["status"] != "missing"
    }
    return [name for name in CONTENDERS if name in shown]


def _grid(steps: list[dict[str, Any]], columns: list[str], cell: Any) -> str:
    titles = [CONTENDERS[name].title for name in columns]
    rows = [f"| | {' | '.join(titles)} |", f"|---|{'---|' * len(titles)}"]
    for result in steps:
        cells = [cell(result, name) for name in columns]
        rows.append(f"| {result['case']['title']} | {' | '.join(cells)} |")
    return "\n".join(rows)


def _time_cell(result: dict[str, Any], name: str) -> str:
    entry = result["contenders"].get(name)
    if entry is None:
        return ""
    if "ratio" not in entry:
        return entry["status"]
    flops = flops_ratio(result, name)
    full = CONTENDERS[name].group == "full" and flops
    return ratio(entry) + (f"; FLOPs {flops:.3f}" if full else "")


def _memory_cell(result: dict[str, Any], name: str) -> str:
    entry = result["contenders"].get(name, {})
    peak = entry.get("device_peak") or entry.get("process_peak")
    if not peak:
        return "" if "ratio" in entry else entry.get("status", "")
    compiled = entry.get("temporaries")
    return size(peak) + (f"; {size(compiled)}" if compiled else "")


def _reasons(results: dict[str, Any]) -> list[str]:
    """Returns a line for each reason why there is no figure, with the cases that it concerns."""
    cases: dict[tuple[str, str], list[str]] = {}
    for result in results["cases"]:
        for name, entry in result["contenders"].items():
            if entry["status"] not in ("measured", "compiled"):
                why = f"{entry['status']}: {entry['reason']}"
                cases.setdefault((name, why), []).append(result["case"]["name"])
    return [
        f"{CONTENDERS[name].title} ({', '.join(names)}): {why}"
        for (name, why), names in cases.items()
    ]


def write_block(readme: Path, block: str) -> None:
    """Puts a block between the README's markers.

    Raises:
      ValueError: the README has no markers, or more than one pair.
    """
    before = readme.read_text()
    pattern = re.compile(f"{re.escape(BEGIN)}.*?{re.escape(END)}", re.DOTALL)
    if len(pattern.findall(before)) != 1:
        raise ValueError(f"{readme} needs one pair of the lines {BEGIN} and {END}")
    readme.write_text(pattern.sub(lambda _: f"{BEGIN}\n\n{block}\n\n{END}", before))
