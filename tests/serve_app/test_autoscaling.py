"""Serving on a cluster that grows: load brings replicas, and nodes under them."""

from __future__ import annotations

import json
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from serve_app.__main__ import main
from serve_app.environment import SERVE_ENVIRONMENT
from serve_app.haproxy import HAPROXY_VARIABLE, free_ports, haproxy_script, own_haproxy_ports
from tests import preloaded
from tests.clusters import AutoscalingCluster, autoscaling_cluster
from tests.servers import Answer, call

pytestmark = [pytest.mark.cluster, pytest.mark.slow]
QUICK = {
    "min_replicas": 1,
    "max_replicas": 3,
    "upscale_delay_s": 1,
    "downscale_delay_s": 3,
    "look_back_period_s": 2,
    "metrics_interval_s": 1,
}


HEADS = ("head-topic", "head-mood", "head-entities")
ONE_EACH = dict.fromkeys(("encoder", *HEADS), 1)


@dataclass(frozen=True)
class Served:
    """An artifact on a cluster of up to four nodes."""

    cluster: AutoscalingCluster
    url: str
    artifact: Path
    folder: Path

    def deploy(self, **targets: float) -> None:
        """`serve deploy`, with autoscalers of seconds, not minutes.

        Args:
            targets: requests in work a replica from which a deployment grows; all others stay.
        """
        file = self.folder / "serve_config.yaml"
        port = self.url.rpartition(":")[2]
        main(["--artifact", str(self.artifact), "--port", port, "--write-config", str(file)])
        config = yaml.safe_load(file.read_text(encoding="utf-8"))
        config["proxy_location"] = "HeadOnly"  # all nodes have one address here, and one such port
        for application in config["applications"]:
            (deployment,) = application["deployments"]
            target = targets.get(deployment["name"].replace("-", "_"), 1000)
            deployment["autoscaling_config"] = {**QUICK, "target_ongoing_requests": target}
        file.write_text(yaml.safe_dump(config), encoding="utf-8")
        env = {**self.cluster.environment, "RAY_DASHBOARD_ADDRESS": self.cluster.dashboard}
        done = preloaded.run("ray.serve.scripts", ("deploy", str(file)), self.folder, env, 60)
        assert done.returncode == 0, done.stderr
        wait_for(self.cluster, lambda found: found == ONE_EACH, 90)

    def answers(self) -> bool:
        return call(f"{self.url}/v1/predict", {"inputs": "the song on a playlist"}).status == 200


@pytest.fixture(scope="module")
def served(artifact: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    cpu = {"resources": {"CPU": 1}, "max_workers": 4}
    url = f"http://127.0.0.1:{free_ports(1)[0]}"
    haproxy = {
        HAPROXY_VARIABLE: haproxy_script(loopback=True),
        **own_haproxy_ports(),
    }
    env = {**SERVE_ENVIRONMENT, **haproxy, preloaded.FOLDER: preloaded.scripts()}
    with autoscaling_cluster({"cpu": cpu}, **env) as cluster:
        yield Served(cluster, url, artifact, tmp_path_factory.mktemp("deployed"))


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
def load(url: str) -> Iterator[list[Answer]]:
    """Sixteen clients that never rest, and every answer."""
    answers: list[Answer] = []
    done = threading.Event()

    def ask() -> None:
        while not done.is_set():
            body: dict[str, Any] = {"inputs": ["the song on a playlist"] * 64, "tasks": ["topic"]}
            answers.append(call(f"{url}/v1/predict", body))

    clients = [threading.Thread(target=ask, daemon=True) for _ in range(16)]
    for client in clients:
        client.start()
    yield answers
    done.set()
    for client in clients:
        client.join(60)


def test_load_brings_encoder_replicas_and_nodes_and_its_end_takes_them_away(
    served: Served,
) -> None:
    served.deploy(encoder=2)
    assert served.cluster.nodes() == 2  # a CPU for the encoder, and tenths of one for three heads
    assert served.answers()
    with load(served.url) as answers:
        found = wait_for(served.cluster, lambda found: found["encoder"] == 3, 60)
        assert len(set(found["encoder"].values())) == 3
        assert {name: len(found[name]) for name in HEADS} == dict.fromkeys(HEADS, 1)
        assert served.cluster.nodes() == 4
    assert not [answer for answer in answers if answer.status not in (200, 429)]
    assert sum(answer.status == 200 for answer in answers) > 16

    wait_for(served.cluster, lambda found: found == ONE_EACH, 60)
    served.cluster.wait_for_nodes(2)
    assert served.answers()


def test_a_head_grows_apart_from_the_encoder_and_the_other_heads(served: Served) -> None:
    served.deploy(head_topic=0.02)
    served.cluster.wait_for_nodes(2)  # whatever the test before left
    with load(served.url) as answers:
        wait_for(served.cluster, lambda found: found == {**ONE_EACH, "head-topic": 3}, 60)
        assert served.cluster.nodes() == 2
    assert not [answer for answer in answers if answer.status not in (200, 429)]
    wait_for(served.cluster, lambda found: found == ONE_EACH, 60)
    assert served.answers()
