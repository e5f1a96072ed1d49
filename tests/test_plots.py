"""Pictures: each function leaves a PNG of a sane size, whatever the labels hold."""

from __future__ import annotations

import struct
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from mtl_core import plots
from mtl_core.plot_parts import display_width, short_count, short_label

ODD_LABELS = [
    "$x_1$ and $",
    "😀 smile",
    "日本語のラベル",
    "عربي",
    "_hidden",
    "two\nlines",
    "\ud83d",
    "",
]


def png_size(path: Path) -> tuple[int, int]:
    """Width and height in pixels, from the file's header."""
    header = path.read_bytes()[:24]
    assert header[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", header[16:24])
    return width, height


def assert_is_sane(path: Path) -> None:
    width, height = png_size(path)
    assert 300 <= width <= 2500
    assert 200 <= height <= 2500


def labels_of(count: int) -> list[str]:
    return [*ODD_LABELS, *(f"a_rather_long_label_{number}" for number in range(count))][:count]


def counts_of(num_classes: int) -> npt.NDArray[np.int64]:
    rng = np.random.default_rng(0)
    matrix = rng.integers(0, 30, (num_classes, num_classes))
    matrix[0] = 0
    return matrix


def history_of(tasks: list[str]) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for step in range(1, 61):
        rows.append({"event": "step", "step": step, "epoch": step / 20, "learning_rate": 1e-4})
        rows[-1] |= {f"loss/{task}": 1 / step for task in tasks}
        if step % 20 == 0:
            rows.append({"event": "validation", "step": step, "epoch": step / 20, "score": 0.9})
            rows[-1] |= {f"validation/{task}/loss": 0.3 for task in tasks}
            rows[-1] |= {f"validation/{task}/accuracy": step / 100 for task in tasks}
    return rows


@pytest.mark.parametrize("num_classes", [1, 20, 77])
def test_a_confusion_matrix_is_drawn_for_few_and_many_labels(
    num_classes: int, tmp_path: Path
) -> None:
    path = tmp_path / "confusion.png"
    labels = labels_of(num_classes)
    plots.confusion_matrix(counts_of(num_classes), labels, path, "Task $a$ 日本 " * 9)
    assert_is_sane(path)


def test_a_confusion_matrix_of_zeros_is_drawn(tmp_path: Path) -> None:
    path = tmp_path / "confusion.png"
    plots.confusion_matrix(np.zeros((3, 3), dtype=np.int64), ["a", "b", "c"], path, "Nothing")
    assert_is_sane(path)


@pytest.mark.parametrize(("num_texts", "sign"), [(1, 1), (8, -1), (12, 1), (60, -1)])
def test_a_heatmap_is_drawn_with_and_without_negative_cosines(
    num_texts: int, sign: int, tmp_path: Path
) -> None:
    path = tmp_path / "similarity.png"
    matrix = np.full((num_texts, num_texts), sign * 0.4)
    np.fill_diagonal(matrix, 1.0)
    texts = [f"{label} is said at length about the weather" for label in labels_of(num_texts)]
    plots.similarity_heatmap(matrix, texts, path)
    assert_is_sane(path)


def test_bars_count_gold_of_labels_and_entity_types_alike(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[Any] = []
    monkeypatch.setattr(plots, "save_figure", lambda figure, _: drawn.append(figure))
    row = {"precision": 1.0, "recall": 0.5, "f1": 2 / 3, "support": 12.0}
    plots.per_type_bars({"good": row}, tmp_path / "bars.png", "mood on test")
    (axes,) = drawn[0].axes
    assert axes.get_xlabel() == "F1, gold count in brackets"
    assert [label.get_text() for label in axes.get_yticklabels()] == ["good (12)"]


def test_more_types_make_a_taller_picture(tmp_path: Path) -> None:
    row = {"precision": 1.0, "recall": 0.5, "f1": 2 / 3, "support": 12.0}
    for count in (1, 4, 40):
        rows = dict.fromkeys(labels_of(count), row)
        plots.per_type_bars(rows, tmp_path / f"{count}.png", "Entities by type")
        assert_is_sane(tmp_path / f"{count}.png")
    assert png_size(tmp_path / "40.png")[1] > 3 * png_size(tmp_path / "4.png")[1]


@pytest.mark.parametrize("num_tasks", [1, 9])
def test_learning_curves_are_drawn_for_any_number_of_tasks(num_tasks: int, tmp_path: Path) -> None:
    path = tmp_path / "curves.png"
    plots.learning_curves(history_of(labels_of(num_tasks)), path)
    assert_is_sane(path)


def test_learning_curves_are_drawn_before_anything_was_recorded(tmp_path: Path) -> None:
    path = tmp_path / "curves.png"
    plots.learning_curves([], path)
    assert_is_sane(path)


def test_learning_curves_skip_values_that_are_missing_or_not_finite(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[Any] = []
    monkeypatch.setattr(plots, "save_figure", lambda figure, _: drawn.append(figure))
    history = history_of(["a"])
    history[4]["loss/a"] = float("nan")
    history[5]["loss/a"] = None
    history[6]["loss/a"] = float("inf")
    plots.learning_curves(history, tmp_path / "curves.png")
    loss, *_ = drawn[0].axes[0].lines
    assert list(loss.get_xdata()) == [1, 2, 3, 4, *range(8, 61)]


@pytest.mark.parametrize("num_tasks", [2, 3, 9])
def test_gradient_cosines_are_drawn_for_any_number_of_tasks(num_tasks: int, tmp_path: Path) -> None:
    tasks = [f"a_rather_long_task_{number}" for number in range(num_tasks)]
    history = history_of(tasks)
    for row in history[::3]:
        row |= {f"cosine/{a}/{b}": np.cos(row["step"]) for a, b in combinations(tasks, 2)}
    history[3][f"cosine/{tasks[0]}/{tasks[1]}"] = float("nan")
    plots.gradient_cosines(history, tmp_path / "cosines.png")
    assert_is_sane(tmp_path / "cosines.png")


@pytest.mark.parametrize(
    ("metrics", "expected"),
    [
        ({"accuracy": 0.9, "loss": 0.1}, 0.9),
        ({"macro_f1": 0.9, "micro_f1": 0.8}, 0.8),
        ({"token_accuracy": 0.9, "f1": 0.7, "precision": 0.6}, 0.7),
        ({"loss": 0.1}, None),
    ],
)
def test_the_score_of_a_task_is_the_primary_metric_of_its_kind(
    metrics: dict[str, float], expected: float | None
) -> None:
    row = {"step": 5, **{f"validation/a/{name}": value for name, value in metrics.items()}}
    points = [] if expected is None else [(5.0, expected)]
    assert plots._score_curve([row], "a") == points


def test_the_best_validation_is_the_first_with_the_highest_score() -> None:
    scores = [0.5, 0.8, 0.8, float("nan")]
    rows = [
        {"step": 10 * number, "epoch": number / 2, "score": score}
        for number, score in enumerate(scores, start=1)
    ]
    assert plots._best(rows) == (20.0, "best 0.800 at epoch 1")


def test_smoothing_keeps_a_straight_line_and_damps_noise() -> None:
    line = [(float(step), 2.0 * step) for step in range(100)]
    np.testing.assert_allclose(plots._smooth(line), line)
    noisy = [(float(step), float((-1) ** step)) for step in range(100)]
    assert all(abs(value) < 0.2 for _, value in plots._smooth(noisy)[5:-5])


def test_a_picture_leaves_matplotlib_settings_as_they_were(tmp_path: Path) -> None:
    import matplotlib

    before = dict(matplotlib.rcParams)
    plots.per_type_bars({}, tmp_path / "types.png", "No types")
    assert dict(matplotlib.rcParams) == before


def test_a_long_label_is_cut_to_one_line_with_an_ellipsis() -> None:
    assert short_label("one\ttwo\n three") == "one two three"
    assert short_label("word " * 20) == "word word word word word word word word…"


def test_wide_characters_take_two_columns() -> None:
    assert [display_width(text) for text in ("abc", "日本", "😀")] == [3, 4, 2]


def test_counts_stay_short() -> None:
    counts = [0, 950, 9999, 12_345, 999_499, 999_500, 4_567_890]
    assert [short_count(count) for count in counts] == [
        "0", "950", "9999", "12.3k", "999k", "1M", "4.57M",
    ]  # fmt: skip
