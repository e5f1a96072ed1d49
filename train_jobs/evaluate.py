"""python -m train_jobs.evaluate: score an artifact on its own test data or on other files."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

import torch
from rich.console import Console

from mtl_core.artifact import load_config, load_model
from mtl_core.command import run_command
from mtl_core.config import ConfigError, Experiment, SourceConfig, Split
from mtl_core.data.encoding import Labels
from mtl_core.data.prepare import prepare_scored
from mtl_core.evaluation import Evaluation, evaluate
from mtl_core.metrics import per_label
from mtl_core.runtime import RuntimeName, load_runtime, with_runtime
from mtl_core.storage import fetch
from train_jobs.console import label_table, score_table


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m train_jobs.evaluate",
        description="Score an artifact.",
        epilog="example: python -m train_jobs.evaluate --artifact runs/demo/artifact --split test",
    )
    parser.add_argument("--artifact", required=True, help="artifact folder or s3:// URL")
    parser.add_argument("--split", choices=["train", "validation", "test"], default="test")
    parser.add_argument(
        "--data",
        action="append",
        default=[],
        metavar="TASK=PATH",
        help="score this task on another file or folder, read with the columns "
        "it was trained with; may be repeated; only the tasks named are scored",
    )
    parser.add_argument(
        "--runtime",
        choices=get_args(RuntimeName),
        default="torch-fp32",
        help="how the encoder is executed (%(default)s)",
    )
    parser.add_argument("--output", help="also write all numbers to this JSON file")
    options = parser.parse_args(arguments)
    labels, result = evaluate_artifact(
        options.artifact, options.split, options.data, options.runtime
    )
    show(labels, result, options.split)
    if options.output:
        report = {
            task: {
                "scores": scores,
                "labels": per_label(result.kinds[task], result.counts[task], labels[task]),
            }
            for task, scores in result.scores().items()
        }
        Path(options.output).write_text(json.dumps(report, indent=1), encoding="utf-8")


def evaluate_artifact(
    artifact: str, split: Split, data: Sequence[str] = (), runtime: RuntimeName = "torch-fp32"
) -> tuple[Labels, Evaluation]:
    """Labels and counts of an artifact on a split of its own data, or on other data.

    Raises:
        ArtifactError: the artifact is damaged, or cannot be fetched.
        ConfigError: `data` names an unknown task, or the runtime is not to be had.
        DataError: the split has no rows, or a label the artifact does not know.
    """
    artifact = str(fetch(artifact))
    sources = _other_sources(load_config(artifact), data, split) if data else None
    labels, scored = prepare_scored(artifact, split, sources)
    model = load_model(artifact)
    executes = load_runtime(runtime, artifact, lambda: model.encoder, torch.device("cpu"))
    return labels, evaluate(with_runtime(model, executes), scored, tasks=list(labels))


def _other_sources(experiment: Experiment, data: Sequence[str], split: Split) -> list[SourceConfig]:
    """The experiment's sources pointed at other files; tasks given the same file share its rows."""
    files: dict[str, list[str]] = {}
    for item in data:
        task, separator, path = item.partition("=")
        if not separator or not path:
            raise ConfigError(f"--data {item}: expected TASK=PATH")
        if task not in experiment.tasks:
            known = ", ".join(experiment.tasks)
            raise ConfigError(f"--data {item}: unknown task {task!r}; known: {known}")
        files.setdefault(path, []).append(task)
    sources = []
    for path, tasks in files.items():
        like = next(s for s in experiment.data if tasks[0] in s.task_columns)
        columns = {
            name: column
            for name, column in like.columns.items()
            if name in ("text", "words") or name in tasks
        }
        changes = {
            "path": path,
            "hub": None,
            "demo": False,
            "columns": columns,
            "splits": {},
            "subset": None,
            "format": None,
        }
        if Path(path).is_file():
            changes |= {"path": str(Path(path).parent), "splits": {split: Path(path).name}}
        sources.append(like.model_copy(update=changes))
    return sources


def show(labels: Labels, result: Evaluation, split: str) -> None:
    console = Console(highlight=False)
    console.print(score_table("scores", {split: result.scores()}))
    for task in result.scores():
        rows = per_label(result.kinds[task], result.counts[task], labels[task])
        console.print(label_table(f"{task}: by label ({split})", rows))


if __name__ == "__main__":
    run_command(main)
