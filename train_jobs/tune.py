"""python -m train_jobs.tune: search an experiment's settings, and compare what was found."""

from __future__ import annotations

import argparse
import contextlib
import logging
import math
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

from ray import tune
from ray.exceptions import RayError

from mtl_core.command import INTERRUPTED, run_command
from mtl_core.data.prepare import check_metric, prepare
from mtl_core.errors import ConfigError, TrainingError
from mtl_core.forks import forked_workers
from mtl_core.metrics import primary_scores
from train_jobs.cluster import cpu_share, idle_gpus, ray_cluster, room_for, worker_resources
from train_jobs.console import describe_data
from train_jobs.driver import stop_as_interrupt
from train_jobs.rehearsal import rehearse
from train_jobs.search import TimeBudget, comparison_options, search_options
from train_jobs.sweep import Plan, check_baselines, load_plan
from train_jobs.sweep_folder import SweepFolder
from train_jobs.sweep_report import show_report, write_report
from train_jobs.sweep_table import SweepTable, reason_of
from train_jobs.trials import (
    ALONE,
    BASE,
    BEST,
    Job,
    RestoreMissingCheckpoints,
    TrialResult,
    objective_keys,
    run_trial,
)

EPILOG = """examples:
  python -m train_jobs.tune --config tune_configs/demo.yaml
  python -m train_jobs.tune --config my_sweep.yaml --set budget.trials=8 --set name=try

Running the same name again resumes the sweep; finished trials are not repeated. Ctrl-C stops it and
reports what there is. docs/tuning.md shows how, docs/sweep.md explains every key."""
PHASES = ("baselines", "search", "best")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m train_jobs.tune",
        description="Search learning rates, loss weights and freezing; see whether sharing helps.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", required=True, help="sweep file (YAML)")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="change one field of the sweep by its dotted path; may be repeated",
    )
    options = parser.parse_args(arguments)
    plan = load_plan(options.config, options.set)
    folder = SweepFolder(plan.sweep)
    resumed = folder.check(plan)
    if folder.is_finished(plan.sweep.budget.minutes):
        print(f"{folder.title} is finished:")
        show_report(folder)
        return
    if resumed:
        print(f"resuming {folder.title}")
    whole = sweep(plan, folder)
    show_report(folder)
    if not whole:
        print("interrupted; run the same command again to go on", file=sys.stderr)
        sys.exit(INTERRUPTED)


def sweep(plan: Plan, folder: SweepFolder) -> bool:
    """Run every phase of a sweep and write its report; False if it was interrupted.

    Raises:
        ConfigError: training would refuse a baseline, the cluster cannot hold a trial, not all of
            its nodes reach the folder, or another process works on this sweep.
        DataError: the data cannot be used, has no score that the search is to go by, or is not what
            the sweep was begun with.
    """
    check_baselines(plan)
    data = prepare(plan.base)
    for objective in plan.sweep.objectives:
        if "/" in objective:
            check_metric("objective", objective, data)
    describe_data(data)
    os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
    for name in ("execution.tune_controller", "search.search_generator", "tune"):
        logging.getLogger(f"ray.tune.{name}").addFilter(_is_news)
    # A trial that ended is on disk a second later, whatever happens to this process.
    os.environ.setdefault("TUNE_GLOBAL_CHECKPOINT_S", "1")
    with forked_workers("train_jobs.preload") as scripts, ray_cluster(scripts):
        plan = _with_resources(plan)  # what this machine cannot hold leaves no folder
        if hint := idle_gpus(plan.base.scale):
            print(hint)
        with folder.claim(plan, data.keys):
            rehearse(plan.base.scale, plan.sweep)
            return run_phases(Job(plan, folder.title, data.labels, data.keys), folder)


