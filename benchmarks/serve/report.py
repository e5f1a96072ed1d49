"""Medians, ratios and the table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from benchmarks.serve.plan import Kind, Row

Values = Mapping[tuple[str, str], Sequence[Mapping[str, float]]]
"""(server or engine, load) → what each round measured."""
UNITS: dict[Kind, str] = {"rate": "/s", "p50": " ms", "cost": "/s"}


def compare(row: Row, values: Values) -> dict[str, Any] | None:
    """Both sides' medians and ranges, and what follows; None when a side was not measured.

    A rate's factor is ours / peer, a latency's peer / ours, so above 1 we are faster; a cost is the
    share of the peer's rate that is lost. Spread is that of the rounds, each against its own.
    """
    field = "p50_ms" if row.kind == "p50" else "rate"
    ours = [sample[field] for sample in values.get((row.ours, row.load), ())]
    peer = [sample[field] for sample in values.get((row.peer, row.load), ())]
    if not ours or not peer:
        return None
    rounds = [_result(row.kind, *pair) for pair in zip(ours, peer, strict=True)]
    result = _result(row.kind, median(ours), median(peer))
    return {
        "ours": _spread(ours),
        "peer": _spread(peer),
        "result": result,
        "result_min": min(rounds),
        "result_max": max(rounds),
        "asked": row.asked,
        "met": None if row.asked is None else _met(row.kind, result, row.asked),
    }


def _result(kind: Kind, ours: float, peer: float) -> float:
    return {"rate": ours / peer, "p50": peer / ours, "cost": 1 - ours / peer}[kind]


def _met(kind: Kind, result: float, asked: float) -> bool:
    return result <= asked if kind == "cost" else result >= asked


def _spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": median(values), "min": min(values), "max": max(values)}


def table(
    rows: Mapping[str, Row], results: Mapping[str, Any], titles: Mapping[str, str]
) -> list[str]:
    """Markdown: median (min to max) of each side, the factor and what was asked."""
    lines = [
        "| measure | ours | against | theirs | result | asked | |",
        "|---|---|---|---|---|---|---|",
    ]
    for key, row in rows.items():
        found = results.get(key)
        peer = titles[row.peer]
        if found is None:
            lines.append(f"| {row.title} | | {peer} | not measured | | {_asked(row)} | |")
            continue
        ours, theirs = (_cell(found[side], UNITS[row.kind]) for side in ("ours", "peer"))
        verdict = {True: "met", False: "**missed**", None: ""}[found["met"]]
        span = " to ".join(_factor(row.kind, found[f"result_{end}"]) for end in ("min", "max"))
        lines.append(
            f"| {row.title} | {ours} | {peer} | {theirs} "
            f"| {_factor(row.kind, found['result'])} ({span}) | {_asked(row)} | {verdict} |"
        )
    return lines


def _asked(row: Row) -> str:
    if row.asked is None:
        return "–"
    bound = "at most" if row.kind == "cost" else "at least"
    return f"{bound} {_factor(row.kind, row.asked)}"


def _factor(kind: Kind, value: float) -> str:
    return f"{100 * value:.0f} %" if kind == "cost" else f"{value:.2f} ×"


def _cell(spread: Mapping[str, float], unit: str) -> str:
    digits = 0 if spread["median"] >= 100 else 1
    least, most = f"{spread['min']:.{digits}f}", f"{spread['max']:.{digits}f}"
    return f"{spread['median']:.{digits}f}{unit} ({least} to {most})"
