"""A task of several labels a text, from rows on disk through every command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from sklearn.metrics import f1_score

from mtl_core.predictor import Predictor
from tests.commands import run, write_config
from tests.small_runs import LABELS, examples, write_rows

pytestmark = [pytest.mark.cluster, pytest.mark.slow]
ROWS = examples(20_000, 60, everything=True)


def test_a_multilabel_task_is_trained_scored_and_predicted(
    tmp_path: Path, ray_address: str, experiment: dict[str, Any]
) -> None:
    for name, count in (("train", 200), ("validation", 40)):
        write_rows(tmp_path / f"{name}.jsonl", examples(count * 100, count, everything=True))
    test = write_rows(tmp_path / "test.jsonl", ROWS)
    changes = {
        "tasks": {"mood": {"kind": "multilabel"}},
        "data": [{"path": str(tmp_path), "columns": {"text": "text", "mood": "mood"}}],
        "optim": {"learning_rate": 5e-3, "head_learning_rate": 5e-2},
        "training": {"epochs": 4, "batch_size": 8, "precision": "fp32"},
        "scale": {"workers": 1},
    }
    config = write_config(tmp_path, experiment, **changes)
    trained = run("train", "--config", str(config), address=ray_address)
    assert trained.returncode == 0, trained.stderr
    artifact = tmp_path / "runs/small/artifact"

    report = tmp_path / "report.json"
    scored = run("evaluate", "--artifact", str(artifact), "--output", str(report))
    assert scored.returncode == 0, scored.stderr
    assert "mood: by label (test)" in scored.stdout
    files = ("--input", str(test), "--output", str(tmp_path / "out.parquet"))
    predicted = run("predict", "--artifact", str(artifact), *files, address=ray_address)
    assert predicted.returncode == 0, predicted.stderr

    answers = pq.read_table(tmp_path / "out.parquet")["predicted_mood"].to_pylist()
    expected = Predictor.load(artifact).predict([row.text for row in ROWS])
    assert answers == [answer["mood"]["labels"] for answer in expected]
    truth = [[name in row.targets["mood"] for name in LABELS["mood"]] for row in ROWS]
    guess = [[name in labels for name in LABELS["mood"]] for labels in answers]
    scores = json.loads(report.read_text())["mood"]["scores"]
    for average in ("micro", "macro"):
        theirs = f1_score(truth, guess, average=average, zero_division=0)
        assert scores[f"{average}_f1"] == pytest.approx(theirs)
    assert scores["micro_f1"] > 0.6
