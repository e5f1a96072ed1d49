"""Serve on a Ray that runs already: `serve deploy`, and the command with RAY_ADDRESS."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mtl_core.predictor import Predictor
from serve_app.environment import LOCAL_ENVIRONMENT, SERVE_ENVIRONMENT
from serve_app.haproxy import HAPROXY_VARIABLE, free_ports, haproxy_script
from tests import preloaded
from tests.head_node import HeadNode, head_node
from tests.servers import Answer, call, wait_for

pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.timeout(280)]
TEXT = "Maria Lopez had the food at the table in Berlin wonderful"
ROOT = Path(__file__).parents[2]


@pytest.fixture
def cluster() -> Iterator[HeadNode]:
    """`ray start` with a token, in the environment that docs/serving.md tells to set."""
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "a-token-for-this-test-alone-0123456789"}
    haproxy = {HAPROXY_VARIABLE: haproxy_script(loopback=False)}
    with head_node({**SERVE_ENVIRONMENT, **LOCAL_ENVIRONMENT, **haproxy, **token}) as running:
        yield running


def ready(url: str) -> bool:
    try:
        return call(f"{url}/ready").status == 200
    except OSError:
        return False


def predict(url: str, *texts: str) -> Answer:
    return call(f"{url}/v1/predict", {"inputs": list(texts)})


def test_serve_deploy_and_the_command_bring_a_cluster_to_what_they_are_told(
    cluster: HeadNode, artifact: Path, predictor: Predictor, tmp_path: Path
) -> None:
    port, file = free_ports(1)[0], tmp_path / "serve_config.yaml"
    url = f"http://127.0.0.1:{port}"
    asked = ["--artifact", artifact, "--port", str(port), "--set", "runtime=torch-fp32"]
    written = cluster.serve_app(*asked, "--write-config", file)
    assert written.returncode == 0, written.stderr

    cluster.serve_deploy(file)
    wait_for(lambda: ready(url))
    (row,) = predict(url, TEXT).body["results"]
    expected: Any = predictor.predict([TEXT])[0]
    assert row["topic"]["label"] == expected["topic"]["label"]
    places = [(entity["start"], entity["end"]) for entity in row["entities"]]
    assert places == [(entity["start"], entity["end"]) for entity in expected["entities"]]

    changed = cluster.serve_app(*asked, "--set", "max_inputs=2", "--ask", TEXT)
    assert changed.returncode == 0, changed.stderr
    assert json.loads(changed.stdout.partition("\n")[2].rpartition("}")[0] + "}")["results"]
    assert predict(url, *[TEXT] * 3).status == 413
    assert predict(url, *[TEXT] * 2).status == 200

    elsewhere = cluster.serve_app(*asked[:2], "--port", str(free_ports(1)[0]))
    assert elsewhere.returncode == 1
    assert f"Serve runs on this cluster already, on 127.0.0.1:{port}" in elsewhere.stderr


UNGUARDED = """
import sys
from serve_app import launch
from serve_app.environment import set_environment
from serve_app.settings import ENCODER

artifact, port, scripts, folder = sys.argv[1], int(sys.argv[2]), *sys.argv[3:]
app = {"name": ENCODER, "route_prefix": "/", "deployments": [{"name": ENCODER}]}
app["args"] = {"artifact": artifact, "heads": "in_process"}
set_environment(folder)
try:
    launch.start_ray("0.0.0.0", port, 4, scripts)
    launch.deploy({"applications": [app]})
finally:
    launch.stop()
"""


def test_a_replica_refuses_to_start_where_others_could_ask_without_a_key(artifact: Path) -> None:
    port = free_ports(1)[0]
    env = {name: value for name, value in os.environ.items() if name != "MTL_API_KEYS"}
    with tempfile.TemporaryDirectory(prefix="mtl-", dir="/tmp") as folder:
        done = subprocess.run(
            [sys.executable, "-c", UNGUARDED, artifact, str(port), preloaded.scripts(), folder],
            env={**env, "RAY_AUTH_MODE": "disabled"},
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=200,
            check=False,
        )
    assert done.returncode == 1
    assert "Serve's port is bound to 0.0.0.0, where others reach it, and no API key" in done.stderr
    with socket.socket() as probe:
        probe.bind(("0.0.0.0", port))


def test_a_ray_that_is_not_there_is_named_at_once(
    artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mtl_core.errors import ConfigError
    from serve_app.launch import start_ray

    monkeypatch.setenv("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{free_ports(1)[0]}")
    with pytest.raises(ConfigError, match="no Ray listens there"):
        start_ray("127.0.0.1", free_ports(1)[0])


def test_a_wrong_token_is_told_in_words(cluster: HeadNode, artifact: Path) -> None:
    cluster.env["RAY_AUTH_TOKEN"] = "another-token-0123456789"
    done = cluster.serve_app("--artifact", artifact)
    assert done.returncode == 1
    assert f"error: cannot reach the cluster at RAY_ADDRESS={cluster.gcs}: " in done.stderr
    assert "Traceback" not in done.stderr


def test_a_job_that_is_stopped_has_the_time_to_end_well(cluster: HeadNode, tmp_path: Path) -> None:
    begun, ended, slow = tmp_path / "begun", tmp_path / "ended", tmp_path / "slow.sh"
    slow.write_text(
        f"trap 'sleep 5; touch {ended}; exit' TERM; touch {begun}; while true; do sleep 1; done"
    )

    def job(verb: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        ray = Path(sys.executable).with_name("ray")
        return cluster.run(ray, "job", verb, "--address", cluster.dashboard, *arguments)

    submitted = job("submit", "--submission-id", "slow", "--no-wait", "--", "bash", str(slow))
    assert submitted.returncode == 0, submitted.stdout + submitted.stderr
    wait_for(begun.exists)
    stopped = job("stop", "slow")
    assert stopped.returncode == 0, stopped.stdout + stopped.stderr
    assert ended.exists()
