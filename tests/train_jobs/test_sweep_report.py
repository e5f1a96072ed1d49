"""What a sweep's report shows: pictures that open, a page that needs nothing, what mattered."""

from __future__ import annotations

import base64
import io
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import pytest
import yaml
from PIL import Image

from mtl_core.config import Experiment, ScaleConfig, dump_experiment
from mtl_core.metrics import PRIMARY
from train_jobs import sweep_plots, sweep_report
from train_jobs.runs import RunFolder
from train_jobs.sweep import Plan, load_plan
from train_jobs.sweep_folder import SweepFolder
from train_jobs.sweep_page import render_page
from train_jobs.sweep_report import draw, importance, show_report, write_report
from train_jobs.trials import TrialResult

KINDS = {"topic": "classification", "mood": "multilabel", "places": "token_classification"}
RATE, DROPOUT, SCHEDULE = "optim.learning_rate", "encoder.dropout", "optim.schedule"
NOTHING_MORE: dict[str, Any] = {"importance": {}, "compared": {}, "best": None}
"""A summary without comparison."""


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    """A sweep of three tasks and three fields."""
    base = {
        "tasks": {task: {"kind": kind} for task, kind in KINDS.items()},
        "data": [{"path": "none.jsonl", "columns": {"text": "text"} | {t: t for t in KINDS}}],
    }
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(base, sort_keys=False), encoding="utf-8")
    space = {
        RATE: {"loguniform": [1e-5, 1e-2]},
        DROPOUT: {"uniform": [0.0, 0.5]},
        SCHEDULE: {"choice": ["linear", "cosine", "constant"]},
    }
    sweep = {"base": "base.yaml", "space": space, "output_dir": str(tmp_path)}
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(sweep), encoding="utf-8")
    return load_plan(tmp_path / "sweep.yaml")


def search_of(count: int, decisive: str) -> list[TrialResult]:
    """Trials whose objective hangs on one field and on nothing else."""
    draw_from = np.random.default_rng(0)
    worth = {"linear": 0.9, "cosine": 0.5, "constant": 0.1}
    trials = []
    for number in range(count):
        exponent, dropout = draw_from.uniform(-5, -2), draw_from.uniform(0, 0.5)
        schedule = str(draw_from.choice(list(worth)))
        scores = {RATE: -abs(exponent + 3), DROPOUT: -dropout, SCHEDULE: worth[schedule]}
        objective = scores[decisive]
        metrics = {
            f"validation/{task}/{PRIMARY[kind]}": 0.5 + objective / 10 + place / 100 * (-1) ** place
            for place, (task, kind) in enumerate(KINDS.items())
        }
        trials.append(
            TrialResult(
                phase="search",
                trial=f"trial_{number}",
                status="finished",
                reason="",
                config={RATE: 10**exponent, DROPOUT: dropout, SCHEDULE: schedule},
                metrics={**metrics, "objective_0": objective, "time_total_s": 1.0 + number},
            )
        )
    return trials


@pytest.mark.parametrize("decisive", [RATE, DROPOUT, SCHEDULE])
def test_the_field_that_decides_is_the_one_that_matters(decisive: str, plan: Plan) -> None:
    found = importance(plan, search_of(60, decisive))
    assert set(found) == {RATE, DROPOUT, SCHEDULE}
    assert sum(found.values()) == pytest.approx(1)
    assert max(found, key=found.__getitem__) == decisive
    assert found[decisive] > 0.7


def test_too_few_trials_say_nothing_of_what_matters(plan: Plan) -> None:
    assert importance(plan, search_of(3, RATE)) == {}


