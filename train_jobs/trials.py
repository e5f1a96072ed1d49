"""What one trial of a sweep runs on Ray: an experiment, scored by the sweep's objectives."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import ray
import torch
from pyarrow.fs import FileSelector, FileType
from ray import tune
from ray.train import Checkpoint
from ray.tune.integration.ray_train import TuneReportCallback

from mtl_core.config import Experiment, WeightingConfig, dump_experiment
from mtl_core.data.prepare import Data, prepare, reopen
from mtl_core.metrics import mean_score, primary_scores
from mtl_core.state import FILES
from mtl_core.world import World
from train_jobs.driver import build_trainer
from train_jobs.progress import progress_log
from train_jobs.runs import RunFolder, take
from train_jobs.sweep import Plan
from train_jobs.worker import WorkerSession

BASE, BEST, ALONE = "base", "best", "alone/"
"""What is compared in the end: the experiment with fixed weights, the best setting, each task by
itself."""

COSINES_EVERY = 10
"""Steps between two looks at the tasks' gradients, in the base experiment's first run."""


@dataclass(frozen=True)
class TrialResult:
    """What became of a trial, as reports have it."""

    phase: str
    trial: str
    """Tune's name for it."""
    status: Literal["finished", "stopped", "failed", "unfinished"]
    reason: str
    """Why it failed; "" otherwise."""
    config: Mapping[str, Any]
    """What a searcher drew, or a case and a seed of a comparison."""
    metrics: Mapping[str, Any]
    """Its last report; empty if there was none."""
    checkpoint: Checkpoint | None = None

    @property
    def is_finished(self) -> bool:
        """Whether it was trained to its end."""
        return self.status == "finished"

    @property
    def seconds(self) -> float:
        """How long it ran; NaN without a report."""
        return float(self.metrics.get("time_total_s", math.nan))


class TrialFailed(RuntimeError):
    """Training of one trial could not go on; the message is the loop's own."""


@dataclass(frozen=True)
class Job:
    """What the trials of one phase share; it travels through the object store once."""

    plan: Plan
    folder: str
    """The sweep's folder, as path or URL."""
    labels: Mapping[str, tuple[str, ...]]
    keys: Mapping[str, str]
    """Of the base experiment's encoded splits."""
    best: Mapping[str, Any] | None = None
    """What the search drew for its best trial."""
    alone: Mapping[str, float] = field(default_factory=dict)
    """Task → validation score when trained alone, which `gain` is relative to."""

    def experiment(self, config: Mapping[str, Any]) -> Experiment:
        """What a trial trains: a case and a seed of the comparison, or what a searcher drew."""
        if "case" not in config:
            return self.plan.experiment(config)
        case, seed = str(config["case"]), int(config["seed"])
        if case == BEST:
            assert self.best is not None
            return self.plan.experiment(self.best, seed)
        if case.startswith(ALONE):
            alone = self.plan.alone(case.removeprefix(ALONE))
            return alone.model_copy(update={"seed": seed, "weighting": WeightingConfig()})
        base = self.plan.base
        every = base.weighting.gradient_cosines or (COSINES_EVERY if seed == base.seed else None)
        weighting = WeightingConfig(strategy="fixed", gradient_cosines=every)
        return base.model_copy(update={"seed": seed, "weighting": weighting})

    def data(self, experiment: Experiment) -> Data:
        """Its encoded texts: mapped when they are the base experiment's, else made, or found made
        by another trial."""
        if _texts(experiment) == _texts(self.plan.base):
            return reopen(experiment, self.labels, self.keys)
        return prepare(experiment)


def _texts(experiment: Experiment) -> str:
    """All that encoded texts depend on."""
    raw = experiment.model_dump(mode="json")
    labels = {name: (task["kind"], task["labels"]) for name, task in raw["tasks"].items()}
    sharded = raw["training"]["shard_texts"]  # whose blocks are in an order that the seed draws
    drawn = any(source["limit"] or "validation" not in source["splits"] for source in raw["data"])
    seed = raw["seed"] if sharded or drawn else 0
    parts = [raw["data"], raw["encoder"], raw["init_from"], labels, sharded, seed]
    return json.dumps(parts, sort_keys=True)


