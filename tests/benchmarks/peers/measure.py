"""Measures a case: its contenders take turns with the reference, pair by pair.

Before a contender is timed, its losses are compared with the reference's. One that computes
something else is refused: a ratio of different work means nothing.
"""

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from tests.benchmarks.peers.cases import Case
from tests.benchmarks.peers.contenders import CONTENDERS
from tests.benchmarks.peers.processes import Failed, Worker, time_of_import

SAME_TOKENS = {"float32": 0.9, "bfloat16": 0.5}  # the least share of decoded tokens that agree
_CHECKED = 2  # steps: the second loss shows the gradient and the optimiser
_COMPARED = 4  # tokens a row: later ones follow from a near-tie, once one differs
MEASURED, REFUSED, FAILED, COMPILED = "measured", "refused", "not available", "compiled"
MISSING = "missing"


class Options(NamedTuple):
    """How to measure.

    Attributes:
      rounds: turns of each pair; 0 compiles only.
      turn_s: least seconds of a turn, which repeats short programs.
      device: "cpu" or "gpu".
      folders: contender -> the arguments ``base`` and ``adapter`` of its model and adapter.
      say: prints progress.
    """

    rounds: int
    turn_s: float
    device: str
    folders: Callable[[str], Mapping[str, str]]
    say: Callable[[str], None]


Entry = dict[str, Any]


def measure(case: Case, names: Sequence[str], options: Options, found: dict[str, Entry]) -> None:
    """Measures a case.

    Args:
      case: the computation.
      names: the contenders that are installed; the first is the reference.
      options: how to measure.
      found: filled as results come in, so that an interruption keeps them. Name -> entry; an entry
        has a status, a reason where it has no ratio, and ``ratio``: the reference's time over the
        contender's, as median, min and max over rounds.
    """
    if case.kind in ("start", "import"):
        _measure_fresh(case, names, options, found)
        return
    reference, *others = names
    with Worker(reference, options.device) as ours:
        try:
            entry = found[reference] = _begin(ours, reference, case, options)
        except Failed as error:
            found[reference] = {"status": FAILED, "reason": str(error)}
            return
        for name in others:
            with Worker(name, options.device) as theirs:
                try:
                    other = found[name] = _begin(theirs, name, case, options)
                    peers = [reference, *_peers(name, found)]
                    reasons = (disagreement(case, one, found[one], name, other) for one in peers)
                    other["reason"] = next(filter(None, reasons), "")
                    if other["reason"]:
                        other["status"] = REFUSED
                    elif options.rounds:
                        _take_turns(ours, theirs, entry, other, name, options)
                    other |= theirs.ask("memory")
                except Failed as error:
                    found[name] = {"status": FAILED, "reason": str(error)}
        if options.rounds and not others:
            _take_turns(ours, None, entry, entry, reference, options)
        entry |= ours.ask("memory")


def _begin(worker: Worker, name: str, case: Case, options: Options) -> Entry:
    title = CONTENDERS[name].title
    options.say(f"{title}: starting a process, loading and compiling")
    entry: Entry = {"status": COMPILED, "reason": "", "ready_s": worker.ready()}
    entry |= worker.load(case, options.folders(name))
    if entry["device"] != options.device:
        raise Failed(f"it runs on {entry['device']}, and the device asked for is {options.device}")
    if options.rounds:
        options.say(f"{title}: the first steps")
        entry |= worker.ask("check", steps=_CHECKED)
        entry["runs_a_turn"] = max(1, math.ceil(options.turn_s / max(entry["seconds"], 1e-6)))
        entry["status"], entry["seconds"] = MEASURED, []
    return entry


def _take_turns(
    ours: Worker, theirs: Worker | None, entry: Entry, other: Entry, name: str, options: Options
) -> None:
    """Times both by turns; who begins alternates, so that a drift of the machine cancels."""
    pair = [(ours, entry)] if theirs is None else [(ours, entry), (theirs, other)]
    other["ratios"] = []
    for i in range(options.rounds):
        options.say(f"{CONTENDERS[name].title}: round {i + 1} of {options.rounds}")
        for worker, one in pair if i % 2 == 0 else pair[::-1]:
            seconds = worker.ask("time", runs=one["runs_a_turn"])["seconds"]
            one["seconds"].append(seconds / one["runs_a_turn"])
        if theirs is not None:
            other["ratios"].append(entry["seconds"][-1] / other["seconds"][-1])
            other["ratio"] = spread(other["ratios"])


