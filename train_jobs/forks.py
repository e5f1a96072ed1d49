"""Ray's worker processes as forks of one process that has the libraries loaded.

A run needs up to nine Python processes on its machine (Ray Train's controller, helpers, workers),
and each would spend seconds on the same imports. Here one process imports them while the driver
reads its data; what Ray starts as "Python" asks that process to fork.

    python -m train_jobs.forks DESCRIPTOR                 what forks, on a socket that listens
    python -I -S … forks.py SOCKET default_worker.py …    what Ray starts: it hands over and ends
"""

from __future__ import annotations

import gc
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

STREAMS = (0, 1, 2)
MOST_BYTES = 1 << 20
"""Of a request: a command and an environment."""


@contextmanager
def forked_workers() -> Iterator[str | None]:
    """Start the process that forks; yields the command that Ray is to start workers with.

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
            server = start_server(listener.fileno())
        try:
            # It imports hardly anything, so without a site it starts in a hundredth of a second.
            quick = ("-I", "-S", "-X", "utf8")
            yield shlex.join([sys.executable, *quick, os.path.abspath(__file__), path])
        finally:
            server.kill()
            server.communicate()


def start_server(number: int) -> subprocess.Popen[bytes]:
    """Start the process that forks, with the file descriptor of a socket that listens."""
    return subprocess.Popen(
        [sys.executable, "-m", "train_jobs.forks", str(number)],
        pass_fds=[number],
        stdin=subprocess.PIPE,  # closed by the system when this process is gone
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,  # Ctrl-C is for the driver
    )


def serve(number: int) -> None:
    """Load the libraries, then fork for each that asks, until the driver is gone.

    `number` is the file descriptor of a socket that listens.
    """
    with socket.socket(fileno=number) as listener:
        load_libraries()
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the system buries the workers
        while sys.stdin not in select.select([sys.stdin, listener], [], [])[0]:
            with listener.accept()[0] as connection:
                command, environment, folder, streams = receive(connection)
            if "ray" not in sys.modules:
                load_ray(environment)
            if os.fork() == 0:
                listener.close()
                os.setsid()
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                run(command, environment, folder, streams)
                return
            for stream in streams:
                os.close(stream)


def load_libraries() -> None:
    """Import what a worker needs, all but Ray."""
    import pandas  # noqa: F401
    import transformers

    import mtl_core.build
    import mtl_core.loop  # noqa: F401

    for name in ("AutoConfig", "AutoModel", "AutoTokenizer", "PreTrainedModel"):
        getattr(transformers, name)  # they are loaded on first use


def load_ray(environment: dict[str, str]) -> None:
    """Import Ray, which reads the environment then: with that of the first worker.

    What it reads, the job and the process that Ray's own processes hang on, is the same for all.
    """
    os.environ.update(environment)

    from unittest.mock import patch

    import ray.actor

    # Ray's generator of ids is seeded at its first draw, and forks made after it would all draw the
    # same ones. All that is drawn by imports is an id for each class of actors.
    with patch.object(ray.actor, "ActorClassID", SystemDrawn):
        import ray.data
        import ray.train.torch

    gc.collect()
    gc.freeze()  # the collector would write to every page that the forks share


class SystemDrawn:
    """Draws ids for classes of actors from the system's random numbers."""

    @staticmethod
    def from_random() -> object:
        from ray import ActorClassID

        return ActorClassID(os.urandom(ActorClassID.size()))


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
    if len(sys.argv) == 2:
        serve(int(sys.argv[1]))
    else:
        ask(sys.argv[1], sys.argv[2:])
