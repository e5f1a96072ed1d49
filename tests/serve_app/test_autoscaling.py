"""Serving on a cluster that grows: load brings replicas of the encoder and nodes under them."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

from serve_app.__main__ import main
from serve_app.launch import SERVE_ENVIRONMENT
from serve_app.ports import own_haproxy_ports
from tests.clusters import AutoscalingCluster, autoscaling_cluster
from tests.commands import ROOT
from tests.servers import call, free_port

pytestmark = [pytest.mark.cluster, pytest.mark.slow]
QUICK = {
    "min_replicas": 1,
    "max_replicas": 3,
    "target_ongoing_requests": 2,
    "upscale_delay_s": 1,
    "downscale_delay_s": 3,
    "look_back_period_s": 2,
    "metrics_interval_s": 1,
}


def quick_config(artifact: Path, folder: Path, port: int) -> Path:
    """What the command writes for `serve deploy`, with an autoscaler of seconds, not minutes."""
    file = folder / "serve_config.yaml"
    main(["--artifact", str(artifact), "--port", str(port), "--write-config", str(file)])
    config = yaml.safe_load(file.read_text(encoding="utf-8"))
    config["proxy_location"] = "HeadOnly"  # all nodes have one address here, and one such port
    for application in config["applications"]:
        (deployment,) = application["deployments"]
        least = {"target_ongoing_requests": 1000} if deployment["name"] != "encoder" else {}
        deployment["autoscaling_config"] = {**QUICK, **least}
    file.write_text(yaml.safe_dump(config), encoding="utf-8")
    return file


def replicas(cluster: AutoscalingCluster) -> dict[str, dict[str, str]]:
    """Deployment → running replica → node."""
    token = {"Authorization": f"Bearer {cluster.environment['RAY_AUTH_TOKEN']}"}
    url = f"{cluster.dashboard}/api/serve/applications/"
    with urllib.request.urlopen(urllib.request.Request(url, headers=token), timeout=30) as reply:
        applications = json.load(reply)["applications"]
    return {
        name: {
            replica["replica_id"]: replica["node_id"]
            for replica in deployment["replicas"]
            if replica["state"] == "RUNNING"
        }
        for application in applications.values()
        for name, deployment in application["deployments"].items()
    }


def wait_for(
    cluster: AutoscalingCluster, want: Callable[[dict[str, int]], bool], seconds: float
) -> dict[str, dict[str, str]]:
    deadline = time.monotonic() + seconds
    while True:
        found = replicas(cluster)
        if want({name: len(running) for name, running in found.items()}):
            return found
        assert time.monotonic() < deadline, (found, cluster.nodes())
        time.sleep(0.5)


@contextmanager
def load(url: str) -> Iterator[list[int]]:
    """Sixteen clients that never rest; the status of every answer."""
    statuses: list[int] = []
    done = threading.Event()

    def ask() -> None:
        while not done.is_set():
            body: dict[str, Any] = {"inputs": ["the song on a playlist"] * 64, "tasks": ["topic"]}
            statuses.append(call(f"{url}/v1/predict", body).status)

    clients = [threading.Thread(target=ask, daemon=True) for _ in range(16)]
    for client in clients:
        client.start()
    yield statuses
    done.set()
    for client in clients:
        client.join(60)


def test_load_brings_encoder_replicas_and_nodes_and_its_end_takes_them_away(
    artifact: Path, tmp_path: Path
) -> None:
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    config = quick_config(artifact, tmp_path, port)
    cpu = {"resources": {"CPU": 1}, "max_workers": 4}
    serve = {**SERVE_ENVIRONMENT, **own_haproxy_ports(), "PYTHONPATH": str(ROOT)}
    with autoscaling_cluster({"cpu": cpu}, **serve) as cluster:
        deployed = subprocess.run(
            [sys.executable, "-m", "ray.serve.scripts", "deploy", str(config)],
            env={**cluster.environment, "RAY_DASHBOARD_ADDRESS": cluster.dashboard},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert deployed.returncode == 0, deployed.stderr
        heads = {"head-topic", "head-mood", "head-entities"}
        one_each = dict.fromkeys(("encoder", *heads), 1)
        wait_for(cluster, lambda found: found == one_each, 90)
        assert cluster.nodes() == 2  # a CPU for the encoder, and tenths of one for three heads
        assert call(f"{url}/v1/predict", {"inputs": "the song on a playlist"}).status == 200

        with load(url) as statuses:
            found = wait_for(cluster, lambda found: found["encoder"] == 3, 60)
            assert len(set(found["encoder"].values())) == 3
            assert {name: len(found[name]) for name in heads} == dict.fromkeys(heads, 1)
            assert cluster.nodes() == 4
        assert set(statuses) <= {200, 429}
        assert statuses.count(200) > 16

        wait_for(cluster, lambda found: found == one_each, 60)
        cluster.wait_for_nodes(2)
        assert call(f"{url}/v1/predict", {"inputs": "the song on a playlist"}).status == 200
