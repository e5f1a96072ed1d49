"""What the trials of a sweep share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
import torch
import yaml
from pyarrow.fs import FileSystem, FileType
from ray import tune
from ray.tune.integration.ray_train import TuneReportCallback

from aws.prepare import policies
from mtl_core import features
from mtl_core.config import parse_experiment
from mtl_core.data.prepare import prepare
from mtl_core.state import FILES
from tests.s3_server import s3_server
from train_jobs import trials
from train_jobs.folders import NamedFolder
from train_jobs.runs import RESULT, RunFolder
from train_jobs.sweep import load_plan
from train_jobs.trials import (
    Job,
    ReportToTune,
    RestoreMissingCheckpoints,
    Scorer,
    TrialFailed,
    TrialHistory,
    TrialSession,
    first_complete,
    run_trial,
)

Tell = Callable[[str, dict[str, Any]], dict[str, Any] | None]
"""Takes what a worker tells, and returns the last row that Tune got."""


@pytest.mark.cluster
@pytest.mark.slow
def test_a_frozen_encoder_runs_once_a_text_and_not_once_a_trial(
    tmp_path: Path, ray_address: str, experiment: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    base = {
        **experiment,
        "data": [{"demo": True, "limit": 80}],
        "freeze": {"encoder": True},
        "scale": {"workers": 1},
    }
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(base), encoding="utf-8")
    space = {"optim.head_learning_rate": {"loguniform": [1e-3, 1e-1]}}
    sweep = {"base": "base.yaml", "space": space}
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(sweep), encoding="utf-8")
    plan = load_plan(tmp_path / "sweep.yaml")

    batches, texts = features.evaluation_batches, []

    def counted(split: Any) -> Any:
        texts.append(len(split))
        return batches(split)

    scores: list[dict[str, Any]] = []
    monkeypatch.setenv("MTL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(features, "evaluation_batches", counted)
    monkeypatch.setattr(tune, "get_checkpoint", lambda: None)
    monkeypatch.setattr(tune, "report", lambda row, checkpoint: scores.append(row))
    data = prepare(plan.base)
    job = Job(plan, str(tmp_path / "sweep"), data.labels, data.keys)
    for number, rate in enumerate((1e-3, 1e-2, 1e-1)):
        context = SimpleNamespace(get_trial_id=lambda number=number: f"trial_{number}")
        monkeypatch.setattr(tune, "get_context", lambda context=context: context)
        run_trial({"optim.head_learning_rate": rate}, job)
    assert sorted(texts) == sorted(len(data.splits[name]) for name in ("train", "validation"))
    ends = [row for row in scores if row.get("finished")]
    assert len(ends) == 3
    assert len({row["objective_0"] for row in ends}) > 1


def one_trial(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    gpus: tuple[str, ...] = (),
    workers: int = 1,
) -> tuple[dict[str, float], Job]:
    """What Tune calls a trial with, given these GPUs of a node; its data are not read."""
    base = {
        "tasks": {"sentiment": {"kind": "classification"}},
        "data": [{"demo": True, "columns": {"text": "text", "sentiment": "sentiment"}}],
        "scale": {"workers": workers},
    }
    (folder / "base.yaml").write_text(yaml.safe_dump(base), encoding="utf-8")
    sweep = {"base": "base.yaml", "space": {"optim.learning_rate": {"loguniform": [1e-4, 1e-3]}}}
    (folder / "sweep.yaml").write_text(yaml.safe_dump(sweep), encoding="utf-8")
    context = SimpleNamespace(get_trial_id=lambda: "trial")
    node = {"Alive": True, "Resources": {"CPU": 2.0, "GPU": 1.0}}
    monkeypatch.setattr(ray, "nodes", lambda: [node])
    monkeypatch.setattr(ray, "get_gpu_ids", lambda: list(gpus))
    monkeypatch.setattr(tune, "get_context", lambda: context)
    monkeypatch.setattr(Job, "data", lambda *_: SimpleNamespace(splits={}, keys={}))
    return {"optim.learning_rate": 5e-4}, Job(load_plan(folder / "sweep.yaml"), str(folder), {}, {})


@pytest.mark.parametrize(("gpus", "device"), [(("3",), "cuda"), ((), "cpu")])
def test_a_trial_trains_on_the_gpu_that_it_was_given_even_if_torch_finds_none(
    gpus: tuple[str, ...], device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sessions = []

    def build(*_: Any, session: TrialSession) -> SimpleNamespace:
        sessions.append(session)
        return SimpleNamespace(fit=lambda: None)

    config, job = one_trial(tmp_path, monkeypatch, gpus)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(trials, "build_trainer", build)
    run_trial(config, job)
    assert [session.world.device.type for session in sessions] == [device]


def test_workers_of_a_trial_find_in_its_folder_that_their_node_reaches_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[str | None] = []

    def build(_: Any, folder: RunFolder, *__: Any, **___: Any) -> SimpleNamespace:
        def fit() -> SimpleNamespace:
            found.append(NamedFolder(folder.storage_path, "trial").read("experiment.yaml"))
            return SimpleNamespace(metrics=None)

        return SimpleNamespace(fit=fit)

    config, job = one_trial(tmp_path, monkeypatch, workers=2)
    log = SimpleNamespace(drain=SimpleNamespace(remote=list))
    monkeypatch.setattr(ray, "get", lambda answer: answer)
    monkeypatch.setattr(trials, "progress_log", lambda: log)
    monkeypatch.setattr(trials, "build_trainer", build)
    monkeypatch.setattr(trials, "ReportToTune", lambda *_: None)
    run_trial(config, job)
    assert found
    assert found[0]


@pytest.mark.parametrize(
    ("training", "change", "shared"),
    [
        ({}, {"seed": 43}, True),
        ({"shard_texts": 200}, {"optim": {"learning_rate": 1e-5}}, True),
        ({"shard_texts": 200}, {"seed": 43}, False),  # which draws another cut
        ({"shard_texts": 200}, {"training": {"shard_texts": 400}}, False),
        ({}, {"training": {"shard_texts": 400}}, False),
    ],
)
def test_a_trial_takes_the_base_s_texts_where_they_are_its_own(
    training: dict[str, Any],
    change: dict[str, Any],
    shared: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    source = {"path": "rows", "columns": {"text": "text", "topic": "topic"}}
    base = {
        "tasks": {"topic": {"kind": "classification"}},
        "data": [{**source, "splits": {"train": "a.jsonl", "validation": "b.jsonl"}}],
        "training": training,
    }
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(base), encoding="utf-8")
    sweep = {"base": "base.yaml", "space": {"optim.learning_rate": {"uniform": [1e-5, 1e-3]}}}
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(sweep), encoding="utf-8")
    monkeypatch.setattr(trials, "reopen", lambda *_: "the base's")
    monkeypatch.setattr(trials, "prepare", lambda _: "its own")
    plan = load_plan(tmp_path / "sweep.yaml")
    experiment = parse_experiment({**plan.base.model_dump(mode="json"), **change})
    found = Job(plan, str(tmp_path), {}, {}).data(experiment)
    assert found == ("the base's" if shared else "its own")


def test_a_task_that_validation_has_no_label_of_counts_for_no_objective() -> None:
    scorer = Scorer(("mean", "gain"), {"topic": 0.5, "mood": 0.9})
    row = scorer({"validation/topic/accuracy": 0.75, "best": True})
    assert row["objective_0"] == 0.75
    assert row["objective_1"] == 0.5
    scorer = Scorer(("gain",), {"topic": 0.5})
    row = scorer({"validation/topic/accuracy": 0.75, "validation/mood/accuracy": 0.0, "best": True})
    assert row["objective_0"] == 0.5


def history_in(folder: Path) -> TrialHistory:
    """What a trial of one task knows when its process begins."""
    raw = {
        "name": "trial",
        "output_dir": str(folder),
        "tasks": {"topic": {"kind": "classification"}},
        "data": [{"path": "none.jsonl", "columns": {"text": "text", "topic": "topic"}}],
    }
    experiment = parse_experiment(raw)
    return TrialHistory(RunFolder(experiment), Scorer(("mean",), {}))


def epoch(number: int, score: float, best: bool) -> dict[str, Any]:
    """What is told of an epoch of ten steps."""
    step = {"step": 10 * number, "epoch": float(number)}
    return {**step, "validation/topic/accuracy": score, "best": best}


def in_its_own_process(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Tell:
    """A trial with one worker, begun or begun again."""
    session = TrialSession(history_in(folder), keep_weights=False, use_gpu=False)
    reported: list[dict[str, Any]] = []
    monkeypatch.setattr(tune, "report", lambda row, checkpoint: reported.append(row))

    def tell(event: str, row: dict[str, Any]) -> dict[str, Any] | None:
        session.tell(event, row)
        if event == "validation":
            session.report({**row}, None)
        if event == "end":
            session.report({**row, "finished": True}, None)
        return reported[-1] if reported else None

    return tell


def with_workers(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Tell:
    """The same with workers of its own, seen from Ray Train's controller."""
    told: list[tuple[str, dict[str, Any]]] = []
    reported: list[dict[str, Any]] = []

    def drain() -> list[tuple[str, dict[str, Any]]]:
        new = list(told)
        told.clear()
        return new

    def after_report(_: Any, __: Any, metrics: list[dict[str, Any]], ___: Any) -> None:
        reported.extend(metrics)

    monkeypatch.setattr(ray, "get", lambda found: found)
    monkeypatch.setattr(TuneReportCallback, "__init__", lambda _: None)
    monkeypatch.setattr(TuneReportCallback, "after_report", after_report)
    log = SimpleNamespace(drain=SimpleNamespace(remote=drain))
    callback = ReportToTune(history_in(folder), log)

    def tell(event: str, row: dict[str, Any]) -> dict[str, Any] | None:
        told.append((event, row))
        if event in ("validation", "end"):
            callback.after_report(None, [row], None)
        return {**reported[-1], "history": history_in(folder).rows} if reported else None

    return tell


