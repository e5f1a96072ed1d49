"""What `python -m serve_app` does: serve an artifact on this machine, or bring a cluster to it."""

from __future__ import annotations

import argparse
import math
import os
import sys
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml

from mtl_core.artifact import parse_manifest, read_manifest
from mtl_core.config import parse_override
from mtl_core.errors import ConfigError
from mtl_core.folders import socket_root
from mtl_core.runtime import usable_cpus
from mtl_core.storage import fetch, manifest_of, version_of
from serve_app import client, launch
from serve_app.auth import KEYS_VARIABLE, Keys
from serve_app.environment import set_environment
from serve_app.settings import ENCODER, ENCODER_CPUS, HEAD_CPUS, LOOPBACK, head_name, parse_settings

EVERYWHERE = "0.0.0.0"


def serve_config(options: argparse.Namespace) -> dict[str, Any]:
    """The applications for an artifact, in the form `serve deploy` takes.

    Raises:
        ArtifactError: the artifact is not sound.
        ConfigError: a setting is wrong, or the port would be open to others without a key.
    """
    check_host(options.host)
    args: dict[str, Any] = {"artifact": artifact_path(options.artifact)}
    args |= map(parse_override, options.set)
    if options.keys_file:
        args["keys_file"] = os.path.abspath(os.path.expanduser(options.keys_file))
    if options.insecure:
        args["insecure"] = True
    settings = parse_settings(args)
    # The file of a config that is written here may be on the cluster alone: replicas read it.
    keys = Keys(None if options.write_config else settings.keys_file)
    guarded = keys.required or settings.keys_file or settings.insecure
    if options.host not in LOOPBACK and not guarded:
        raise ConfigError(
            f"--host {options.host}: others could ask without a key; set {KEYS_VARIABLE} or "
            "--keys-file, or say --insecure"
        )
    manifest = read_manifest(fetch(args["artifact"]))
    apps: list[dict[str, Any]] = [
        {
            "name": ENCODER,
            "route_prefix": "/",
            "import_path": "serve_app.deployments:encoder_app",
            "args": args,
            "deployments": [
                {
                    "name": ENCODER,
                    "num_replicas": options.encoder_replicas,
                    "ray_actor_options": {"num_cpus": ENCODER_CPUS, "num_gpus": options.gpus or 0},
                }
            ],
        }
    ]
    if settings.heads == "deployments":
        apps += [head_config(task, options.head_replicas) for task in manifest.tasks]
    http = {"host": options.host, "port": options.port}
    return {"http_options": http, "applications": apps}


def artifact_path(artifact: str) -> str:
    """An artifact as replicas find it: a folder's path in full, a URL as it is."""
    return artifact if "://" in artifact else str(Path(artifact).expanduser().resolve())


def check_host(host: str) -> None:
    """Refuse what HAProxy, which asks the replicas of its node at 127.0.0.1, cannot do with.

    Raises:
        ConfigError: it is the address of one interface, or of IPv6.
    """
    if host not in (*LOOPBACK, EVERYWHERE):
        raise ConfigError(
            f"--host {host}: replicas take requests there, and HAProxy reaches them at 127.0.0.1; "
            f"give 127.0.0.1, or {EVERYWHERE} and let a firewall say who reaches which address"
        )


def head_config(task: str, replicas: int) -> dict[str, Any]:
    """A head's application."""
    return {
        "name": head_name(task),
        "route_prefix": None,
        "import_path": "serve_app.deployments:head_app",
        "args": {"task": task},
        "deployments": [
            {
                "name": head_name(task),
                "num_replicas": replicas,
                "ray_actor_options": {"num_cpus": HEAD_CPUS},
            }
        ],
    }


def share_gpus(config: dict[str, Any], found: float, asked: float | None) -> None:
    """Give each encoder replica a GPU, or its share where there are fewer, for torch to run on.

    A GPU that torch cannot use, without CUDA or with too old a driver, counts only if asked for.

    Raises:
        ConfigError: more is asked for than this machine has, for which replicas would wait, or
            torch cannot use it.
    """
    import torch

    encoder = config["applications"][0]
    runtime = parse_settings(encoder["args"]).runtime
    (deployment,) = encoder["deployments"]
    replicas = deployment["num_replicas"]
    if asked is not None:
        if asked and replicas > room(found, asked):
            raise ConfigError(
                f"--gpus {asked:g}: Ray finds {found:g} here, for {replicas} replicas"
            )
        if asked and not torch.cuda.is_available():
            raise ConfigError(f"--gpus {asked:g}: PyTorch finds none that it can use here")
    elif found and torch.cuda.is_available() and not runtime.startswith("openvino"):
        share = 1 / math.ceil(replicas / found)
        deployment["ray_actor_options"]["num_gpus"] = math.floor(share * 1e4) / 1e4


def room(gpus: float, share: float) -> float:
    """Replicas that GPUs hold if each takes so much; Ray gives a share of one GPU, never of two."""
    return gpus * math.floor(1 / share) if share < 1 else gpus // share