class Scorer:
    """Adds the sweep's objectives to what a worker reports."""

    def __init__(self, objectives: tuple[str, ...], alone: Mapping[str, float]) -> None:
        self.objectives = objectives
        self.alone = dict(alone)
        self.best: Mapping[str, Any] = {}
        """The report of the epoch whose weights are kept."""

    def __call__(self, metrics: Mapping[str, Any]) -> dict[str, Any]:
        if metrics.get("best") or metrics.get("finished") or not self.best:
            self.best = metrics
        values = map(self.value, self.objectives)
        return {**metrics, **dict(zip(objective_keys(self.objectives), values, strict=True))}

    def value(self, objective: str) -> float:
        # As in training a task without a label there does not count.
        scores = primary_scores(self.best, "validation")
        if objective == "mean":
            return mean_score(scores)
        if objective == "gain":
            before = self.alone
            return mean_score({t: s / before[t] - 1 for t, s in scores.items() if t in before})
        return float(self.best.get(f"validation/{objective}", float("nan")))


def objective_key(number: int) -> str:
    """The name of an objective among a trial's results."""
    return f"objective_{number}"


def objective_keys(objectives: Sequence[str]) -> list[str]:
    """The names of all of them there."""
    return [objective_key(number) for number in range(len(objectives))]


class TrialHistory:
    """What a trial tells, kept in a folder of its own for whoever goes on with the trial."""

    def __init__(self, folder: RunFolder, scorer: Scorer) -> None:
        self.folder, self.scorer = folder, scorer
        self.rows = folder.history()
        self.begun = False
        """Whether training has begun since; what fails before may not the next time."""

    @property
    def failure(self) -> str | None:
        """Why training cannot go on."""
        return next((row["message"] for row in self.rows if row["event"] == "failed"), None)

    def take(self, event: str, row: Mapping[str, Any]) -> None:
        take(self.rows, event, row)
        if event == "start":
            self.begun = True
            for earlier in self.rows:
                if earlier["event"] == "validation":
                    self.scorer(earlier)  # which of them was the best

    def take_from(self, log: Any) -> None:
        """Take and keep what several workers have told a ProgressLog."""
        for event, row in ray.get(log.drain.remote()):
            self.take(event, row)
        self.store()

    def store(self) -> None:
        if self.folder.is_local:
            self.folder.filesystem.makedirs(self.folder.path, exist_ok=True)
        kept = [row for row in self.rows if self.begun or row["event"] != "failed"]
        self.folder.write_history(kept)


class TrialSession(WorkerSession):
    """A worker in the trial's own process: one process less to start for each trial."""

    def __init__(self, history: TrialHistory, keep_weights: bool, use_gpu: bool) -> None:
        # Ray Train's own context knows nothing of a trial.
        self.world = World(device=torch.device("cuda" if use_gpu else "cpu"))
        self.history, self.keep_weights = history, keep_weights

    def checkpoint(self) -> Checkpoint | None:
        found: Checkpoint | None = tune.get_checkpoint()
        return None if found is None else first_complete(found)

    def report(self, metrics: dict[str, Any], folder: Path | None) -> None:
        row = self.history.scorer(metrics)
        self.history.store()
        if metrics.get("finished"):
            row["history"] = self.history.rows
            folder = folder if self.keep_weights else None
        checkpoint = None if folder is None else tune.Checkpoint.from_directory(str(folder))
        tune.report(row, checkpoint=checkpoint)

    def tell(self, event: str, row: dict[str, Any]) -> None:
        self.history.take(event, row)
        if event == "failed":
            self.history.store()


