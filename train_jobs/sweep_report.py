"""What a sweep found: tables, pictures, the best setting and its artifact, and one page."""

from __future__ import annotations

import io
import itertools
import json
import math
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from pyarrow.fs import FSSpecHandler, PyFileSystem
from ray.train import Checkpoint
from rich.console import Console
from rich.table import Table

from mtl_core import plots
from mtl_core.config import Experiment, dump_experiment
from mtl_core.data.prepare import prepare
from mtl_core.metrics import primary_scores
from mtl_core.plot_parts import short_label
from train_jobs import sweep_plots
from train_jobs.comparison import caveat, compare, statement
from train_jobs.report import build_artifact
from train_jobs.runs import RunFolder
from train_jobs.sweep import Plan
from train_jobs.sweep_folder import SweepFolder
from train_jobs.sweep_page import pair_name, render_page
from train_jobs.trials import ALONE, BASE, BEST, TrialResult, objective_key, objective_keys

SUMMARY = "summary.json"
Results = Sequence[TrialResult]


def write_report(
    plan: Plan,
    folder: SweepFolder,
    results: Mapping[str, Results],
    best: TrialResult | None,
    seconds: Mapping[str, float],
) -> None:
    """Write all that is known so far into the sweep's folder.

    Args:
        plan, folder: the sweep.
        results: phase → its trials.
        best: the best trial of the search, if there is one.
        seconds: phase → how long it took in this process.
    """
    table = trials_table(plan, results)
    folder.write("trials.csv", table.to_csv(index=False))
    folder.write("trials.parquet", _parquet(table))
    compared, splits = compared_scores(plan, results)
    summary: dict[str, Any] = {
        "name": plan.sweep.name,
        "objective": list(plan.sweep.objectives),
        "phases": {phase: _counts(trials) for phase, trials in results.items()},
        "seconds": dict(seconds),
        "compared": compared,
        "splits": splits,
        "caveat": caveat(compared, splits, plan.base.mixing.strategy),
        "statements": {t: statement(t, scores, splits[t]) for t, scores in compared.items()},
        "comparisons": {task: compare(scores) for task, scores in compared.items()},
        "importance": importance(plan, results.get("search", [])),
        "best": None,
    }
    if best is not None:
        experiment = plan.experiment(best.config)
        experiment = experiment.model_copy(update={"name": f"{plan.sweep.name}-best"})
        folder.set_best(dump_experiment(experiment))
        summary["best"] = {
            "trial": best.trial,
            "settings": plan.settings(best.config),
            "objective": _objectives(plan, best),
            "validation": primary_scores(best.metrics, "validation"),
        }
        if "best" in results:
            _publish(plan, folder, experiment, results["best"])
    folder.write(SUMMARY, json.dumps(_finite(summary), indent=1, default=str))
    pictures = draw(plan, results, summary)
    for name, content in pictures.items():
        folder.write(name, content)
    folder.write("report.html", render_page(summary, table, pictures, folder.read("best.yaml")))


def trials_table(plan: Plan, results: Mapping[str, Results]) -> pd.DataFrame:
    """A row for each trial of every phase."""
    rows = []
    for phase, trials in results.items():
        for trial in trials:
            metrics, config = trial.metrics, trial.config
            settings = plan.settings(config) if phase == "search" else dict(config)
            row = {key: getattr(trial, key) for key in ("phase", "trial", "status", "reason")}
            row |= {k: _cell(v) for k, v in settings.items()}
            if phase == "search":
                row |= _objectives(plan, trial)
            row |= {
                key: value
                for key, value in metrics.items()
                if key.startswith(("validation/", "test/")) and isinstance(value, float)
            }
            row |= {"epochs": metrics.get("epoch"), "seconds": metrics.get("time_total_s")}
            rows.append(row)
    return pd.DataFrame(rows)


def compared_scores(
    plan: Plan, results: Mapping[str, Results]
) -> tuple[dict[str, dict[str, list[float]]], dict[str, str]]:
    """Task → alone, shared, best → score of each seed; and task → the split these are of.

    That is test where every run has a score of the task there, else validation.
    """
    ended = [*results.get("baselines", []), *results.get("best", [])]
    ended = [trial for trial in ended if trial.is_finished]
    compared: dict[str, dict[str, list[float]]] = {}
    splits: dict[str, str] = {}
    for task in plan.base.tasks:
        cases = {"alone": f"{ALONE}{task}", "shared": BASE, "best": BEST}
        runs = [trial for trial in ended if trial.config["case"] in cases.values()]
        tested = all(task in primary_scores(trial.metrics, "test") for trial in runs)
        splits[task] = "test" if tested else "validation"
        scored = [(t.config["case"], primary_scores(t.metrics, splits[task])) for t in runs]
        of_cases = {
            name: [scores[task] for found, scores in scored if found == case and task in scores]
            for name, case in cases.items()
        }
        compared[task] = {name: scores for name, scores in of_cases.items() if scores}
    return compared, splits