def autoscale(config: dict[str, Any]) -> None:
    """Let replicas come and go with the requests, as on a cluster they may."""
    for application in config["applications"]:
        (deployment,) = application["deployments"]
        least = deployment.pop("num_replicas")
        deployment["autoscaling_config"] = {
            "min_replicas": least,
            "max_replicas": max(4, least),
            "target_ongoing_requests": 32 if application["route_prefix"] else 8,
            "downscale_delay_s": 60,
        }


def write_config(options: argparse.Namespace) -> None:
    """Write what `serve deploy` reads."""
    config = serve_config(options)
    autoscale(config)
    with open(options.write_config, "w", encoding="utf-8") as file:
        yaml.safe_dump(config, file, sort_keys=False, allow_unicode=True)
    print(f"wrote {options.write_config}; run: serve deploy {options.write_config}")


def serve_until_stopped(options: argparse.Namespace, scripts: str | None) -> None:
    """Start everything on this machine, answer until Ctrl-C, stop everything.

    With `scripts`, a folder of `forked_workers`, replicas are forks.
    """
    config = serve_config(options)
    options.port = launch.check_port(options.host, options.port)
    config["http_options"]["port"] = options.port
    # Ray hands an encoder replica one CPU; here they may share all that the machine has.
    encoder = config["applications"][0]
    settings = parse_settings(encoder["args"])
    share = max(1, usable_cpus() // options.encoder_replicas)
    encoder["args"].setdefault("threads", share)
    url = local_url(options)
    # HAProxy's files, sockets with short paths among them.
    with TemporaryDirectory(prefix="mtl-", dir=socket_root(), ignore_cleanup_errors=True) as folder:
        set_environment(folder)
        print("starting Ray and the replicas …", flush=True)
        try:
            launch.start_ray(options.host, options.port, cpus_for(config), scripts)
            share_gpus(config, launch.gpus(), options.gpus)
            launch.deploy(config)
            client.wait_until_ready(url)
            if options.ask:
                client.ask(url, options.ask, Keys(settings.keys_file).first)
                return
            heads = HeadWatcher(config, options.head_replicas)
            ready = f"ready: {url}  (page, /docs, /v1/predict; Ctrl-C stops)"
            launch.wait_for_signal(heads.look, settings.poll_seconds, ready)
            with suppress(OSError):  # a terminal that has closed
                print("stopping …", flush=True)
        finally:
            launch.stop()


def serve_on_cluster(options: argparse.Namespace) -> None:
    """Bring a cluster to what `serve_config` gives, as `serve deploy` does; leave it running."""
    config = serve_config(options)
    autoscale(config)
    set_environment()
    launch.start_ray(options.host, options.port)
    launch.deploy_on_cluster(config)
    url = local_url(options)
    if options.ask:
        client.wait_until_ready(url)
        settings = parse_settings(config["applications"][0]["args"])
        client.ask(url, options.ask, Keys(settings.keys_file).first)
    print(
        f"deployed on the cluster at {os.environ['RAY_ADDRESS']}, port {options.port}; it goes on "
        "without this command; `serve status` shows it, `serve shutdown` stops it"
    )


def local_url(options: argparse.Namespace) -> str:
    """Where this machine reaches the server."""
    host = "127.0.0.1" if options.host == EVERYWHERE else options.host
    return f"http://{host}:{options.port}"


def cpus_for(config: dict[str, Any]) -> int:
    """CPUs that Ray is told of: at least what the replicas ask for and room for a few heads."""
    deployments = [app["deployments"][0] for app in config["applications"]]
    asked: float = sum(d["num_replicas"] * d["ray_actor_options"]["num_cpus"] for d in deployments)
    return max(usable_cpus(), math.ceil(asked + 0.5))


class HeadWatcher:
    """Deploys the heads that a new version of the artifact brings.

    The encoder takes such a version up once they answer. On a cluster, running the command again
    does the same.
    """

    def __init__(self, config: dict[str, Any], replicas: int) -> None:
        args = config["applications"][0]["args"]
        self.artifact = args["artifact"]
        self.replicas = replicas
        self.seen: str | None = None
        self.complaint = ""
        self.in_process = args.get("heads") == "in_process"
        self.running = {app["name"] for app in config["applications"]}

    def look(self) -> None:
        if self.in_process:
            return
        try:
            manifest = manifest_of(self.artifact)
            version = version_of(manifest)
            if version == self.seen:
                return
            tasks = parse_manifest(manifest, self.artifact).tasks
            heads = [head_config(task, self.replicas) for task in tasks]
            new = [head for head in heads if head["name"] not in self.running]
            if new:
                launch.deploy({"applications": new})
                self.running |= {head["name"] for head in new}
                print(f"added {', '.join(head['name'] for head in new)}", flush=True)
            self.seen = version
        except Exception as error:  # whatever it is, it must not end the server
            if str(error) != self.complaint:
                print(f"artifact: {error}; what is served stays", file=sys.stderr, flush=True)
            self.complaint = str(error)
