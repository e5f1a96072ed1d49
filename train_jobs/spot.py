"""python -m train_jobs.spot: on a spot machine, tell Ray two minutes before AWS takes it away.

Runs beside a worker's Ray. A node that drains gets no new work: Serve starts replicas elsewhere and
Ray Train goes on from its last checkpoint on the nodes that stay. Ray itself does not listen.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
import urllib.error
import urllib.request
from datetime import UTC, datetime

METADATA = "http://169.254.169.254"
POLL_SECONDS = 5.0


def ask(base: str, path: str) -> str | None:
    """A value of the machine's metadata, by IMDSv2; None if there is none."""
    lifetime = {"X-aws-ec2-metadata-token-ttl-seconds": "60"}
    request = urllib.request.Request(f"{base}/latest/api/token", headers=lifetime, method="PUT")
    with urllib.request.urlopen(request, timeout=5) as reply:
        token = {"X-aws-ec2-metadata-token": reply.read().decode()}
    request = urllib.request.Request(f"{base}/latest/meta-data/{path}", headers=token)
    try:
        with urllib.request.urlopen(request, timeout=5) as reply:
            return str(reply.read().decode())
    except urllib.error.HTTPError as error:
        if error.code == 404:
            return None
        raise


def seconds_left(notice: str, now: datetime) -> int:
    """Until the machine goes, of a notice such as {"action": "terminate", "time": "…Z"}."""
    end = datetime.fromisoformat(json.loads(notice)["time"])
    return max(0, int((end - now).total_seconds()))


def wait_for_notice(base: str = METADATA, poll: float = POLL_SECONDS) -> int | None:
    """Seconds left when the notice comes; None on a machine that is no spot machine."""
    while True:
        try:
            if ask(base, "instance-life-cycle") != "spot":
                return None
            notice = ask(base, "spot/instance-action")
            if notice is not None:
                return seconds_left(notice, datetime.now(UTC))
        except (OSError, ValueError, KeyError) as error:  # the next poll may be luckier
            print(f"metadata: {error}", file=sys.stderr, flush=True)
        time.sleep(poll)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m train_jobs.spot",
        description="Drain this node when AWS announces that it takes the machine away.",
        epilog="Other options go to `ray drain-node`, for instance --address.",
    )
    parser.add_argument("--metadata", default=METADATA, help="metadata service (%(default)s)")
    parser.add_argument("--poll", type=float, default=POLL_SECONDS, help="seconds (%(default)s)")
    options, more = parser.parse_known_args(arguments)
    left = wait_for_notice(options.metadata, options.poll)
    if left is None:
        print("not a spot machine: nothing to wait for")
        return
    print(f"AWS takes this machine in {left} s: draining", flush=True)
    drain = [sys.executable, "-m", "ray.scripts.scripts", "drain-node"]
    drain += ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot notice"]
    sys.exit(subprocess.call([*drain, "--deadline-remaining-seconds", str(left), *more]))


if __name__ == "__main__":
    main()
