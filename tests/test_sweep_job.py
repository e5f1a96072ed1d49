"""A sweep as a job on a cluster that grows, with its folder on S3."""

from __future__ import annotations

import io
import json
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from tests.clusters import AutoscalingCluster, autoscaling_cluster
from tests.commands import ROOT
from tests.s3_server import s3_server

pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


@dataclass
class User:
    """Somebody in a folder outside the repository, with a cluster, a bucket and an encoder."""

    cluster: AutoscalingCluster
    s3: Any
    environment: dict[str, str]
    folder: Path
    encoder: Path

    def tune(self, name: str, *options: str, **more: Any) -> subprocess.CompletedProcess[str]:
        """Submit the shipped demo sweep with two short trials, and wait for it.

        Args:
            name: of the sweep.
            options: of `ray job submit`.
            more: settings of the sweep.
        """
        changes = {
            "name": name,
            "output_dir": "s3://bucket/sweeps",
            "set.encoder.model": self.encoder,
            "set.training.precision": "fp32",
            "set.training.epochs": 1,
            "set.data.0.limit": 80,
            "budget.trials": 2,
            "baselines": "false",
            "seeds": 1,
            **more,
        }
        sets = [word for key, value in changes.items() for word in ("--set", f"{key}={value}")]
        runtime = json.dumps({"env_vars": self.environment})
        submit = ["job", "submit", "--working-dir", str(ROOT), "--runtime-env-json", runtime]
        command = [
            "--",
            "python",
            "-m",
            "train_jobs.tune",
            "--config",
            "tune_configs/demo.yaml",
            *sets,
        ]
        return self.cluster.ray(*submit, *options, *command, cwd=self.folder)

    def stored(self, name: str) -> set[str]:
        found = self.s3.list_objects_v2(Bucket="bucket", Prefix=f"sweeps/{name}/")
        return {item["Key"].split("/", 2)[2] for item in found.get("Contents", [])}


@pytest.fixture(scope="module")
def user(
    tmp_path_factory: pytest.TempPathFactory, tiny_encoders: dict[str, Path]
) -> Iterator[User]:
    """One node of three CPUs may come."""
    folder = tmp_path_factory.mktemp("elsewhere")
    cpu = {"resources": {"CPU": 3}, "max_workers": 1}
    with s3_server("bucket") as (client, environment), autoscaling_cluster({"cpu": cpu}) as cluster:
        yield User(cluster, client, environment, folder, tiny_encoders["bert"])


def test_trials_of_more_workers_than_may_come_are_refused(user: User) -> None:
    done = user.tune("wide", **{"set.scale.workers": 4})
    assert done.returncode != 0
    said = done.stdout + done.stderr
    assert "error: scale: no node that this cluster may start has room for 4 worker(s)" in said
    assert "Traceback" not in said
    assert not [name for name in user.stored("wide") if name.startswith("search/")]
    assert user.cluster.nodes() == 0


def test_a_sweep_runs_as_a_job_with_its_folder_on_s3(user: User) -> None:
    # On the node, beside its trials: here all nodes share a folder, so the first worker of a new
    # node unpacks the job's code anew where a driver on the head would be working.
    done = user.tune("small", "--entrypoint-num-cpus", "1")
    assert done.returncode == 0, done.stdout + done.stderr
    stored = user.stored("small")
    assert {"artifact/manifest.json", "best.yaml", "report.html", "finished"} <= stored
    table = user.s3.get_object(Bucket="bucket", Key="sweeps/small/trials.csv")["Body"].read()
    trials = pd.read_csv(io.BytesIO(table))
    assert trials["phase"].tolist() == ["search", "search", "best"]
    assert set(trials["status"]) <= {"finished", "stopped"}
