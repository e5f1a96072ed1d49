"""python -m train_jobs.evaluate: score an artifact on its own test data or on other files."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from rich.console import Console

from mtl_core.artifact import load_config, read_manifest
from mtl_core.command import run_command
from mtl_core.config import RESERVED_COLUMNS, SPLITS, SourceConfig, Split
from mtl_core.data.prepare import prepare_scored
from mtl_core.errors import ConfigError, there_is
from mtl_core.evaluation import Evaluation, evaluate
from mtl_core.predictor import Predictor
from mtl_core.runtime import RuntimeName, with_runtime
from mtl_core.storage import fetch
from train_jobs.console import label_table, score_table


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m train_jobs.evaluate",
        description="Score an artifact.",
        epilog="example: python -m train_jobs.evaluate --artifact runs/demo/artifact --split test",
    )
    parser.add_argument("--artifact", required=True, help="artifact folder or s3:// URL")
    parser.add_argument(
        "--split", choices=SPLITS, help="of the artifact's own data; test when absent"
    )
    parser.add_argument(
        "--data",
        action="append",
        default=[],
        metavar="TASK=PATH",
        help="score this task on another file, or a folder's test file, here or s3://, read as the "
        "data it was trained on; may be repeated; only the tasks named are scored",
    )
    parser.add_argument(
        "--runtime",
        choices=get_args(RuntimeName),
        default="torch-fp32",
        help="how the encoder is executed (%(default)s)",
    )
    parser.add_argument("--output", help="also write all numbers to this JSON file")
    options = parser.parse_args(arguments)
    if options.split and options.data:
        raise ConfigError("--split: what --data names is scored whole; leave one of them out")
    split: Split = options.split or "test"
    artifact = str(fetch(options.artifact))
    report = evaluate_artifact(artifact, split, options.data, options.runtime).report()
    show(report, "--data" if options.data else split)
    carried = carried_tasks(artifact)
    if carried and not options.data:
        print(f"not scored, for want of their data: {', '.join(carried)}; give --data TASK=PATH")
    if options.output:
        Path(options.output).write_text(json.dumps(report, indent=1), encoding="utf-8")


def evaluate_artifact(
    artifact: str, split: Split, data: Sequence[str] = (), runtime: RuntimeName = "torch-fp32"
) -> Evaluation:
    """Counts of an artifact on a split of its own data, or on other data; tells of what it skips.

    Raises:
        ArtifactError: the artifact is damaged.
        ConfigError: `data` names an unknown task, or the runtime is not to be had.
        DataError: as `prepare_scored`.
    """
    sources = other_sources(artifact, data) if data else None
    scored = prepare_scored(artifact, split, sources)
    for line in scored.remarks:
        print(line)
    loaded = Predictor.load(artifact, runtime=runtime)
    model = with_runtime(loaded.model, loaded.stage.runtime)
    return evaluate(model, scored.splits[split], tasks=list(scored.labels))


def other_sources(artifact: str, data: Sequence[str]) -> list[SourceConfig]:
    """The artifact's own sources pointed at other files; tasks of one source and file share rows.

    A task that came with `init_from` has no source here: its column is named as it is.
    """
    tasks = read_manifest(artifact, check_files=False).tasks
    origins = list(load_config(artifact).data)
    if carried := carried_tasks(artifact):
        columns: dict[str, str | int] = {name: name for name in ("text", *carried)}
        origins.append(SourceConfig(path=artifact, columns=columns))
    chosen: dict[tuple[str, int], list[str]] = {}
    for item in data:
        task, separator, path = item.partition("=")
        if not separator or not path:
            raise ConfigError(f"--data {item}: expected TASK=PATH")
        if task not in tasks:
            raise ConfigError(f"--data {item}: unknown task {task!r}; {there_is(tasks, task)}")
        origin = next(i for i, source in enumerate(origins) if task in source.task_columns)
        chosen.setdefault((path, origin), []).append(task)
    return [_pointed_at(path, origins[i], named) for (path, i), named in chosen.items()]


def _pointed_at(path: str, origin: SourceConfig, tasks: Sequence[str]) -> SourceConfig:
    columns = {
        name: column
        for name, column in origin.columns.items()
        if name in RESERVED_COLUMNS or name in tasks
    }
    changes = {"path": path, "hub": None, "demo": False, "columns": columns, "splits": {}}
    return origin.model_copy(update=changes)


def carried_tasks(artifact: str) -> list[str]:
    """Tasks that came with `init_from`: the artifact has their heads and none of their data."""
    own = load_config(artifact).tasks
    return [task for task in read_manifest(artifact, check_files=False).tasks if task not in own]


def show(report: Mapping[str, Any], split: str) -> None:
    console = Console(highlight=False)
    scores = {task: values["scores"] for task, values in report.items()}
    console.print(score_table("scores", {split: scores}))
    for task, values in report.items():
        title = f"{task}: by label ({split})"
        console.print(label_table(title, values["labels"], 40, "the file that --output names"))


if __name__ == "__main__":
    run_command(main)