def test_every_two_tasks_are_drawn_against_each_other(
    plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: dict[str, Any] = {}
    monkeypatch.setattr(
        sweep_plots,
        "trade_off",
        lambda points, names, path, **_: drawn.update({path.name: (names, points)}),
    )
    trials = search_of(5, RATE)
    draw(plan, {"search": trials}, NOTHING_MORE)
    names = {"pareto_topic+mood.png", "pareto_topic+places.png", "pareto_mood+places.png"}
    assert drawn.keys() - {"time.png"} == names
    (first, second), points = drawn["pareto_topic+places.png"]
    assert (first, second) == ("topic", "places")
    assert points[0]["x"] == trials[0].metrics["validation/topic/accuracy"]
    assert points[0]["y"] == trials[0].metrics["validation/places/f1"]


def test_the_front_is_a_line_through_what_nothing_beats(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    figures = []
    monkeypatch.setattr(sweep_plots, "save_figure", lambda figure, _: figures.append(figure))
    scores = [(0.1, 0.9), (0.5, 0.5), (0.9, 0.1), (0.4, 0.4)]
    points: list[dict[str, Any]] = [{"status": "finished", "x": x, "y": y} for x, y in scores]
    points.append({"status": "stopped", "x": 1.0, "y": 1.0})  # not trained to its end
    sweep_plots.trade_off(points, ("topic", "mood"), tmp_path / "front.png")
    (line,) = figures[0].axes[0].lines
    assert list(zip(*line.get_data(), strict=True)) == scores[:3]


@pytest.mark.parametrize("best", ["trial_0", None])
def test_the_trial_that_stands_out_is_the_best_and_not_one_that_was_stopped(
    best: str | None, plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    figures = {}
    monkeypatch.setattr(sweep_plots, "save_figure", lambda f, path: figures.update({path.name: f}))
    chosen = ((1e-5, 0.5, "finished"), (1e-4, 0.5, "finished"), (1e-3, 0.9, "stopped"))
    trials = [
        replace(
            trial,
            status=status,
            config={**trial.config, RATE: rate},
            metrics={**trial.metrics, "objective_0": objective},
        )
        for trial, (rate, objective, status) in zip(search_of(3, RATE), chosen, strict=True)
    ]
    draw(plan, {"search": trials}, {**NOTHING_MORE, "best": best and {"trial": best}})
    (axes,) = figures["trials.png"].axes
    orange = [line.get_ydata()[0] for line in axes.lines if line.get_color() == sweep_plots.BEST]
    assert orange == ([0.0] if best else []), "the lowest rate"


class Resources(HTMLParser):
    """Everything that a page would fetch."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.tags: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.found += [v or "" for k, v in attrs if k in ("src", "href", "srcset", "data")]


def test_the_page_shows_every_picture_and_fetches_nothing(plan: Plan) -> None:
    folder = SweepFolder(plan.sweep)
    with folder.claim(plan):
        write_report(plan, folder, {"search": search_of(6, RATE)}, None, {})
    pictures = sorted(Path(folder.path).glob("*.png"))
    assert len(pictures) == 6  # trials, importance, time, three pairs of tasks
    page = (Path(folder.path) / "report.html").read_text(encoding="utf-8")
    resources = Resources()
    resources.feed(page)
    assert not resources.tags & {"script", "link", "iframe", "object"}
    assert not re.search(r"url\(|@import", page)
    shown = []
    for source in resources.found:
        kind, data = source.split(",", 1)
        assert kind == "data:image/png;base64"
        shown.append(base64.b64decode(data))
    assert sorted(shown) == sorted(path.read_bytes() for path in pictures)
    for content in shown:
        with Image.open(io.BytesIO(content)) as picture:
            assert np.asarray(picture).std() > 0


def test_each_picture_says_what_it_shows_and_where_its_numbers_are() -> None:
    names = ["importance.png", "cosines.png", "time.png", "pareto_a+b_c.png", "pareto_a_b+c.png"]
    summary = {"name": "x", "objective": [], "phases": {}, "statements": {}, "caveat": ""}
    summary |= {"compared": {}, "splits": {}, "best": None}
    page = render_page(summary, pd.DataFrame(), dict.fromkeys(names, b""), None)
    table = "; the numbers are in the table of trials"
    assert re.findall('alt="(.*?)"', page) == [
        "What mattered; the numbers are in summary.json",
        f"Score against training time{table}",
        "Do the tasks&#x27; gradients agree? Cosines over training",
        f"b_c against a{table}",
        f"c against a_b{table}",
    ]


def runs_of(case: str, scores: dict[str, float]) -> list[TrialResult]:
    """Two seeds of a case of the comparison that ended with these scores."""
    metrics = {"time_total_s": 1.0, **scores}
    return [
        TrialResult("", case, "finished", "", {"case": case, "seed": seed}, metrics)
        for seed in (43, 44)
    ]


def spread_runs_of(case: str, scores: dict[str, float]) -> list[TrialResult]:
    """As `runs_of`, the second seed a little better."""
    first, second = runs_of(case, scores)
    better = {name: value + 0.001 for name, value in second.metrics.items()}
    return [first, replace(second, metrics=better)]


@pytest.mark.parametrize("seeds", [1, 2])
def test_the_summary_is_json_for_strict_parsers_too(plan: Plan, seeds: int) -> None:
    """Neither one seed nor two of one score give an interval, and a trial may have no objective."""
    one = runs_of("alone/topic", {"validation/topic/accuracy": 0.6})[:seeds]
    one += runs_of("base", {"validation/topic/accuracy": 0.7})[:seeds]
    first, second = search_of(2, RATE)
    first = replace(first, metrics={**first.metrics, "objective_0": float("nan")})
    folder = SweepFolder(plan.sweep)
    with folder.claim(plan):
        write_report(plan, folder, {"baselines": one, "search": [first, second]}, first, {})

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    summary = json.loads(folder.read("summary.json") or "", parse_constant=refuse)
    (found,) = summary["comparisons"]["topic"]
    assert found["difference"] == pytest.approx(0.1)
    assert found["low"] is found["high"] is None
    assert found["verdict"] == "no spread to judge by"
    assert summary["best"]["objective"] == {"objective mean": None}


def test_a_task_is_compared_on_one_split_which_is_named(
    plan: Plan, capsys: pytest.CaptureFixture[str]
) -> None:
    """No text of test has a mood, and one run of places ended without its score there."""
    topic, mood, places = (f"{task}/{PRIMARY[kind]}" for task, kind in KINDS.items())
    seen = {f"validation/{name}": 0.9 for name in (topic, mood, places)}
    baselines = [
        *spread_runs_of("alone/topic", {f"validation/{topic}": 0.6, f"test/{topic}": 0.5}),
        *spread_runs_of("alone/mood", {f"validation/{mood}": 0.6}),
        *spread_runs_of("alone/places", {f"validation/{places}": 0.6, f"test/{places}": 0.5}),
        *spread_runs_of("base", {**seen, f"test/{topic}": 0.7, f"test/{places}": 0.7}),
    ]
    results = {
        "baselines": baselines,
        "best": spread_runs_of("best", {**seen, f"test/{topic}": 0.8}),
    }
    folder = SweepFolder(plan.sweep)
    with folder.claim(plan):
        write_report(plan, folder, results, None, {})
    show_report(folder)
    told = capsys.readouterr().out
    assert "topic (test): sharing helps (+20.00 points" in told
    for task in ("mood", "places"):
        assert f"{task} (validation): sharing helps (+30.00 points" in told
    caveat = "mood, places: the best setting was chosen on validation"
    page = (Path(folder.path) / "report.html").read_text(encoding="utf-8")
    for shown in (told, page):
        assert caveat in shown
        for label in ("topic (test)", "mood (validation)", "places (validation)"):
            assert label in shown


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Where the weights were that artifacts are made of; nothing of them is read."""
    found = []

    def build(weights: Path, experiment: Experiment, _: Any, run: RunFolder, __: float) -> None:
        found.append(weights)
        artifact = Path(run.artifact)
        artifact.mkdir()
        (artifact / "experiment.yaml").write_text(dump_experiment(experiment), encoding="utf-8")
        (artifact / "manifest.json").touch()

    monkeypatch.setattr(sweep_report, "build_artifact", build)
    monkeypatch.setattr(sweep_report, "prepare", lambda _: None)
    return found


def best_run(plan: Plan, status: Literal["finished", "failed"] = "finished") -> list[TrialResult]:
    """The best setting's first seed, trained with several workers in another place."""
    config = {"case": "best", "seed": plan.base.seed}
    place = {"checkpoint_path": "/before/sweep/workers/best/checkpoint_7"}
    (run,) = runs_of("best", place)[:1]
    return [replace(run, config=config, status=status)]


def test_an_artifact_is_of_the_best_setting_or_not_there(
    plan: Plan, built: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = SweepFolder(plan.sweep)
    first, second = searched = search_of(2, RATE)
    run, failed = best_run(plan), best_run(plan, "failed")
    wider = replace(plan, base=plan.base.model_copy(update={"scale": ScaleConfig(workers=2)}))
    with folder.claim(plan):
        for of, best, runs, there in (
            (plan, None, None, False),
            (plan, first, None, False),
            (plan, first, run, True),
            (wider, first, None, True),
            (plan, second, None, False),  # found by a search that went on
            (plan, second, failed, False),
        ):
            results = {"search": searched, **({"best": runs} if runs else {})}
            write_report(of, folder, results, best, {})
            assert folder.holds("artifact/*") == there
            show_report(folder)
            beside = [*(["best.yaml"] if best else []), *(["artifact/"] if there else [])]
            told = f"report.html  ({', '.join([*beside, 'trials.csv'])} beside it)"
            assert told in capsys.readouterr().out
    assert len(built) == 1


def test_weights_are_found_in_a_sweep_that_was_moved(plan: Plan, built: list[Path]) -> None:
    folder = SweepFolder(plan.sweep)
    searched = search_of(1, RATE)
    with folder.claim(plan):
        write_report(plan, folder, {"search": searched, "best": best_run(plan)}, searched[0], {})
    assert built == [Path(folder.path) / "workers/best/checkpoint_7"]
