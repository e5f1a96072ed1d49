"""Commands as forks of one process that has the libraries loaded: the same code, seconds earlier.

Each command of the tests, and each process that forks the workers of one, would spend four seconds
of a CPU on the same imports. Everything behind the imports is as it ever is: a process of its own,
with its arguments, environment, folder and streams.

    python -m tests.preloaded DESCRIPTOR        what forks, on a socket that listens
"""

from __future__ import annotations

import atexit
import gc
import json
import os
import runpy
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from functools import cache
from importlib import import_module
from pathlib import Path
from threading import Thread
from typing import IO, TextIO

from mtl_core import forks
from serve_app import preload as servers
from train_jobs import preload as jobs

ROOT = Path(__file__).parents[1]
FOLDER = "MTL_TEST_SCRIPTS"
"""The variable that tells `tests.ray_start` of `scripts`."""
OF_RAY = (
    *("aiohttp.web", "aiohttp_cors", "boto3", "botocore.endpoint", "colorful", "fsspec.core"),
    *("google.protobuf.json_format", "grpc.aio", "jsonschema", "matplotlib.backends.backend_agg"),
    *("matplotlib.pyplot", "opentelemetry.exporter.prometheus", "opentelemetry.sdk.metrics"),
    *("PIL.JpegImagePlugin", "pyarrow.json", "pyarrow.parquet", "pydantic.v1", "rich.console"),
    *("rich.progress", "tensorboardX", "uvloop"),
)
"""What Ray and plots import of others."""


@cache
def scripts() -> str:
    """A folder with the socket of the process that forks, which ends with this one.

    Its scripts stand in for Ray's: any driver's workers are forks too, and load no more than Ray.
    """
    folder = tempfile.mkdtemp(prefix="mtl-preloaded-", dir="/tmp")
    for script in forks.SCRIPTS:
        os.symlink(forks.__file__, f"{folder}/{script}")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"{folder}/socket")
        listener.listen()
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.preloaded", str(listener.fileno())],
            cwd=ROOT,
            pass_fds=[listener.fileno()],
            stdin=subprocess.PIPE,
        )
    atexit.register(_end, process, folder)
    return folder


def _end(process: subprocess.Popen[bytes], folder: str) -> None:
    process.communicate()  # closes its input, which tells it to end
    shutil.rmtree(folder)


class Process:
    """A command under way: has what its users take of Popen."""

    def __init__(
        self,
        module: str,
        arguments: tuple[str, ...],
        folder: Path,
        env: Mapping[str, str],
        out: IO[bytes],
        err: IO[bytes],
    ) -> None:
        self.args = ["-m", module, *arguments]
        self.returncode: int | None = None
        self.stdout: TextIO | None = None
        request = json.dumps([self.args, dict(env), str(folder)]).encode()
        self.connection = socket.socket(socket.AF_UNIX)
        self.connection.connect(f"{scripts()}/socket")
        with open(os.devnull, "rb") as nothing:
            streams = [nothing.fileno(), out.fileno(), err.fileno()]
            sent = socket.send_fds(self.connection, [request], streams)
        self.connection.sendall(request[sent:])
        self.connection.shutdown(socket.SHUT_WR)
        self.pid = self._number()

    def _number(self) -> int:
        line = b""
        while not line.endswith(b"\n"):
            line += self.connection.recv(1) or b"the process that forks is gone\n"
        return int(line)

    def poll(self) -> int | None:
        if self.returncode is None and select.select([self.connection], [], [], 0)[0]:
            self.wait()
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            self.connection.settimeout(timeout)
            try:
                self.returncode = self._number()
            except TimeoutError:
                raise subprocess.TimeoutExpired(self.args, timeout or 0) from None
            self.connection.close()
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str, None]:
        """What is still to be read, once the command has ended."""
        assert self.stdout is not None
        texts: list[str] = []
        reader = Thread(
            target=lambda out: texts.append(out.read()), args=[self.stdout], daemon=True
        )
        reader.start()
        reader.join(timeout)
        if reader.is_alive():
            raise subprocess.TimeoutExpired(self.args, timeout or 0)
        self.stdout.close()
        self.wait(timeout)
        return texts[0], None

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def start(module: str, arguments: tuple[str, ...], folder: Path, env: Mapping[str, str]) -> Process:
    """`python -m module`, its output and its complaints to be read from one pipe."""
    read, write = os.pipe()
    with open(write, "wb") as out:
        process = Process(module, arguments, folder, env, out, out)
    process.stdout = os.fdopen(read, encoding="utf-8", errors="backslashreplace")
    return process


def run(
    module: str, arguments: tuple[str, ...], folder: Path, env: Mapping[str, str], timeout: float
) -> subprocess.CompletedProcess[str]:
    """What `subprocess.run` of `python -m module` gives."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        process = Process(module, arguments, folder, env, out, err)
        try:
            status = process.wait(timeout)
        except subprocess.TimeoutExpired:
            process.kill()
            raise
        texts = []
        for stream in (out, err):
            stream.seek(0)
            texts.append(stream.read().decode("utf-8", "backslashreplace"))
    return subprocess.CompletedProcess(process.args, status, *texts)


def serve(number: int) -> None:
    """Fork for each that asks, until whoever started this process is gone."""
    with socket.socket(fileno=number) as listener:
        jobs.load_libraries()
        servers.load_libraries()
        for name in OF_RAY:
            import_module(name)
        gc.collect()
        gc.freeze()  # the collector would write to every page that the forks share
        gc.set_threshold(100_000, 50, 50)
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
    become(command, environment, folder, streams)


def keep(connection: socket.socket) -> None:
    """Fork the command, tell its pid and, when it has ended, its status; returns in the fork."""
    if child := os.fork():
        with suppress(BrokenPipeError):  # whoever asks for a worker of Ray's does not wait
            connection.sendall(f"{child}\n".encode())
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        with suppress(BrokenPipeError):
            connection.sendall(f"{status}\n".encode())
        os._exit(0)


def become(
    command: list[str], environment: dict[str, str], folder: str, streams: list[int]
) -> None:
    """Be the command."""
    for stream, number in zip(streams, forks.STREAMS, strict=True):
        os.dup2(stream, number)
        os.close(stream)
    # Those of the server know whether they can seek, and what was written to them before.
    lines = 1 if environment.get("PYTHONUNBUFFERED") else -1
    sys.stdout = open(1, "w", lines, encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", 1, encoding="utf-8", errors="backslashreplace", closefd=False)  # noqa: SIM115
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    if command[0] == "-m":
        forks.start_server = ForkedServer().start
        sys.argv = command[1:]
        runpy.run_module(command[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = command
        runpy.run_path(command[0], run_name="__main__")


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
        preload, given, _, _ = socket.recv_fds(line, 100, 1)
        if not given:
            return  # the command has ended without it
        nothing = os.open(os.devnull, os.O_WRONLY)
        for stream, number in zip(forks.STREAMS, (line.fileno(), nothing, nothing), strict=True):
            os.dup2(number, stream)
        forks.serve(given[0], preload.decode())

    def start(self, number: int, preload: str) -> ForkedServer:
        socket.send_fds(self.line, [preload.encode()], [number])
        return self

    def kill(self) -> None:
        with suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)

    def communicate(self) -> None:
        self.line.close()
        with suppress(ChildProcessError):  # the command has waited for all its children
            os.waitpid(self.pid, 0)


if __name__ == "__main__":
    serve(int(sys.argv[1]))
