"""Virtual environments for peers, whose packages this project does not need or pins otherwise."""

from __future__ import annotations

import shutil
import subprocess
import sys
import venv
from pathlib import Path

from mtl_core.folders import cache_root


def folder_of(wanted: Path) -> Path:
    """Where the virtual environment of a requirements file is."""
    return cache_root() / "bench" / wanted.stem


def environment(wanted: Path) -> Path:
    """A virtual environment with what a requirements file asks for; made once."""
    folder = folder_of(wanted)
    installed = folder / "installed.txt"
    if installed.is_file() and installed.read_text() == wanted.read_text():
        return folder
    print(f"installing {wanted.name} into {folder}", file=sys.stderr)
    venv.create(folder, with_pip=True)
    install = [folder / "bin/python", "-m", "pip", "install", "--quiet", "-r", wanted]
    subprocess.run(install, check=True, stdout=sys.stderr)
    shutil.copy(wanted, installed)
    return folder


def packages(python: Path) -> list[str]:
    """What an environment holds, in exact versions."""
    freeze = [python, "-m", "pip", "freeze", "--disable-pip-version-check"]
    return subprocess.run(freeze, capture_output=True, text=True).stdout.splitlines()
