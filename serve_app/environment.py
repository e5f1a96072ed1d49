"""python -m serve_app.environment COMMAND …: start Ray with the variables that Serve needs."""

from __future__ import annotations

import os
import sys
import tempfile

from mtl_core.errors import ConfigError
from mtl_core.folders import socket_root
from serve_app.haproxy import (
    HAPROXY_DEFAULTS,
    HAPROXY_VARIABLE,
    RETRY_ON,
    haproxy_files,
    haproxy_script,
    own_haproxy_ports,
)

USAGE = """usage: python -m serve_app.environment COMMAND [ARGUMENT …]

Become COMMAND with SERVE_ENVIRONMENT set; what is set already stays.
example:
  python -m serve_app.environment ray start --head"""
SERVE_ENVIRONMENT = {
    # HAProxy in front and one event loop a replica: nine times the requests of Serve's defaults.
    "RAY_SERVE_ENABLE_HA_PROXY": "1",
    "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
    # A batch's token states are larger than gRPC's 4 MB.
    "RAY_SERVE_REPLICA_GRPC_MAX_MESSAGE_LENGTH": str(512 * 1024 * 1024),
    # Requests change nothing, so one whose replica died is sent to another. A 503 is an answer:
    # a head that hangs would be asked five times over.
    "RAY_SERVE_HAPROXY_RETRY_ON": HAPROXY_DEFAULTS,
    "RAY_SERVE_HAPROXY_INGRESS_RETRY_ON": RETRY_ON,
    "RAY_SERVE_HAPROXY_RETRIES": "5",
    # What can be sent again must fit HAProxy's buffer.
    "RAY_SERVE_HAPROXY_TUNE_BUFSIZE": str(256 * 1024),
    "RAY_SERVE_HAPROXY_NBTHREAD": "1",
    # A client that stops reading its answer is let go; the time an answer takes does not count.
    "RAY_SERVE_HAPROXY_TIMEOUT_CLIENT_S": "60",
    # A HAProxy that died is replaced after three checks: in seconds, not half a minute.
    "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": "1",
    # Replicas log to files that Ray lets grow for ever unless it is told a size.
    "RAY_ROTATION_MAX_BYTES": str(64 * 1024 * 1024),
    "RAY_ROTATION_BACKUP_COUNT": "4",
    # Ray runs its workers at nice 15, which starves them beside anything else on a small machine.
    "RAY_worker_niceness": "0",
    # What was given no GPU sees none; else torch may take memory of one for nothing.
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "1",
    # Ray kills a job three seconds after `ray job stop`: too soon for a sweep to report and to
    # give back its nodes.
    "RAY_JOB_STOP_WAIT_TIME_S": "60",
    "TOKENIZERS_PARALLELISM": "false",
}
"""Must be set where Ray itself is started: here for a local Ray, at `ray start` on a cluster.
`python -m serve_app.environment` starts it so."""
LOCAL_ENVIRONMENT = {
    # A proxy that is not ready by then is ended, and the start with it: on a busy machine five
    # seconds, the default, are too few.
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "30",
    # With one node no load balancer elsewhere has to notice that a replica is going.
    "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "1",
    # Ray's own ports on the loopback address, as on the platforms that it is named for.
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
}


def set_environment(folder: str | None = None) -> None:
    """Set what Serve reads at import; what the user set stays.

    `folder` is for HAProxy's files, where Ray is started here; None for a cluster.

    Raises:
        ConfigError: Ray is started here, and there is no HAProxy.
    """
    chosen = dict(SERVE_ENVIRONMENT)
    if folder is not None:
        chosen |= {**LOCAL_ENVIRONMENT, **own_haproxy_ports(), **haproxy_files(folder)}
        if HAPROXY_VARIABLE not in os.environ:
            chosen[HAPROXY_VARIABLE] = haproxy_script(loopback=True)
    for name, value in chosen.items():
        os.environ.setdefault(name, value)


def main(arguments: list[str] | None = None) -> None:
    command = sys.argv[1:] if arguments is None else arguments
    if not command or command[0] in ("-h", "--help"):
        print(USAGE)
        raise SystemExit(0 if command else 2)
    set_environment()
    try:
        if not haproxy_files("").keys() <= os.environ.keys():
            # COMMAND takes this process's place, so nobody is left to remove it.
            folder = tempfile.mkdtemp(prefix="mtl-", dir=socket_root())
            for name, value in haproxy_files(folder).items():
                os.environ.setdefault(name, value)
        if HAPROXY_VARIABLE not in os.environ:
            os.environ[HAPROXY_VARIABLE] = haproxy_script(loopback=False)
    except (ConfigError, OSError) as error:
        print(f"note: HAProxy is left as Ray starts it: {error}", file=sys.stderr)
    try:
        os.execvp(command[0], command)
    except OSError as error:
        print(f"error: cannot run {command[0]}: {error.strerror}", file=sys.stderr)
        raise SystemExit(127) from error


if __name__ == "__main__":
    main()
