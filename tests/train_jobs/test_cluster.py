"""What a run, the trials of a sweep and prediction ask of the nodes that there are."""

from __future__ import annotations

import os
import re
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
import torch
import yaml

from mtl_core.config import ScaleConfig
from mtl_core.errors import ConfigError
from serve_app.environment import SERVE_ENVIRONMENT
from train_jobs import predict, tune
from train_jobs.cluster import LOCAL_SETTINGS, idle_gpus, ray_cluster, worker_resources
from train_jobs.search import trials_at_once
from train_jobs.sweep import Plan, load_plan
from train_jobs.sweep_folder import SweepFolder
from train_jobs.tune import _resources, _with_resources

SMALL, LARGE, GPU, GPUS = (8, 0), (16, 0), (4, 1), (48, 4)
"""CPUs and GPUs of a node."""


def cluster_of(monkeypatch: pytest.MonkeyPatch, *nodes: tuple[int, int]) -> None:
    """Have Ray tell of these nodes, and of one that is gone."""
    told = [
        {"Alive": True, "Resources": {"CPU": float(cpus), "memory": 1.0} | {"GPU": float(gpus)}}
        for cpus, gpus in nodes
    ]
    gone = {"Alive": False, "Resources": {"CPU": 64.0, "GPU": 8.0}}
    monkeypatch.setattr(ray, "nodes", lambda: [*told, gone])
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.5:6379")


