"""What a sweep says while it runs."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import OutOfMemoryError
from rich.console import Console

from mtl_core.errors import TrainingError
from train_jobs import sweep_table
from train_jobs.sweep_table import MAX_ROWS, SECONDS_BETWEEN_LINES, SweepTable
from train_jobs.tune import tune_breaking_off


class Clock:
    now = 100.0

    def monotonic(self) -> float:
        return self.now


def test_in_a_log_a_long_trial_says_where_it_is_now_and_then_and_how_it_ended(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = Clock()
    monkeypatch.setattr(sweep_table, "time", clock)
    plan: Any = SimpleNamespace(settings=dict)
    trial = SimpleNamespace(trial_id="a", config={"optim.learning_rate": 0.001})
    with SweepTable("search", plan, ["mean"]) as table:
        table.on_trial_start(0, [], trial)
        for epoch in range(1, 7):
            clock.now += SECONDS_BETWEEN_LINES * 0.6
            spent = clock.now - 100
            result = {"epoch": epoch, "time_total_s": spent, "objective_0": epoch / 10}
            table.on_trial_result(0, [], trial, {**result, "finished": epoch == 6})
        table.on_trial_complete(0, [], trial)
    assert capsys.readouterr().out.splitlines() == [
        "search:",
        "trial 1 epoch 2, 20, 36 s",
        "trial 1 epoch 4, 40, 72 s",
        "trial 1 finished, 60, 108 s: optim.learning_rate 0.001",
    ]


def test_the_table_shows_what_runs_and_then_the_best_and_how_each_ended() -> None:
    """One trial more than it has rows for: the worst is left out."""
    plan: Any = SimpleNamespace(settings=dict)
    table = SweepTable("search", plan, ["mean"])
    for number in range(1, MAX_ROWS + 2):
        trial = SimpleNamespace(trial_id=str(number), config={"optim.learning_rate": 0.001})
        table.on_trial_start(0, [], trial)
        result = {"epoch": 1, "objective_0": number / 100, "finished": number % 2}
        table.on_trial_result(0, [], trial, result)
        if number not in (3, 5):
            table.on_trial_complete(0, [], trial)
    numbers, states = (list(column.cells) for column in table.render().columns[:2])
    ended = [n for n in range(MAX_ROWS + 1, 1, -1) if n not in (3, 5)]
    assert numbers == [str(n) for n in (5, 3, *ended)]
    assert states == ["running"] * 2 + ["finished" if n % 2 else "stopped" for n in ended]


@pytest.mark.parametrize("terminal", [True, False])
def test_why_a_trial_failed_is_said_on_a_terminal_and_in_a_log(
    terminal: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    here = partial(Console, force_terminal=terminal, width=100)
    monkeypatch.setattr(sweep_table, "Console", here)
    plan: Any = SimpleNamespace(settings=dict)
    trial = SimpleNamespace(
        trial_id="a",
        config={"optim.learning_rate": 1e38},
        get_pickled_error=lambda: None,
        get_error=lambda: "Failure # 1\nthe loss of [sentiment] is not finite at step 1",
    )
    with SweepTable("search", plan, ["mean"]) as table:
        table.on_trial_start(0, [], trial)
        table.on_trial_result(0, [], trial, {"time_total_s": 1.0})  # Tune's own, without an epoch
        table.on_trial_error(0, [], trial)
    assert "trial 1: the loss of [sentiment] is not finite at step 1\n" in capsys.readouterr().out


def handled_as_tune_does(killed: BaseException) -> None:
    """Ray 2.60's event manager hands errors on while it handles them."""
    try:
        raise killed
    except Exception as error:
        raise RuntimeError(f"Caught unexpected exception: {error}") from None


def test_what_tune_itself_does_not_survive_is_told_in_a_line() -> None:
    killed = OutOfMemoryError("Task was killed due to the node running low on memory.\nMemory: …")
    said = "^Ray Tune broke off: Task was killed .* low on memory; the same command goes on$"
    with pytest.raises(TrainingError, match=said), tune_breaking_off():
        handled_as_tune_does(killed)
    with pytest.raises(RuntimeError, match="unexpected exception: a bug"), tune_breaking_off():
        handled_as_tune_does(ValueError("a bug"))
