"""The live table of a sweep's trials."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from ray import tune
from ray.exceptions import RayTaskError
from rich.console import Console
from rich.live import Live
from rich.table import Table

from train_jobs.sweep import Plan
from train_jobs.trials import objective_keys

MAX_ROWS = 20
SECONDS_BETWEEN_LINES = 30
"""Where there is no terminal: how often a trial says at most where it is."""


class SweepTable(tune.Callback):
    """Shows trials as they come and go: a table on a terminal, elsewhere a line now and then."""

    def __init__(self, phase: str, plan: Plan, objectives: Sequence[str]) -> None:
        self.phase, self.plan, self.objectives = phase, plan, list(objectives)
        self.trials: dict[str, dict[str, Any]] = {}
        self.started = time.monotonic()
        self.console = Console(highlight=False)
        self.live: Live | None = None

    def __enter__(self) -> SweepTable:
        self.console.print(f"{self.phase}:")
        if self.console.is_terminal:
            self.live = Live(console=self.console, refresh_per_second=2, get_renderable=self.render)
            self.live.__enter__()
        return self

    def __exit__(self, *details: Any) -> None:
        if self.live is not None:
            self.live.__exit__(*details)
            self.live = None

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._row(trial).update(status="running")

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: Mapping[str, Any], **info: Any
    ) -> None:
        keys = objective_keys(self.objectives)
        row = self._row(trial)
        row.update(
            epoch=shown(result.get("epoch", "")),
            seconds=result.get("time_total_s"),
            scores=[result[key] for key in keys if key in result],
            finished=bool(result.get("finished")),
        )
        said = row.setdefault("said", self.started)
        if time.monotonic() - said > SECONDS_BETWEEN_LINES and not row["finished"]:
            row["said"] = time.monotonic()
            self._say(row, f"epoch {row['epoch']}")

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        row = self._row(trial)
        self._end(row, "finished" if row.get("finished") else "stopped")

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        row = self._row(trial)
        self._end(row, "failed")
        if error := trial.get_pickled_error() or trial.get_error():
            told = f"trial {row['number']}: {reason_of(error)}"
            self.console.print(told, soft_wrap=True, markup=False)

    def _row(self, trial: Any) -> dict[str, Any]:
        return self.trials.setdefault(
            trial.trial_id,
            {"settings": self._settings(trial.config), "number": len(self.trials) + 1},
        )

    def _settings(self, config: Mapping[str, Any]) -> dict[str, Any]:
        return dict(config) if "case" in config else self.plan.settings(config)

    def _end(self, row: dict[str, Any], status: str) -> None:
        row["status"] = status
        told = ", ".join(f"{k} {shown(v)}" for k, v in row["settings"].items())
        self._say(row, status, f": {told}")

    def _say(self, row: Mapping[str, Any], what: str, more: str = "") -> None:
        """A line of its own, where nothing else shows how far a trial is."""
        if self.live is not None:
            return
        scores = " ".join(shown(100 * score) for score in row.get("scores", ())) or "no score"
        spent = f"{row.get('seconds') or 0:.0f} s"
        self.console.print(f"trial {row['number']} {what}, {scores}, {spent}{more}", soft_wrap=True)

    def render(self) -> Table:
        minutes, seconds = divmod(int(time.monotonic() - self.started), 60)
        counts = [row.get("status", "waiting") for row in self.trials.values()]
        states = ", ".join(f"{counts.count(s)} {s}" for s in dict.fromkeys(counts))
        table = Table(
            title=f"{self.phase}: {states}  {minutes}:{seconds:02d}", title_justify="left"
        )
        ordered = sorted(self.trials.values(), key=_running_then_best)
        columns = list(ordered[0]["settings"]) if ordered else []
        for name in ("trial", "status", "epoch", *self.objectives, "seconds", *columns):
            table.add_column(name, overflow="fold")
        for row in ordered[:MAX_ROWS]:
            scores = [shown(100 * score) for score in row.get("scores", ())]
            scores += [""] * (len(self.objectives) - len(scores))
            table.add_row(
                str(row["number"]),
                row.get("status", ""),
                row.get("epoch", ""),
                *scores,
                f"{row['seconds']:.0f}" if row.get("seconds") else "",
                *(shown(row["settings"].get(name, "")) for name in columns),
            )
        return table


def _running_then_best(row: Mapping[str, Any]) -> tuple[bool, list[float]]:
    return row.get("status") != "running", [-score for score in row.get("scores", [1.0])]


def reason_of(error: BaseException | str) -> str:
    """A line that says why a trial failed: its own last words, or what Ray says of its end.

    Ray has a text instead of an exception where a process was killed.
    """
    lines = [line.strip() for line in str(error).strip().splitlines()]
    if isinstance(error, RayTaskError):
        return lines[-1]
    return next((line for line in lines if not line.startswith("Failure #")), repr(error))


def shown(value: Any) -> str:
    """A value as short as tables need it."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)
