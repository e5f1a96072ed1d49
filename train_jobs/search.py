"""How Ray Tune searches: what it draws next, which trials it stops, and when its time is over."""

from __future__ import annotations

import math
import signal
import time
from typing import Any

from ray import tune
from ray.tune.search import ConcurrencyLimiter
from ray.tune.search.basic_variant import BasicVariantGenerator

from train_jobs.cluster import room_for, worker_resources
from train_jobs.sweep import Plan
from train_jobs.trials import objective_key, objective_keys


def search_options(plan: Plan) -> dict[str, Any]:
    """What `tune.run` is told of a search."""
    options = {
        "num_samples": 1 if plan.sweep.searcher.algorithm == "grid" else plan.sweep.budget.trials,
        "search_alg": build_searcher(plan, trials_at_once(plan)),
        "scheduler": build_scheduler(plan),
    }
    if len(plan.sweep.objectives) > 1:  # the searcher has the metrics
        return options
    return {**options, "metric": objective_key(0), "mode": "max"}


def comparison_options(plan: Plan) -> dict[str, Any]:
    """What `tune.run` is told where every case of a comparison is trained to its end."""
    variants = ResumableVariants(max_concurrent=trials_at_once(plan) or 0)
    return {"search_alg": variants, "metric": objective_key(0), "mode": "max"}


def build_searcher(plan: Plan, at_once: int | None = None) -> Any:
    """What draws the settings of each trial, for at most so many trials at a time."""
    searcher = plan.sweep.searcher
    if searcher.algorithm != "optuna":
        return ResumableVariants(max_concurrent=at_once or 0, random_state=searcher.seed)
    import optuna
    from ray.tune.search.optuna import OptunaSearch

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    keys = objective_keys(plan.sweep.objectives)
    sampler = optuna.samplers.TPESampler(
        n_startup_trials=searcher.startup_trials, seed=searcher.seed
    )
    several = len(keys) > 1
    search = OptunaSearch(
        metric=keys if several else keys[0],
        mode=["max"] * len(keys) if several else "max",
        sampler=sampler,
    )
    return search if at_once is None else ResumableLimiter(search, at_once)


def build_scheduler(plan: Plan) -> Any:
    """What stops trials that fall behind; None lets all of them end."""
    from ray.tune.schedulers import AsyncHyperBandScheduler, MedianStoppingRule

    scheduler = plan.sweep.scheduler
    if scheduler.kind == "asha":
        epochs = plan.most_epochs()
        return AsyncHyperBandScheduler(
            time_attr="epoch",
            max_t=epochs + 1,  # the scores come after the last epoch's report
            grace_period=min(scheduler.grace_epochs, epochs),
            reduction_factor=scheduler.reduction_factor,
        )
    if scheduler.kind == "median":
        return MedianStoppingRule(time_attr="epoch", grace_period=scheduler.grace_epochs)
    return None


def trials_at_once(plan: Plan) -> int | None:
    """How many trials may run at a time; None leaves it to what their processes ask for.

    With workers of their own as many as the cluster holds now: a driver takes next to no CPU, so
    Tune would start all of them, to wait for workers in memory.
    """
    workers = worker_resources(plan.base.scale)
    if plan.sweep.budget.concurrency or workers.most == 1:
        return plan.sweep.budget.concurrency
    return max(1, room_for(workers.each) // workers.most)


class ResumableVariants(BasicVariantGenerator):
    """Random and grid search; a resumed one keeps the number of trials at once of this command."""

    def set_state(self, state: dict[str, Any]) -> None:
        state = {**state, "max_concurrent": self.max_concurrent}
        super().set_state(state)  # type: ignore[no-untyped-call]


class ResumableLimiter(ConcurrencyLimiter):
    """The same around Optuna's search."""

    def set_state(self, state: dict[str, Any]) -> None:
        super().set_state({**state, "max_concurrent": self.max_concurrent})

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        # Ray's own ignores the results of trials that it did not start, such as those begun without
        # a limit.
        self.live_trials.discard(trial_id)
        self.searcher.on_trial_complete(trial_id, result=result, error=error)


class TimeBudget(tune.Callback):
    """Ends a search when its time is over, as Ctrl-C does, so that more time lets it go on.

    Tune's own `time_budget_s` ends the trials for good.
    """

    def __init__(self, minutes: float | None) -> None:
        self.minutes = math.inf if minutes is None else minutes
        self.earlier = 0.0
        """Minutes that the search took in commands before this one."""
        self.started = time.monotonic()
        self.is_over = False

    @property
    def spent(self) -> float:
        return self.earlier + (time.monotonic() - self.started) / 60

    def get_state(self) -> dict[str, float]:
        return {"spent": self.spent}

    def set_state(self, state: dict[str, float]) -> None:
        self.earlier = state["spent"]

    def on_step_end(self, iteration: int, trials: list[Any], **info: Any) -> None:
        if self.spent > self.minutes:
            self.is_over = True
            signal.raise_signal(signal.SIGUSR1)  # which Tune takes as the wish to end
