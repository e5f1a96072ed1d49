"""Pictures of a sweep: what was tried, what mattered, and what is paid for what."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mtl_core.plot_parts import font_families, new_figure, save_figure, set_title, short_label

if TYPE_CHECKING:
    from matplotlib.axes import Axes

STYLES = {"finished": ("o", "#0072B2"), "stopped": ("x", "0.55"), "unfinished": ("x", "0.55")}
BEST = "#D55E00"
Rows = Sequence[Mapping[str, Any]]
"""Trials: `best` (whether it is), `status`, `seconds`, `settings` (field → value), `scores` (task →
score), `objective`."""


def parallel_coordinates(
    trials: Rows, objective: str, logarithmic: Collection[str], path: Path
) -> None:
    """A line for each trial through its settings to its objective; the best one stands out."""
    fields = list(trials[0]["settings"]) if trials else []
    figure = new_figure(max(6.0, 1.7 * (len(fields) + 1)), 4.4)
    axes = figure.subplots()
    columns = [
        _positions([trial["settings"][name] for trial in trials], name in logarithmic)
        for name in fields
    ]
    columns.append(_positions([trial["objective"] for trial in trials]))
    names = [*fields, objective]
    ranked = np.array([trial["objective"] for trial in trials], dtype=float)
    order = np.argsort(np.nan_to_num(ranked, nan=-np.inf))
    low, high = (np.nanmin(ranked), np.nanmax(ranked)) if len(ranked) else (0.0, 1.0)
    colours = _colours()
    for index in order:
        share = (ranked[index] - low) / (high - low) if high > low else 1.0
        best = trials[index]["best"]
        heights = [position[index] for position, _ in columns]
        axes.plot(
            range(len(names)),
            heights,
            color=BEST if best else colours(0.15 + 0.75 * float(np.nan_to_num(share))),
            linewidth=2.4 if best else 1.1,
            alpha=1.0 if best else 0.75,
            zorder=3 if best else 2,
        )
    for number, (_, ticks) in enumerate(columns):
        axes.axvline(number, color="0.3", linewidth=0.8)
        for height, text in ticks:
            axes.text(number + 0.03, height, text, fontsize=7.5, va="center", parse_math=False)
    labels = ["\n".join(name.rsplit(".", 1)) for name in names]
    axes.set_xticks(range(len(names)), labels, parse_math=False, fontfamily=font_families())
    axes.tick_params(length=0, labelsize=8.5)
    axes.set(yticks=[], xlim=(-0.15, len(names) - 1 + 0.6), ylim=(-0.06, 1.06))
    axes.spines[:].set_visible(False)
    marked = "; the best in orange" if any(trial["best"] for trial in trials) else ""
    set_title(figure, f"Every trial through its settings{marked}")
    save_figure(figure, path)


def trade_off(points: Rows, names: tuple[str, str], path: Path, smaller_x: bool = False) -> None:
    """Trials by two values, `x` and `y`, and the Pareto front, where neither can be had for more.

    Args:
        points: rows with x, y and status.
        names: what x and y are.
        smaller_x: less of x is better, as with seconds.
    """
    figure = new_figure(6, 4.2)
    axes = figure.subplots()
    for status in dict.fromkeys(point["status"] for point in points):
        marker, colour = STYLES.get(status, ("x", "0.55"))
        of = [point for point in points if point["status"] == status]
        axes.scatter(
            [p["x"] for p in of], [p["y"] for p in of], marker=marker, color=colour, label=status
        )
    finished = [(p["x"], p["y"]) for p in points if p["status"] == "finished"]
    front = pareto_front(finished, smaller_x)
    if front:
        style = "steps-post" if smaller_x else "steps-pre"
        xs, ys = zip(*front, strict=True)
        axes.plot(xs, ys, color=BEST, linewidth=1.4, drawstyle=style, label="Pareto front")
    axes.set_xlabel(names[0], parse_math=False, fontfamily=font_families())
    axes.set_ylabel(names[1], parse_math=False, fontfamily=font_families())
    _finish(axes)
    if points:
        axes.legend(frameon=False, fontsize=8)
    set_title(figure, f"{short_label(names[1])} against {short_label(names[0])}")
    save_figure(figure, path)


def pareto_front(
    points: Sequence[tuple[float, float]], smaller_x: bool = False
) -> list[tuple[float, float]]:
    """The points that no other beats in one value without losing in the other, by x."""
    sign = -1 if smaller_x else 1
    front: list[tuple[float, float]] = []
    highest = -math.inf
    finite = [p for p in points if all(map(math.isfinite, p))]
    for x, y in sorted(finite, key=lambda p: (-sign * p[0], -p[1])):
        if y > highest:
            highest = y
            front.append((x, y))
    return sorted(front)


def importance_bars(importance: Mapping[str, float], path: Path) -> None:
    """The share of each field in what makes trials good."""
    ordered = sorted(importance.items(), key=lambda item: item[1])
    figure = new_figure(7, 0.36 * len(ordered) + 1.2)
    axes = figure.subplots()
    axes.barh(range(len(ordered)), [value for _, value in ordered], color="#0072B2", height=0.65)
    axes.set_yticks(range(len(ordered)), [name for name, _ in ordered], fontfamily=font_families())
    for place, (_, value) in enumerate(ordered):
        axes.text(value + 0.01, place, f"{value:.2f}", va="center", fontsize=8, color="0.25")
    axes.set_xlim(0, 1.1)
    axes.set_xlabel("importance (PED-ANOVA), in all 1")
    axes.spines[["top", "right"]].set_visible(False)
    set_title(figure, "What mattered")
    save_figure(figure, path)


def compared_scores(cases: Mapping[str, Mapping[str, Sequence[float]]], path: Path) -> None:
    """Title → case → scores of its seeds: a dot for each, a line for their mean."""
    figure = new_figure(max(5.0, 3.0 * len(cases)), 3.8)
    panels = figure.subplots(1, max(len(cases), 1), squeeze=False)[0]
    for axes, (title, scores) in zip(panels, cases.items(), strict=False):
        for place, (_case, values) in enumerate(scores.items()):
            percent = [100 * value for value in values]
            axes.scatter([place] * len(percent), percent, color="#0072B2", alpha=0.75, zorder=3)
            mean = sum(percent) / len(percent)
            axes.hlines(mean, place - 0.3, place + 0.3, color=BEST, linewidth=2)
            axes.text(place + 0.08, mean, f"{mean:.2f}", fontsize=8, va="bottom")
        axes.set_xticks(range(len(scores)), list(scores), fontsize=8.5)
        axes.set_xlim(-0.6, len(scores) - 0.4)
        axes.set_title(title, fontsize=10, parse_math=False)
        _finish(axes)
    set_title(figure, "Alone, shared with fixed weights, and the best found (dots are seeds)")
    save_figure(figure, path)


def _finish(axes: Axes) -> None:
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def _colours() -> Any:
    from matplotlib import colormaps

    return colormaps["Blues"]


def _positions(
    values: Sequence[Any], logarithmic: bool = False
) -> tuple[list[float], list[tuple[float, str]]]:
    """Heights between 0 and 1 of a column's values, and its ticks."""
    numbers = all(isinstance(v, int | float) and not isinstance(v, bool) for v in values)
    if not numbers or len({str(v) for v in values}) < 2:
        kinds = sorted({str(v) for v in values})
        step = 1 / max(len(kinds) - 1, 1)
        heights = [kinds.index(str(v)) * step for v in values]
        return heights, [(i * step, short_label(kind, 22)) for i, kind in enumerate(kinds)]
    finite = [float(v) for v in values if math.isfinite(v)]
    low, high = min(finite), max(finite)
    scale = math.log if logarithmic else float
    span = scale(high) - scale(low) or 1.0
    heights = [(scale(v) - scale(low)) / span if math.isfinite(v) else 0.0 for v in values]
    middle = math.sqrt(low * high) if logarithmic else (low + high) / 2
    return heights, [(0.0, f"{low:.3g}"), (0.5, f"{middle:.3g}"), (1.0, f"{high:.3g}")]
