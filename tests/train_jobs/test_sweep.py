"""The sweep file: what is accepted, what is refused, and what a draw becomes."""

from __future__ import annotations

from contextlib import nullcontext
from datetime import date
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from mtl_core import build
from mtl_core.data.sources import read_corpus
from mtl_core.errors import ConfigError, DataError
from train_jobs import sweep, tune
from train_jobs.space import Parameter
from train_jobs.sweep import Plan, load_plan
from train_jobs.sweep_folder import SweepFolder
from train_jobs.trials import ALONE, Job, TrialResult
from train_jobs.trials import BASE as BASELINE
from train_jobs.tune import _space, best_trial, run_phase, run_phases

BASE: dict[str, Any] = {
    "tasks": {
        "sentiment": {"kind": "classification"},
        "entities": {"kind": "token_classification"},
    },
    "data": [{"demo": True}],
}
SWEEPS = sorted(Path("tune_configs").glob("*.yaml"))


def plan_of(folder: Path, **changes: Any) -> Plan:
    base = changes.pop("base", None) if isinstance(changes.get("base"), dict) else None
    (folder / "base.yaml").write_text(yaml.safe_dump(base or BASE), encoding="utf-8")
    sweep = {
        "base": "base.yaml",
        "space": {"optim.learning_rate": {"loguniform": [1e-5, 1e-3]}},
        **changes,
    }
    path = folder / "sweep.yaml"
    path.write_text(
        yaml.safe_dump(sweep, sort_keys=False, default_flow_style=None), encoding="utf-8"
    )
    return load_plan(path)


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_every_sweep_that_ships_is_sound(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MTL_DATA", "data")
    assert load_plan(path).sweep.name


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"spase": {}}, r"sweep.yaml:.*unknown key; did you mean 'space'"),
        ({"base": "nowhere.yaml"}, r"sweep.yaml:1: base: there is no file 'nowhere.yaml'"),
        (
            {"space": {"optim.lerning_rate": {"uniform": [0.1, 0.2]}}},
            r"sweep.yaml:3: space.optim.lerning_rate: .*did you mean 'learning_rate'",
        ),
        (
            {"space": {"encoder.dropout": {"uniform": [0.0, 1.5]}}},
            r"sweep.yaml:3: space.encoder.dropout: encoder.dropout = 1.5: .*less than 1",
        ),
        (
            {"space": {"optim.learning_rate": {"loguniform": [0, 1]}}},
            r"sweep.yaml:3: .*low must be above 0",
        ),
        (
            {"space": {"optim.learning_rate": {"uniform": [1, 0.5]}}},
            r"sweep.yaml:3: .*low must be below high",
        ),
        ({"space": {"optim.learning_rate": {"normal": [0, 1]}}}, r"expected one of uniform, "),
        ({"space": {"name": {"choice": ["a", "b"]}}}, r"space.name: this field cannot be searched"),
        (
            {"space": {"freeze": {"choice": [{"encoder": True, "unfreeze_every": 1}, {}]}}},
            r"sweep.yaml:3: .*drop it to use unfreeze_every",
        ),
        (
            {"searcher": {"algorithm": "grid"}},
            r"grid cannot try every value of space.optim.learning_rate \(loguniform\)",
        ),
        (
            {"space": {"freeze.layers": {"grid": [0, 2]}}, "searcher": {"algorithm": "optuna"}},
            r"write choice",
        ),
        ({"objective": "slots/f1"}, r"sweep.yaml:5: objective: no task .slots. reports 'slots/f1'"),
        ({"objective": "entitles/f1"}, r"'entitles/f1'; did you mean 'entities'\?"),
        ({"objective": "entities/accuracy"}, r"entities reports no 'accuracy'; it reports f1"),
        ({"objective": "gain"}, r"set baselines: true"),
        (
            {"objective": [], "searcher": {"algorithm": "optuna"}},
            r"sweep.yaml:5: objective: name at least one",
        ),
        ({"objective": ["mean", "entities/f1"]}, r"a list needs searcher.algorithm: optuna"),
        (
            {
                "objective": ["sentiment/accuracy", "entities/f1"],
                "searcher": {"algorithm": "optuna"},
                "scheduler": {"kind": "asha"},
            },
            r"asha compares by one objective only",
        ),
        (
            {
                "space": {
                    "tasks.*.dropout": {"uniform": [0.0, 0.5]},
                    "tasks.entities.dropout": {"uniform": [0.0, 0.5]},
                }
            },
            r"sweep.yaml:5: .*is searched by tasks.\*.dropout already",
        ),
        (
            {
                "space": {
                    "freeze": {"choice": [{}, {"embeddings": True}]},
                    "freeze.layers": {"randint": [0, 2]},
                }
            },
            r"sweep.yaml:\d+: space.freeze.layers: freeze.layers is searched by freeze already",
        ),
        (
            {
                "space": {
                    "freeze.layers": {"randint": [0, 2]},
                    "freeze": {"choice": [{}, {"embeddings": True}]},
                }
            },
            r"sweep.yaml:5: space.freeze: freeze.layers is searched by freeze.layers already",
        ),
        (
            {"space": {"encoder.revision": {"choice": [date(2020, 1, 1), "main"]}}},
            r"sweep.yaml:3: space.encoder.revision: .*valid string",
        ),
        (
            {"space": {"encoder": {"choice": [{"revision": date(2020, 1, 1)}, {}]}}},
            r"sweep.yaml:3: space.encoder: .*valid string",
        ),
        (
            {"space": {"tasks.entities.loss_weight": {"sample_from": "simplex"}}},
            r"need several fields",
        ),
        (
            {"space": {"tasks.*.loss_weight": {"sample_from": "dirichlet"}}},
            r"sweep.yaml:3: .*sample_from knows 'simplex' only",
        ),
        (
            {
                "space": {
                    "freeze": {
                        "choice": [
                            {"layers": 1, "embeddings": True},
                            {"embeddings": True, "layers": 1},
                        ]
                    }
                }
            },
            r"sweep.yaml:3: .*choice names a value twice",
        ),
        (
            {"space": {"freeze.layers": {"uniform": [0, 4]}}},
            r"sweep.yaml:3: space.freeze.layers: freeze.layers = 1.48: .*valid integer",
        ),
        (
            {"space": {"encoder.dropout": {"quniform": [0.05, 0.5, 0.1]}}},
            r"sweep.yaml:3: .*low and high must be multiples of step",
        ),
        (
            {"space": {"encoder.dropout": {"quniform": [0.0, 0.5, 0.6]}}},
            r"sweep.yaml:3: .*step must be above 0 and fit between low and high",
        ),
        ({"budget": {"trials": 0}}, r"sweep.yaml:5: budget.trials: .*greater than 0"),
        (
            {"set": {"optim.warmup": 0.1, "training.epoch": 3}},
            r"sweep.yaml:5: set.training.epoch: .*unknown key; did you mean 'epochs'",
        ),
        (
            {"set": {"training.epochs": 0}},
            r"sweep.yaml:5: set.training.epochs: .*greater than 0 \(got 0\)",
        ),
        (
            {"set": {"freeze.encoder": True, "freeze.unfreeze_every": 1}},
            r"sweep.yaml:5: set.freeze.encoder: .*drop it to use unfreeze_every",
        ),
        (
            {"set": {"data.1.limit": 10}},
            r"sweep.yaml:5: set.data.1.limit: .*data.1.limit=10: '1' is no index",
        ),
    ],
)
def test_a_mistake_is_refused_with_its_line(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        plan_of(tmp_path, **changes)


def test_a_mistake_of_the_base_is_not_blamed_on_what_is_set(tmp_path: Path) -> None:
    base = {**BASE, "training": {"epoch": 3}}
    with pytest.raises(ConfigError, match=r"base.yaml: training.epoch: unknown key"):
        plan_of(tmp_path, base=base, set={"training.epochs": 3})
    with pytest.raises(ConfigError) as error:
        plan_of(tmp_path, base=base, set={"training.epochs": 3})
    assert "sweep.yaml" not in str(error.value)


def test_what_is_set_keeps_every_character(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, set={"tasks.sentiment.labels": ["😀", "𠀀 é", "a\\n"]})
    assert plan.base.tasks["sentiment"].labels == ("😀", "𠀀 é", "a\\n")


def test_a_change_to_one_field_of_the_base_or_one_range_leaves_the_others(tmp_path: Path) -> None:
    base = {**BASE, "training": {"epochs": 3, "batch_size": 7}}
    plan_of(tmp_path, base=base, set={"training.patience": 2})
    changes = ["set.training.epochs=5", "space.encoder.dropout={uniform: [0.0, 0.4]}"]
    plan = load_plan(tmp_path / "sweep.yaml", changes)
    training = plan.base.training
    assert (training.epochs, training.batch_size, training.patience) == (5, 7, 2)
    assert list(plan.sweep.space) == ["optim.learning_rate", "encoder.dropout"]


@pytest.mark.parametrize(
    ("space", "drawn", "metric"),
    [
        ({"training": {"choice": [{"epochs": 2}, {"epochs": 3}]}}, '{"epochs": 2}', True),
        ({"training": {"choice": [{"metric": "mean"}, {}]}}, '{"metric": "mean"}', False),
        ({"training.metric": {"choice": ["mean", "sentiment/accuracy"]}}, "mean", False),
        ({"optim": {"choice": [{"warmup": 0.2}, {}]}}, '{"warmup": 0.2}', True),
    ],
)
def test_a_trial_s_best_epoch_is_best_by_the_objective_unless_that_is_searched(
    space: dict[str, Any], drawn: str, metric: bool, tmp_path: Path
) -> None:
    plan = plan_of(tmp_path, objective="sentiment/accuracy", space=space)
    training = plan.experiment(dict.fromkeys(space, drawn)).training
    assert training.metric == ("sentiment/accuracy" if metric else "mean")
    assert plan.base.training.metric == "sentiment/accuracy"
    several = plan_of(tmp_path, space=space)
    assert several.experiment(dict.fromkeys(space, drawn)).training.metric == "mean"


@pytest.mark.parametrize(
    "range_",
    [
        {"uniform": [0.1, 0.4]},
        {"loguniform": [0.1, 0.4]},
        {"quniform": [0.1, 0.4, 0.1]},
        {"choice": [0.1, 0.4]},
    ],
    ids=lambda range_: next(iter(range_)),
)
def test_what_is_drawn_lies_within_the_range(range_: dict[str, Any]) -> None:
    (domain,) = Parameter.parse(range_).domains("x", ["x"]).values()
    draws = [float(domain.sample()) for _ in range(1000)]
    assert min(draws) + 1e-9 >= 0.1
    assert max(draws) - 1e-9 <= 0.4
    assert min(draws) < 0.15
    assert max(draws) > 0.35


@pytest.mark.parametrize(
    "range_",
    [
        {"loguniform": [0.1, 0.4]},
        {"quniform": [0.0, 0.5, 0.5]},
        {"choice": [{}, {"layers": 1}]},
        {"sample_from": "simplex"},
    ],
    ids=lambda range_: next(iter(range_)),
)
def test_a_range_is_written_as_it_was_read(range_: dict[str, Any]) -> None:
    assert Parameter.parse(range_).plain() == range_


def test_whole_numbers_are_drawn_with_both_ends() -> None:
    (domain,) = Parameter.parse({"randint": [1, 3]}).domains("x", ["x"]).values()
    assert {domain.sample() for _ in range(200)} == {1, 2, 3}


def test_a_grid_search_tries_every_choice(tmp_path: Path) -> None:
    space = {
        "optim.learning_rate": {"grid": [1e-3, 1e-2]},
        "freeze": {"choice": [{}, {"layers": 1}]},
    }
    plan = plan_of(tmp_path, space=space, searcher={"algorithm": "grid"})
    found = _space(plan)
    assert found["optim.learning_rate"] == {"grid_search": [1e-3, 1e-2]}
    assert found["freeze"] == {"grid_search": ["{}", '{"layers": 1}']}
    assert plan.sweep.num_trials == 4


def test_gain_is_refused_for_a_single_task(tmp_path: Path) -> None:
    """Its runs alone would be the base's own."""
    one = {"tasks": {"sentiment": BASE["tasks"]["sentiment"]}}
    one["data"] = [{"demo": True, "columns": {"text": "text", "sentiment": "sentiment"}}]
    with pytest.raises(ConfigError, match=r"sweep.yaml:5: objective: .*one task only"):
        plan_of(tmp_path, base=one, objective="gain", baselines=True)


def test_a_draw_sets_every_field_it_names(tmp_path: Path) -> None:
    plan = plan_of(
        tmp_path,
        space={
            "tasks.*.dropout": {"uniform": [0.0, 0.5]},
            "freeze": {"choice": [{}, {"layers": 2}]},
            "data.0.limit": {"randint": [10, 20]},
        },
    )
    drawn = {"tasks.*.dropout": 0.25, "freeze": '{"layers": 2}', "data.0.limit": 12}
    experiment = plan.experiment(drawn, seed=7)
    assert [task.dropout for task in experiment.tasks.values()] == [0.25, 0.25]
    assert experiment.freeze.layers == 2
    assert experiment.data[0].limit == 12
    assert experiment.seed == 7
    assert plan.base.freeze.layers == 0


def test_a_task_with_dots_in_its_name_is_searched_as_any_other(tmp_path: Path) -> None:
    """Also beside one that is called as its name begins."""
    tasks = {name: {"kind": "classification"} for name in ("topic", "topic.v2", "mood")}
    columns = {"text": "text"} | {name: name for name in tasks}
    space = {
        "tasks.*.loss_weight": {"sample_from": "simplex"},
        "tasks.topic.v2.dropout": {"choice": [0.3, 0.4]},
        "data.0.limit": {"randint": [10, 20]},
    }
    base = {"tasks": tasks, "data": [{"path": "none.jsonl", "columns": columns}]}
    plan = plan_of(tmp_path, base=base, space=space)
    draws = {f"tasks.{name}.loss_weight": number / 4 for number, name in enumerate(tasks, 1)}
    found = plan.experiment({**draws, "tasks.topic.v2.dropout": 0.4, "data.0.limit": 12}).tasks
    assert found.keys() == tasks.keys()
    weights = [found[name].loss_weight for name in tasks]
    assert weights == sorted(weights, reverse=True)
    assert sum(weights) == pytest.approx(1)
    assert [found[name].dropout for name in tasks] == [0.1, 0.4, 0.1]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(0.001, 0.999), min_size=2, max_size=5))