@pytest.mark.parametrize("begin", [in_its_own_process, with_workers])
def test_a_trial_that_goes_on_knows_its_best_epoch_and_all_that_it_told(
    begin: Callable[[Path, pytest.MonkeyPatch], Tell],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tell = begin(tmp_path, monkeypatch)
    tell("start", {"step": 0})
    for row in (epoch(1, 0.5, True), epoch(2, 0.9, True), epoch(3, 0.7, False)):
        tell("validation", row)
    tell = begin(tmp_path, monkeypatch)
    tell("start", {"step": 20})  # from the checkpoint of the second epoch
    row = tell("validation", epoch(3, 0.7, False))
    assert row
    assert row["objective_0"] == 0.9
    row = tell("end", {"step": 30})
    assert row
    steps = [(told["event"], told["step"]) for told in row["history"]]
    ends = [("validation", 10), ("validation", 20), ("start", 20), ("validation", 30), ("end", 30)]
    assert steps == [("start", 0), *ends]


@pytest.mark.parametrize(("begins", "times"), [(True, 1), (False, 2)])
def test_what_fails_in_training_is_not_trained_again_and_what_fails_before_is_tried(
    begins: bool, times: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tune calls a trial that failed once more."""
    trained = []

    def build(*_: Any, session: TrialSession) -> SimpleNamespace:
        def fit() -> None:
            if begins:
                session.tell("start", {"step": 0})
            session.tell("failed", {"message": "the loss is not finite"})

        trained.append(session)
        return SimpleNamespace(fit=fit)

    config, job = one_trial(tmp_path, monkeypatch)
    monkeypatch.setattr(trials, "build_trainer", build)
    for _ in range(2):
        with pytest.raises(TrialFailed, match="the loss is not finite"):
            run_trial(config, job)
    assert len(trained) == times


@pytest.mark.parametrize(
    ("stand", "expected"),
    [
        ({3: FILES, 4: FILES}, 3),
        ({4: FILES}, 4),  # deleted, and the next one not recorded yet
        ({3: FILES[1:], 4: FILES}, 4),  # half deleted
        ({3: FILES[1:], 4: (RESULT,)}, None),  # the next one is of the end, with scores alone
        ({2: FILES}, None),
        ({}, None),
    ],
)
def test_a_trial_goes_on_from_a_checkpoint_that_stands(
    stand: dict[int, tuple[str, ...]], expected: int | None, tmp_path: Path
) -> None:
    def folder(number: int) -> Path:
        return tmp_path / "trial" / f"checkpoint_{number:06}"

    for number, files in stand.items():
        folder(number).mkdir(parents=True)
        for file in files:
            (folder(number) / file).touch()
    found = first_complete(tune.Checkpoint(folder(3)))
    assert (found and found.path) == (expected and str(folder(expected)))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_gone_checkpoint_on_s3_is_replaced_with_a_worker_s_rights_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    policy = policies("worker", "123456789012", "us-east-1", "bucket")["worker"]
    with s3_server("bucket", policy) as (client, environment):
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        for file in FILES:
            client.put_object(Bucket="bucket", Key=f"sweeps/trial/checkpoint_000004/{file}")
        filesystem, path = FileSystem.from_uri("s3://bucket/sweeps/trial/checkpoint_000003")
        gone = tune.Checkpoint(path, filesystem)
        trial = SimpleNamespace(checkpoint=gone, is_finished=lambda: False)
        RestoreMissingCheckpoints().on_step_begin(1, [trial])
        assert filesystem.get_file_info(path).type == FileType.Directory
        found = first_complete(gone)
        assert found is not None
        assert found.path == "bucket/sweeps/trial/checkpoint_000004"