def run_phases(job: Job, folder: SweepFolder) -> bool:
    """Run the baselines, the search and its best setting; False if one was interrupted.

    Raises:
        ConfigError: no trial of the search finished, or no baseline that its objective needs, or
            that scores 0.
    """
    plan = job.plan
    results: dict[str, list[TrialResult]] = {}
    seconds: dict[str, float] = {}
    best: TrialResult | None = None
    for phase in PHASES:
        records = phase
        if phase == "best":
            if best is None:
                raise ConfigError(f"no trial of {folder.title} finished; trials.csv there says why")
            job = replace(job, best=best.config)
            records = f"best-{best.trial}"  # a search that goes on may find a better one
        cases = _cases(phase, plan)
        if phase != "search" and not cases:
            continue
        space = _space(plan) if phase == "search" else cases
        started = time.monotonic()
        results[phase], whole = run_phase(phase, job, space, folder, records)
        seconds[phase] = round(time.monotonic() - started, 1)
        best = best_trial(results.get("search", []), plan)
        write_report(plan, folder, results, best, seconds)
        if not whole:
            return False
        if phase == "baselines":
            job = replace(job, alone=_scores_alone(results[phase], plan))
    timed_out = _num_ended(results["search"]) < plan.sweep.num_trials
    folder.finish(plan.sweep.budget.minutes if timed_out else None)
    return True


def _is_news(record: logging.LogRecord) -> bool:
    """Filter for logs: drops messages of Ray's that our own output covers."""
    known = (
        "Trial task failed",  # a page of traceback
        "Trials did not complete",
        "Stop signal received",
        "Experiment has been interrupted",
        "Limiter was not found",
    )
    return not record.getMessage().startswith(known)


def _cases(phase: str, plan: Plan) -> dict[str, Any]:
    """What a phase of comparison trains."""
    if phase == "best":
        names = [BEST]
    elif phase == "baselines" and plan.sweep.baselines:
        names = [BASE, *(f"{ALONE}{task}" for task in plan.base.tasks if len(plan.base.tasks) > 1)]
    else:
        return {}
    return {"case": tune.grid_search(names), "seed": tune.grid_search(plan.seeds())}


def _space(plan: Plan) -> dict[str, Any]:
    every = plan.sweep.searcher.algorithm == "grid"
    space: dict[str, Any] = {}
    for path, parameter in plan.sweep.space.items():
        space |= parameter.domains(path, plan.fields[path], every)
    return space


def _with_resources(plan: Plan) -> Plan:
    """The base with its workers' CPUs settled, so that best.yaml trains as the trial did.

    Raises:
        ConfigError: the cluster cannot hold one trial.
    """
    scale = plan.base.scale
    if not isinstance(scale.workers, int):
        raise ConfigError("scale.workers: trials need one number of workers, not [min, max]")
    workers = worker_resources(scale)
    if scale.cpus_per_worker is None:
        at_once = plan.sweep.budget.concurrency or min(
            plan.sweep.num_trials, max(1, room_for({**workers.each, "CPU": 1}) // workers.most)
        )
        share = cpu_share(workers.most * at_once, workers.use_gpu)
        scale = scale.model_copy(update={"cpus_per_worker": share})
    return replace(plan, base=plan.base.model_copy(update={"scale": scale}))


def run_phase(
    phase: str, job: Job, space: Mapping[str, Any], folder: SweepFolder, records: str
) -> tuple[list[TrialResult], bool]:
    """Run a phase's trials, or what is left of them; their results, and whether all ran.

    Args:
        phase: which of PHASES.
        job: what its trials share.
        space: what Tune draws from.
        folder: the sweep's.
        records: the folder in it of Tune's records, from which the phase goes on.
    """
    searching, sweep = phase == "search", job.plan.sweep
    table = SweepTable(phase, job.plan, sweep.objectives if searching else ("mean",))
    budget = TimeBudget(sweep.budget.minutes if searching else None)
    trainable = tune.with_resources(tune.with_parameters(run_trial, job=job), _resources(job.plan))
    with table, stop_as_interrupt(), tune_breaking_off():
        # Tuner.restore would take all settings from its records, and the command may change some.
        analysis = tune.run(
            trainable,
            config=dict(space),
            name=records,
            storage_path=folder.title,
            resume=folder.holds(f"{records}/experiment_state-*.json"),
            max_failures=1,
            checkpoint_config=tune.CheckpointConfig(num_to_keep=1),
            # A trial that is stopped keeps its workers as long as the process that waits for them.
            reuse_actors=job.plan.base.scale.workers == 1,
            raise_on_failed_trial=False,
            callbacks=[table, budget, RestoreMissingCheckpoints()],
            verbose=0,
            **(search_options if searching else comparison_options)(job.plan),
        )
    # Where no result came the trial itself still knows its settings.
    grid = tune.ResultGrid(analysis)
    pairs = [(trial, grid[number]) for number, trial in enumerate(analysis.trials)]
    # Tune has them in another order once it went on with some, or tried one again.
    found = [_result(phase, result, trial) for trial, result in sorted(pairs, key=_drawn_as)]
    found = [trial for trial in found if trial.metrics or trial.reason]  # the others never began
    if budget.is_over:
        print(f"{budget.minutes:g} minutes are over; with more the same command goes on")
    expected = sweep.num_trials
    if not searching:
        expected = math.prod(len(values["grid_search"]) for values in space.values())
    return found, budget.is_over or _num_ended(found) >= expected


@contextlib.contextmanager
def tune_breaking_off() -> Iterator[None]:
    """Turn the end of a process that Tune cannot handle into an error that says so.

    It expects errors of a trial or of its actor. One that is killed for lack of memory as it starts
    may be neither, and ends the whole phase.

    Raises:
        TrainingError: that happened.
    """
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error.__context__, RayError):
            raise
        reason = reason_of(error.__context__).rstrip(".")
        raise TrainingError(f"Ray Tune broke off: {reason}; the same command goes on") from error


