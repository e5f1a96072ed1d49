"""Who may import whom, what an import may do, and that the set-up files tell the truth."""

from __future__ import annotations

import ast
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("mtl_core", "train_jobs", "serve_app")
FILES = tuple(path for name in PACKAGES for path in sorted((ROOT / name).rglob("*.py")))
HEAVY = ("ray", "datasets", "transformers", "matplotlib", "pandas", "torch")

# Imports argv[1:] and prints, as JSON, what that did. Libraries probe /dev/null and their scratch
# folder while they load; TMPDIR is private to the run, and what stays in it is looked at after.
PROBE = """
import importlib, json, logging, os, sys, tempfile

effects, scratch = [], tempfile.gettempdir()
writing = os.O_WRONLY | os.O_RDWR | os.O_CREAT

def innocent(path):
    path = os.path.abspath(os.fsdecode(path))
    return path == os.devnull or path.startswith(scratch + os.sep)

def watch(event, args):
    if event in ("socket.connect", "socket.getaddrinfo"):
        effects.append(f"{event} {args[-1]!r}")
    elif event == "os.mkdir" and not innocent(args[0]):
        effects.append(f"mkdir {args[0]}")
    elif event == "open" and not isinstance(args[0], int) and args[2] & writing:
        if not innocent(args[0]):
            effects.append(f"write {args[0]}")

root_logger = logging.getLogger()
before = (list(root_logger.handlers), root_logger.level)
sys.addaudithook(watch)
for name in sys.argv[1:]:
    count = len(effects)
    importlib.import_module(name)
    if (root_logger.handlers, root_logger.level) != before:
        effects.append("logging set up")
        before = (list(root_logger.handlers), root_logger.level)
    effects[count:] = [f"import {name}: {effect}" for effect in effects[count:]]
print(json.dumps({"effects": effects, "modules": [m for m in sys.modules if "." not in m]}))
"""


