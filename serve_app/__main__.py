"""python -m serve_app: answer over HTTP with an artifact."""

from __future__ import annotations

import argparse
import os

from mtl_core.command import run_command
from mtl_core.errors import ConfigError
from mtl_core.forks import forked_workers

EPILOG = """examples:
  python -m serve_app --artifact runs/demo/artifact
  python -m serve_app --artifact runs/demo/artifact --set runtime=torch-fp32 --set max_inputs=64
  MTL_API_KEYS=one,two python -m serve_app --artifact runs/demo/artifact --host 0.0.0.0
  python -m serve_app --artifact s3://bucket/runs/demo/artifact --write-config serve_config.yaml

A new version of the artifact is taken up without a restart;
docs/settings.md explains every --set."""


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m serve_app",
        description="Answer over HTTP with an artifact, on Ray Serve.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--artifact", required=True, help="artifact folder or s3:// URL")
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to bind to, this or 0.0.0.0 (%(default)s)"
    )
    parser.add_argument(
        "--port", type=port, default=8000, help="port; 0 for any free one (%(default)s)"
    )
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="a setting of the server"
    )
    parser.add_argument(
        "--encoder-replicas", type=count, default=1, metavar="N", help="replicas of the encoder"
    )
    parser.add_argument(
        "--head-replicas", type=count, default=1, metavar="N", help="replicas of each head"
    )
    parser.add_argument(
        "--gpus",
        type=share,
        metavar="N",
        help="GPUs of an encoder replica, as 1 or 0.5 (all that this machine has; 0 on a cluster)",
    )
    parser.add_argument("--keys-file", help="file with an API key a line")
    parser.add_argument("--insecure", action="store_true", help="let others ask without a key")
    parser.add_argument(
        "--ask", metavar="TEXT", help="ask one question over HTTP, print the reply and stop"
    )
    parser.add_argument("--write-config", metavar="FILE", help="write a file for `serve deploy`")
    options = parser.parse_args(arguments)
    on_cluster = bool(os.environ.get("RAY_ADDRESS"))
    if not options.port and (on_cluster or options.write_config):
        raise ConfigError("--port: 0 is for this machine alone; a cluster needs a port's number")
    if options.write_config or on_cluster:
        from serve_app.application import serve_on_cluster, write_config

        (write_config if options.write_config else serve_on_cluster)(options)
        return
    # What takes seconds to import is imported by two processes at the same time.
    with forked_workers("serve_app.preload") as scripts:
        from serve_app.application import serve_until_stopped

        serve_until_stopped(options, scripts)


def port(text: str) -> int:
    """A port's number, or 0."""
    number = int(text)
    if number not in range(65_536):
        raise ValueError
    return number


def count(text: str) -> int:
    """A whole number from 1 on."""
    number = int(text)
    if number < 1:
        raise ValueError
    return number


def share(text: str) -> float:
    """A number that Ray takes for GPUs: up to 1, or a whole one."""
    number = float(text)
    if number < 0 or (number > 1 and not number.is_integer()):
        raise ValueError
    return number


if __name__ == "__main__":
    run_command(main)