def test_weights_on_the_simplex_are_positive_and_sum_to_one(draws: list[float]) -> None:
    fields = [f"tasks.{number}.loss_weight" for number in range(len(draws))]
    parameter = Parameter("sample_from", ())
    weights = parameter.decode("*", fields, dict(zip(fields, draws, strict=True)))
    assert sum(weights.values()) == pytest.approx(1)
    assert min(weights.values()) > 0


def test_weights_on_the_simplex_are_drawn_uniformly() -> None:
    """With three weights, uniform means that each is Beta(1, 2): mean 1/3, variance 1/18."""
    import numpy as np

    fields = ["a", "b", "c"]
    draws = np.random.default_rng(0).uniform(0.001, 0.999, (20_000, 3))
    parameter = Parameter("sample_from", ())
    weights = np.array(
        [
            list(parameter.decode("*", fields, dict(zip(fields, row, strict=True))).values())
            for row in draws
        ]
    )
    np.testing.assert_allclose(weights.mean(axis=0), 1 / 3, atol=0.005)
    np.testing.assert_allclose(weights.var(axis=0), 1 / 18, rtol=0.04)


@pytest.mark.parametrize("strategy", ["fixed", "uncertainty", "dwa", "rlw", "pcgrad"])
def test_what_is_compared_as_shared_and_alone_has_fixed_weights(
    strategy: str, tmp_path: Path
) -> None:
    plan = plan_of(tmp_path, base={**BASE, "weighting": {"strategy": strategy}})
    job = Job(plan, str(tmp_path), labels={}, keys={})
    first, second = (job.experiment({"case": BASELINE, "seed": seed}) for seed in (42, 43))
    assert first.weighting.strategy == second.weighting.strategy == "fixed"
    assert first.weighting.gradient_cosines
    assert not second.weighting.gradient_cosines
    assert second.optim == plan.base.optim
    for task in BASE["tasks"]:
        alone = job.experiment({"case": f"{ALONE}{task}", "seed": 43})
        assert alone.weighting == second.weighting
        assert alone.seed == 43


