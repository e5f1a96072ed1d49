"""python -m serve_app.environment COMMAND …: start Ray with the variables that Serve needs."""

from __future__ import annotations

import os
import sys
import tempfile

from mtl_core.errors import ConfigError
from mtl_core.folders import socket_root
from serve_app.launch import set_environment
from serve_app.ports import HAPROXY_VARIABLE, haproxy_files, haproxy_script

USAGE = """usage: python -m serve_app.environment COMMAND [ARGUMENT …]

Become COMMAND with serve_app.launch.SERVE_ENVIRONMENT set; what is set already stays.
example:
  python -m serve_app.environment ray start --head"""


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
