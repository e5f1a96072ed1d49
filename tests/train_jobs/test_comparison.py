"""What a sweep says of its trials, against sums done by hand and by other means."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from train_jobs import sweep_plots
from train_jobs.comparison import caveat, compare, difference, statement, verdict

T_975 = {2: 4.302653, 4: 2.776445}
"""Quantiles of Student's t, as tables print them, by degrees of freedom."""


def test_the_interval_is_the_textbook_s() -> None:
    """With equal variances and 3 runs each, Welch's degrees of freedom are 4."""
    gap, low, high = difference([0.70, 0.71, 0.72], [0.80, 0.81, 0.82])
    reach = T_975[4] * math.sqrt(2 * 0.01**2 / 3)
    assert gap == pytest.approx(0.10)
    assert (low, high) == pytest.approx((0.10 - reach, 0.10 + reach), rel=1e-5)


def test_a_constant_side_leaves_the_other_s_degrees_of_freedom() -> None:
    _, low, high = difference([0.5, 0.5, 0.5], [0.70, 0.71, 0.72])
    reach = T_975[2] * math.sqrt(0.01**2 / 3)
    assert (low, high) == pytest.approx((0.21 - reach, 0.21 + reach), rel=1e-5)


@pytest.mark.parametrize(
    ("first", "second"),
    [([0.70, 0.71, 0.73], [0.78, 0.80, 0.81, 0.85, 0.80]), ([0.6, 0.7, 0.9, 0.8], [0.75, 0.72])],
)
def test_sides_of_unequal_numbers_have_welch_s_interval(
    first: list[float], second: list[float]
) -> None:
    from scipy.stats import ttest_ind

    _, low, high = difference(first, second)
    wanted = ttest_ind(second, first, equal_var=False).confidence_interval()
    assert (low, high) == pytest.approx((wanted.low, wanted.high))


@pytest.mark.parametrize(
    ("second", "wanted"),
    [
        ([0.80, 0.81, 0.82], "helps"),
        ([0.60, 0.61, 0.62], "hurts"),
        ([0.70, 0.72, 0.74], "makes no difference"),
        ([0.99], "no spread to judge by"),
    ],
)
def test_a_verdict_needs_more_than_the_spread(second: list[float], wanted: str) -> None:
    assert verdict([0.70, 0.71, 0.72], second) == wanted
    opposite = {"helps": "hurts", "hurts": "helps"}
    assert verdict(second, [0.70, 0.71, 0.72]) == opposite.get(wanted, wanted)


def test_seeds_that_agree_by_chance_are_no_proof() -> None:
    """Accuracy over few texts has few values, so two seeds often end on the same one."""
    alone, shared = [0.86, 0.86], [0.72, 0.72]
    assert difference(alone, shared) == (pytest.approx(-0.14), -math.inf, math.inf)
    assert verdict(alone, shared) == "no spread to judge by"
    told = statement("intent", {"alone": alone, "shared": shared}, "test")
    assert told == (
        "intent (test): sharing changes it by -14.00 points (2 seeds, no spread to judge by)"
    )
    assert difference(alone, alone) == (0, 0, 0)
    assert verdict(alone, alone) == "makes no difference"


@pytest.mark.parametrize("mixing", ["proportional", "round_robin", "temperature", "joint"])
def test_more_passes_over_a_small_task_are_not_taken_for_sharing(mixing: str) -> None:
    both = {"intent": {"alone": [0.5], "shared": [0.6]}}
    told = caveat(both, {"intent": "test"}, mixing)
    assert (f"under mixing {mixing} the shared run may go" in told) == (
        mixing in ("round_robin", "temperature")
    )
    assert not caveat({"intent": {"shared": [0.6]}}, {"intent": "test"}, mixing)
    chosen = {"intent": {**both["intent"], "best": [0.6]}}
    assert "flatters it there" in caveat(chosen, {"intent": "validation"}, mixing)
    assert "flatters" not in caveat(chosen, {"intent": "test"}, mixing)


