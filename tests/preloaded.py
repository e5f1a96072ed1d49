"""Commands as forks of one process that has the libraries loaded: the same code, seconds earlier.

Each command of the tests, and each process that forks the workers of one, would spend four seconds
of a CPU on the same imports. Everything behind the imports is as it ever is: a process of its own,
with its arguments, environment, folder and streams.

    python -m tests.preloaded DESCRIPTOR        what forks, on a socket that listens
"""

from __future__ import annotations

import atexit
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from functools import cache
from pathlib import Path

from train_jobs import forks

ROOT = Path(__file__).parents[1]


@cache
def server() -> str:
    """Where the process that forks listens; it ends with this one."""
    path = f"{tempfile.mkdtemp(prefix='mtl-preloaded-', dir='/tmp')}/socket"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.preloaded", str(listener.fileno())],
            cwd=ROOT,
            pass_fds=[listener.fileno()],
            stdin=subprocess.PIPE,
        )
    atexit.register(_end, process, Path(path))
    return path


def _end(process: subprocess.Popen[bytes], path: Path) -> None:
    process.communicate()  # closes its input, which tells it to end
    path.unlink()
    path.parent.rmdir()


def run(
    module: str, arguments: tuple[str, ...], folder: Path, env: Mapping[str, str], timeout: float
) -> subprocess.CompletedProcess[str]:
    """What `subprocess.run` of `python -m module` gives."""
    command = ["-m", module, *arguments]
    request = json.dumps([command, dict(env), str(folder)]).encode()
    with (
        tempfile.TemporaryFile() as out,
        tempfile.TemporaryFile() as err,
        open(os.devnull, "rb") as nothing,
        socket.socket(socket.AF_UNIX) as connection,
        connection.makefile() as told,
    ):
        connection.connect(server())
        streams = [nothing.fileno(), out.fileno(), err.fileno()]
        connection.sendall(request[socket.send_fds(connection, [request], streams) :])
        connection.shutdown(socket.SHUT_WR)
        connection.settimeout(timeout)
        pid = int(told.readline())
        try:
            status = int(told.readline())
        except TimeoutError:
            os.kill(pid, signal.SIGKILL)
            raise subprocess.TimeoutExpired(command, timeout) from None
        texts = []
        for stream in (out, err):
            stream.seek(0)
            texts.append(stream.read().decode("utf-8", "backslashreplace"))
    return subprocess.CompletedProcess(command, status, *texts)


def serve(number: int) -> None:
    """Fork for each that asks, until whoever started this process is gone."""
    with socket.socket(fileno=number) as listener:
        forks.load_libraries()
        import matplotlib.pyplot  # noqa: F401

        signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the system buries the keepers
        while sys.stdin not in select.select([sys.stdin, listener], [], [])[0]:
            with listener.accept()[0] as connection:
                command, environment, folder, streams = forks.receive(connection)
                if os.fork() == 0:
                    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                    listener.close()
                    keep(connection)
                    break
            for stream in streams:
                os.close(stream)
        else:
            return
    start(command, environment, folder, streams)


def keep(connection: socket.socket) -> None:
    """Fork the command, tell its pid and, when it has ended, its status; returns in the fork."""
    if child := os.fork():
        connection.sendall(f"{child}\n".encode())
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        connection.sendall(f"{status}\n".encode())
        os._exit(0)


def start(command: list[str], environment: dict[str, str], folder: str, streams: list[int]) -> None:
    """Be the command."""
    for stream, number in zip(streams, forks.STREAMS, strict=True):
        os.dup2(stream, number)
        os.close(stream)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    forks.start_server = ForkedServer().start
    _, module, *arguments = command
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


class ForkedServer:
    """The process that forks Ray's workers, as a fork itself: has what its users take of Popen.

    It is forked while Ray has not been imported yet, and told the socket once there is one.
    """

    def __init__(self) -> None:
        self.line, its_line = socket.socketpair()
        self.pid = os.fork()
        if self.pid:
            its_line.close()
            return
        try:
            self._serve(its_line)
        finally:  # a worker that has ended must not go on in its driver's place
            atexit._run_exitfuncs()
            os._exit(0)

    def _serve(self, line: socket.socket) -> None:
        self.line.close()
        os.setsid()
        _, given, _, _ = socket.recv_fds(line, 1, 1)
        if not given:
            return  # the command has ended without it
        nothing = os.open(os.devnull, os.O_WRONLY)
        for stream, number in zip(forks.STREAMS, (line.fileno(), nothing, nothing), strict=True):
            os.dup2(number, stream)
        forks.serve(given[0])

    def start(self, number: int) -> ForkedServer:
        socket.send_fds(self.line, [b"1"], [number])
        return self

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)

    def communicate(self) -> None:
        self.line.close()
        os.waitpid(self.pid, 0)


if __name__ == "__main__":
    serve(int(sys.argv[1]))
