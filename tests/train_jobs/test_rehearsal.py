"""What a cluster is asked before a sweep's trials start."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from mtl_core.config import ScaleConfig
from mtl_core.errors import ConfigError
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


def test_a_trial_that_fits_on_nodes_that_reach_the_folder_may_start(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_proof(sweep(str(tmp_path)))
    rehearsal.rehearse(ScaleConfig(workers=2), sweep(str(tmp_path)))
    assert "waiting" not in capsys.readouterr().out


def test_a_folder_that_only_the_driver_reaches_is_refused() -> None:
    of = sweep("memory://runs")  # each process has such a file system of its own
    write_proof(of)
    with pytest.raises(ConfigError, match=r"output_dir: node \S+ of this cluster does not reach"):
        rehearsal.rehearse(ScaleConfig(workers=1), of)


TWO_NODES = """
import os, sys
from pathlib import Path

import ray
from ray.cluster_utils import Cluster

from mtl_core.config import ScaleConfig
from train_jobs import rehearsal
from train_jobs.sweep import Sweep
from train_jobs.sweep_folder import SweepFolder

sweep = Sweep(name="small", base="b.yaml", space={"x": {"choice": [1]}}, output_dir=sys.argv[1])
Path(sys.argv[1], "small").mkdir()
SweepFolder(sweep).write(rehearsal.PROOF, "")


def read_proof(_):
    node = ray.get_runtime_context().get_node_id()
    return node, "" if node == head else None, " (said here)"


rehearsal.read_proof = read_proof
cluster = Cluster(True, head_node_args={"num_cpus": 1, "include_dashboard": False})
cluster.add_node(num_cpus=1)
os.environ["RAY_ADDRESS"] = cluster.address
ray.init(log_to_driver=False)
head = ray.get_runtime_context().get_node_id()
for _ in range(4):  # wherever Ray begins to look for room
    try:
        rehearsal.rehearse(ScaleConfig(workers=1, cpus_per_worker=1), sweep)
    except ValueError as error:
        print(error)
ray.shutdown()
cluster.shutdown()
"""


def test_every_node_is_asked_though_a_trial_needs_but_one(tmp_path: Path) -> None:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_ADDRESS")}
    command = [sys.executable, "-c", TWO_NODES, str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("does not reach") == 4, done.stdout
