"""Ray clusters that grow and shrink for real, on this machine: Ray's autoscaler with true raylets.

Ray's own fake provider starts a raylet where a cloud would start a machine; ours has no GPUs to
give. All else is what a cluster has: token authentication, the dashboard's job server, a head
without CPUs.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import yaml

from mtl_core.forks import end
from serve_app.haproxy import free_ports
from tests import preloaded
from tests.commands import ROOT
from tests.head_node import RAY_START

PROVIDER = "tests.refusing.NoGpus"
HEAD_ID = "f" * 51 + "00000"
HEAD_TYPE = "ray.head.default"  # the provider knows no other
MEMORY = 100_000_000


@dataclass
class AutoscalingCluster:
    """A head that runs no work, and nodes that come with demand and go when idle."""

    gcs: str
    dashboard: str
    environment: dict[str, str]
    """What leads a command to this cluster: the token above all."""
    head: subprocess.Popen[bytes]

    def ray(self, *arguments: str, cwd: Path, **more: str) -> subprocess.CompletedProcess[str]:
        """Run `ray …` as a user does, pointed at this cluster."""
        env = {**self.environment, "RAY_API_SERVER_ADDRESS": self.dashboard, **more}
        return preloaded.run("ray.scripts.scripts", arguments, cwd, env, 150)

    def nodes(self) -> int:
        """Nodes alive now, the head left out."""
        token = {"Authorization": f"Bearer {self.environment['RAY_AUTH_TOKEN']}"}
        request = urllib.request.Request(f"{self.dashboard}/api/v0/nodes", headers=token)
        with urllib.request.urlopen(request, timeout=30) as reply:
            rows = json.load(reply)["data"]["result"]["result"]
        return sum(row["state"] == "ALIVE" and row["node_id"] != HEAD_ID for row in rows)

    def lose_a_node(self) -> None:
        """Kill a node that trains, at once, as a machine that is switched off goes."""
        family = psutil.Process(self.head.pid).children(recursive=True)
        workers = [p for p in family if "RayTrainWorker" in " ".join(p.cmdline())]
        raylet = workers[-1].parent()
        assert raylet is not None
        assert raylet.name() == "raylet"
        for process in [raylet, *raylet.children(recursive=True)]:
            process.kill()

    def wait_for_nodes(self, count: int, seconds: float = 60) -> None:
        deadline = time.monotonic() + seconds
        while (found := self.nodes()) != count:
            assert time.monotonic() < deadline, found
            time.sleep(0.5)


@contextmanager
def autoscaling_cluster(
    node_types: Mapping[str, Mapping[str, Any]], **environment: str
) -> Iterator[AutoscalingCluster]:
    """A cluster of these worker types, each with `resources` and `max_workers`.

    Args:
        node_types: name → resources and bounds.
        environment: set where Ray starts, on every node, as in a container's run_options.
    """
    gcs_port, dashboard = free_ports(2)
    gcs = f"127.0.0.1:{gcs_port}"
    with tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp") as folder:  # sockets: short paths
        config = Path(folder, "cluster.yaml")
        config.write_text(yaml.safe_dump(_autoscaling_config(gcs, node_types)), encoding="utf-8")
        env = {
            **os.environ,
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
            "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # all on the loopback address
        }
        at_start = {
            "RAY_FAKE_CLUSTER": "1",
            "RAY_enable_autoscaler_v2": "1",
            "RAY_CLOUD_INSTANCE_ID": HEAD_ID,
            "RAY_OVERRIDE_NODE_ID_FOR_TESTING": HEAD_ID,
            "RAY_NODE_TYPE_NAME": HEAD_TYPE,
            "AUTOSCALER_UPDATE_INTERVAL_S": "1",
            "RAY_worker_niceness": "0",
            "PYTHONPATH": str(ROOT),
        }
        command = [*RAY_START, "--block", "--disable-usage-stats"]
        command += ["--port", str(gcs_port), "--num-cpus", "0"]
        command += ["--dashboard-host", "127.0.0.1", "--dashboard-port", str(dashboard)]
        command += ["--dashboard-agent-listen-port", "0", "--object-store-memory", str(MEMORY)]
        command += ["--autoscaling-config", str(config), "--temp-dir", f"{folder}/ray"]
        log = Path(folder, "head.log")
        with log.open("wb") as output:
            head = subprocess.Popen(
                command, env={**env, **at_start, **environment}, stdout=output, stderr=output
            )
        cluster = AutoscalingCluster(gcs, f"http://127.0.0.1:{dashboard}", env, head)
        try:
            _wait_until_up(cluster, log)
            yield cluster
        finally:
            _end(head)


def _autoscaling_config(gcs: str, node_types: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    workers = {
        name: {
            "node_config": {},
            "min_workers": 0,
            **kind,
            "resources": {**kind["resources"], "object_store_memory": MEMORY},
        }
        for name, kind in node_types.items()
    }
    head = {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0}
    commands = ("initialization", "setup", "head_setup", "worker_setup", "head_start_ray")
    return {
        "cluster_name": "test",
        "max_workers": sum(kind["max_workers"] for kind in workers.values()),
        "idle_timeout_minutes": 0.05,
        "provider": {
            # By its class: the name fake_multinode needs a file that Ray's wheel does not have.
            "type": "external",
            "module": PROVIDER,
            "gcs_address": gcs,
            "head_node_id": HEAD_ID,
            "launch_multiple": True,
            "disable_node_updaters": True,
            "disable_launch_config_check": True,
        },
        "head_node_type": HEAD_TYPE,
        "available_node_types": {HEAD_TYPE: head, **workers},
        **{f"{name}_commands": [] for name in (*commands, "worker_start_ray")},
        "file_mounts": {},
        "cluster_synced_files": [],
        "auth": {},
    }


def _wait_until_up(cluster: AutoscalingCluster, log: Path) -> None:
    deadline = time.monotonic() + 60
    while True:
        try:
            cluster.nodes()
            return
        except (OSError, KeyError, TypeError, ValueError):
            said = log.read_text(errors="replace")
            assert cluster.head.poll() is None, said
            assert time.monotonic() < deadline, said
            time.sleep(0.3)


def _end(head: subprocess.Popen[bytes]) -> None:
    """Stop the head and all that it or its autoscaler started."""
    process = psutil.Process(head.pid)
    end([*process.children(recursive=True), process])
    head.wait(10)


def job_id(output: str) -> str:
    """The id in what `ray job submit` prints."""
    found = re.search(r"raysubmit_\w+", output)
    assert found, output
    return found[0]
