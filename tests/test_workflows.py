"""The workflows run what exists, on the Pythons the project names, with few rights."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.specifiers import SpecifierSet

ROOT = Path(__file__).parents[1]
WORKFLOWS: dict[str, dict[Any, Any]] = {
    path.name: yaml.safe_load(path.read_text(encoding="utf-8"))
    for path in sorted((ROOT / ".github/workflows").glob("*.yml"))
}
JOBS = [job for workflow in WORKFLOWS.values() for job in workflow["jobs"].values()]
STEPS = [step for job in JOBS for step in job["steps"]]


def test_actionlint_finds_nothing_in_them() -> None:
    """It has shellcheck look at their scripts, and without one says so and goes on."""
    tools = Path(sys.executable).parent
    files = sorted((ROOT / ".github/workflows").iterdir())
    command = [tools / "actionlint", "-verbose", "-shellcheck", tools / "shellcheck", *files]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    assert 'Rule "shellcheck" was disabled' not in done.stderr


def test_the_shell_of_the_local_run_is_sound() -> None:
    shellcheck = [Path(sys.executable).with_name("shellcheck"), ROOT / ".ci/run"]
    done = subprocess.run(shellcheck, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z][a-z-]*):", makefile, re.MULTILINE))
    runs = " ".join(step.get("run", "") for step in STEPS)
    used = set(re.findall(r"\bmake ([a-z-]+)", runs))
    assert {"check", "notebook", "demo", "readme-check", "up", "down"} <= used <= targets


def test_pythons_are_those_of_pyproject() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    tested = WORKFLOWS["ci.yml"]["jobs"]["check"]["strategy"]["matrix"]["python"]
    named = [c.rpartition(" :: ")[2] for c in project["classifiers"] if "Python :: 3." in c]
    assert tested == named
    assert all(version in SpecifierSet(project["requires-python"]) for version in tested)
    others = {step.get("with", {}).get("python-version", "3.11") for step in STEPS}
    assert others <= {"3.11", "${{ matrix.python }}"}


def test_actions_are_pinned() -> None:
    used = [step["uses"] for step in STEPS if "uses" in step]
    assert used
    for action in used:
        assert re.fullmatch(r"[\w-]+/[\w-]+@(v\d+(\.\d+)*|[0-9a-f]{40})", action), action


def test_only_the_push_of_a_tag_may_write() -> None:
    for workflow in WORKFLOWS.values():
        assert workflow["permissions"] == {"contents": "read"}
    (writer,) = (job for job in JOBS if "permissions" in job)
    assert writer["permissions"] == {"contents": "read", "packages": "write"}
    assert writer["if"] == "startsWith(github.ref, 'refs/tags/v') && vars.IMAGE_REGISTRY != ''"


def test_any_change_builds_the_image_and_one_that_fails_stops_no_other() -> None:
    image = WORKFLOWS["image.yml"]
    assert image[True] == {"push": {"tags": ["v*"]}, "pull_request": None}, "`on`, in YAML 1.1"
    runs = [step.get("run", "") for step in image["jobs"]["try"]["steps"]]
    assert any("docker build" in run and "--target jupyter" in run for run in runs)
    assert image["jobs"]["push"]["strategy"]["fail-fast"] is False


@pytest.mark.parametrize("name", sorted(WORKFLOWS))
def test_what_a_workflow_names_is_there(name: str) -> None:
    text = (ROOT / ".github/workflows" / name).read_text(encoding="utf-8")
    for path in re.findall(r"docker/(?:Dockerfile|[\w-]+\.yml)", text):
        assert (ROOT / path).is_file(), path
    stages = re.findall(r"^FROM .* AS (\w+)$", (ROOT / "docker/Dockerfile").read_text(), re.M)
    for job in WORKFLOWS[name]["jobs"].values():
        assert set(job.get("strategy", {}).get("matrix", {}).get("target", ())) <= set(stages)
        assert job["timeout-minutes"] <= 60