def spread(ratios: Sequence[float]) -> dict[str, float]:
    """Returns the median, the least and the largest.

    >>> spread([1.0, 1.5, 1.25])
    {'median': 1.25, 'min': 1.0, 'max': 1.5}
    """
    return {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)}


def disagreement(case: Case, reference: str, ours: Entry, name: str, theirs: Entry) -> str:
    """Returns how a contender's losses or tokens differ from the reference's; "" if they agree."""
    if "decoded" in ours:
        pairs = [
            pair
            for rows in zip(ours["decoded"], theirs["decoded"], strict=True)
            for pair in list(zip(*rows, strict=True))[:_COMPARED]
        ]
        share = sum(a == b for a, b in pairs) / len(pairs)
        theirs["same_tokens"] = share
        if share >= SAME_TOKENS[case.dtype]:
            return ""
        return f"other tokens than {reference}: {share:.0%} of the first {_COMPARED} a row agree"
    if "losses" not in ours:
        return ""
    n = len(ours["losses"]) if _same_group(reference, name) else 1
    a, b = ours["losses"][:n], theirs["losses"][:n]
    if all(abs(x - y) <= case.tolerance * abs(x) for x, y in zip(a, b, strict=True)):
        return ""
    listed = [" ".join(f"{x:.5f}" for x in losses) for losses in (b, a)]
    return f"another computation: losses {listed[0]}, and {reference}'s are {listed[1]}"


def _peers(name: str, found: Mapping[str, Entry]) -> list[str]:
    """Returns those measured before a contender that train as it does."""
    measured = [one for one in found if one != name and found[one]["status"] == MEASURED]
    return [one for one in measured if _same_group(one, name)]


def _same_group(a: str, b: str) -> bool:
    return CONTENDERS[a].group == CONTENDERS[b].group


def _measure_fresh(
    case: Case, names: Sequence[str], options: Options, found: dict[str, Entry]
) -> None:
    """Measures what only a fresh process shows, in a new one each round; nobody runs beside it."""
    failed: set[str] = set()
    for i in range(options.rounds):
        for name in names if i % 2 == 0 else names[::-1]:
            if name in failed:
                continue
            options.say(f"{CONTENDERS[name].title}: fresh process {i + 1} of {options.rounds}")
            try:
                once = _import_once if case.kind == "import" else _start_once
                parts = once(name, case, options)
            except Failed as error:
                failed.add(name)
                found[name] = {"status": FAILED, "reason": str(error)}
                continue
            entry = found.setdefault(name, {"status": MEASURED, "reason": "", "rounds": []})
            entry["rounds"].append(parts)
            entry["seconds"] = [one["seconds"] for one in entry["rounds"]]
        _compare_fresh(case, names, found)


def _compare_fresh(case: Case, names: Sequence[str], found: dict[str, Entry]) -> None:
    """Adds medians and ratios of the rounds so far."""
    measured = [name for name in names if found.get(name, {}).get("rounds")]
    for name in measured:
        entry = found[name]
        for key in [key for key in entry["rounds"][0] if key.endswith("_s")]:
            entry[key] = statistics.median(one[key] for one in entry["rounds"])
        if name == names[0] or names[0] not in measured:
            continue
        ours = found[names[0]]
        entry["reason"] = disagreement(case, names[0], ours["rounds"][0], name, entry["rounds"][0])
        if entry["reason"]:
            entry["status"] = REFUSED
            continue
        pairs = zip(ours["seconds"], entry["seconds"], strict=False)  # one may have been cut short
        entry["ratios"] = [a / b for a, b in pairs]
        entry["ratio"] = spread(entry["ratios"])


def _import_once(name: str, case: Case, options: Options) -> Entry:
    return {"seconds": time_of_import(CONTENDERS[name].needs[-1], options.device)}


def _start_once(name: str, case: Case, options: Options) -> Entry:
    """Returns the seconds from the start of a process to the end of its first step, and parts."""
    with Worker(name, options.device) as worker:
        parts: Entry = {"ready_s": worker.ready()}
        loaded = worker.load(case, options.folders(name))
        parts |= {key: value for key, value in loaded.items() if key.endswith("_s")}
        parts |= worker.ask("check", steps=1)
        parts["seconds"] = worker.age()
        return parts