@pytest.mark.parametrize(
    ("change", "allowed"),
    [
        ("budget.minutes=60", True),
        ("budget.concurrency=3", True),
        ("set.scale.workers=1", True),
        ("set.scale={workers: 1}", True),
        ("set.training.epochs=3", False),
        ("seeds=2", False),
        ("space.optim.learning_rate={loguniform: [0.00001, 0.01]}", False),
    ],
)
def test_a_sweep_goes_on_with_more_time_or_another_scale_and_is_else_another_one(
    change: str, allowed: bool, tmp_path: Path
) -> None:
    place = {"output_dir": str(tmp_path / "sweeps"), "set": {"scale.workers": 4}}
    plan = plan_of(tmp_path, **place)
    with SweepFolder(plan.sweep).claim(plan):
        pass
    changed = load_plan(tmp_path / "sweep.yaml", [change])
    if allowed:
        assert SweepFolder(changed.sweep).check(changed)
    else:
        with pytest.raises(ConfigError, match="belongs to another sweep"):
            SweepFolder(changed.sweep).check(changed)


def test_a_sweep_that_came_in_between_is_not_mixed_with_another(tmp_path: Path) -> None:
    ours = plan_of(tmp_path, output_dir=str(tmp_path / "sweeps"))
    theirs = load_plan(tmp_path / "sweep.yaml", ["seeds=7"])
    assert not SweepFolder(ours.sweep).check(ours)
    with SweepFolder(theirs.sweep).claim(theirs):
        pass
    with (
        pytest.raises(ConfigError, match=r"sweep\.seeds was 7, now 3"),
        SweepFolder(ours.sweep).claim(ours),
    ):
        pass
    assert SweepFolder(theirs.sweep).check(theirs)


