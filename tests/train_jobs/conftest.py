"""What tests of the commands share: one Ray cluster, a small experiment, a finished run."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mtl_core.forks import own_node
from tests import preloaded
from tests.commands import run, write_config


@pytest.fixture(scope="session")
def ray_address() -> Iterator[str]:
    """A local Ray of two CPUs that every test marked `cluster` shares."""
    import ray
    from ray._private.node import Node

    from train_jobs.cluster import LOCAL_SETTINGS

    os.environ.update(LOCAL_SETTINGS)
    settings = {"num_cpus": 2, "include_dashboard": False, "logging_level": "ERROR"}
    with own_node(Node, preloaded.scripts()):
        ray.init(address="local", log_to_driver=False, **settings)
    yield ray.get_runtime_context().gcs_address
    ray.shutdown()


@pytest.fixture(scope="session")
def experiment(tiny_encoders: dict[str, Path]) -> dict[str, Any]:
    """Two tasks of the embedded corpus on a tiny encoder, with dropout on."""
    return {
        "name": "small",
        "tasks": {
            "sentiment": {"kind": "classification"},
            "entities": {"kind": "token_classification"},
        },
        "data": [{"demo": True, "limit": 300}],
        "encoder": {"model": str(tiny_encoders["bert"]), "max_length": 48},
        "optim": {"learning_rate": 1e-3},
        "training": {"epochs": 2, "batch_size": 4, "checkpoint_every": 10, "precision": "fp32"},
        "weighting": {"strategy": "dwa", "gradient_cosines": 10},
        "scale": {"workers": 2},
    }


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory, experiment: dict[str, Any]) -> Path:
    """The folder of an undisturbed run: config, runs/small and its artifact."""
    folder = tmp_path_factory.mktemp("undisturbed")
    done = run("train", "--config", str(write_config(folder, experiment)))
    assert done.returncode == 0, done.stderr
    (folder / "output.txt").write_text(done.stdout)
    return folder
