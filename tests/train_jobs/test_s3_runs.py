"""Runs whose folder is behind s3://, on a real S3 server of the test's own."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mtl_core.artifact import read_manifest
from mtl_core.predictor import Predictor
from tests.commands import run, start, wait_for, weights, write_config
from tests.s3_server import checkpoints, s3_server

pytestmark = [pytest.mark.cluster, pytest.mark.slow]
RUN = "team/runs/small"


@pytest.fixture
def server() -> Iterator[tuple[Any, dict[str, str]]]:
    with s3_server("bucket") as both:
        yield both


def names(client: Any) -> set[str]:
    """What is in the run's folder."""
    found = client.list_objects_v2(Bucket="bucket", Prefix=f"{RUN}/").get("Contents", [])
    return {item["Key"].removeprefix(f"{RUN}/") for item in found}


def told(client: Any) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl so far."""
    if "metrics.jsonl" not in names(client):
        return []
    text = client.get_object(Bucket="bucket", Key=f"{RUN}/metrics.jsonl")["Body"].read().decode()
    return [json.loads(line) for line in text.splitlines()]


def download(client: Any, folder: Path) -> Path:
    for name in names(client):
        if name.startswith("artifact/"):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            client.download_file("bucket", f"{RUN}/{name}", str(folder / name))
    return folder / "artifact"


@pytest.mark.filterwarnings("ignore")
def test_a_run_on_s3_goes_on_after_its_driver_was_killed_and_ends_as_one_on_a_disk(
    finished: Path,
    tmp_path: Path,
    server: tuple[Any, dict[str, str]],
    experiment: dict[str, Any],
) -> None:
    client, environment = server
    config = write_config(tmp_path, experiment, output_dir="s3://bucket/team/runs")
    process = start("train", "--config", str(config), **environment)
    wait_for(lambda: checkpoints(client, RUN), process)
    process.kill()
    process.communicate()
    assert "run.lock" in names(client)
    assert "artifact/manifest.json" not in names(client)

    resumed = run("train", "--config", str(config), "--resume", **environment)
    assert resumed.returncode == 0, resumed.stderr
    assert "resuming s3://bucket/team/runs/small" in resumed.stdout
    assert "accuracy" in resumed.stdout
    assert [row["step"] for row in told(client) if row["event"] == "start"][-1] > 0
    assert "run.lock" not in names(client)
    assert any(name.startswith("tensorboard/") for name in names(client))

    artifact = download(client, tmp_path / "runs/small")
    assert weights(tmp_path) == weights(finished)
    assert read_manifest(artifact).name == "small"
    assert Predictor.load(artifact).predict(["The food was cold."])
    shown = run("train", "--config", str(config), **environment)
    assert shown.returncode == 0, shown.stderr
    assert "s3://bucket/team/runs/small is finished" in shown.stdout

    taken_up = {
        "name": "next",
        "init_from": "s3://bucket/team/runs/small/artifact",
        "tasks": {"sentiment": experiment["tasks"]["sentiment"]},
        "data": [{"demo": True, "columns": {"text": "text", "sentiment": "sentiment"}}],
        "freeze": {"encoder": True, "heads": ["sentiment"]},
        "weighting": {},
    }
    frozen = write_config(tmp_path, {**experiment, **taken_up})
    started = run("train", "--config", str(frozen), **environment)
    assert started.returncode == 0, started.stderr
    assert weights(tmp_path, "next") == weights(finished)
