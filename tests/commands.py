"""The commands as a user runs them: in a process of their own, with files in a folder."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from mtl_core.artifact import read_manifest
from tests import preloaded

ROOT = Path(__file__).parents[1]


EARLY = ("PYTHON", "LC_", "TZ", "OMP_", "HF_")
"""How variables begin that Python or a library reads as it starts."""


def run(
    command: str, *arguments: str, address: str | None = None, folder: Path = ROOT, **env: str
) -> Any:
    """Run `python -m train_jobs.<command>` as a user would and return the finished process.

    It is a fork that has the libraries already, unless something in its environment would have
    been read before.
    """
    module, whole = f"train_jobs.{command}", environment(address, **env)
    if not any(name.startswith(EARLY) and os.environ.get(name) != env[name] for name in env):
        return preloaded.run(module, arguments, folder, whole, 240)
    return subprocess.run(
        [sys.executable, "-m", module, *arguments],
        cwd=folder,
        encoding="utf-8",
        errors="backslashreplace",
        capture_output=True,
        timeout=240,
        env=whole,
        check=False,
    )


def start(
    command: str, *arguments: str, address: str | None = None, **env: str
) -> preloaded.Process:
    """Begin it, always as such a fork, without waiting for its end."""
    return preloaded.start(f"train_jobs.{command}", arguments, ROOT, environment(address, **env))


def environment(address: str | None, **changes: str) -> dict[str, str]:
    env = {**os.environ, "PYTHONPATH": str(ROOT), **changes}
    env.pop("RAY_ADDRESS", None)
    return {**env, "RAY_ADDRESS": address} if address else env


def write_config(folder: Path, experiment: dict[str, Any], **changes: Any) -> Path:
    """An experiment file in `folder`, whose runs go to `folder`/runs."""
    path = folder / "experiment.yaml"
    content = {**experiment, "output_dir": str(folder / "runs"), **changes}
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    return path


def history(folder: Path, name: str = "small") -> list[dict[str, Any]]:
    """The rows of a run's metrics.jsonl so far."""
    path = folder / "runs" / name / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def weights(folder: Path, name: str = "small") -> dict[str, str]:
    """Hashes of the artifact's weight files: equal hashes are equal weights, bit for bit."""
    files = read_manifest(folder / "runs" / name / "artifact").files
    return {path: sha for path, sha in files.items() if path.endswith(".safetensors")}


def wait_for(
    condition: Callable[[], Any], process: preloaded.Process | subprocess.Popen[str]
) -> Any:
    """Poll until the condition gives something, while the process lives."""
    for _ in range(1200):
        found = condition()
        if found:
            return found
        if process.poll() is not None:
            raise AssertionError(process.communicate()[0])
        time.sleep(0.05)
    raise AssertionError("waited too long")