def test_two_caveats_are_told_apart_and_hold_if_they_hold_for_one_task() -> None:
    compared = {"intent": {"alone": [0.5], "shared": [0.6]}, "slots": {"best": [0.6]}}
    told = caveat(compared, {"intent": "test", "slots": "validation"}, "temperature")
    first, second = told.split("; ")
    assert first.startswith("slots: the best setting was chosen on validation")
    assert second.startswith("under mixing temperature the shared run may go")


@pytest.mark.parametrize(
    ("alone", "shared", "told"),
    [
        ([0.70, 0.71, 0.72], [0.8], "sharing changes it by +9.00 points, on one seed only"),
        ([0.7], [0.8, 0.8, 0.8], "sharing changes it by +10.00 points, on one seed only"),
        (
            [0.7, 0.7, 0.7],
            [0.8, 0.8],
            "sharing changes it by +10.00 points (2 seeds, no spread to judge by)",
        ),
    ],
)
def test_what_sharing_leaves_open_does_not_keep_from_judging_the_best_setting(
    alone: list[float], shared: list[float], told: str
) -> None:
    scores = {"alone": alone, "shared": shared, "best": [0.90, 0.91]}
    said = statement("intent", scores, "test").removeprefix("intent (test): ")
    first, second = said.split("; ")
    assert first == told
    assert second.startswith("the best setting shared, against the untuned base alone,")
    assert second.endswith(" 2 seeds)" if len(alone) > 1 else "on one seed only")


def test_a_statement_names_task_points_and_seeds() -> None:
    scores = {"alone": [0.7, 0.71, 0.72], "shared": [0.8, 0.81, 0.82], "best": [0.71, 0.7, 0.73]}
    told = statement("intent", scores, "test")
    wanted = "intent (test): sharing helps (+10.00 points, 95 % interval +7.73 to +12.27"
    assert told.startswith(wanted)
    assert "untuned base alone, makes no difference that the spread can show" in told
    assert "3 seeds" in told
    assert statement("intent", {"shared": [0.5]}, "test") == ""
    assert "one seed only" in statement("intent", {"alone": [0.5], "shared": [0.6]}, "test")
    assert [(row["from"], row["to"]) for row in compare(scores)] == [
        ("alone", "shared"),
        ("alone", "best"),
        ("shared", "best"),
    ]


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), max_size=12),
    st.booleans(),
)
def test_the_front_is_what_no_point_dominates(
    points: list[tuple[float, float]], smaller: bool
) -> None:
    sign = -1 if smaller else 1

    def dominates(a: tuple[float, float], b: tuple[float, float]) -> bool:
        return a != b and sign * a[0] >= sign * b[0] and a[1] >= b[1]

    wanted = {p for p in points if not any(dominates(q, p) for q in points)}
    assert set(sweep_plots.pareto_front(points, smaller)) == wanted


def test_pictures_stand_strange_trials(tmp_path: Path) -> None:
    """A score that is missing, one value only, sections as settings, names in other scripts."""
    trials = [
        {
            "best": n == 0,
            "status": status,
            "seconds": 1.0,
            "settings": {"optim.learning_rate": 1e-4, "freeze": {"layers": n}, "任务 $x$": n},
            "objective": score,
        }
        for n, (status, score) in enumerate(
            [("finished", 0.5), ("failed", float("nan")), ("stopped", 0.2)]
        )
    ]
    sweep_plots.parallel_coordinates(trials, "mean", {"optim.learning_rate"}, tmp_path / "a.png")
    points = [{**trial, "x": 1.0, "y": trial["objective"]} for trial in trials]
    sweep_plots.trade_off(points, ("任务", "b_$1"), tmp_path / "b.png")
    sweep_plots.trade_off([], ("a", "b"), tmp_path / "c.png")
    sweep_plots.importance_bars({"optim.learning_rate": 1.0}, tmp_path / "d.png")
    sweep_plots.compared_scores({"t": {"alone": [0.5], "shared": [0.5]}}, tmp_path / "e.png")
    for name in "abcde":
        with Image.open(tmp_path / f"{name}.png") as picture:
            assert np.asarray(picture).std() > 0
