"""Ray's worker processes as forks of one process that has the libraries loaded.

A run needs up to nine Python processes on its machine (Ray Train's controller, helpers, workers), a
server six (Serve's controller and proxies, replicas), and each would spend seconds on the same
imports. Here one process imports them while the driver does its own part; what Ray starts as
"Python" asks that process to fork. Forks share the memory of what was loaded before.

    python -m mtl_core.forks DESCRIPTOR PRELOAD           what forks, on a socket that listens
    python -I -S … forks.py SOCKET default_worker.py …    what Ray starts: it hands over and ends

PRELOAD is a module with two functions: `load_libraries` imports all but Ray, at once; `load_ray`
imports Ray, in the environment of the first process that asks.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import runpy
import select
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

STREAMS = (0, 1, 2)
MOST_BYTES = 1 << 20
"""Of a request: a command and an environment."""


@contextmanager
def forked_workers(preload: str) -> Iterator[str | None]:
    """Start the process that forks; yields the command that Ray is to start workers with.

    `preload` names the module that says what to import.

    None on somebody else's cluster, where there are GPUs, since CUDA does not live through a fork,
    and where the system's own libraries do not (macOS).
    """
    gpu = os.path.exists("/dev/nvidiactl")
    if os.environ.get("RAY_ADDRESS") or gpu or sys.platform != "linux":
        yield None
        return
    with tempfile.TemporaryDirectory(prefix="mtl-forks-", dir="/tmp") as folder:  # a short path
        path = f"{folder}/socket"
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(path)
            listener.listen(128)  # whoever asks before the libraries are loaded waits
            # Only the server keeps the socket: whoever asks after its end is refused, not kept.
            server = start_server(listener.fileno(), preload)
        try:
            # It imports hardly anything, so without a site it starts in a hundredth of a second.
            quick = ("-I", "-S", "-X", "utf8")
            yield shlex.join([sys.executable, *quick, os.path.abspath(__file__), path])
        finally:
            server.kill()
            server.communicate()


def start_server(number: int, preload: str) -> subprocess.Popen[bytes]:
    """Start the process that forks, with the file descriptor of a socket that listens."""
    return subprocess.Popen(
        [sys.executable, "-m", "mtl_core.forks", str(number), preload],
        pass_fds=[number],
        stdin=subprocess.PIPE,  # closed by the system when this process is gone
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,  # Ctrl-C is for the driver
    )


def serve(number: int, preload: str) -> None:
    """Load the libraries, then fork for each that asks, until the driver is gone.

    `number` is the file descriptor of a socket that listens.
    """
    libraries: Any = importlib.import_module(preload)
    with socket.socket(fileno=number) as listener:
        libraries.load_libraries()
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the system buries the workers
        complete = False
        while sys.stdin not in select.select([sys.stdin, listener], [], [])[0]:
            with listener.accept()[0] as connection:
                command, environment, folder, streams = receive(connection)
            if not complete:
                # Ray reads the environment when it is imported. What it reads, the job and the
                # process that Ray's own processes hang on, is the same for all that ask.
                os.environ.update(environment)
                libraries.load_ray()
                gc.collect()
                gc.freeze()  # the collector would write to every page that the forks share
                complete = True
            if os.fork() == 0:
                listener.close()
                os.setsid()
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                run(command, environment, folder, streams)
                return
            for stream in streams:
                os.close(stream)


class SystemDrawn:
    """Draws ids of a type of Ray's from the system's random numbers.

    Ray's generator of ids is seeded at its first draw, and forks made after it would all draw the
    same ones. All that is drawn by imports is an id for each class of actors.
    """

    def __init__(self, kind: Any) -> None:
        self.kind = kind

    def from_random(self) -> Any:
        return self.kind(os.urandom(self.kind.size()))


def worker_options(python: str | None) -> dict[str, Any]:
    """What to give `ray.init` so that a Ray of our own starts its workers with this command."""
    if python is None:
        return {}
    os.environ.setdefault("RAY_prestart_worker_first_driver", "0")  # those would be no forks
    return {"runtime_env": {"py_executable": python}}


@contextmanager
def bare_node(*needless: str) -> Iterator[None]:
    """While active, a Ray that starts leaves out what only a cluster needs.

    That is what watches for demand that other machines could meet, and what collects the output of
    workers; `needless` names further methods of Ray's `Node` that start something.
    """
    from unittest.mock import patch  # not at the top: what Ray starts has a hundredth of a second

    names = ("start_monitor", "start_log_monitor", *needless)
    nothing: Any = dict.fromkeys(names, lambda *_, **__: None)
    with patch.multiple("ray._private.node.Node", **nothing):
        yield


def run(command: list[str], environment: dict[str, str], folder: str, streams: list[int]) -> None:
    """Run a Python script as the process would have that asked for it."""
    for stream, number in zip(streams, STREAMS, strict=True):
        os.dup2(stream, number)
        os.close(stream)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = command
    runpy.run_path(command[0], run_name="__main__")


def receive(connection: socket.socket) -> tuple[list[str], dict[str, str], str, list[int]]:
    """Command, environment, folder and streams that `ask` sent."""
    content, streams, _, _ = socket.recv_fds(connection, MOST_BYTES, len(STREAMS))
    while part := connection.recv(MOST_BYTES):
        content += part
    return (*json.loads(content), streams)


def ask(path: str, command: list[str]) -> None:
    """Have the server run a Python script; without a server, run it here."""
    request = json.dumps([command, dict(os.environ), os.getcwd()]).encode()
    try:
        with socket.socket(socket.AF_UNIX) as server:
            server.connect(path)
            sent = socket.send_fds(server, [request], STREAMS)
            server.sendall(request[sent:])
    except OSError:
        os.execv(sys.executable, [sys.executable, *command])


if __name__ == "__main__":
    if sys.argv[1].isdecimal():
        serve(int(sys.argv[1]), sys.argv[2])
    else:
        ask(sys.argv[1], sys.argv[2:])
