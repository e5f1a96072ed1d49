"""From trained weights to the finished artifact: scores, plots, manifest, model card."""

from __future__ import annotations

import json
import os
import shlex
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from mtl_core import plots
from mtl_core.artifact import (
    SCHEMA_VERSION,
    Manifest,
    describe_encoder,
    library_versions,
    model_card,
    parse_manifest,
    read_manifest,
    write_manifest,
)
from mtl_core.config import Experiment, dump_experiment
from mtl_core.data.prepare import Data
from mtl_core.evaluation import Evaluation
from mtl_core.folders import copy_tree
from mtl_core.storage import fetch
from train_jobs.console import label_table, score_table
from train_jobs.runs import RESULT, RunFolder

MAX_LABELS_IN_MATRIX = 80
MAX_LABELS_SHOWN = 12
History = Sequence[dict[str, Any]]


def build_artifact(
    weights: Path, experiment: Experiment, data: Data, folder: RunFolder, seconds: float
) -> None:
    """Put together and publish the artifact of a run whose last checkpoint is `weights`."""
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        copy_tree(weights, root)
        result = json.loads((root / RESULT).read_text(encoding="utf-8"))
        (root / RESULT).unlink()
        (root / "experiment.yaml").write_text(dump_experiment(experiment), encoding="utf-8")
        scored = evaluations(experiment, data, result["splits"])
        report = build_report(scored)
        (root / "report.json").write_text(json.dumps(report, indent=1), encoding="utf-8")
        pictures = draw(root, scored, report, folder.history())
        manifest = Manifest(
            schema_version=SCHEMA_VERSION,
            name=experiment.name,
            tasks=describe_tasks(root, experiment, report),
            encoder=describe_encoder(root, experiment.init_from or experiment.encoder.model),
            data=data.summary(),
            versions=library_versions(),
            files={},
            training=result["training"]
            | {"seconds": round(seconds, 1), "skipped_rows": sum(data.skipped.values())},
        )
        write_manifest(root, manifest)
        card = model_card(manifest, pictures, label_rows(report))
        (root / "README.md").write_text(card, encoding="utf-8")
        folder.publish(root)


def describe_tasks(
    root: Path, experiment: Experiment, report: Mapping[str, Any]
) -> dict[str, dict[str, Any]]:
    """Task → kind, labels and metrics; heads carried over keep the metrics they came with."""
    start = experiment.init_from
    carried = read_manifest(fetch(start)).tasks if start else {}
    tasks = {}
    for head in sorted(path.parent for path in root.glob("heads/*/head.json")):
        spec = json.loads((head / "head.json").read_text(encoding="utf-8"))
        name = head.name
        measured = {split: rows[name]["scores"] for split, rows in report.items() if name in rows}
        if name not in experiment.tasks:
            measured = carried[name]["metrics"]
        tasks[name] = {"kind": spec["kind"], "labels": spec["labels"], "metrics": measured}
    return tasks


def evaluations(
    experiment: Experiment, data: Data, splits: dict[str, Any]
) -> dict[str, Evaluation]:
    """Split → what the workers counted of it."""
    kinds = {task: config.kind for task, config in experiment.tasks.items()}
    return {
        split: Evaluation(
            kinds,
            data.labels,
            {task: np.array(values["counts"]) for task, values in tasks.items()},
            {task: values["loss"] for task, values in tasks.items()},
        )
        for split, tasks in splits.items()
    }


def build_report(scored: Mapping[str, Evaluation]) -> dict[str, Any]:
    """Split → task → scores, loss, and precision, recall and F1 a label."""
    return {
        split: {
            task: {**values, "loss": result.losses[task]}
            for task, values in result.report().items()
        }
        for split, result in scored.items()
    }


def last_splits(report: Mapping[str, Any]) -> dict[str, str]:
    """Task → the last split that has a score of it."""
    return {task: split for split, tasks in report.items() for task in tasks}


def label_rows(report: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Title → rows by label of each task, from the last split that has a score of it."""
    return {
        f"{task}: by label ({split})": report[split][task]["labels"]
        for task, split in last_splits(report).items()
    }


def show_result(folder: RunFolder) -> None:
    """Print the artifact's scores and where to go from here."""
    console = Console(highlight=False)
    content = folder.read("artifact/manifest.json") or ""
    manifest = parse_manifest(content.encode(), f"{folder.title}/artifact")
    report = json.loads(folder.read("artifact/report.json") or "{}")
    if not manifest.training.get("trained", True):
        console.print(
            "Nothing was trained: every part is frozen. These are the scores as it stood."
        )
    scores: dict[str, dict[str, dict[str, float]]] = {}
    for task, info in manifest.tasks.items():
        for split, values in info["metrics"].items():
            scores.setdefault(split, {})[task] = values
    console.print(score_table(f"{manifest.name}: scores", scores))
    for title, rows in label_rows(report).items():
        console.print(label_table(title, rows, MAX_LABELS_SHOWN, "the artifact's README.md"))
    where = f"{folder.title}/artifact"
    if folder.is_local and not os.path.relpath(where).startswith(".."):
        where = os.path.relpath(where)
    print(f"artifact: {where}  (plots in plots/, all numbers in report.json)")
    print(f'next:     python -m train_jobs.predict --artifact {shlex.quote(where)} --text "…"')


def draw(
    root: Path, scored: Mapping[str, Evaluation], report: Mapping[str, Any], history: History
) -> list[str]:
    """Draw what there is to draw; returns the pictures' paths within the artifact."""
    (root / "plots").mkdir()
    pictures = []
    if any(row["event"] == "step" for row in history):
        pictures.append("plots/learning_curves.png")
        plots.learning_curves(history, root / pictures[-1])
    if any(key.startswith("cosine/") for row in history for key in row):
        pictures.append("plots/gradient_cosines.png")
        plots.gradient_cosines(history, root / pictures[-1])
    for task, split in last_splits(report).items():
        result, title = scored[split], f"{task} on {split}"
        if len(result.labels[task]) > MAX_LABELS_IN_MATRIX:
            continue
        if result.kinds[task] == "classification":
            pictures.append(f"plots/confusion_{task}.png")
            counts, labels = result.counts[task], result.labels[task]
            plots.confusion_matrix(counts, labels, root / pictures[-1], title)
        else:
            pictures.append(f"plots/labels_{task}.png")
            plots.per_type_bars(report[split][task]["labels"], root / pictures[-1], title)
    return pictures
