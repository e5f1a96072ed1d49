"""Starting Ray and Serve for one artifact, and stopping what was started."""

from __future__ import annotations

import json
import logging
import os
import signal
import time
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil

from mtl_core.config import ConfigError
from serve_app.auth import KEYS_VARIABLE

SERVE_ENVIRONMENT = {
    # HAProxy in front and one event loop a replica: nine times the requests of Serve's defaults.
    "RAY_SERVE_ENABLE_HA_PROXY": "1",
    "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
    # A batch's token states are larger than gRPC's 4 MB.
    "RAY_SERVE_REPLICA_GRPC_MAX_MESSAGE_LENGTH": str(256 * 1024 * 1024),
    # Requests change nothing, so one whose replica died is sent to another.
    "RAY_SERVE_HAPROXY_RETRY_ON": "conn-failure empty-response response-timeout 503",
    "RAY_SERVE_HAPROXY_RETRIES": "5",
    # What can be sent again must fit HAProxy's buffer.
    "RAY_SERVE_HAPROXY_TUNE_BUFSIZE": str(256 * 1024),
    "RAY_SERVE_HAPROXY_NBTHREAD": "1",
    # Ray runs its workers at nice 15, which starves them beside anything else on a small machine.
    "RAY_worker_niceness": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "TOKENIZERS_PARALLELISM": "false",
}
"""Must be set where Ray itself is started: here for a local Ray, at `ray start` on a cluster."""
LOCAL_ENVIRONMENT = {
    # With one node no load balancer elsewhere has to notice that a replica is going.
    "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "1",
}


def set_environment() -> None:
    """Set what Serve reads at import; what the user set stays."""
    for name, value in {**SERVE_ENVIRONMENT, **LOCAL_ENVIRONMENT}.items():
        os.environ.setdefault(name, value)


def start_ray(host: str, port: int) -> None:
    """Connect to RAY_ADDRESS, or start Ray here, and start Serve on a host and port.

    Raises:
        ConfigError: Ray or the port cannot be had.
    """
    import ray
    from ray import serve
    from ray.serve.config import HTTPOptions

    address = os.environ.get("RAY_ADDRESS")
    try:
        if address:
            ray.init(address=address, logging_level=logging.ERROR, log_to_driver=False)
        else:
            ray.init(
                address="local",
                include_dashboard=False,
                logging_level=logging.ERROR,
                log_to_driver=False,
            )
    except (ConnectionError, RuntimeError, ValueError) as error:
        where = f"the cluster at RAY_ADDRESS={address}" if address else "a local Ray"
        raise ConfigError(f"cannot reach {where}: {error}") from error
    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    serve.start(http_options=HTTPOptions(host=host, port=port))


def deploy(config: Mapping[str, Any]) -> None:
    """Run the applications of a Serve config and wait until they are up.

    Raises:
        ConfigError: an application did not come up; the message is its own.
    """
    from ray import serve
    from ray.serve.exceptions import RayServeException

    from serve_app import deployments

    builders = {
        "serve_app.deployments:encoder_app": deployments.encoder_app,
        "serve_app.deployments:head_app": deployments.head_app,
    }
    targets = [
        serve.RunTarget(
            builders[application["import_path"]](application["args"]),
            application["name"],
            application.get("route_prefix"),
        )
        for application in config["applications"]
    ]
    try:
        serve.run_many(targets)
    except (RuntimeError, RayServeException) as error:
        raise ConfigError(f"the deployments did not come up: {error}") from error


def children_of(names: Sequence[str]) -> list[psutil.Process]:
    """Processes of these names that descend from this one."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if process.name() in names:
                found.append(process)
        except psutil.Error:
            continue
    return found


def stop(local: bool) -> None:
    """Drain and stop Serve, and Ray with it when it was started here; leave no process behind."""
    import ray
    from ray import serve

    proxies = children_of(["haproxy"]) if local else []
    if local:
        serve.shutdown()  # type: ignore[no-untyped-call]
        ray.shutdown()
    for process in proxies:
        try:
            process.send_signal(signal.SIGTERM)
            process.wait(3)
        except psutil.TimeoutExpired:
            process.kill()
        except psutil.Error:
            continue


def wait_for_signal() -> None:
    """Return at Ctrl-C or SIGTERM."""
    done: list[int] = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda got, _: done.append(got))
    while not done:
        time.sleep(0.2)


def check_port(host: str, port: int) -> int:
    """The port to bind to: a free one for 0.

    Raises:
        ConfigError: something listens there already.
    """
    import socket

    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
            return int(probe.getsockname()[1])
        except OSError as error:
            raise ConfigError(
                f"--port: {host}:{port} cannot be had: {error.strerror}; stop what listens there, "
                "or choose another port"
            ) from error


def artifact_path(artifact: str) -> str:
    """An artifact as replicas find it: a folder's path in full, a URL as it is."""
    return artifact if "://" in artifact else str(Path(artifact).expanduser().resolve())


def request(url: str, body: object = None) -> Any:
    """One HTTP request's JSON reply; keys come from the environment."""
    key = os.environ.get(KEYS_VARIABLE, "").split(",")[0].strip()
    headers = {"content-type": "application/json"}
    if key:
        headers["authorization"] = f"Bearer {key}"
    data = None if body is None else json.dumps(body).encode()
    with urllib.request.urlopen(urllib.request.Request(url, data, headers), timeout=60) as reply:
        return json.load(reply)


def wait_until_ready(url: str, timeout_s: float = 60.0) -> None:
    """Return once every deployment answers.

    Raises:
        ConfigError: it does not within the time.
    """
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            request(f"{url}/ready")
            return
        except OSError as error:
            if time.monotonic() > deadline:
                raise ConfigError(f"{url} is not ready after {timeout_s:g} s: {error}") from error
            time.sleep(0.1)


def ask(url: str, text: str) -> None:
    """Ask one question over HTTP and print question and reply."""
    body = {"inputs": text}
    print(f"POST {url}/v1/predict {json.dumps(body, ensure_ascii=False)}")
    print(json.dumps(request(f"{url}/v1/predict", body), indent=2, ensure_ascii=False))
