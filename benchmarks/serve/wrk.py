"""The load generator: wrk with one thread, and what it says."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

SCRIPT = Path(__file__).with_name("requests.lua")
LEAST_WAITING = 0.8
"""Share of the connections; the rest may be requests under way when the time is over."""


class LoadError(RuntimeError):
    """A measurement that does not count; the message says why."""


@dataclass(frozen=True)
class Sample:
    """One measurement of one server."""

    requests: int
    seconds: float
    mean_ms: float
    p50_ms: float
    p99_ms: float

    @property
    def rate(self) -> float:
        """Requests a second."""
        return self.requests / self.seconds


def require_wrk() -> None:
    """Raise LoadError, saying how to get wrk, when there is none."""
    if shutil.which("wrk") is None:
        raise LoadError("wrk is not installed: apt-get install wrk (macOS: brew install wrk)")


def drive(port: int, route: str, bodies: Path, connections: int, seconds: int) -> Sample:
    """Post the lines of a file in turn for some seconds.

    Raises:
        LoadError: wrk or a request failed, or one was answered with 400 or more, or not at all.
    """
    return parse(_post(port, route, bodies, connections, seconds), connections)


def warm_up(port: int, route: str, bodies: Path, connections: int, seconds: int) -> None:
    """The same, of which nothing counts: first answers may take longer than it lasts."""
    _post(port, route, bodies, connections, seconds)


def _post(port: int, route: str, bodies: Path, connections: int, seconds: int) -> str:
    command = ["wrk", "--threads", "1", "--connections", str(connections)]
    command += ["--duration", f"{seconds}s", "--timeout", "60s", "--script", str(SCRIPT)]
    command += [f"http://127.0.0.1:{port}", "--", route, str(bodies)]
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=seconds + 90)
    except subprocess.TimeoutExpired as error:
        raise LoadError(f"wrk did not end within {error.timeout:.0f} s") from error
    if run.returncode:
        raise LoadError(f"wrk ended with {run.returncode}: {(run.stderr or run.stdout).strip()}")
    return run.stdout


def parse(output: str, connections: int) -> Sample:
    """Read what requests.lua printed.

    Raises:
        LoadError: it printed nothing, nothing was answered, there were errors, or requests were
            never answered, which wrk does not count.
    """
    found = re.search(r"^RESULT (\{.*\})$", output, re.MULTILINE)
    if found is None:
        raise LoadError(f"wrk printed no result:\n{output.strip()}")
    result = json.loads(found[1])
    errors = result.pop("errors")
    if errors:
        raise LoadError(f"{errors} errors beside {result['requests']} answers")
    if not result["requests"]:
        raise LoadError("no answer arrived")
    sample = Sample(**result)
    # Little's law: in a closed loop rate times latency is how many requests wait at a time.
    waiting = sample.rate * sample.mean_ms / 1e3
    if waiting < LEAST_WAITING * connections:
        raise LoadError(f"of {connections} connections only {waiting:.1f} had answers")
    return sample
