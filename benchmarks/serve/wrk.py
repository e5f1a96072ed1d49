"""The load generator: wrk with one thread, and what it says."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

SCRIPT = Path(__file__).with_name("requests.lua")


class LoadError(RuntimeError):
    """A measurement that does not count; the message says why."""


@dataclass(frozen=True)
class Sample:
    """One measurement of one server."""

    requests: int
    seconds: float
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
        LoadError: a request failed or was answered with another status than success.
    """
    command = ["wrk", "--threads", "1", "--connections", str(connections)]
    command += ["--duration", f"{seconds}s", "--timeout", "60s", "--script", str(SCRIPT)]
    command += [f"http://127.0.0.1:{port}", "--", route, str(bodies)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=seconds + 90)
    if run.returncode:
        raise LoadError(f"wrk ended with {run.returncode}: {(run.stderr or run.stdout).strip()}")
    return parse(run.stdout)


def parse(output: str) -> Sample:
    """Read what requests.lua printed.

    Raises:
        LoadError: it printed nothing, nothing was answered, or there were errors.
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
    return Sample(**result)
