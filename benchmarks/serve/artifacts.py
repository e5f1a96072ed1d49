"""What the servers serve: artifacts, made once."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

from mtl_core.folders import cache_root
from mtl_core.runtime import INT8_FOLDER
from mtl_core.storage import version_of

CONFIG = "train_jobs/configs/demo.yaml"
MAX_LENGTH = 256
"""What MiniLM is published with; the demo's 64 would cut the longer of the offline sentences."""


def demo_artifact() -> Path:
    """An artifact with two tasks on MiniLM, trained by the project's own command; made once."""
    folder = cache_root() / "bench" / "demo"
    if not (folder / "artifact" / "manifest.json").is_file():
        command = [sys.executable, "-m", "train_jobs.train", "--config", CONFIG]
        command += ["--set", f"output_dir={folder.parent}"]
        command += ["--set", f"encoder.max_length={MAX_LENGTH}"]
        subprocess.run(command, check=True, stdout=sys.stderr)
    return folder / "artifact"


def multilabel_tasks(artifact: Path) -> list[str]:
    """Tasks that peers cannot serve."""
    specs = sorted((artifact / "heads").glob("*/head.json"))
    kinds = {
        spec.parent.name: json.loads(spec.read_text(encoding="utf-8"))["kind"] for spec in specs
    }
    return [task for task, kind in kinds.items() if kind == "multilabel"]


def int8_artifact(artifact: Path) -> Path:
    """A copy of the artifact with the int8 encoder that serve_app.optimize makes and checks."""
    version = version_of((artifact / "manifest.json").read_bytes())
    copy = cache_root() / "bench" / "int8" / version
    if not (copy / INT8_FOLDER).is_dir():
        shutil.copytree(artifact, copy, dirs_exist_ok=True)
        command = [sys.executable, "-m", "serve_app.optimize", "--artifact", str(copy)]
        subprocess.run(command, check=True, stdout=sys.stderr)
    if not (copy / INT8_FOLDER).is_dir():
        sys.exit("--int8: serve_app.optimize kept no int8 encoder on this machine; see above")
    return copy