@pytest.mark.parametrize(
    ("name", "free"), [("run.lock", True), ("sweep.yaml.partial", True), ("notes.txt", False)]
)
def test_a_folder_that_a_start_which_broke_off_left_is_free(
    name: str, free: bool, tmp_path: Path
) -> None:
    plan = plan_of(tmp_path, output_dir=str(tmp_path / "sweeps"))
    folder = SweepFolder(plan.sweep)
    Path(folder.path).mkdir(parents=True)
    Path(folder.path, name).touch()
    if free:
        assert not folder.check(plan)
    else:
        with pytest.raises(ConfigError, match="holds something else"):
            folder.check(plan)


def test_a_sweep_does_not_go_on_with_other_texts_than_it_was_begun_with(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, output_dir=str(tmp_path / "sweeps"))
    folder = SweepFolder(plan.sweep)
    keys = {"train": "a", "validation": "b"}
    for asked in ({"train": "z"}, keys, keys):  # nothing was tried with the first
        with folder.claim(plan, asked):
            pass
    (tmp_path / "sweeps/sweep/search").mkdir()
    folder.write("search/experiment_state-1.json", "{}")
    assert folder.check(plan)
    for changed, splits in (
        ({**keys, "validation": "c"}, "validation"),
        ({"train": "d"}, "train, validation"),
        ({**keys, "test": "e"}, "test"),
    ):
        with (
            pytest.raises(DataError, match=f"^{splits}: texts, .* have changed since .*sweep"),
            folder.claim(plan, changed),
        ):
            pass
    with folder.claim(plan, keys):
        pass