def first_complete(checkpoint: Checkpoint) -> Checkpoint | None:
    """The first complete checkpoint of a trial from this one onwards, or None.

    Tune deletes a checkpoint once it has the next, and records only then which one that is: what a
    driver that was killed in between left behind names one that is gone, or half gone.
    """
    folder, _, name = checkpoint.path.rpartition("/")
    filesystem = checkpoint.filesystem
    assert filesystem is not None
    found = filesystem.get_file_info(FileSelector(folder, allow_not_found=True))
    for later in sorted(info.path for info in found if info.base_name >= name):
        files = filesystem.get_file_info([f"{later}/{file}" for file in FILES])
        if all(file.type == FileType.File for file in files):
            return Checkpoint(later, filesystem)
    return None


class RestoreMissingCheckpoints(tune.Callback):
    """Puts a folder where a checkpoint was that Tune's records name, else Tune fails the trial.

    What the trial goes on from instead is for `first_complete` to find.
    """

    looked = False

    def on_step_begin(self, iteration: int, trials: list[Any], **info: Any) -> None:
        for trial in () if self.looked else trials:
            checkpoint = trial.checkpoint
            if checkpoint is None or trial.is_finished():
                continue
            filesystem = checkpoint.filesystem
            if filesystem.get_file_info(checkpoint.path).type == FileType.NotFound:
                filesystem.create_dir(checkpoint.path)
                with filesystem.open_output_stream(f"{checkpoint.path}/gone"):
                    pass  # an object store has no empty folders
        self.looked = True


class ReportToTune(TuneReportCallback):
    """Passes on what several workers report, with the objectives; keeps what they told until then.

    Ray Train's controller has a copy of it, in a process of its own.
    """

    def __init__(self, history: TrialHistory, log: Any) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.history, self.log = history, log

    def after_report(self, run_context: Any, metrics: list[Any], checkpoint: Any) -> None:
        self.history.take_from(self.log)
        super().after_report(run_context, [self.history.scorer(metrics[0])], checkpoint)


def run_trial(config: dict[str, Any], job: Job) -> None:
    """Train what a config asks for, with the one builder of training runs.

    Raises:
        TrialFailed: training cannot go on; the reason. Tune tries again, and hears it at once.
    """
    experiment = job.experiment(config)
    case = config.get("case")
    objectives = job.plan.sweep.objectives if case is None else ("mean",)
    trial = tune.get_context().get_trial_id()
    named = experiment.model_copy(update={"name": trial, "output_dir": f"{job.folder}/workers"})
    scorer = Scorer(objectives, job.alone)
    history = TrialHistory(RunFolder(named), scorer)
    if history.failure is None:
        data = job.data(experiment)
        if case is None:  # a search chooses by validation, and has no business with test
            data.splits.pop("test", None)
            data.keys.pop("test", None)
        if experiment.scale.workers == 1:
            first = config.get("seed") == job.plan.base.seed
            given = bool(ray.get_gpu_ids())  # by Tune, whatever other nodes have now
            session = TrialSession(history, keep_weights=case == BEST and first, use_gpu=given)
            build_trainer(named, history.folder, data, None, session=session).fit()
        else:
            history = _train_with_workers(named, data, history)
    if history.failure is not None:
        raise TrialFailed(history.failure)


def _train_with_workers(experiment: Experiment, data: Data, history: TrialHistory) -> TrialHistory:
    """Train with workers of their own; returns what they told."""
    folder, scorer, log = history.folder, history.scorer, progress_log()
    history.store()
    folder.write("experiment.yaml", dump_experiment(experiment))  # which its workers look for
    callbacks = [ReportToTune(history, log)]
    result = build_trainer(experiment, folder, data, log, callbacks=callbacks).fit()
    before, history = history.rows, TrialHistory(folder, scorer)  # what the callback's copy kept
    history.begun = history.rows != before
    history.take_from(log)
    if result.metrics and result.metrics.get("finished"):
        assert result.checkpoint is not None
        where = {"checkpoint_path": result.checkpoint.path}
        tune.report({**scorer(result.metrics), **where, "history": history.rows})
    return history
