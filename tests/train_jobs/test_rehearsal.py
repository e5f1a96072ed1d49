"""What a cluster is asked before a sweep's trials start."""

from __future__ import annotations

from pathlib import Path

import pytest

from mtl_core.config import ConfigError, ScaleConfig
from train_jobs import rehearsal
from train_jobs.sweep import Sweep
from train_jobs.sweep_folder import SweepFolder

pytestmark = [pytest.mark.cluster, pytest.mark.slow]


def sweep(output_dir: str) -> Sweep:
    space = {"optim.learning_rate": {"choice": [1e-3]}}
    raw = {"name": "small", "base": "base.yaml", "space": space, "output_dir": output_dir}
    return Sweep.model_validate(raw)


@pytest.fixture(autouse=True)
def on_a_cluster(ray_address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The shared Ray of two CPUs, as a job sees it."""
    monkeypatch.setenv("RAY_ADDRESS", ray_address)


def write_proof(of: Sweep) -> None:
    folder = SweepFolder(of)
    folder.filesystem.makedirs(folder.path, exist_ok=True)
    folder.write(rehearsal.PROOF, "sweep: {}\n")


def test_a_trial_that_fits_on_nodes_that_reach_the_folder_may_start(tmp_path: Path) -> None:
    write_proof(sweep(str(tmp_path)))
    said: list[str] = []
    rehearsal.rehearse(ScaleConfig(workers=2), sweep(str(tmp_path)), said.append)
    assert not said


def test_a_folder_that_only_the_driver_reaches_is_refused() -> None:
    of = sweep("memory://runs")  # each process has such a file system of its own
    write_proof(of)
    with pytest.raises(ConfigError, match=r"output_dir: node \S+ of this cluster does not reach"):
        rehearsal.rehearse(ScaleConfig(workers=1), of)