def test_a_sweep_of_older_software_goes_on(tmp_path: Path) -> None:
    """It kept no keys of its texts."""
    plan = plan_of(tmp_path, output_dir=str(tmp_path / "sweeps"))
    folder = SweepFolder(plan.sweep)
    with folder.claim(plan, {"train": "a"}):
        pass
    earlier = yaml.safe_load(folder.read("sweep.yaml") or "")
    del earlier["texts"]
    folder.write("sweep.yaml", yaml.safe_dump(earlier))
    assert folder.check(plan)
    with folder.claim(plan, {"train": "b"}):
        pass


def test_a_search_that_goes_on_is_not_finished_before_its_end(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, output_dir=str(tmp_path / "sweeps"))
    folder = SweepFolder(plan.sweep)
    with folder.claim(plan):
        folder.finish(5)
    assert folder.check(plan)
    assert folder.is_finished(5)
    with folder.claim(plan):  # with more minutes, and interrupted
        pass
    assert not folder.is_finished(5)


def test_a_search_cut_off_by_its_time_is_finished_until_it_gets_more(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, output_dir=str(tmp_path / "sweeps"))
    folder = SweepFolder(plan.sweep)
    assert not folder.is_finished(5)
    with folder.claim(plan):
        folder.finish(5)
    assert folder.is_finished(5)
    assert not folder.is_finished(5.5)
    assert not folder.is_finished(None)
    folder.finish(None)
    assert folder.is_finished(60)
    assert folder.is_finished(None)


