"""One driver at a time in a run's folder.

On a disk (NFS too) the operating system holds the lock and drops it with the process, however that
ends. An object store has no locks: there the driver keeps rewriting a small object, and one that is
no longer rewritten was left by a driver that died.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import signal
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mtl_core.errors import ConfigError

NO_LOCKS_HERE = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS)
RENEW_SECONDS = 10.0
"""How often a driver rewrites its object; one that is silent for three times that is dead."""


@contextmanager
def hold_file(path: Path) -> Iterator[None]:
    """Hold a lock file until the block or this process ends.

    Raises:
        ConfigError: another process holds it.
        OSError: the file cannot be written.
    """
    with path.open("a+", encoding="utf-8") as file:
        _lock(file, fcntl.LOCK_EX, path)
        file.truncate(0)
        file.write(_owner())
        file.flush()
        yield


def check_file(path: Path) -> None:
    """Raise ConfigError if another process holds this lock file now."""
    with contextlib.suppress(FileNotFoundError), path.open(encoding="utf-8") as file:
        _lock(file, fcntl.LOCK_SH, path)


def _lock(file: Any, kind: int, path: Path) -> None:
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        raise _taken(str(path.parent), file.read()) from None
    except OSError as error:
        if error.errno not in NO_LOCKS_HERE:
            raise


@contextmanager
def hold_object(filesystem: Any, path: str, renew: float = RENEW_SECONDS) -> Iterator[None]:
    """The same for an object store.

    A lock that a killed driver left is told from a living one by watching it for three renewals;
    when that driver was on this machine its process tells at once.

    Raises:
        ConfigError: another process holds it, or took it over meanwhile, which interrupts the
            block.
    """
    mine = uuid.uuid4().hex
    try:
        filesystem.pipe_file(path, _owner(mine).encode(), mode="create")
    except OSError as error:  # some stores say that it exists in words of their own
        if not isinstance(error, FileExistsError) and not _content(filesystem, path):
            raise
        _take_over(filesystem, path, renew, mine)
    done = threading.Event()
    lost: list[ConfigError] = []

    def keep_renewing() -> None:
        while not done.wait(renew) and not lost:
            # A store that does not answer must not end the run; the next turn tries again.
            with contextlib.suppress(Exception):
                now = _content(filesystem, path)
                if mine in now:
                    filesystem.pipe_file(path, _owner(mine).encode())
                else:
                    lost.append(_taken_over(_folder(filesystem, path), now))
        if lost and not done.is_set():
            interrupt()

    thread = threading.Thread(target=keep_renewing, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        with contextlib.suppress(Exception):
            if mine in _content(filesystem, path):
                filesystem.rm_file(path)
        if lost:
            raise lost[0]


def interrupt() -> None:
    """End this process as Ctrl-C does; every command takes SIGTERM so."""
    os.kill(os.getpid(), signal.SIGTERM)


def _take_over(filesystem: Any, path: str, renew: float, mine: str) -> None:
    """Replace a lock whose owner is dead."""
    folder = _folder(filesystem, path)
    earlier = now = _content(filesystem, path)
    end = time.monotonic() + 3 * renew
    while earlier and not _died_here(earlier) and time.monotonic() < end:
        time.sleep(renew / 10)
        now = _content(filesystem, path)
        if now not in ("", earlier):
            raise _taken(folder, now)
        earlier = now
    filesystem.pipe_file(path, _owner(mine).encode())
    time.sleep(renew / 10)  # two that take over at once: the later write stands
    now = _content(filesystem, path)
    if mine not in now:
        raise _taken(folder, now)


def _folder(filesystem: Any, path: str) -> str:
    return str(filesystem.unstrip_protocol(path)).rpartition("/")[0]


def _content(filesystem: Any, path: str) -> str:
    try:
        return str(filesystem.cat_file(path).decode("utf-8", "replace"))
    except FileNotFoundError:
        return ""


def _owner(holder: str = "") -> str:
    """Who holds a lock; differs at every call."""
    here = {"pid": os.getpid(), "host": socket.gethostname(), "pids": _pids(), "holder": holder}
    return json.dumps({**here, "time": time.time_ns()})


def _pids() -> str:
    """Where a process number means the same process; "" if Linux does not tell.

    Machines and containers may share a host name.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _read_owner(content: str) -> tuple[str, int | None, str]:
    try:
        owner = json.loads(content)
        return str(owner["host"]), int(owner["pid"]), str(owner.get("pids", ""))
    except (ValueError, KeyError, TypeError):
        return "unknown", None, ""  # the other one has not written it yet


def _died_here(content: str) -> bool:
    """Whether the owner was a process of this machine that is gone."""
    _, pid, pids = _read_owner(content)
    if pid is None or not pids or pids != _pids():
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return False


def _taken(folder: str, content: str) -> ConfigError:
    return ConfigError(
        f"{folder} is in use by {_who(content)}, which trains the same name now. Wait for it to "
        "end or stop it, then run this command to go on; or give this run a name of its own "
        "(--set name=…)."
    )


def _taken_over(folder: str, content: str) -> ConfigError:
    return ConfigError(
        f"{folder} was taken over by {_who(content)} while this process was silent (asleep, or cut "
        "off from the store), so this one has ended. When the other has ended, run this command "
        "to go on."
    )


def _who(content: str) -> str:
    host, pid, _ = _read_owner(content)
    return f"process {pid} on host {host}" if pid is not None else "another process"
