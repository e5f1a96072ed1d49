"""Ray's worker processes as forks of one process that has the libraries loaded.

A run needs up to nine Python processes on its machine (Ray Train's controller, helpers, workers), a
server six (Serve's controller and proxies, replicas), and each would spend seconds on the same
imports. Here one process imports them while the driver does its own part; the scripts that Ray
starts instead of its own ask that process to fork. Forks share the memory of what was loaded.

    python -m mtl_core.forks DESCRIPTOR PRELOAD    what forks, on a socket that listens
    python FOLDER/default_worker.py …              what Ray starts: it hands over and ends
    python FOLDER/setup_worker.py …                the same, with a runtime environment of Ray's

PRELOAD is a module with two functions: `load_libraries` imports all but Ray, at once; `load_ray`
imports Ray, in the environment of the first process that asks. What Ray starts has a hundredth of a
second, so that only the standard library is imported at the top here.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import psutil

STREAMS = (0, 1, 2)
KILL_TIMEOUT_S = 2.0
"""Seconds to wait for an orphaned worker before killing it."""
SETUP, WORKER = SCRIPTS = ("setup_worker.py", "default_worker.py")
"""Ray's worker scripts; ours must have the same names."""
SETUP_OPTIONS = ("--serialized-runtime-env-context", "--language")
"""What setup_worker.py takes itself; the rest, behind default_worker.py's path, it passes on."""
MAX_BYTES = 1 << 20
"""Of a request: a command and an environment."""
GPU_FILES = ("/dev/nvidiactl", "/dev/dxg")
"""Of NVIDIA's driver, and of the one that Linux in Windows (WSL2) has."""
SHELL_METACHARACTERS = frozenset(" \t'\"\\$`&;()<>|")
"""Characters that a shell treats specially in a path."""


@contextmanager
def forked_workers(preload: str) -> Iterator[str | None]:
    """Start the process that forks; yields a folder with scripts to be started in place of Ray's.

    `preload` names the module that says what to import.

    None on somebody else's cluster, where there are GPUs, since CUDA does not live through a fork,
    and where the system's own libraries do not (macOS).
    """
    from mtl_core.folders import socket_root

    gpu = any(map(os.path.exists, GPU_FILES))
    if os.environ.get("RAY_ADDRESS") or gpu or sys.platform != "linux":
        yield None
        return
    with tempfile.TemporaryDirectory(prefix="mtl-forks-", dir=socket_root()) as folder:
        for script in SCRIPTS:
            os.symlink(os.path.abspath(__file__), f"{folder}/{script}")
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(f"{folder}/socket")
            listener.listen(128)  # whoever asks before the libraries are loaded waits
            # Only the server keeps the socket: whoever asks after its end is refused, not kept.
            server = start_server(listener.fileno(), preload)
        try:
            yield folder
        finally:
            end_server(server)


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


def end_server(server: subprocess.Popen[bytes]) -> None:
    """Stop the process that forks, and what is left of its workers: they should go with Ray."""
    import psutil

    workers = []
    with suppress(psutil.NoSuchProcess):
        workers = psutil.Process(server.pid).children()
    _, left = psutil.wait_procs(workers, timeout=KILL_TIMEOUT_S)
    for worker in left:
        worker.kill()
    psutil.wait_procs(left, timeout=KILL_TIMEOUT_S)
    server.kill()  # after them: whoever is not its child may stay in the system's table when dead
    server.communicate()


def serve(number: int, preload: str) -> None:
    """Load the libraries, then fork for each that asks, until the driver is gone.

    `number` is the file descriptor of a socket that listens.
    """
    libraries: Any = importlib.import_module(preload)
    gc.disable()  # what is imported stays
    with socket.socket(fileno=number) as listener:
        libraries.load_libraries()
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the system buries the workers
        job: str | None = None
        while sys.stdin not in select.select([sys.stdin, listener], [], [])[0]:
            with listener.accept()[0] as connection:
                command, environment, folder, streams = receive(connection)
            of_job = environment.get("RAY_JOB_ID")
            if job is None and of_job is not None:
                # Ray reads the environment when it is imported: the process that its own hang on,
                # which is the same for all that ask, and the job, which is the driver's.
                job = of_job
                os.environ.update(environment)
                libraries.load_ray()
                gc.collect()
                gc.freeze()  # the collector would write to every page that the forks share
            if os.fork() == 0:
                gc.enable()
                listener.close()
                os.setsid()
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                # Another driver's workers start afresh, and so does what moves objects between
                # memory and disk, which is of no job.
                run(command, environment, folder, streams, afresh=job is None or of_job != job)
                return
            for stream in streams:
                os.close(stream)


class OsRandomIds:
    """Draws ids of a type of Ray's from the system's random numbers.

    Ray's generator of ids is seeded at its first draw, and forks made after it would all draw the
    same ones. All that is drawn by imports is an id for each class of actors.
    """

    def __init__(self, kind: Any) -> None:
        self.kind = kind

    def from_random(self) -> Any:
        return self.kind(os.urandom(self.kind.size()))


