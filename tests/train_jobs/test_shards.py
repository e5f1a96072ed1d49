"""Training on a corpus in shards by the command: what it says, a crash, and a row that is wrong."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest

from mtl_core.config import parse_experiment
from mtl_core.data.demo import demo_corpus
from mtl_core.data.shards import ShardedCorpus
from tests.commands import history, run, start, wait_for, weights, write_config
from tests.small_runs import write_rows

pytestmark = [pytest.mark.cluster, pytest.mark.slow]
ROWS = 600


@pytest.fixture
def sharded(tmp_path: Path, experiment: dict[str, Any]) -> dict[str, Any]:
    """The small experiment on a file, which makes five shards."""
    path = write_rows(tmp_path / "rows.jsonl", demo_corpus()["train"][:ROWS])
    columns = {name: name for name in ("text", "sentiment", "entities")}
    training = {**experiment["training"], "shard_texts": 120, "epochs": 2}
    source = {"path": str(path), "columns": columns}
    return {**experiment, "data": [source], "training": training}


def shards(folder: Path) -> list[int]:
    return [row["shard"] for row in history(folder) if row["event"] == "shard"]


def test_a_run_in_shards_goes_on_after_its_driver_was_killed(
    tmp_path: Path, sharded: dict[str, Any]
) -> None:
    whole, cut = tmp_path / "undisturbed", tmp_path / "killed"
    whole.mkdir()
    cut.mkdir()
    done = run("train", "--config", str(write_config(whole, sharded)))
    assert done.returncode == 0, done.stderr
    assert "reading all rows for the labels of entities, sentiment; name them" in done.stdout
    assert "train: 540 rows in 5 shards, which are read as they are needed" in done.stdout
    assert "shard 2 of 5: 108 labelled texts in 108 rows" in done.stdout
    assert shards(whole) == [1, 2, 3, 4, 5] * 2

    config = str(write_config(cut, sharded))
    process = start("train", "--config", config)
    wait_for(lambda: len(shards(cut)) >= 7, process)  # inside the second epoch
    process.send_signal(signal.SIGKILL)
    process.communicate()
    done = run("train", "--config", config, "--resume")
    assert done.returncode == 0, done.stderr
    starts = [row["step"] for row in history(cut) if row["event"] == "start"]
    assert starts[-1] > 5 * 27
    assert weights(cut) == weights(whole)


def test_a_row_that_cannot_be_read_ends_the_run_with_its_place(
    tmp_path: Path, sharded: dict[str, Any]
) -> None:
    labels = {
        "sentiment": ["negative", "neutral", "positive"],
        "entities": ["organisation", "person", "place", "product"],
    }
    tasks = {task: {**known, "labels": labels[task]} for task, known in sharded["tasks"].items()}
    sharded = {**sharded, "tasks": tasks}
    cut, _ = ShardedCorpus(parse_experiment(sharded)).cut()
    wrong = cut.share(2)[0][0]
    rows = tmp_path / "rows.jsonl"
    lines = rows.read_text(encoding="utf-8").splitlines(keepends=True)
    lines[wrong] = json.dumps({"text": " ", "sentiment": "neutral"}) + "\n"
    rows.write_text("".join(lines), encoding="utf-8")
    done = run("train", "--config", str(write_config(tmp_path, sharded)))
    assert done.returncode == 1
    assert "reading all rows" not in done.stdout
    assert shards(tmp_path) == [1, 2]
    said = " ".join(done.stderr.split())
    assert f"rows.jsonl:{wrong + 1}: the text is empty or only spaces" in said
    assert "`on_bad_row: skip` passes such rows over" in said
    assert "Traceback" not in done.stderr
