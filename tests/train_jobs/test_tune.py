"""python -m train_jobs.tune, as a user runs it on a cluster of two CPUs."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import re
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pandas as pd
import psutil
import pytest
import yaml

from mtl_core.artifact import read_manifest
from tests.commands import run, start
from tests.preloaded import Process

pytestmark = [pytest.mark.cluster, pytest.mark.slow]


SLOW: dict[str, Any] = {
    "set": {"training.epochs": 12},
    "budget": {"trials": 3, "concurrency": 1},
    "seeds": 1,
}
"""Trials of a few seconds, one after the other."""


def write_sweep(folder: Path, experiment: dict[str, Any], **changes: Any) -> Path:
    """A sweep of few and short trials."""
    base = {
        **experiment,
        "data": [{"demo": True, "limit": 80}],
        "training": {**experiment["training"], "epochs": 2, "checkpoint_every": None},
        "scale": {"workers": 1},
    }
    (folder / "base.yaml").write_text(yaml.safe_dump(base), encoding="utf-8")
    sweep = {
        "name": "sweep",
        "base": "base.yaml",
        "output_dir": str(folder / "sweeps"),
        "space": {
            "optim.learning_rate": {"loguniform": [1e-4, 1e-2]},
            "tasks.*.loss_weight": {"sample_from": "simplex"},
        },
        "budget": {"trials": 4},
        "seeds": 2,
        **changes,
    }
    path = folder / "sweep.yaml"
    path.write_text(yaml.safe_dump(sweep), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory, experiment: dict[str, Any]) -> Path:
    """The folder of a finished sweep with baselines, of enough epochs to score alone."""
    folder = tmp_path_factory.mktemp("sweep")
    rates = {"optim.learning_rate": 5e-3, "optim.head_learning_rate": 5e-2}
    longer = {**rates, "training.epochs": 12}
    path = write_sweep(folder, experiment, baselines=True, objective="gain", set=longer)
    done = run("tune", "--config", str(path))
    assert done.returncode == 0, done.stderr
    (folder / "output.txt").write_text(done.stdout, encoding="utf-8")
    return folder


def trials_of(folder: Path) -> pd.DataFrame:
    return pd.read_csv(folder / "sweeps/sweep/trials.csv")


def finished_of(trials: pd.DataFrame) -> pd.DataFrame:
    """The finished trials of the search, by name."""
    wanted = (trials["phase"] == "search") & (trials["status"] == "finished")
    return trials[wanted].set_index("trial")


def test_every_trial_stands_in_the_table(swept: Path) -> None:
    trials = trials_of(swept)
    assert dict(trials["phase"].value_counts()) == {"baselines": 6, "search": 4, "best": 2}
    assert set(trials["status"]) == {"finished"}
    searched = trials[trials["phase"] == "search"]
    weights = searched["tasks.sentiment.loss_weight"] + searched["tasks.entities.loss_weight"]
    assert weights.to_list() == pytest.approx([1.0] * 4)
    assert searched["test/entities/f1"].isna().all()
    pd.testing.assert_frame_equal(
        pd.read_parquet(swept / "sweeps/sweep/trials.parquet")[["trial", "seconds"]],
        trials[["trial", "seconds"]],
    )


def test_gain_is_relative_to_the_tasks_alone(swept: Path) -> None:
    trials = trials_of(swept)
    alone = trials[trials["phase"] == "baselines"].groupby("case").mean(numeric_only=True)
    before = {
        "validation/sentiment/accuracy": alone.loc["alone/sentiment"],
        "validation/entities/f1": alone.loc["alone/entities"],
    }
    for _, trial in trials[trials["phase"] == "search"].iterrows():
        gains = [(trial[key] - row[key]) / row[key] for key, row in before.items()]
        assert trial["objective gain"] == pytest.approx(sum(gains) / 2, rel=1e-6)


def test_best_yaml_trains_to_the_reported_scores(swept: Path) -> None:
    folder = swept / "sweeps/sweep"
    settings = ("--set", f"output_dir={swept}/runs")
    done = run("train", "--config", str(folder / "best.yaml"), *settings)
    assert done.returncode == 0, done.stderr
    again = read_manifest(swept / "runs/sweep-best/artifact").tasks
    kept = read_manifest(folder / "artifact").tasks
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    for task, metric in (("sentiment", "accuracy"), ("entities", "f1")):
        assert again[task]["metrics"] == kept[task]["metrics"]
        reported = summary["best"]["validation"][task]
        assert again[task]["metrics"]["validation"][metric] == reported


def test_the_page_holds_everything_and_needs_nothing(swept: Path) -> None:
    page = (swept / "sweeps/sweep/report.html").read_text(encoding="utf-8")
    assert "http://" not in page
    assert "https://" not in page
    for wanted in ("Does sharing help?", "best.yaml", "What mattered", "data:image/png;base64,"):
        assert wanted in page
    for trial in trials_of(swept)["trial"]:
        assert trial in page


def test_every_picture_of_a_whole_sweep_is_on_the_page(swept: Path) -> None:
    folder = swept / "sweeps/sweep"
    pictures = {path.name: path.read_bytes() for path in folder.glob("*.png")}
    names = {"compared", "cosines", "importance", "pareto_entities+sentiment", "time", "trials"}
    assert pictures.keys() == {f"{name}.png" for name in names}
    page = (folder / "report.html").read_text(encoding="utf-8")
    for content in pictures.values():
        assert base64.b64encode(content).decode() in page


def test_a_finished_sweep_is_shown_and_not_repeated(swept: Path) -> None:
    before = trials_of(swept)
    done = run("tune", "--config", str(swept / "sweep.yaml"))
    assert done.returncode == 0, done.stderr
    assert "is finished" in done.stdout
    assert "sentiment (test): sharing" in done.stdout
    pd.testing.assert_frame_equal(trials_of(swept), before)


def test_a_search_whose_time_is_over_goes_on_when_it_gets_more(
    tmp_path: Path, experiment: dict[str, Any]
) -> None:
    """A thousand short trials never end within the time that they get."""
    budget = {"trials": 1000, "concurrency": 1, "minutes": 0.25}
    path = write_sweep(tmp_path, experiment, budget=budget, seeds=1)
    done = run("tune", "--config", str(path))
    assert done.returncode == 0, done.stderr
    assert "0.25 minutes are over" in done.stdout
    assert "WARNING" not in done.stderr
    first = trials_of(tmp_path)
    ended = finished_of(first)
    assert 2 <= len(ended) < 500
    assert (first[first["phase"] == "best"]["status"] == "finished").all()

    more = ("--set", "budget.minutes=0.5", "--set", "budget.concurrency=2")
    done = run("tune", "--config", str(path), *more)
    assert done.returncode == 0, done.stderr
    assert "resuming" in done.stdout
    assert "0.5 minutes are over" in done.stdout
    searched = finished_of(trials_of(tmp_path))
    assert len(searched) > len(ended)
    before = ended["seconds"].iloc[:-1]  # the last may have been cut off behind its scores
    pd.testing.assert_series_equal(searched.loc[before.index, "seconds"], before)
    summary = json.loads((tmp_path / "sweeps/sweep/summary.json").read_text(encoding="utf-8"))
    best = searched["objective mean"].idxmax()
    assert summary["best"]["trial"] == best
    assert (tmp_path / f"sweeps/sweep/best-{best}").is_dir()


def test_trials_of_two_workers_share_two_cpus_and_report_every_epoch(
    tmp_path: Path, experiment: dict[str, Any]
) -> None:
    path = write_sweep(
        tmp_path,
        experiment,
        set={"scale.workers": 2, "training.epochs": 3},
        budget={"trials": 2},
        seeds=1,
    )
    done = run("tune", "--config", str(path))
    assert done.returncode == 0, done.stderr
    assert (trials_of(tmp_path)["status"] == "finished").all()
    (state,) = (tmp_path / "sweeps/sweep/search").glob("experiment_state-*.json")
    reports = re.findall(r"training_iteration\W+(\d+)", state.read_text(encoding="utf-8"))
    assert max(map(int, reports)) >= 3 + 1  # every epoch, and the scores
    for told in (tmp_path / "sweeps/sweep/workers").glob("*/metrics.jsonl"):
        assert told.read_text("utf-8").count('"event": "validation"') == 3
    history = (tmp_path / "sweeps/sweep/metrics.jsonl").read_text("utf-8")
    assert history.count('"event": "validation"') == 3
    assert (tmp_path / "sweeps/sweep/artifact/manifest.json").is_file()


def test_stopped_it_reports_what_there_is_and_the_same_command_goes_on(
    tmp_path: Path, experiment: dict[str, Any]
) -> None:
    """By the signal of `ray job stop`, which becomes Ctrl-C's."""
    path = write_sweep(tmp_path, experiment, **SLOW)
    sweep = start("tune", "--config", str(path))
    read_until(sweep, "trial 1 finished")
    sweep.send_signal(signal.SIGTERM)
    output, _ = sweep.communicate(timeout=120)
    assert sweep.returncode == 130, output
    assert "report:" in output
    ended = trials_of(tmp_path)
    before = ended[ended["status"] == "finished"].set_index("trial")
    assert 1 <= len(before) < 3

    done = run("tune", "--config", str(path))
    assert done.returncode == 0, done.stderr
    assert "trial 3 finished" not in done.stdout  # numbered anew: two were left
    trials = trials_of(tmp_path).set_index("trial")
    assert (trials["status"] == "finished").all()
    searched = trials.index[trials["phase"] == "search"]
    assert len(searched) == 3
    assert list(searched[: len(ended)]) == list(ended["trial"]), "in the order of their draws"
    pd.testing.assert_series_equal(trials.loc[before.index, "seconds"], before["seconds"])