@contextmanager
def own_node(kind: Any, scripts: str | None) -> Iterator[None]:
    """While active, a Ray that starts here has what one machine and one command need.

    With `scripts`, a folder of `forked_workers`, its workers are forks. What watches for demand
    that other machines could meet, what collects the output of workers and the server of a
    dashboard that is off are left out. And SIGTERM means afterwards what it meant before: Ray would
    end what this process is connected to, and the process with it. `kind` is Ray's `Node`.

    Raises:
        ValueError: without `scripts` no worker would start.
    """
    from unittest.mock import patch

    if scripts is None and SHELL_METACHARACTERS.intersection(sys.executable):
        raise ValueError(
            f"its workers do not start where Python is, {sys.executable}, since a shell reads that "
            "path: put the virtual environment where no folder has a space, quote or bracket"
        )
    os.environ.setdefault("RAY_prestart_worker_first_driver", "0")  # one for each CPU, unasked
    with suppress(OSError):  # for the token, which Ray would let others of this machine read
        os.mkdir(os.path.expanduser("~/.ray"), mode=0o700)
    begin = kind.__init__

    def begin_bare(node: Any, ray_params: Any, **options: Any) -> None:
        ray_params.update(no_monitor=True, include_log_monitor=False)
        if scripts is not None:
            setup, worker = (f"{scripts}/{script}" for script in SCRIPTS)
            ray_params.update(setup_worker_path=setup, worker_path=worker)
        begin(node, ray_params, **options)

    def start_nothing(*_: Any, **__: Any) -> None:
        pass

    on_sigterm = signal.getsignal(signal.SIGTERM)
    try:
        with patch.multiple(kind, __init__=begin_bare, start_api_server=start_nothing):
            yield
    except SystemExit as stop:  # what Ray makes of SIGTERM meanwhile
        raise KeyboardInterrupt from stop
    finally:
        signal.signal(signal.SIGTERM, on_sigterm)


def end(processes: Sequence[psutil.Process], patience_s: float = 3.0) -> None:
    """Stop processes, by force where they do not go by themselves."""
    import psutil

    for process in processes:
        with suppress(psutil.Error):
            process.terminate()
    _, left = psutil.wait_procs(processes, timeout=patience_s)
    for process in left:
        with suppress(psutil.Error):
            process.kill()


def run(
    command: list[str], environment: dict[str, str], folder: str, streams: list[int], afresh: bool
) -> None:
    """Run a Python script as the process would have that asked for it."""
    for stream, number in zip(streams, STREAMS, strict=True):
        os.dup2(stream, number)
        os.close(stream)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    if afresh:
        os.execv(sys.executable, [sys.executable, *command])
    sys.argv = command
    runpy.run_path(command[0], run_name="__main__")


def receive(connection: socket.socket) -> tuple[list[str], dict[str, str], str, list[int]]:
    """Command, environment, folder and streams that `ask` sent."""
    content, streams, _, _ = socket.recv_fds(connection, MAX_BYTES, len(STREAMS))
    while part := connection.recv(MAX_BYTES):
        content += part
    return (*json.loads(content), streams)


def start_worker(script: str, arguments: list[str]) -> None:
    """Do what Ray's own script of this name does, where that can be in a fork."""
    folder, name = os.path.split(script)
    spec = find_spec("ray")
    assert spec is not None
    assert spec.origin is not None
    of_ray = os.path.join(os.path.dirname(spec.origin), "_private", "workers")
    if name == SETUP:
        options = [part for part in arguments if part.startswith(SETUP_OPTIONS)]
        values = dict(option.split("=", 1) for option in options)
        context = json.loads(values[SETUP_OPTIONS[0]])
        variables = context.pop("env_vars")
        own = context.pop("py_executable") == sys.executable and not any(context.values())
        if own and "$" not in "".join(variables.values()):  # else Ray knows what is to be done
            name = WORKER
            os.environ.update(variables)
            _, *arguments = (part for part in arguments if part not in options)
    command = [f"{of_ray}/{name}", *arguments]
    if name == SETUP or not ask(folder, command):
        os.execv(sys.executable, [sys.executable, *command])


def ask(folder: str, command: list[str]) -> bool:
    """Have the server run a Python script; False without a server."""
    request = json.dumps([command, dict(os.environ), os.getcwd()]).encode()
    try:
        with socket.socket(socket.AF_UNIX) as server:
            server.connect(f"{folder}/socket")
            sent = socket.send_fds(server, [request], STREAMS)
            server.sendall(request[sent:])
    except OSError:
        return False
    return True


if __name__ == "__main__":
    if os.path.basename(sys.argv[0]) in SCRIPTS:
        start_worker(sys.argv[0], sys.argv[1:])
    else:
        serve(int(sys.argv[1]), sys.argv[2])