def importance(plan: Plan, trials: Results) -> dict[str, float]:
    """Field → its share in what separates the better trials from the rest, by PED-ANOVA.

    Watanabe, Bansal and Hutter, IJCAI 2023, as Optuna has it. Empty with fewer than four trials
    that have a score: there is nothing to tell then.
    """
    import optuna

    scored = [t for t in trials if objective_key(0) in t.metrics]
    settings = [{k: _cell(v) for k, v in plan.settings(t.config).items()} for t in scored]
    varied = [
        k for k in (settings[0] if settings else {}) if len({str(s[k]) for s in settings}) > 1
    ]
    if len(scored) < 4 or not varied:
        return {}
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    steep = plan.logarithmic()
    spaces = {n: _distribution([s[n] for s in settings], n in steep) for n in varied}
    study = optuna.create_study(direction="maximize")
    for trial, setting in zip(scored, settings, strict=True):
        value = sum(_objectives(plan, trial).values())
        if value == value:
            params = {name: setting[name] for name in varied}
            study.add_trial(optuna.create_trial(params=params, distributions=spaces, value=value))
    evaluator = optuna.importance.PedAnovaImportanceEvaluator()
    found = optuna.importance.get_param_importances(study, evaluator=evaluator)
    return {name: float(value) for name, value in found.items()}


def _distribution(values: Sequence[Any], logarithmic: bool) -> Any:
    from optuna.distributions import CategoricalDistribution, FloatDistribution

    if any(isinstance(v, str | bool) or v is None for v in values):
        return CategoricalDistribution(sorted(set(values), key=str))
    return FloatDistribution(min(values), max(values), log=logarithmic)


def draw(
    plan: Plan, results: Mapping[str, Results], summary: Mapping[str, Any]
) -> dict[str, bytes]:
    """Name → PNG of every picture that the results allow."""
    searched: list[dict[str, Any]] = []
    best = (summary["best"] or {}).get("trial")
    for trial in results.get("search", []):
        if objective_key(0) in trial.metrics:
            searched.append(
                {
                    "best": trial.trial == best,
                    "status": trial.status,
                    "seconds": trial.seconds,
                    "settings": plan.settings(trial.config),
                    "scores": primary_scores(trial.metrics, "validation"),
                    "objective": sum(_objectives(plan, trial).values())
                    / len(plan.sweep.objectives),
                }
            )
    objective = ", ".join(plan.sweep.objectives)
    tasks = list(plan.base.tasks)
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        if searched:
            logarithmic = plan.logarithmic()
            sweep_plots.parallel_coordinates(searched, objective, logarithmic, root / "trials.png")
            points = [{**t, "x": t["seconds"], "y": t["objective"]} for t in searched]
            names = ("seconds a trial", objective)
            sweep_plots.trade_off(points, names, root / "time.png", smaller_x=True)
        for first, second in itertools.combinations(tasks, 2):
            points = [
                {**t, "x": t["scores"][first], "y": t["scores"][second]}
                for t in searched
                if first in t["scores"] and second in t["scores"]
            ]
            if points:
                where = root / pair_name(first, second)
                sweep_plots.trade_off(points, (first, second), where)
        if summary["importance"]:
            sweep_plots.importance_bars(summary["importance"], root / "importance.png")
        if any(len(cases) > 1 for cases in summary["compared"].values()):
            panels = {
                f"{short_label(task)} ({summary['splits'][task]})": scores
                for task, scores in summary["compared"].items()
            }
            sweep_plots.compared_scores(panels, root / "compared.png")
        history = _history(results.get("baselines", []), BASE)
        if any(key.startswith("cosine/") for row in history for key in row):
            plots.gradient_cosines(history, root / "cosines.png")
        return {path.name: path.read_bytes() for path in sorted(root.glob("*.png"))}


