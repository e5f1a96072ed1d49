"""What `ray job submit --working-dir .` would upload."""

from __future__ import annotations

import subprocess
import zipfile
from pathlib import Path

import pytest

from tests.commands import ROOT


@pytest.mark.slow
def test_a_job_uploads_code_and_configurations_and_nothing_heavy(tmp_path: Path) -> None:
    from ray._private.runtime_env.packaging import create_package

    checkout = tmp_path / "checkout"
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, check=False).stdout
    if not listed:
        pytest.skip("not a git checkout")
    for name in listed.decode().splitlines():
        if (ROOT / name).is_file():
            (checkout / name).parent.mkdir(parents=True, exist_ok=True)
            (checkout / name).write_bytes((ROOT / name).read_bytes())
    for heavy in (".git/objects/pack", ".venv/lib/torch.so", "runs/demo/weights", "dist/a.whl"):
        (checkout / heavy).parent.mkdir(parents=True, exist_ok=True)
        (checkout / heavy).write_bytes(bytes(2_000_000))
    package = tmp_path / "package.zip"
    create_package(str(checkout), package, include_gitignore=True)
    with zipfile.ZipFile(package) as archive:
        sizes = {info.filename: info.file_size for info in archive.infolist()}
    assert {"mtl_core/loop.py", "train_jobs/train.py", "train_jobs/configs/demo.yaml"} <= set(sizes)
    assert not any(name.startswith((".git/", ".venv/", "runs/", "dist/")) for name in sizes)
    assert sum(sizes.values()) < 1_000_000, sorted(sizes, key=lambda name: -sizes[name])[:5]