@pytest.mark.parametrize(
    ("nodes", "scale", "cpus"),
    [
        ([SMALL], {"workers": 3}, 2),
        ([SMALL, GPU], {"workers": 1}, 4),
        ([SMALL, GPU], {"workers": 1, "gpu": False}, 8),
        ([SMALL, GPU, GPU], {"workers": 2}, 4),
        ([SMALL, GPU], {"workers": 2}, 4),  # one GPU is too few, and both train on CPUs
        ([SMALL, GPU], {"workers": 2, "gpu": True}, 1),  # the second GPU's node is to come
        ([SMALL], {"workers": 1, "gpu": True}, 1),
        ([GPUS], {"workers": 4}, 12),
        ([SMALL, SMALL], {"workers": 1}, 8),
        ([SMALL, SMALL], {"workers": 3}, 4),
        ([LARGE, SMALL], {"workers": 2}, 8),
        ([SMALL, SMALL], {"workers": 40}, 1),
        ([(0, 0)], {"workers": 2}, 1),
        ([SMALL, SMALL], {"workers": [1, 2]}, 1),
        ([SMALL, SMALL], {"workers": 1, "cpus_per_worker": 12}, 12),
    ],
)
def test_a_worker_asks_for_no_more_than_a_node_has_for_it(
    nodes: list[tuple[int, int]],
    scale: dict[str, Any],
    cpus: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cluster_of(monkeypatch, *nodes)
    workers = worker_resources(ScaleConfig.model_validate(scale))
    assert workers.each == {"CPU": cpus, **({"GPU": 1} if workers.use_gpu else {})}


def test_this_machine_alone_says_what_it_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster_of(monkeypatch, SMALL)
    monkeypatch.delenv("RAY_ADDRESS")
    with pytest.raises(ConfigError, match=r"9 worker\(s\) of 1 CPU\(s\) do not fit on 8 CPU"):
        worker_resources(ScaleConfig(workers=9))
    with pytest.raises(ConfigError, match=r"1 GPU\(s\) asked .* has 0 that PyTorch can use"):
        worker_resources(ScaleConfig(workers=1, gpu=True))


@pytest.mark.parametrize(
    ("address", "usable", "counted"),
    [(None, True, "as Ray finds"), (None, False, 0), ("10.0.0.5:6379", False, "as Ray finds")],
)
def test_gpus_of_this_machine_count_if_torch_can_use_them(
    address: str | None, usable: bool, counted: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[dict[str, Any]] = []
    monkeypatch.setattr(os, "environ", {"RAY_ADDRESS": address} if address else {})
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", lambda **options: started.append(options))
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: usable)
    with ray_cluster():
        pass
    (options,) = started
    found = options.get("num_gpus")
    assert ("as Ray finds" if found is None else found) == counted


@pytest.mark.parametrize(
    ("nodes", "scale", "use_gpu", "hint"),
    [
        ([GPU], {"workers": 1}, True, None),
        ([GPU], {"workers": 2}, False, r"1 GPU\(s\) for 2 worker\(s\): training on CPUs"),
        ([GPU], {"workers": [1, 2]}, True, None),
        ([GPU], {"workers": [2, 3]}, False, r"scale\.workers=1 would use them"),
        ([GPU], {"workers": 2, "gpu": False}, False, None),
        ([GPUS], {"workers": 4}, True, None),
        ([GPUS], {"workers": 5}, False, r"scale\.workers=4 would use them"),
        ([SMALL], {"workers": 2}, False, None),
    ],
)
@pytest.mark.parametrize("alone", [True, False])
def test_unasked_workers_take_gpus_where_there_is_one_for_each(
    nodes: list[tuple[int, int]],
    scale: dict[str, Any],
    use_gpu: bool,
    hint: str | None,
    alone: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cluster_of(monkeypatch, *nodes)
    if alone:
        monkeypatch.delenv("RAY_ADDRESS")
    asked = ScaleConfig.model_validate(scale)
    assert worker_resources(asked).use_gpu is use_gpu
    said = idle_gpus(asked)
    assert said is None if hint is None else re.search(hint, said or "")


@pytest.mark.cluster
@pytest.mark.slow
def test_what_was_given_no_gpu_sees_none(ray_address: str) -> None:
    @ray.remote
    def visible() -> str | None:
        return os.environ.get("CUDA_VISIBLE_DEVICES")

    assert ray.get(visible.remote()) == ""
    name = "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"
    assert SERVE_ENVIRONMENT[name] == LOCAL_SETTINGS[name]  # nor does a head beside its encoder


def plan_of(folder: Path, scale: dict[str, Any], budget: dict[str, Any]) -> Plan:
    base = {"tasks": {"sentiment": {"kind": "classification"}}, "scale": scale}
    columns = {"text": "text", "sentiment": "sentiment"}
    base["data"] = [{"demo": True, "columns": columns}]
    (folder / "base.yaml").write_text(yaml.safe_dump(base), encoding="utf-8")
    space = {"optim.learning_rate": {"loguniform": [1e-4, 1e-3]}}
    sweep = {"base": "base.yaml", "space": space, "budget": budget}
    (folder / "sweep.yaml").write_text(yaml.safe_dump(sweep), encoding="utf-8")
    return load_plan(folder / "sweep.yaml")


@pytest.mark.parametrize(
    ("nodes", "scale", "budget", "cpus", "at_once"),
    [
        ([SMALL], {"workers": 1}, {"trials": 4}, 2, None),
        ([SMALL, SMALL], {"workers": 1}, {"trials": 3}, 4, None),
        ([GPUS], {"workers": 1}, {"trials": 16}, 12, None),
        ([SMALL, GPU], {"workers": 1}, {"trials": 16}, 4, None),
        ([SMALL, SMALL], {"workers": 2}, {"trials": 2}, 4, 2),
        ([GPUS], {"workers": 2}, {"trials": 16}, 12, 2),
        ([GPUS], {"workers": 2, "cpus_per_worker": 1}, {"trials": 16}, 1, 2),
        ([SMALL, GPU, GPU], {"workers": 2}, {"trials": 16}, 4, 1),
        ([SMALL], {"workers": 2}, {"trials": 16, "concurrency": 1}, 4, 1),
    ],
)
def test_trials_share_what_the_nodes_have_gpus_too(
    nodes: list[tuple[int, int]],
    scale: dict[str, Any],
    budget: dict[str, Any],
    cpus: int,
    at_once: int | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cluster_of(monkeypatch, *nodes)
    plan = _with_resources(plan_of(tmp_path, scale, budget))
    assert plan.base.scale.cpus_per_worker == cpus
    assert trials_at_once(plan) == at_once


@pytest.mark.parametrize(("gpu", "asked"), [(None, 1.0), (True, 1.0), (False, 0.0)])
def test_a_trial_asks_for_a_gpu_only_if_its_scale_has_one(
    gpu: bool | None, asked: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster_of(monkeypatch, GPU)
    plan = plan_of(tmp_path, {"workers": 1, "gpu": gpu}, {"trials": 1})
    assert _resources(plan).get("gpu", 0.0) == asked


@pytest.mark.parametrize(
    ("nodes", "free", "workers", "expected"),
    [
        ([SMALL], 0, None, (7, 1, 0)),
        ([SMALL], 0, 1, (1, 7, 0)),
        ([SMALL], 0, 2, (2, 3, 0)),
        ([SMALL, SMALL], 0, None, (15, 1, 0)),
        ([SMALL, SMALL], 0, 1, (1, 8, 0)),
        ([SMALL, SMALL], 0, 2, (2, 7, 0)),
        ([SMALL, SMALL], 0, 3, (3, 4, 0)),
        ([SMALL, SMALL], 0, 40, (40, 1, 0)),
        ([(0, 0)], 0, None, (1, 1, 0)),
        ([SMALL, GPU, GPUS], 5, None, (5, 1, 5)),
        ([SMALL, GPU, GPUS], 2, 2, (2, 1, 2)),
        ([SMALL, GPU, GPUS], 2, 3, (3, 16, 0)),
        ([SMALL, GPU], 0.5, None, (11, 1, 0)),
    ],
)
def test_a_process_that_predicts_takes_free_gpus_or_no_more_threads_than_a_node_has_for_it(
    nodes: list[tuple[int, int]],
    free: float,
    workers: int | None,
    expected: tuple[int, int, int],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    cluster_of(monkeypatch, *nodes)
    asked: dict[str, Any] = {}
    dataset = SimpleNamespace(iter_batches=lambda **_: [])
    dataset.map_batches = lambda _, **more: asked.update(more) or dataset
    monkeypatch.setattr("ray.available_resources", lambda: {"GPU": free})
    monkeypatch.setattr(predict, "_texts", lambda *_: dataset)
    where = ("s3://bucket/artifact", Path("in.jsonl"), "text")
    assert not list(predict._answers(*where, None, workers, "torch-fp32"))
    processes, threads, gpus = expected
    assert asked["compute"].max_size == processes
    assert (asked["num_cpus"], asked["num_gpus"]) == ((0, 1) if gpus else (threads, 0))
    said = capsys.readouterr().out
    assert bool(said) == (gpus == 0 and any(there for _, there in nodes))
    if said:
        advice = f"--workers {int(free)} would" if free >= 1 else "others use them now"
        assert "predicting on CPUs; " + advice in said


@pytest.fixture
def no_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sweep reads no data, starts no Ray and trains nothing."""
    data = SimpleNamespace(labels={}, keys={})
    for name, stand_in in {
        "prepare": lambda _: data,
        "describe_data": lambda _: None,
        "forked_workers": nullcontext,
        "ray_cluster": nullcontext,
        "rehearse": lambda *_: None,
        "run_phases": lambda *_: True,
    }.items():
        monkeypatch.setattr(tune, name, stand_in)


@pytest.mark.usefixtures("no_cluster")
@pytest.mark.parametrize(("node", "told"), [(GPU, True), (SMALL, False)])
def test_a_sweep_says_once_that_its_trials_leave_gpus_idle(
    node: tuple[int, int],
    told: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    cluster_of(monkeypatch, node)
    monkeypatch.chdir(tmp_path)
    plan = plan_of(tmp_path, {"workers": 2}, {"trials": 3})
    assert tune.sweep(plan, SweepFolder(plan.sweep))
    assert capsys.readouterr().out.count("training on CPUs") == told


@pytest.mark.usefixtures("no_cluster")
def test_a_sweep_that_this_machine_cannot_hold_is_refused_and_leaves_no_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster_of(monkeypatch, SMALL)
    monkeypatch.delenv("RAY_ADDRESS")
    monkeypatch.chdir(tmp_path)
    plan = plan_of(tmp_path, {"workers": 500}, {"trials": 3})
    folder = SweepFolder(plan.sweep)
    with pytest.raises(ConfigError, match=r"500 worker\(s\)"):
        tune.sweep(plan, folder)
    assert not Path(folder.title).exists()