def _publish(plan: Plan, folder: SweepFolder, experiment: Experiment, trials: Results) -> None:
    """Build the artifact from the weights of the best setting's first seed."""
    first = next((t for t in trials if t.config["seed"] == plan.base.seed), None)
    if first is None or not first.is_finished:
        return
    place = {"name": folder.name, "output_dir": plan.sweep.output_dir}
    run = RunFolder(experiment.model_copy(update=place))
    run.write_history(_history(trials, BEST))
    with _weights(first, folder).as_directory() as weights:
        build_artifact(Path(weights), experiment, prepare(experiment), run, first.seconds)


def _weights(trial: TrialResult, folder: SweepFolder) -> Any:
    """Tune's checkpoint of a trial in one process, or the one that its workers wrote."""
    if trial.checkpoint is not None:
        return trial.checkpoint
    filesystem = None if folder.is_local else PyFileSystem(FSSpecHandler(folder.filesystem))
    name = Path(trial.metrics["checkpoint_path"]).name  # the sweep may have moved since
    path = f"{folder.path}/workers/{trial.trial}/{name}"
    return Checkpoint(path, filesystem=filesystem)


def _history(trials: Results, case: str) -> list[dict[str, Any]]:
    """What the first finished run of a case told on its way."""
    for trial in trials:
        if trial.is_finished and trial.config.get("case") == case:
            return list(trial.metrics.get("history", []))
    return []


def _objectives(plan: Plan, trial: TrialResult) -> dict[str, float]:
    objectives = plan.sweep.objectives
    values = map(trial.metrics.get, objective_keys(objectives))
    return {
        f"objective {name}": float("nan") if value is None else float(value)
        for name, value in zip(objectives, values, strict=True)
    }


def _counts(trials: Results) -> dict[str, int]:
    states = [trial.status for trial in trials]
    return {state: states.count(state) for state in dict.fromkeys(states)}


def _finite(value: Any) -> Any:
    """The same with null for numbers that JSON has not: the ends of an interval without spread."""
    if isinstance(value, Mapping):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _cell(value: Any) -> Any:
    """A setting as a table holds it: sections become text."""
    return json.dumps(value) if isinstance(value, dict | list) else value


def _parquet(table: pd.DataFrame) -> bytes:
    """Columns of mixed values become text, which Parquet can hold."""
    mixed = [c for c in table if len({type(v) for v in table[c].dropna()}) > 1]
    buffer = io.BytesIO()
    table.astype(dict.fromkeys(mixed, str)).to_parquet(buffer, index=False)
    return buffer.getvalue()


def show_report(folder: SweepFolder) -> None:
    """Print what the sweep found."""
    text = folder.read(SUMMARY)
    if text is None:
        print(f"{folder.title}: nothing to report yet")
        return
    summary = json.loads(text)
    console = Console(highlight=False)
    for phase, counts in summary["phases"].items():
        told = ", ".join(f"{number} {state}" for state, number in counts.items())
        console.print(f"{phase}: {told or 'no trial'}")
    if any(summary["compared"].values()):
        table = Table(title="scores (mean, and range over seeds)", title_justify="left")
        cases = list(dict.fromkeys(c for scores in summary["compared"].values() for c in scores))
        table.add_column("task")
        for case in cases:
            table.add_column(case, justify="right")
        splits = summary.get("splits", {})  # reports of older software name none
        for task, scores in summary["compared"].items():
            cells = (spread(scores.get(case, [])) for case in cases)
            table.add_row(f"{task} ({splits[task]})" if task in splits else task, *cells)
        console.print(table)
    if summary.get("caveat"):
        console.print(summary["caveat"], soft_wrap=True)
    for sentence in summary["statements"].values():
        if sentence:
            console.print(sentence, soft_wrap=True)
    if summary["best"]:
        told = ", ".join(f"{k} = {_cell(v)}" for k, v in summary["best"]["settings"].items())
        console.print(f"best: {told}", soft_wrap=True)
    beside = ("best.yaml", "artifact/manifest.json", "trials.csv")
    there = ", ".join(name.removesuffix("manifest.json") for name in beside if folder.holds(name))
    print(f"report: {folder.title}/report.html  ({there} beside it)")


def spread(values: Sequence[float]) -> str:
    """Mean and range in percent."""
    if not values:
        return ""
    mean = 100 * sum(values) / len(values)
    return f"{mean:.2f} ({100 * min(values):.2f} to {100 * max(values):.2f})"
