"""How a sweep searches: what falls behind is stopped, what is drawn follows from the results."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.tune.experiment import Experiment
from ray.tune.search import SearchGenerator
from ray.tune.search.optuna import OptunaSearch

from train_jobs import search
from train_jobs.search import (
    ResumableLimiter,
    ResumableVariants,
    TimeBudget,
    build_scheduler,
    build_searcher,
)
from train_jobs.sweep import Plan, load_plan
from train_jobs.tune import _space

EPOCHS = 9
RATE = "optim.learning_rate"


def plan_of(folder: Path, **changes: Any) -> Plan:
    base = {
        "tasks": {
            "sentiment": {"kind": "classification"},
            "entities": {"kind": "token_classification"},
        },
        "data": [{"demo": True}],
        "training": {"epochs": EPOCHS},
    }
    (folder / "base.yaml").write_text(yaml.safe_dump(base), encoding="utf-8")
    sweep = {"base": "base.yaml", "space": {RATE: {"loguniform": [1e-6, 1e-2]}}, **changes}
    (folder / "sweep.yaml").write_text(yaml.safe_dump(sweep), encoding="utf-8")
    return load_plan(folder / "sweep.yaml")


class Trial:
    """What a scheduler sees of a trial: its score after each epoch."""

    def __init__(self, number: int, scores: list[float]) -> None:
        self.trial_id, self.scores = str(number), scores

    def result(self, epoch: int) -> dict[str, float]:
        return {"epoch": float(epoch), "objective_0": self.scores[epoch - 1]}


class Controller:
    def get_live_trials(self) -> list[Trial]:
        return []


def epochs_of(scheduler: Any, *scores: list[float]) -> list[int]:
    """How many epochs each of several trials gets that train side by side."""
    scheduler.set_search_properties("objective_0", "max")
    trials = [Trial(number, of_trial) for number, of_trial in enumerate(scores)]
    for trial in trials:
        scheduler.on_trial_add(Controller(), trial)
    trained = dict.fromkeys(trials, 0)
    running = list(trials)
    for epoch in range(1, len(scores[0]) + 1):
        for trial in list(running):
            trained[trial] = epoch
            if scheduler.on_trial_result(Controller(), trial, trial.result(epoch)) == "STOP":
                running.remove(trial)
    return list(trained.values())


def test_asha_stops_what_is_behind_at_a_rung_and_lets_the_best_end(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, scheduler={"kind": "asha", "grace_epochs": 2})
    late = [0.96] * 5 + [0.1] * 4
    steady = ([score] * EPOCHS for score in (0.95, 0.8, 0.1, 0.97))
    assert epochs_of(build_scheduler(plan), *steady, late) == [9, 2, 2, 9, 6]


def test_asha_lets_one_in_so_many_go_on(tmp_path: Path) -> None:
    steady = [[score] * EPOCHS for score in (0.9, 0.5, 0.75)]
    for factor, last in ((2, 4), (3, 2)):
        scheduler = {"kind": "asha", "grace_epochs": 2, "reduction_factor": factor}
        plan = plan_of(tmp_path, scheduler=scheduler)
        assert epochs_of(build_scheduler(plan), *steady) == [9, 2, last]


def test_asha_stops_nothing_where_every_trial_has_all_its_epochs_to_show_itself(
    tmp_path: Path,
) -> None:
    plan = plan_of(tmp_path, scheduler={"kind": "asha", "grace_epochs": 2 * EPOCHS})
    steady = ([score] * EPOCHS for score in (0.9, 0.5))
    assert epochs_of(build_scheduler(plan), *steady) == [9, 9]


def test_a_bad_trial_is_stopped_by_the_median_after_its_grace(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, scheduler={"kind": "median", "grace_epochs": 3})
    steady = ([score] * EPOCHS for score in (0.9, 0.8, 0.85, 0.1))
    assert epochs_of(build_scheduler(plan), *steady) == [9, 9, 9, 3]


def test_nothing_is_stopped_unless_asked_for(tmp_path: Path) -> None:
    assert build_scheduler(plan_of(tmp_path)) is None


def test_asha_s_rungs_reach_as_far_as_the_longest_trial(tmp_path: Path) -> None:
    """The base has 9 epochs; trials of 20 are still compared at 18, and the best one ends."""
    space = {"training.epochs": {"choice": [3, 20]}}
    plan = plan_of(tmp_path, space=space, scheduler={"kind": "asha", "grace_epochs": 2})
    late = [0.96] * 9 + [0.1] * 11
    assert epochs_of(build_scheduler(plan), [0.95] * 20, late) == [20, 18]


@pytest.mark.parametrize(
    ("space", "most"),
    [
        ({"training.epochs": {"randint": [2, 12]}}, 12),
        ({"training.epochs": {"quniform": [2, 8, 2]}}, 8),
        ({"training.epochs": {"choice": [4, 3]}}, 4),
        ({"training": {"choice": [{"epochs": 11}, {"epochs": 3}]}}, 11),
        ({RATE: {"uniform": [0.1, 0.2]}}, EPOCHS),
    ],
)
def test_the_longest_trial_is_known(space: dict[str, Any], most: int, tmp_path: Path) -> None:
    assert plan_of(tmp_path, space=space).most_epochs() == most


def draws(plan: Plan, score: Callable[[float], dict[str, float]], count: int = 40) -> list[float]:
    """Logarithms of the rates that a search asks for, one after the other."""
    searcher = build_searcher(plan)
    several = len(plan.sweep.objectives) > 1
    searcher.set_search_properties(
        None if several else "objective_0", None if several else "max", _space(plan)
    )
    found = []
    for number in range(count):
        drawn = math.log10(searcher.suggest(str(number))[RATE])
        searcher.on_trial_complete(str(number), score(drawn))
        found.append(drawn)
    return found


def test_after_its_first_draws_tpe_goes_where_the_results_are_better(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, searcher={"algorithm": "optuna", "startup_trials": 5})
    low = draws(plan, lambda rate: {"objective_0": -abs(rate + 5)})
    high = draws(plan, lambda rate: {"objective_0": -abs(rate + 3)})
    assert low[:5] == high[:5], "random draws do not hang on results"
    assert low[5:10] != high[5:10]
    assert sum(abs(rate + 5) < 0.5 for rate in low[5:]) > 15
    assert sum(abs(rate + 3) < 0.5 for rate in high[5:]) > 15


@pytest.mark.parametrize("algorithm", ["random", "optuna"])
def test_the_seed_fixes_what_is_drawn(algorithm: str, tmp_path: Path) -> None:
    def drawn(seed: int) -> list[float]:
        plan = plan_of(tmp_path, searcher={"algorithm": algorithm, "seed": seed})
        searcher = build_searcher(plan)
        if algorithm == "optuna":
            searcher.set_search_properties("objective_0", "max", _space(plan))
        space = {"config": _space(plan), "num_samples": 3, "storage_path": str(tmp_path)}
        trainable = Experiment("search", lambda config: None, **space)
        searcher = searcher if algorithm == "random" else SearchGenerator(searcher)
        searcher.add_configurations([trainable])
        return [searcher.next_trial().config[RATE] for _ in range(3)]

    assert drawn(1) == drawn(1)
    assert drawn(1) != drawn(2)


def test_with_two_objectives_draws_gather_between_their_optima(tmp_path: Path) -> None:
    """Any rate between them is on the Pareto front, and none outside is."""
    plan = plan_of(
        tmp_path,
        searcher={"algorithm": "optuna", "startup_trials": 10},
        objective=["sentiment/accuracy", "entities/f1"],
    )

    def two(rate: float) -> dict[str, float]:
        return {"objective_0": -abs(rate + 5), "objective_1": -abs(rate + 4.5)}

    found = draws(plan, two)
    inside = [-5.1 < rate < -4.4 for rate in found]
    assert sum(inside[:10]) < 4
    assert sum(inside[10:]) > 12


def test_a_search_that_goes_on_runs_as_many_at_a_time_as_it_is_told_now(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, searcher={"algorithm": "optuna"})
    earlier, now = build_searcher(plan, 1), build_searcher(plan, 3)
    now.set_state(earlier.get_state())
    assert now.max_concurrent == 3
    variants = ResumableVariants(max_concurrent=3)
    variants.set_state(ResumableVariants(max_concurrent=1).get_state())
    assert variants.max_concurrent == 3


def test_a_limited_search_hears_of_trials_that_began_without_a_limit(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, searcher={"algorithm": "optuna"})
    search = OptunaSearch(metric="objective_0", mode="max")
    search.set_search_properties("objective_0", "max", _space(plan))
    search.suggest("a")
    limited = ResumableLimiter(search, 1)
    assert limited.suggest("b")
    assert limited.suggest("c") is None
    limited.on_trial_complete("a", {"objective_0": 0.5})
    limited.on_trial_complete("b", {"objective_0": 0.7})
    assert [trial.value for trial in search._ot_study.trials] == [0.5, 0.7]
    assert limited.suggest("c")


def test_time_counts_over_all_commands_of_a_search(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    sent: list[int] = []
    monkeypatch.setattr(search.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(search.signal, "raise_signal", sent.append)
    first = TimeBudget(10)
    now[0] = 6 * 60
    first.on_step_end(0, [])
    assert not first.is_over
    second = TimeBudget(10)
    second.set_state(first.get_state())
    now[0] += 3 * 60
    second.on_step_end(0, [])
    assert not second.is_over
    assert not sent
    now[0] += 2 * 60
    second.on_step_end(0, [])
    assert second.is_over
    assert sent