def test_trials_are_reported_in_the_order_in_which_they_were_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tune lists those of a search that goes on by their last results; of equals the first wins."""
    listed = [
        SimpleNamespace(
            trial_id=f"trial_{number}",
            experiment_tag=f"{number}_optim.learning_rate=0.{number}",
            config={"optim.learning_rate": number},
        )
        for number in (10, 2, 1)
    ]
    results = [
        SimpleNamespace(
            metrics={"finished": True, "objective_0": 0.9, "number": trial.trial_id},
            error=None,
            checkpoint=None,
        )
        for trial in listed
    ]
    plan = plan_of(tmp_path, output_dir=str(tmp_path))
    ran = SimpleNamespace(
        run=lambda *_, **__: SimpleNamespace(trials=listed),
        ResultGrid=lambda _: results,
        with_parameters=lambda *_, **__: None,
        with_resources=lambda *_: None,
        CheckpointConfig=lambda **_: None,
    )
    monkeypatch.setattr(tune, "tune", ran)
    monkeypatch.setattr(tune, "_resources", lambda _: {})
    monkeypatch.setattr(tune, "search_options", lambda _: {})
    job = Job(plan, str(tmp_path), labels={}, keys={})
    found, _ = run_phase("search", job, {}, SweepFolder(plan.sweep), "search")
    assert [trial.trial for trial in found] == ["trial_1", "trial_2", "trial_10"]
    assert [trial.metrics["number"] for trial in found] == ["trial_1", "trial_2", "trial_10"]
    best = best_trial(found, plan)
    assert best is not None
    assert best.trial == "trial_1"


def test_baselines_that_are_interrupted_leave_a_report_of_what_there_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tune, "run_phase", lambda *_: ([], False))
    place = {"output_dir": str(tmp_path / "sweeps")}
    plan = plan_of(tmp_path, objective="gain", baselines=True, **place)
    folder = SweepFolder(plan.sweep)
    with folder.claim(plan):
        assert not run_phases(Job(plan, folder.title, labels={}, keys={}), folder)
    assert folder.holds("report.html")


@pytest.mark.parametrize(
    ("score", "refused"), [(0.5, False), (0.0, True), (None, False)], ids=["0.5", "0", "none"]
)
def test_a_gain_over_nothing_is_refused(
    score: float | None, refused: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A task that validation has no label of has no score, and does not count."""
    place = {"output_dir": str(tmp_path / "sweeps")}
    plan = plan_of(tmp_path, objective="gain", baselines=True, seeds=2, **place)
    found = {"entities": {} if score is None else {"validation/entities/f1": score}}
    found["sentiment"] = {"validation/sentiment/accuracy": 0.8}
    ended = [
        TrialResult(
            phase="baselines",
            trial=f"{task}{seed}",
            status="finished",
            reason="",
            config={"case": f"{ALONE}{task}", "seed": seed},
            metrics={**metrics, "objective_0": score or 0.0},
        )
        for task, metrics in found.items()
        for seed in plan.seeds()
    ]
    asked: list[Job] = []

    def phase(name: str, job: Job, *_: Any) -> tuple[list[TrialResult], bool]:
        asked.append(job)
        return (ended, True) if name == "baselines" else ([], False)

    monkeypatch.setattr(tune, "run_phase", phase)
    folder = SweepFolder(plan.sweep)
    message = "gain is relative to what entities scores alone, which is 0; train longer"
    with (
        folder.claim(plan),
        pytest.raises(ConfigError, match=message) if refused else nullcontext(),
    ):
        assert not run_phases(Job(plan, folder.title, labels={}, keys={}), folder)
    if not refused:
        scores = {"sentiment": 0.8, **({} if score is None else {"entities": score})}
        assert asked[-1].alone == scores


