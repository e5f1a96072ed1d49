"""`ray job submit` from a folder of one's own to a cluster with token authentication."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import ray
from botocore.exceptions import ClientError

from aws.prepare import policies
from tests import preloaded
from tests.clusters import AutoscalingCluster, autoscaling_cluster, job_id
from tests.commands import ROOT, run, wait_for
from tests.refusing import QUOTA
from tests.s3_server import checkpoints, s3_client, s3_server

pytestmark = [pytest.mark.cluster, pytest.mark.slow]
RUN = "s3://bucket/runs/demo"


@dataclass
class User:
    """Somebody in a folder outside the repository, with a token and a bucket."""

    cluster: AutoscalingCluster
    folder: Path
    s3: Any
    submit: list[str]
    """`ray job submit` with what leads it to the bucket."""
    rights: dict[str, str]
    """Keys of what jobs may do there: what `aws.prepare` lets workers do."""

    def job(self, *command: str) -> subprocess.CompletedProcess[str]:
        return self.cluster.ray(*self.submit, "--", "python", "-m", *command, cwd=self.folder)

    def stored(self) -> list[str]:
        found = self.s3.list_objects_v2(Bucket="bucket", Prefix="runs/demo/").get("Contents", [])
        return [item["Key"].removeprefix("runs/demo/") for item in found]

    def checkpoints(self) -> set[str]:
        return checkpoints(self.s3, "runs/demo")


@pytest.fixture(scope="module")
def user(tmp_path_factory: pytest.TempPathFactory) -> Iterator[User]:
    """Nodes of one CPU: two workers of a run need two of them. No node has a GPU to give."""
    folder = tmp_path_factory.mktemp("elsewhere")
    cpu = {"resources": {"CPU": 1}, "max_workers": 2}
    gpu = {"resources": {"CPU": 1, "GPU": 1}, "max_workers": 2}
    kinds = {"cpu": cpu, "gpu": gpu}
    policy = policies("worker", "123456789012", "us-east-1", "bucket")["worker"]
    with (
        s3_server("bucket", policy) as (client, environment),
        autoscaling_cluster(kinds) as cluster,
    ):
        runtime = json.dumps({"env_vars": environment})
        submit = ["job", "submit", "--working-dir", str(ROOT), "--runtime-env-json", runtime]
        yield User(cluster, folder, client, submit, environment)


def train_command(encoder: Path) -> list[str]:
    """The shipped demo on a tiny encoder, with its run on S3."""
    changes = {
        "encoder.model": encoder,
        "training.epochs": 5,
        "training.checkpoint_every": 20,
        "training.precision": "fp32",
        "optim.learning_rate": 0.003,
        "output_dir": "s3://bucket/runs",
    }
    sets = [word for key, value in changes.items() for word in ("--set", f"{key}={value}")]
    return ["train_jobs.train", "--config", "train_jobs/configs/demo.yaml", *sets]


def submitted(user: User, command: list[str]) -> preloaded.Process:
    """A job whose logs stream here."""
    arguments = (*user.submit, "--", "python", "-m", *command)
    env = {"RAY_API_SERVER_ADDRESS": user.cluster.dashboard, "PYTHONUNBUFFERED": "1"}
    env = {**user.cluster.environment, **env}
    return preloaded.start("ray.scripts.scripts", arguments, user.folder, env)


def read_until(process: preloaded.Process, want: Callable[[str], Any]) -> str:
    """What the job prints until a line of it is wanted."""
    assert process.stdout is not None
    said = ""
    for line in process.stdout:
        said += line
        if want(line):
            return said
    raise AssertionError(said)


def test_a_run_whose_workers_no_node_can_hold_is_refused(user: User) -> None:
    wide = ("--set", "scale.cpus_per_worker=2")
    done = user.job("train_jobs.train", "--config", "train_jobs/configs/demo.yaml", *wide)
    assert done.returncode != 0
    assert "error: scale: no node that this cluster may start has room for 2 worker(s)" in (
        done.stdout
    )
    assert "Traceback" not in done.stdout
    assert user.cluster.nodes() == 0


def test_a_run_tells_why_the_cloud_refuses_its_nodes(user: User) -> None:
    config = ["train_jobs.train", "--config", "train_jobs/configs/demo.yaml"]
    process = submitted(user, [*config, "--set", "scale.gpu=true"])
    said = read_until(process, lambda line: "cannot be had" in line)
    reason = f"Node Launch Exception (VcpuLimitExceeded): {QUOTA}"
    assert f"waiting: a node of type gpu cannot be had: {reason}" in said
    assert user.cluster.ray("job", "stop", job_id(said), cwd=user.folder).returncode == 0
    assert "Traceback" not in said + process.communicate(timeout=60)[0]
    assert user.cluster.nodes() == 0


@pytest.mark.filterwarnings("ignore")
def test_a_run_brings_nodes_and_survives_a_stop_and_a_lost_node(
    user: User, tiny_encoders: dict[str, Path]
) -> None:
    assert user.cluster.nodes() == 0
    command = train_command(tiny_encoders["bert"])
    process = submitted(user, command)
    said = read_until(process, lambda line: "epoch" in line and user.checkpoints())
    assert "waiting: no room yet for 2 worker(s) of 1 CPU" in said
    assert "2 worker(s) on cpu, from step 0" in said
    assert user.cluster.nodes() == 2
    stop = user.cluster.ray("job", "stop", job_id(said), cwd=user.folder)
    assert stop.returncode == 0, stop.stdout + stop.stderr
    said = process.communicate(timeout=60)[0]
    assert "stopped" in said.lower()  # for which Ray's own exit code is 0
    assert "artifact/manifest.json" not in user.stored()
    user.cluster.wait_for_nodes(0)  # long before Ray's reservation of three minutes would end

    before = user.checkpoints()
    process = submitted(user, [*command, "--resume"])
    said = read_until(process, lambda line: "2 worker(s) on cpu, from step" in line)
    assert f"resuming {RUN}" in said
    assert "from step 0" not in said
    wait_for(lambda: user.checkpoints() - before, process)  # one of this second start's own
    user.cluster.lose_a_node()
    said += process.communicate(timeout=150)[0]
    assert process.returncode == 0, said
    starts = [int(step) for step in re.findall(r"worker\(s\) on cpu, from step (\d+)", said)]
    assert len(starts) == 2, said
    assert starts[1] > starts[0] > 0
    assert "artifact/manifest.json" in user.stored()
    user.cluster.wait_for_nodes(0)


@pytest.mark.filterwarnings("ignore")
def test_its_artifact_is_scored_and_predicts_from_the_bucket(user: User) -> None:
    artifact = f"{RUN}/artifact"
    scored = user.job("train_jobs.evaluate", "--artifact", artifact)
    assert scored.returncode == 0, scored.stdout + scored.stderr
    assert "sentiment" in scored.stdout

    rows = "".join(json.dumps({"text": f"The food was cold {i}."}) + "\n" for i in range(300))
    user.s3.put_object(Bucket="bucket", Key="in.jsonl", Body=rows.encode())
    files = ("--input", "s3://bucket/in.jsonl", "--output", "s3://bucket/out/answers.jsonl")
    done = user.job("train_jobs.predict", "--artifact", artifact, *files)
    assert done.returncode == 0, done.stdout + done.stderr
    body = user.s3.get_object(Bucket="bucket", Key="out/answers.jsonl")["Body"].read().decode()
    answers = [json.loads(line) for line in body.splitlines()]
    assert [answer["text"] for answer in answers] == [f"The food was cold {i}." for i in range(300)]
    assert {"predicted_sentiment", "predicted_entities"} <= set(answers[0])


def test_a_worker_s_rights_are_these_alone(user: User) -> None:
    worker = s3_client(user.rights)
    assert worker.list_objects_v2(Bucket="bucket")["KeyCount"]
    for ask in (
        worker.list_buckets,
        lambda: worker.create_bucket(Bucket="another"),
        lambda: worker.get_object(Bucket="another", Key="key"),
        lambda: worker.delete_bucket(Bucket="bucket"),
        lambda: worker.put_object_acl(Bucket="bucket", Key="in.jsonl", ACL="public-read"),
    ):
        with pytest.raises(ClientError, match="AccessDenied"):
            ask()


@pytest.mark.parametrize("token", ["", "0" * 64])
def test_a_command_of_ours_says_that_the_token_is_missing_or_wrong(user: User, token: str) -> None:
    environment = {**user.cluster.environment, "HOME": str(user.folder), "RAY_AUTH_TOKEN": token}
    config = ("--config", "train_jobs/configs/demo.yaml", "--set", f"output_dir={user.folder}")
    done = run("train", *config, address=user.cluster.gcs, **environment)
    assert done.returncode == 1
    assert f"error: cannot reach the cluster at RAY_ADDRESS={user.cluster.gcs}" in done.stderr
    assert "token" in done.stderr
    assert "Traceback" not in done.stderr


def test_another_ray_than_the_cluster_s_is_named(user: User) -> None:
    older = user.folder / "older"
    older.mkdir()
    (older / "sitecustomize.py").write_text("import ray\nray.__version__ = '2.59.0'\n")
    environment = {**user.cluster.environment, "PYTHONPATH": f"{older}:{ROOT}"}
    config = ("--config", "train_jobs/configs/demo.yaml", "--set", f"output_dir={user.folder}")
    done = run("train", *config, address=user.cluster.gcs, **environment)
    assert done.returncode == 1
    said = " ".join(done.stderr.split())
    assert f"error: cannot reach the cluster at RAY_ADDRESS={user.cluster.gcs}: Version" in said
    assert f"Ray: {ray.__version__}" in said
    assert "Ray: 2.59.0" in said
    assert "Traceback" not in said
