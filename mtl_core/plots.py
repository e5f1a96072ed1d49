"""Pictures of a run: curves, confusion matrix, similarity, scores per type, gradient cosines.

Every function writes one file, in the format its suffix names, through matplotlib's object
interface: no display, no global state. Labels may hold any Unicode text.
Shapes: C classes, N texts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import numpy.typing as npt

from mtl_core.metrics import primary_scores
from mtl_core.plot_parts import (
    display_width,
    font_families,
    label_square,
    new_figure,
    save_figure,
    set_title,
    short_count,
    short_label,
    square_grid,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage
    from matplotlib.lines import Line2D

Matrix: TypeAlias = npt.NDArray[np.floating[Any]] | npt.NDArray[np.integer[Any]]
Rows: TypeAlias = Sequence[Mapping[str, Any]]
Curve: TypeAlias = list[tuple[float, float]]
"""Points of step and value."""

# Okabe and Ito, "Color Universal Design" (2008), without the yellow, which is faint on white.
_PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
_DASHES = ("-", "--", ":")
_MARKED: dict[str, Any] = {"marker": "o", "markersize": 4.5, "linewidth": 1.0, "alpha": 0.9}
_MAX_CLASSES_WITH_COUNTS = 20
_MAX_TEXTS_WITH_VALUES = 12


def learning_curves(history: Rows, path: str | Path) -> None:
    """Training and validation loss, and validation score, of each task by step.

    `history` holds the rows of metrics.jsonl: those with event "step" bring `loss/<task>`, those
    with event "validation" bring `validation/<task>/<metric>` and the `score` that picks the best.
    Values that are missing or not finite are left out.
    """
    from matplotlib.lines import Line2D

    steps = [row for row in history if row.get("event") == "step"]
    validations = [row for row in history if row.get("event") == "validation"]
    tasks = _tasks(steps, validations)
    figure = new_figure(11, 4.6)
    loss_axes, score_axes = figure.subplots(1, 2)
    handles = []
    for number, task in enumerate(tasks):
        style: dict[str, Any] = {
            "color": _PALETTE[number % len(_PALETTE)],
            "linestyle": _DASHES[number // len(_PALETTE) % len(_DASHES)],
        }
        loss = _curve(steps, f"loss/{task}")
        _plot(loss_axes, loss, linewidth=0.8, alpha=0.2, **style)
        _plot(loss_axes, _smooth(loss), linewidth=1.8, **style)
        _plot(loss_axes, _curve(validations, f"validation/{task}/loss"), **_MARKED, **style)
        _plot(score_axes, _score_curve(validations, task), **_MARKED, **style)
        handles.append(Line2D([], [], linewidth=2.5, **style))
    _finish_curves(loss_axes, "Loss: training (smoothed line), validation (dots)", "loss")
    _finish_curves(score_axes, "Validation score", "F1 or accuracy")
    loss_axes.set_ylim(bottom=0)
    best = _best(validations)
    if best is not None:
        step, title = best
        for axes in (loss_axes, score_axes):
            axes.axvline(step, color="0.35", linewidth=1, linestyle=(0, (4, 3)), zorder=0)
        score_axes.set_title(f"Validation score ({title}, dashed line)", fontsize=10)
    _legend(figure, handles, tasks)
    set_title(figure, "Learning curves")
    save_figure(figure, path)


def confusion_matrix(matrix: Matrix, labels: Sequence[str], path: str | Path, title: str) -> None:
    """Counts (C, C), gold by row and prediction by column, coloured by the share of their row.

    Up to 20 classes have their counts in the cells. A class without gold rows is all blank.
    """
    num_classes = len(labels)
    assert matrix.shape == (num_classes, num_classes)
    totals = matrix.sum(axis=1, keepdims=True)
    shares = matrix / np.maximum(totals, 1)
    has_counts = num_classes <= _MAX_CLASSES_WITH_COUNTS
    figure, axes = square_grid(labels, cell=0.5 if has_counts else 0.16)
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    if has_counts:
        texts = [[short_count(value) if value else "" for value in row] for row in matrix.tolist()]
        _write_cells(axes, texts, shares > 0.55)
    axes.set_xlabel("predicted")
    axes.set_ylabel("gold")
    set_title(figure, title)
    _colour_bar(figure, axes, image, "share of the gold label")
    save_figure(figure, path)


def similarity_heatmap(matrix: Matrix, labels: Sequence[str], path: str | Path) -> None:
    """Cosine similarities (N, N) of texts; up to 12 texts have the values in the cells.

    The colours span [0, 1], or [-1, 1] around white once a value is clearly negative.
    """
    num_texts = len(labels)
    assert matrix.shape == (num_texts, num_texts)
    is_signed = bool((matrix < -0.05).any())
    has_values = num_texts <= _MAX_TEXTS_WITH_VALUES
    figure, axes = square_grid(labels, cell=0.6 if has_values else 0.18)
    colours, lowest = ("RdBu_r", -1) if is_signed else ("Blues", 0)
    image = axes.imshow(matrix, cmap=colours, vmin=lowest, vmax=1)
    if has_values:
        texts = [[f"{round(value, 2) + 0.0:.2f}" for value in row] for row in matrix.tolist()]
        _write_cells(axes, texts, np.abs(matrix) > 0.65)
    set_title(figure, "Cosine similarity")
    _colour_bar(figure, axes, image, "cosine")
    save_figure(figure, path)


def gradient_cosines(history: Rows, path: str | Path) -> None:
    """Cosines between the tasks' gradients: their means as a matrix, and the strongest by step.

    `history` holds the rows of metrics.jsonl, of which some have `cosine/<task>/<task>`.
    """
    from matplotlib.lines import Line2D

    keys = dict.fromkeys(key for row in history for key in row if key.startswith("cosine/"))
    curves = {tuple(key.split("/")[1:]): _curve(history, key) for key in keys}
    means = {p: np.mean([value for _, value in curve]) for p, curve in curves.items() if curve}
    tasks = list(dict.fromkeys(task for pair in means for task in pair))
    matrix = np.eye(len(tasks))
    matrix[matrix == 0] = np.nan
    for (first, second), mean in means.items():
        places = tasks.index(first), tasks.index(second)
        matrix[places] = matrix[places[::-1]] = mean
    figure = new_figure(12, 5 + 0.45 * max(0, len(tasks) - 5))
    matrix_axes, line_axes = figure.subplots(1, 2)
    image = matrix_axes.imshow(matrix, cmap="RdBu", vmin=-1, vmax=1)
    texts = [
        ["" if math.isnan(v) else f"{round(v, 2) + 0.0:.2f}" for v in row]
        for row in matrix.tolist()
    ]
    _write_cells(matrix_axes, texts, np.abs(matrix) > 0.65)
    label_square(matrix_axes, tasks)
    matrix_axes.set_title("Mean over training", fontsize=10)
    _colour_bar(figure, matrix_axes, image, "cosine")
    shown = sorted(means, key=lambda pair: -abs(means[pair]))[: len(_PALETTE)]
    handles = []
    for pair, colour in zip(shown, _PALETTE, strict=False):
        _plot(line_axes, curves[pair], linewidth=0.8, alpha=0.25, color=colour)
        _plot(line_axes, _smooth(curves[pair]), linewidth=1.8, color=colour)
        handles.append(Line2D([], [], linewidth=2.5, color=colour))
    which = f", the {len(shown)} strongest of {len(means)}" if len(shown) < len(means) else ""
    _finish_curves(line_axes, f"By step (smoothed line){which}", "cosine")
    line_axes.axhline(0, color="0.35", linewidth=1, zorder=0)
    _legend(figure, handles, [", ".join(pair) for pair in shown])
    set_title(figure, "Cosines between the tasks' gradients of the encoder")
    save_figure(figure, path)


def per_type_bars(rows: Mapping[str, Mapping[str, float]], path: str | Path, title: str) -> None:
    """F1 a label or entity type, best first; rows hold precision, recall, f1 and support."""
    ordered = sorted(rows.items(), key=lambda item: (-item[1]["f1"], item[0]))
    figure = new_figure(8, 0.29 * len(ordered) + 1.7)
    axes = figure.subplots()
    positions = range(len(ordered))
    scores = [row["f1"] for _, row in ordered]
    axes.barh(positions, scores, color=_PALETTE[0], height=0.7)
    labels = [f"{short_label(name)} ({short_count(row['support'])})" for name, row in ordered]
    axes.set_yticks(positions, labels, parse_math=False, fontfamily=font_families())
    for position, (_, row) in zip(positions, ordered, strict=True):
        text = f"{row['f1']:.3f}   (P {row['precision']:.2f}, R {row['recall']:.2f})"
        axes.text(row["f1"] + 0.01, position, text, va="center", fontsize=8, color="0.25")
    axes.set_ylim(len(ordered) - 0.4, -0.6)
    axes.set_xlim(0, 1.32)
    axes.set_xticks(np.linspace(0, 1, 6))
    axes.set_xlabel("F1, gold count in brackets", x=0.5 / 1.32)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines["bottom"].set_bounds(0, 1)
    axes.tick_params(axis="y", length=0)
    set_title(figure, title)
    save_figure(figure, path)


def _write_cells(axes: Axes, texts: list[list[str]], is_dark: npt.NDArray[np.bool_]) -> None:
    """Write one text per cell, white where the cell is dark."""
    for row, cells in enumerate(texts):
        for column, text in enumerate(cells):
            colour = "white" if is_dark[row, column] else "0.15"
            axes.text(column, row, text, ha="center", va="center", fontsize=8.5, color=colour)


def _colour_bar(figure: Figure, axes: Axes, image: AxesImage, name: str) -> None:
    bar = figure.colorbar(image, ax=axes, label=name, shrink=0.8, aspect=25)
    bar.outline.set_visible(False)


def _plot(axes: Axes, curve: Curve, **style: Any) -> None:
    if curve:
        axes.plot([step for step, _ in curve], [value for _, value in curve], **style)


def _legend(figure: Figure, handles: list[Line2D], lines: list[str]) -> None:
    """Name the lines below the panels, away from the lines."""
    if not lines:
        return
    names = [short_label(line).lstrip("_") for line in lines]  # a leading one would hide the entry
    widest = max(display_width(name) for name in names)
    legend = figure.legend(
        handles,
        names,
        loc="outside lower center",
        ncols=min(len(lines), 5, max(1, 150 // (widest + 8))),
        frameon=False,
        prop={"family": font_families()},
    )
    for text in legend.get_texts():
        text.set_parse_math(False)


def _finish_curves(axes: Axes, title: str, name: str) -> None:
    axes.set_title(title, fontsize=10)
    axes.set_xlabel("step")
    axes.set_ylabel(name)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    if not axes.lines:
        axes.set(xticks=[], yticks=[])
        axes.text(0.5, 0.5, "nothing recorded", ha="center", transform=axes.transAxes)


def _tasks(steps: Rows, validations: Rows) -> list[str]:
    """Tasks in the order in which they first occur."""
    trained = [key.removeprefix("loss/") for row in steps for key in row if key.startswith("loss/")]
    checked = [
        key.removeprefix("validation/").rpartition("/")[0]
        for row in validations
        for key in row
        if key.startswith("validation/")
    ]
    return [task for task in dict.fromkeys([*trained, *checked]) if task]


def _curve(rows: Rows, key: str) -> Curve:
    """The finite values of a key by step."""
    return [
        (float(row["step"]), float(row[key]))
        for row in rows
        if isinstance(row.get(key), int | float) and math.isfinite(row[key])
    ]


def _score_curve(validations: Rows, task: str) -> Curve:
    """The task's primary metric by step."""
    scores = (primary_scores(row, "validation").get(task) for row in validations)
    rows = [{**row, "score": score} for row, score in zip(validations, scores, strict=True)]
    return _curve(rows, "score")


def _smooth(curve: Curve) -> Curve:
    """Centred moving average over about a tenth of the curve, narrower towards its ends."""
    reach = len(curve) // 20
    smoothed = []
    for index, (step, _) in enumerate(curve):
        near = min(reach, index, len(curve) - 1 - index)
        values = [value for _, value in curve[index - near : index + near + 1]]
        smoothed.append((step, sum(values) / len(values)))
    return smoothed


def _best(validations: Rows) -> tuple[float, str] | None:
    """Step of the highest score, the first one of equals, and a phrase for it."""
    curve = _curve(validations, "score")
    if not curve:
        return None
    step, score = max(curve, key=lambda point: point[1])
    epochs = dict(_curve(validations, "epoch"))
    when = f"epoch {epochs[step]:g}" if step in epochs else f"step {step:g}"
    return step, f"best {score:.3f} at {when}"