def test_a_killed_driver_and_a_killed_trial_cost_nothing_but_time(
    tmp_path: Path, ray_address: str, experiment: dict[str, Any]
) -> None:
    path = write_sweep(tmp_path, experiment, **SLOW)
    sweep = start("tune", "--config", str(path), address=ray_address)
    read_until(sweep, "trial 1 finished")
    time.sleep(1)
    killed = trial_processes()
    for process in killed:
        process.kill()
    assert killed
    read_until(sweep, "trial 2 finished")
    time.sleep(1)
    os.kill(sweep.pid, signal.SIGKILL)
    sweep.communicate()
    for checkpoint in (tmp_path / "sweeps/sweep/search").glob("*/checkpoint_*"):
        shutil.rmtree(checkpoint, ignore_errors=True)  # as if Tune had just taken the next one
    done = run("tune", "--config", str(path), address=ray_address)
    assert done.returncode == 0, done.stderr
    trials = trials_of(tmp_path)
    assert (trials["status"] == "finished").all(), trials["reason"].to_list()
    assert (trials["phase"] == "search").sum() == 3
    assert "trial 2 finished" not in done.stdout.partition("best:")[0]  # one was left


def trial_processes() -> list[psutil.Process]:
    """Ray names a process after the actor in it; these are of the cluster of these tests."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):  # it ended while it was looked at
            if " ".join(process.cmdline()).startswith(("ray::run_trial", "ray::ImplicitFunc")):
                found.append(process)
    return found


def read_until(process: Process, wanted: str) -> None:
    assert process.stdout is not None
    told = []
    for line in process.stdout:
        told.append(line)
        if wanted in line:
            return
    raise AssertionError("".join(told))
