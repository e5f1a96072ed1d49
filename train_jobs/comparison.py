"""Whether sharing an encoder helps a task, as far as the spread over seeds can show."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

CONFIDENCE = 0.95
Scores = Mapping[str, Sequence[float]]
"""Case (alone, shared, best) → score of each seed."""


def difference(first: Sequence[float], second: Sequence[float]) -> tuple[float, float, float]:
    """Mean of second minus mean of first, with the ends of its confidence interval.

    Welch, "The generalization of Student's problem when several different population variances are
    involved", Biometrika 1947. Infinite with one seed, for one run has no spread.
    """
    from scipy.stats import t

    gap = statistics.mean(second) - statistics.mean(first)
    if min(len(first), len(second)) < 2:
        return gap, float("-inf"), float("inf")
    parts = [(statistics.variance(runs) / len(runs), len(runs) - 1) for runs in (first, second)]
    variance = sum(part for part, _ in parts)
    if variance == 0:
        return gap, gap, gap
    freedom = variance**2 / sum(part**2 / number for part, number in parts)
    reach = float(t.ppf((1 + CONFIDENCE) / 2, freedom)) * math.sqrt(variance)
    return gap, gap - reach, gap + reach


def verdict(first: Sequence[float], second: Sequence[float]) -> str:
    """helps, hurts, or makes no difference, in the sense of the interval."""
    _, low, high = difference(first, second)
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
        if found == "makes no difference":
            found += " that the spread can show"
        parts.append(
            f"{words} {found} ({100 * gap:+.2f} points, {100 * CONFIDENCE:.0f} % interval "
            f"{100 * low:+.2f} to {100 * high:+.2f}, {number} seeds)"
        )
    return f"{task} ({split}): " + "; ".join(parts) if parts else ""


def caveat(compared: Mapping[str, Scores], splits: Mapping[str, str]) -> str:
    """What to keep in mind where the best setting is compared on what it was chosen by."""
    tasks = [t for t, cases in compared.items() if "best" in cases and splits[t] == "validation"]
    if not tasks:
        return ""
    return f"{', '.join(tasks)}: the best setting was chosen on validation, which flatters it there"