def import_fresh(tmp_path: Path, *names: str) -> tuple[list[str], set[str]]:
    """Import the names in a new interpreter of an empty home; its effects and loaded modules."""
    home, scratch = tmp_path / "home", tmp_path / "scratch"
    home.mkdir()
    scratch.mkdir()
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "PYTHONDONTWRITEBYTECODE": "1",
        "HOME": str(home),
        "TMPDIR": str(scratch),
    }
    run = subprocess.run(
        [sys.executable, "-c", PROBE, *names],
        env=environment,
        cwd=home,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    report = json.loads(run.stdout.splitlines()[-1])
    left = [p.name for p in scratch.iterdir() if not p.name.startswith("torchinductor_")]
    return report["effects"] + [f"left behind {name}" for name in left], set(report["modules"])


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def imported(path: Path) -> Iterator[tuple[str, int]]:
    """Top-level names a file imports from elsewhere, inside functions too, and the lines."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name.split(".")[0], node.lineno
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module.split(".")[0], node.lineno


@pytest.mark.parametrize(
    ("package", "forbidden"),
    [
        ("mtl_core", {"ray", "train_jobs", "serve_app"}),
        ("train_jobs", {"serve_app"}),
        ("serve_app", {"train_jobs"}),
    ],
)
def test_a_package_does_not_import(package: str, forbidden: set[str]) -> None:
    found = [
        f"{relative(path)}:{line} imports {name}"
        for path in FILES
        if path.relative_to(ROOT).parts[0] == package
        for name, line in imported(path)
        if name in forbidden
    ]
    assert not found


@pytest.mark.slow
@pytest.mark.parametrize("package", PACKAGES)
def test_importing_every_module_has_no_side_effects_and_of_mtl_core_loads_no_ray(
    package: str, tmp_path: Path
) -> None:
    names = [
        module_name(path)
        for path in FILES
        if path.relative_to(ROOT).parts[0] == package and path.name != "__main__.py"
    ]
    effects, modules = import_fresh(tmp_path, *names)
    assert not effects
    assert package != "mtl_core" or "ray" not in modules


@pytest.mark.parametrize("package", PACKAGES)
def test_importing_a_package_alone_loads_nothing_heavy(package: str, tmp_path: Path) -> None:
    _, modules = import_fresh(tmp_path, package)
    assert not modules & set(HEAVY)


@pytest.mark.parametrize(
    ("name", "unloaded"),
    [
        ("mtl_core.config", HEAVY),
        ("train_jobs.train", HEAVY),  # so that --help and a mistake in the file cost no seconds
        ("serve_app.__main__", HEAVY),
        ("train_jobs.runs", HEAVY),
        ("train_jobs.progress", ("torch", "transformers", "pandas", "datasets")),
        ("mtl_core.data.cache", HEAVY),
    ],
)
def test_what_starts_first_does_not_load(
    name: str, unloaded: tuple[str, ...], tmp_path: Path
) -> None:
    _, modules = import_fresh(tmp_path, name)
    assert not modules & set(unloaded)


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_a_file_says_its_purpose_in_its_first_line(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    docstring = ast.get_docstring(tree, clean=False)
    assert docstring is not None, "no docstring"
    assert tree.body[0].lineno == 1, "the docstring is not on the first line"
    assert docstring.split("\n")[0].strip(), "the docstring's first line is empty"


def test_every_import_is_a_declared_dependency() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    requirements = project["dependencies"] + [
        line for extra, lines in extras.items() if extra != "dev" for line in lines
    ]
    declared = {canonicalize_name(Requirement(line).name) for line in requirements}
    known = {*sys.stdlib_module_names, *PACKAGES, "mtl_core", "train_jobs", "serve_app"}
    distributions = importlib.metadata.packages_distributions()
    undeclared = [
        f"{relative(path)}:{line} imports {name}"
        for path in FILES
        for name, line in imported(path)
        if name not in known
        and not declared & {canonicalize_name(d) for d in distributions.get(name, [name])}
    ]
    assert not undeclared


def pinned() -> list[Requirement]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return [Requirement(line) for line in lines if line and not line.startswith("#")]


def test_every_pin_is_exact_and_appears_once() -> None:
    pins = pinned()
    names = [canonicalize_name(pin.name) for pin in pins]
    assert len(names) == len(set(names))
    for pin in pins:
        assert re.fullmatch(r"==[^*+]+", str(pin.specifier)), f"{pin} is no plain exact version"


def test_every_declared_dependency_is_pinned_within_its_range() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lists = [project["dependencies"], *project["optional-dependencies"].values()]
    versions = {canonicalize_name(pin.name): str(pin.specifier)[2:] for pin in pinned()}
    for requirement in (Requirement(line) for lines in lists for line in lines):
        if requirement.name != project["name"]:
            version = versions.get(canonicalize_name(requirement.name))
            fits = version is not None and version in requirement.specifier
            assert fits, f"{requirement} is pinned to {version}"


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_make_help_lists_every_target_once() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = re.findall(r"^([a-z][\w-]*):(?!=)", makefile, flags=re.MULTILINE)
    (phony,) = re.findall(r"^\.PHONY: (.*)$", makefile, flags=re.MULTILINE)
    shown = subprocess.run(
        ["make", "--no-print-directory", "help"], cwd=ROOT, capture_output=True, text=True
    )
    assert shown.returncode == 0, shown.stderr
    listed = re.findall(r"^  make ([\w-]+) +\S", shown.stdout, flags=re.MULTILINE)
    assert sorted(listed) == sorted(targets) == sorted(phony.split())


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_a_wheel_holds_no_module_that_is_gone(tmp_path: Path) -> None:
    shutil.copy(ROOT / "Makefile", tmp_path)
    for name in ("pyproject.toml", "constraints.txt", "build/lib/gone.py", "build/results.json"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    python = tmp_path / ".venv/bin/python"
    python.parent.mkdir(parents=True)
    python.write_text("#!/bin/sh\nmkdir -p build/lib dist && cp -r build/lib dist\n")
    python.chmod(0o755)
    (tmp_path / ".venv/.installed").touch()
    subprocess.run(["make", "wheel"], cwd=tmp_path, capture_output=True, check=True)
    assert not list((tmp_path / "dist/lib").iterdir())
    assert (tmp_path / "build/results.json").exists(), "build/ is not the wheel's alone"


def test_a_wheel_tells_type_checkers_that_it_has_types(tmp_path: Path) -> None:
    unwanted = shutil.ignore_patterns("__pycache__")
    for name in PACKAGES:
        shutil.copytree(ROOT / name, tmp_path / name, ignore=unwanted)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    build = "from setuptools import build_meta; print(build_meta.build_wheel('dist'))"
    command = [sys.executable, "-c", build]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    with zipfile.ZipFile(tmp_path / "dist" / done.stdout.splitlines()[-1]) as wheel:
        assert {f"{name}/py.typed" for name in PACKAGES} <= set(wheel.namelist())
