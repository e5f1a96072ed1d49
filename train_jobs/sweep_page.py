"""The page of a sweep: one HTML file that holds everything and needs no network."""

from __future__ import annotations

import base64
import html
import re
from collections.abc import Mapping
from typing import Any

import pandas as pd

STYLE = """
:root { color-scheme: light dark; font-family: system-ui, sans-serif; line-height: 1.45; }
body { max-width: 72rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .6rem; border-bottom: 1px solid #8885; text-align: right; }
th:first-child, td:first-child { text-align: left; }
.wide { overflow-x: auto; }
figure { margin: 1.5rem 0; }
img { max-width: 100%; background: white; border-radius: 4px; }
pre { background: #8882; padding: 1rem; overflow-x: auto; }
li { margin: .3rem 0; }
"""
TITLES = {
    "compared.png": "Alone, shared, and the best found",
    "trials.png": "Every trial through its settings",
    "importance.png": "What mattered",
    "time.png": "Score against training time",
    "cosines.png": "Do the tasks' gradients agree? Cosines over training",
}
NUMBERS = {"importance.png": "; the numbers are in summary.json", "cosines.png": ""}
"""Where those of a picture are that the table of trials does not hold."""
PAIR = re.compile(r"pareto_(.+)\+(.+)\.png")


def pair_name(first: str, second: str) -> str:
    """The name of the picture of two tasks against each other; no task's name holds a plus."""
    return f"pareto_{first}+{second}.png"


def render_page(
    summary: Mapping[str, Any],
    trials: pd.DataFrame,
    pictures: Mapping[str, bytes],
    best: str | None,
) -> str:
    """The whole page as text."""
    name = html.escape(str(summary["name"]))
    parts = [f"<h1>Sweep {name}</h1>", _phases(summary)]
    statements = [text for text in summary["statements"].values() if text]
    if statements:
        items = "".join(f"<li>{html.escape(text)}</li>" for text in statements)
        parts.append(f"<h2>Does sharing help?</h2><ul>{items}</ul>")
    parts.append(_compared(summary["compared"], summary["splits"], summary["caveat"]))
    if summary["best"]:
        rows = "".join(
            f"<tr><td>{html.escape(str(key))}</td><td>{html.escape(_shown(value))}</td></tr>"
            for key, value in summary["best"]["settings"].items()
        )
        parts.append(f"<h2>Best setting</h2><table>{rows}</table>")
    ordered = [*TITLES, *(name for name in pictures if name not in TITLES)]
    for picture in ordered:
        if picture in pictures:
            parts.append(_figure(picture, pictures[picture]))
    parts.append(f"<h2>Trials</h2><div class=wide>{_table(trials)}</div>")
    if best:
        parts.append(f"<h2>best.yaml</h2><pre>{html.escape(best)}</pre>")
    body = "\n".join(part for part in parts if part)
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{name}</title>'
        f'<meta name="viewport" content="width=device-width">'
        f"<style>{STYLE}</style></head><body>{body}</body></html>\n"
    )


def _phases(summary: Mapping[str, Any]) -> str:
    told = "; ".join(
        f"{phase}: " + ", ".join(f"{number} {state}" for state, number in counts.items())
        for phase, counts in summary["phases"].items()
    )
    objective = ", ".join(summary["objective"])
    return f"<p>Objective: {html.escape(objective)}. {html.escape(told)}.</p>"


def _compared(
    compared: Mapping[str, Mapping[str, list[float]]], splits: Mapping[str, str], caveat: str
) -> str:
    cases = list(dict.fromkeys(case for scores in compared.values() for case in scores))
    if not cases:
        return ""
    head = "".join(f"<th>{html.escape(case)}</th>" for case in ("task", *cases))
    rows = ""
    for task, scores in compared.items():
        cells = ""
        for case in cases:
            values = [100 * value for value in scores.get(case, [])]
            mean = f"{sum(values) / len(values):.2f}" if values else ""
            spread = f" <small>({min(values):.2f} to {max(values):.2f})</small>" if values else ""
            cells += f"<td>{mean}{spread}</td>"
        rows += f"<tr><td>{html.escape(task)} ({splits[task]})</td>{cells}</tr>"
    note = f"<p>{html.escape(caveat)}</p>" if caveat else ""
    return f"<h2>Scores over seeds</h2><table><tr>{head}</tr>{rows}</table>{note}"


def _figure(name: str, png: bytes) -> str:
    data = base64.b64encode(png).decode()
    pair = PAIR.fullmatch(name)
    title = html.escape(f"{pair[2]} against {pair[1]}" if pair else TITLES[name])
    numbers = NUMBERS.get(name, "; the numbers are in the table of trials")
    return (
        f"<figure><h2>{title}</h2>"
        f'<img alt="{title}{numbers}" src="data:image/png;base64,{data}"></figure>'
    )


def _table(trials: pd.DataFrame) -> str:
    head = "".join(f"<th>{html.escape(str(name))}</th>" for name in trials.columns)
    rows = "".join(
        "<tr>" + "".join(f"<td>{html.escape(_shown(value))}</td>" for value in row) + "</tr>"
        for row in trials.itertuples(index=False)
    )
    return f"<table><tr>{head}</tr>{rows}</table>"


def _shown(value: Any) -> str:
    if value is None or (isinstance(value, float) and value != value):
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)