def test_a_search_of_which_no_trial_finished_leaves_a_table_that_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reason = "Task was killed due to the node running low on memory."
    killed = TrialResult("search", "a", "failed", reason, {"optim.learning_rate": 1e-4}, {})
    monkeypatch.setattr(tune, "run_phase", lambda *_: ([killed], True))
    plan = plan_of(tmp_path, output_dir=str(tmp_path / "sweeps"))
    folder = SweepFolder(plan.sweep)
    with folder.claim(plan), pytest.raises(ConfigError, match=r"no trial of .*trials\.csv there"):
        run_phases(Job(plan, folder.title, labels={}, keys={}), folder)
    assert "running low on memory" in (Path(folder.title) / "trials.csv").read_text("utf-8")


def test_a_task_alone_keeps_all_but_the_other_tasks(tmp_path: Path) -> None:
    plan = plan_of(tmp_path)
    alone = plan.alone("entities")
    assert list(alone.tasks) == ["entities"]
    assert list(alone.data[0].task_columns) == ["entities"]
    assert alone.optim == plan.base.optim


def test_trials_read_as_much_of_a_text_as_the_artifact_that_they_start_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = SimpleNamespace(encoder={"max_length": 17})
    monkeypatch.setattr(build, "read_manifest", lambda *_, **__: manifest)
    plan = plan_of(tmp_path, base={**BASE, "init_from": "runs/before/artifact"})
    drawn = plan.experiment({"optim.learning_rate": 1e-4})
    for experiment in (plan.base, drawn, plan.alone("entities")):
        assert experiment.encoder.max_length == 17
    plan = plan_of(
        tmp_path,
        base={**BASE, "init_from": "runs/before/artifact"},
        set={"encoder.max_length": 40},
    )
    assert plan.base.encoder.max_length == 40


@pytest.mark.parametrize(
    ("heads", "changes", "sound"),
    [
        (["sentiment", "entities"], {}, False),
        (["sentiment"], {}, False),  # entities alone would leave it behind
        (["sentiment", "entities"], {"baselines": False}, True),
        (["sentiment", "entities"], {"set": {"freeze.encoder": True}}, True),
        (["sentiment", "entities"], {"set": {"freeze.layers": 2}}, False),
        ([], {}, True),
    ],
)
def test_baselines_that_training_would_refuse_are_refused_before_any_trial(
    heads: list[str],
    changes: dict[str, Any],
    sound: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    manifest = SimpleNamespace(encoder={"max_length": 17}, tasks={head: {} for head in heads})
    for module in (build, sweep):
        monkeypatch.setattr(module, "read_manifest", lambda *_, **__: manifest)
    base = {**BASE, "init_from": "runs/before/artifact"}
    settings = {"base": base, "baselines": True, **changes}
    plan = plan_of(tmp_path, **settings)  # a finished sweep is shown whatever it says
    monkeypatch.setattr(tune, "prepare", lambda _: pytest.fail("goes on", pytrace=False))
    refused = pytest.raises(ConfigError, match=r"baselines: .*set baselines: false, or")
    with pytest.raises(pytest.fail.Exception, match="goes on") if sound else refused:
        tune.sweep(plan, SweepFolder(plan.sweep))


@pytest.mark.parametrize("task", ["sentiment", "entities"])
def test_a_task_alone_has_the_labels_that_it_has_in_the_shared_run(
    task: str, tmp_path: Path
) -> None:
    """A fifth of the rows or so carries one task's labels only."""
    plan = plan_of(tmp_path, set={"data.0.limit": 400})
    shared, alone = (
        read_corpus(experiment.data, experiment.tasks, experiment.seed).splits
        for experiment in (plan.base, plan.alone(task))
    )
    for split, rows in alone.items():
        found = [(row.text, row.targets) for row in rows]
        label = [(row.text, row.targets.get(task)) for row in shared[split]]
        assert found == [(text, {task: target}) for text, target in label if target is not None]
    assert 200 < len(alone["train"]) < 300
