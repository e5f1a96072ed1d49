"""The commands as a user runs them: in a process of their own, with files in a folder."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[1]


def run(command: str, *arguments: str, address: str | None = None, **env: str) -> Any:
    """Run `python -m train_jobs.<command>` as a user would and return the finished process."""
    return subprocess.run(
        [sys.executable, "-m", f"train_jobs.{command}", *arguments],
        cwd=ROOT,
        text=True,
        capture_output=True,
        timeout=240,
        env=environment(address, **env),
        check=False,
    )


def start(command: str, *arguments: str, address: str | None = None) -> subprocess.Popen[str]:
    """The same without waiting for its end."""
    return subprocess.Popen(
        [sys.executable, "-m", f"train_jobs.{command}", *arguments],
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=environment(address),
    )


def environment(address: str | None, **changes: str) -> dict[str, str]:
    env = {**os.environ, **changes}
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
