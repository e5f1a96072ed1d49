"""python -m serve_app: answer over HTTP with an artifact."""

from __future__ import annotations

import argparse
import os
import sys
from typing import Any

import yaml

from mtl_core.artifact import read_manifest
from mtl_core.command import run_command
from mtl_core.config import ConfigError
from serve_app import launch
from serve_app.auth import KEYS_VARIABLE, Keys
from serve_app.loaded import fetch
from serve_app.settings import parse_settings

EPILOG = """examples:
  python -m serve_app --artifact runs/demo/artifact
  python -m serve_app --artifact runs/demo/artifact --set runtime=torch-fp32 --set max_inputs=64
  MTL_API_KEYS=one,two python -m serve_app --artifact runs/demo/artifact --host 0.0.0.0
  python -m serve_app --artifact s3://bucket/runs/demo/artifact --write-config serve_config.yaml

A new version of the artifact is taken up without a restart;
docs/serving.md explains every --set."""


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m serve_app",
        description="Answer over HTTP with an artifact, on Ray Serve.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--artifact", required=True, help="artifact folder or s3:// URL")
    parser.add_argument("--host", default="127.0.0.1", help="address to bind to (%(default)s)")
    parser.add_argument(
        "--port", type=int, default=8000, help="port; 0 for any free one (%(default)s)"
    )
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="a setting of the server"
    )
    parser.add_argument("--keys-file", help="file with an API key a line")
    parser.add_argument("--insecure", action="store_true", help="let others ask without a key")
    parser.add_argument(
        "--ask", metavar="TEXT", help="ask one question over HTTP, print the reply and stop"
    )
    parser.add_argument("--write-config", metavar="FILE", help="write a file for `serve deploy`")
    options = parser.parse_args(arguments)
    if not options.write_config:
        options.port = launch.check_port(options.host, options.port)
    config = serve_config(options)
    if options.write_config:
        write_config(config, options.write_config)
        return
    serve_until_stopped(config, options)


def serve_config(options: argparse.Namespace) -> dict[str, Any]:
    """The applications for an artifact, in the form `serve deploy` takes.

    Raises:
        ArtifactError: the artifact is not sound.
        ConfigError: a setting is wrong, or the port would be open to others without a key.
    """
    args: dict[str, Any] = {"artifact": launch.artifact_path(options.artifact)}
    for change in options.set:
        key, equals, value = change.partition("=")
        if not equals:
            raise ConfigError(f"--set: expected KEY=VALUE, got {change!r}")
        args[key] = yaml.safe_load(value)
    if options.keys_file:
        args["keys_file"] = launch.artifact_path(options.keys_file)
    if options.insecure:
        args["insecure"] = True
    settings = parse_settings(args)
    keys = Keys(settings.keys_file)
    exposed = options.host not in ("127.0.0.1", "::1", "localhost")
    if exposed and not keys.required and not settings.insecure:
        raise ConfigError(
            f"--host {options.host}: others could ask without a key; set {KEYS_VARIABLE} or "
            "--keys-file, or say --insecure"
        )
    manifest = read_manifest(fetch(args["artifact"]), check_files=False)
    apps: list[dict[str, Any]] = [
        {
            "name": "encoder",
            "route_prefix": "/",
            "import_path": "serve_app.deployments:encoder_app",
            "args": args,
            "deployments": [{"name": "encoder"}],
        }
    ]
    if settings.heads == "deployments":
        apps += [
            {
                "name": f"head-{task}",
                "import_path": "serve_app.deployments:head_app",
                "args": {"task": task},
                "deployments": [{"name": f"head-{task}"}],
            }
            for task in manifest.tasks
        ]
    http = {"host": options.host, "port": options.port}
    return {"http_options": http, "applications": apps}


def write_config(config: dict[str, Any], path: str) -> None:
    for application in config["applications"]:
        application.setdefault("route_prefix", None)
        (deployment,) = application["deployments"]
        deployment["autoscaling_config"] = {
            "min_replicas": 1,
            "max_replicas": 4,
            "target_ongoing_requests": 32 if application["route_prefix"] else 8,
            "downscale_delay_s": 60,
        }
    with open(path, "w", encoding="utf-8") as file:
        yaml.safe_dump(config, file, sort_keys=False, allow_unicode=True)
    print(f"wrote {path}; run: serve deploy {path}")


def serve_until_stopped(config: dict[str, Any], options: argparse.Namespace) -> None:
    local = not os.environ.get("RAY_ADDRESS")
    launch.set_environment()
    url = f"http://{options.host}:{options.port}"
    print("starting Ray and the replicas …", flush=True)
    try:
        launch.start_ray(options.host, options.port)
        launch.deploy(config)
        launch.wait_until_ready(url)
        if options.ask:
            launch.ask(url, options.ask)
            return
        print(f"ready: {url}  (page, /docs, /v1/predict; Ctrl-C stops)", flush=True)
        launch.wait_for_signal()
        print("stopping …", flush=True)
    finally:
        launch.stop(local)


if __name__ == "__main__":
    run_command(main)
    sys.exit(0)
