"""Whether sharing an encoder helps a task, as far as the spread over seeds can show."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

CONFIDENCE = 0.95
UNKNOWN = "no spread to judge by"
MIXED_ANEW = ("round_robin", "temperature")
"""Mixing strategies under which an epoch goes through small groups of rows several times."""
Scores = Mapping[str, Sequence[float]]
"""Case (alone, shared, best) → score of each seed."""


def difference(first: Sequence[float], second: Sequence[float]) -> tuple[float, float, float]:
    """Mean of second minus mean of first, with the ends of its confidence interval.

    Welch, "The generalization of Student's problem when several different population variances are
    involved", Biometrika 1947. Infinite without a spread to judge by: with one seed, or
    where seeds agree on each side and the sides do not. Scores come in steps, so seeds may agree.
    """
    from scipy.stats import t

    gap = statistics.mean(second) - statistics.mean(first)
    if min(len(first), len(second)) < 2:
        return gap, float("-inf"), float("inf")
    parts = [(statistics.variance(runs) / len(runs), len(runs) - 1) for runs in (first, second)]
    variance = sum(part for part, _ in parts)
    if variance == 0:
        reach = math.inf if gap else 0.0
        return gap, gap - reach, gap + reach
    freedom = variance**2 / sum(part**2 / number for part, number in parts)
    reach = float(t.ppf((1 + CONFIDENCE) / 2, freedom)) * math.sqrt(variance)
    return gap, gap - reach, gap + reach


def verdict(first: Sequence[float], second: Sequence[float]) -> str:
    """helps, hurts, or makes no difference, in the sense of the interval, if there is one."""
    _, low, high = difference(first, second)
    if math.isinf(low):
        return UNKNOWN
    if low > 0:
        return "helps"
    return "hurts" if high < 0 else "makes no difference"


def compare(scores: Scores) -> list[dict[str, Any]]:
    """Every pair of cases with difference, interval and verdict."""
    cases = list(scores)
    found = []
    for first, second in itertools.combinations(cases, 2):
        gap, low, high = difference(scores[first], scores[second])
        row = {"from": first, "to": second, "difference": gap, "low": low, "high": high}
        found.append({**row, "verdict": verdict(scores[first], scores[second])})
    return found


def statement(task: str, scores: Scores, split: str) -> str:
    """A plain sentence on whether sharing helps a task; empty when it was not trained alone."""
    if "alone" not in scores:
        return ""
    parts = []
    tuned = "the best setting shared, against the untuned base alone,"
    for case, words in (("shared", "sharing"), ("best", tuned)):
        if case not in scores:
            continue
        gap, low, high = difference(scores["alone"], scores[case])
        number = min(len(scores["alone"]), len(scores[case]))
        if number < 2:
            parts.append(f"{words} changes it by {100 * gap:+.2f} points, on one seed only")
            continue
        found = verdict(scores["alone"], scores[case])
        if found == UNKNOWN:
            parts.append(f"{words} changes it by {100 * gap:+.2f} points ({number} seeds, {found})")
            continue
        if found == "makes no difference":
            found += " that the spread can show"
        parts.append(
            f"{words} {found} ({100 * gap:+.2f} points, {100 * CONFIDENCE:.0f} % interval "
            f"{100 * low:+.2f} to {100 * high:+.2f}, {number} seeds)"
        )
    return f"{task} ({split}): " + "; ".join(parts) if parts else ""


def caveat(compared: Mapping[str, Scores], splits: Mapping[str, str], mixing: str) -> str:
    """What to keep in mind: where the best setting is compared on what it was chosen by, and
    where a task alone is trained on fewer passes over its rows than shared."""
    found = []
    tasks = [t for t, cases in compared.items() if "best" in cases and splits[t] == "validation"]
    if tasks:
        chosen = "the best setting was chosen on validation, which flatters it there"
        found.append(f"{', '.join(tasks)}: {chosen}")
    if mixing in MIXED_ANEW and any({"alone", "shared"} <= set(c) for c in compared.values()):
        found.append(
            f"under mixing {mixing} the shared run may go through a small task's rows several "
            "times an epoch, the task alone goes once: what sharing changes there may be that"
        )
    return "; ".join(found)