def _num_ended(trials: Sequence[TrialResult]) -> int:
    return sum(trial.status != "unfinished" for trial in trials)


def _resources(plan: Plan) -> dict[str, float]:
    """What a trial's own process takes: the worker's share, or next to nothing beside workers.

    A byte of memory, since Tune refuses nothing at all, and any part of a CPU would be missing
    where workers ask for all of them.
    """
    workers = worker_resources(plan.base.scale)
    if workers.most != 1:
        return {"cpu": 0.0, "memory": 1.0}
    return {name.lower(): amount for name, amount in workers.each.items()}


def _drawn_as(pair: tuple[Any, tune.Result]) -> int:
    """The number that Tune gave a trial as it was drawn."""
    return int(pair[0].experiment_tag.partition("_")[0])


def _result(phase: str, result: tune.Result, trial: Any) -> TrialResult:
    """A trial as the report has it."""
    metrics = dict(result.metrics or {})
    status: Literal["finished", "stopped", "failed", "unfinished"] = "unfinished"
    reason = ""
    if result.error is not None:
        status, reason = "failed", reason_of(result.error)
    elif metrics.get("finished"):
        status = "finished"
    elif metrics.get("done"):
        status = "stopped"
    return TrialResult(
        phase, trial.trial_id, status, reason, dict(trial.config), metrics, result.checkpoint
    )


def best_trial(trials: Sequence[TrialResult], plan: Plan) -> TrialResult | None:
    """The finished trial with the highest objective, or the highest mean of several; the first of
    equals."""
    keys = objective_keys(plan.sweep.objectives)
    finished = [trial for trial in trials if trial.is_finished]
    return max(finished, key=lambda trial: sum(trial.metrics[k] for k in keys), default=None)


def _scores_alone(trials: Sequence[TrialResult], plan: Plan) -> dict[str, float]:
    """Task → mean validation score over the seeds of its runs alone, if validation has its labels.

    Raises:
        ConfigError: the objective is relative to one that is missing, or 0.
    """
    gain = "gain" in plan.sweep.objectives
    finished = [trial for trial in trials if trial.is_finished]
    alone = {}
    for task in plan.base.tasks:
        runs = [trial.metrics for trial in finished if trial.config["case"] == f"{ALONE}{task}"]
        if gain and not runs:
            raise ConfigError(f"objective: gain needs {task} alone, and no such run finished")
        found = [primary_scores(metrics, "validation") for metrics in runs]
        scores = [each[task] for each in found if task in each]
        if gain and scores and not any(scores):
            raise ConfigError(
                f"objective: gain is relative to what {task} scores alone, which is 0; train "
                "longer, or take mean"
            )
        if scores:
            alone[task] = sum(scores) / len(scores)
    return alone


if __name__ == "__main__":
    with contextlib.suppress(BrokenPipeError):
        run_command(main)
