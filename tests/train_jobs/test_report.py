"""What an artifact tells of its tasks: tables and plots by label."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from mtl_core.evaluation import Evaluation
from train_jobs.report import build_report, draw, label_rows

KINDS: dict[str, Any] = {"topic": "classification", "mood": "multilabel"}
LABELS = {"topic": ("food", "music"), "mood": ("good", "bad")}
COUNTS = {"topic": np.eye(2, dtype=np.int64), "mood": np.ones((3, 3), dtype=np.int64)}


def scored(*tasks: str) -> Evaluation:
    """A split that has labels of these tasks only."""
    counts = {task: COUNTS[task] * (task in tasks) for task in KINDS}
    return Evaluation(KINDS, LABELS, counts, dict.fromkeys(tasks, 0.5))


def test_a_task_without_labels_in_test_is_shown_by_label_as_validation_scored_it(
    tmp_path: Path,
) -> None:
    splits = {"validation": scored("topic", "mood"), "test": scored("topic")}
    report = build_report(splits)
    assert set(label_rows(report)) == {"topic: by label (test)", "mood: by label (validation)"}
    pictures = draw(tmp_path, splits, report, [])
    assert pictures == ["plots/confusion_topic.png", "plots/labels_mood.png"]
    assert all((tmp_path / picture).is_file() for picture in pictures)
