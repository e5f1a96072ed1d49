"""python -m train_jobs.predict: answers for sentences, or for a file through Ray Data."""

from __future__ import annotations

import argparse
import json
import logging
import sys
import tempfile
from collections import deque
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import ray
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from mtl_core.answers import flat_types, flatten
from mtl_core.artifact import read_manifest
from mtl_core.command import run_command
from mtl_core.errors import ConfigError, there_is
from mtl_core.forks import forked_workers
from mtl_core.predictor import Predictor
from mtl_core.runtime import RuntimeName
from mtl_core.storage import download, exists, fetch, remove, upload
from train_jobs.cluster import cpu_share, ray_cluster, total
from train_jobs.tables import (
    ROWS_AT_ONCE,
    Row,
    TableWriter,
    check_suffix,
    column_types,
    count_rows,
    read_rows,
)

if TYPE_CHECKING:
    from ray.data import Dataset

BAD_ROWS = ".bad.jsonl"
RUNTIMES: tuple[RuntimeName, ...] = ("torch-fp32", "auto")
"""Those that every artifact and machine has."""
EPILOG = """examples:
  python -m train_jobs.predict --artifact runs/demo/artifact --text "Maria loved Lisbon."
  python -m train_jobs.predict --artifact runs/demo/artifact --input in.jsonl --output out.parquet

A file keeps its columns and gains predicted_<task> (and predicted_<task>_score). Rows that cannot
be read are left out and named, with their line and reason, in OUTPUT.bad.jsonl."""


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m train_jobs.predict",
        description="Predict with an artifact.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--artifact", required=True, help="artifact folder or s3:// URL")
    parser.add_argument("--text", nargs="+", action="extend", default=[], help="sentences")
    parser.add_argument("--task", action="append", help="only this task; may be repeated")
    parser.add_argument("--json", action="store_true", help="with --text: print JSON, a line each")
    parser.add_argument("--input", help=".jsonl, .csv or .parquet file or s3:// URL")
    parser.add_argument("--output", help="the same, to write")
    parser.add_argument("--column", default="text", help="the input's text column (%(default)s)")
    parser.add_argument("--workers", type=int, help="model processes; as many as fit when absent")
    parser.add_argument(
        "--runtime",
        choices=RUNTIMES,
        default=RUNTIMES[0],
        help="how the encoder runs: as scored, or as fast as in servers (auto) (%(default)s)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace OUTPUT if it exists")
    options = parser.parse_args(arguments)
    if bool(options.text) == bool(options.input):
        raise ConfigError("give either --text or --input")
    if bool(options.input) != bool(options.output):
        raise ConfigError("--input needs --output, and --text takes none")
    if options.workers is not None and options.workers < 1:
        raise ConfigError(f"--workers: expected 1 or more, got {options.workers}")
    artifact = fetch(options.artifact)
    check_tasks(artifact, options.task)
    if options.text:
        predictor = Predictor.load(artifact, runtime=options.runtime)
        show(options.text, predictor.predict(options.text, options.task), options.json)
        return
    read_manifest(artifact)  # all of it, before processes are started that could only die of it
    with tempfile.TemporaryDirectory() as scratch:
        target = options.output
        is_url = "://" in target
        if is_url and exists(target) and not options.overwrite:
            raise ConfigError(f"--output: {target} exists; remove it, or add --overwrite")
        written, bad = predict_file(
            options.artifact,
            download(options.input, Path(scratch)),
            Path(scratch, "output", Path(target).name) if is_url else Path(target),
            options.column,
            options.task,
            options.workers,
            options.overwrite,
            options.runtime,
        )
        if is_url:
            upload(Path(scratch, "output"), target.rpartition("/")[0])
            if not bad:
                remove(f"{target}{BAD_ROWS}")  # of an earlier run
    side = f", {bad} bad row(s) to {target}{BAD_ROWS}" if bad else ""
    print(f"{written} row(s) written to {target}{side}")


def check_tasks(artifact: str | Path, tasks: Sequence[str] | None) -> None:
    known = list(read_manifest(artifact, check_files=False).tasks)
    for task in tasks or ():
        if task not in known:
            raise ConfigError(f"--task: unknown task {task!r}; {there_is(known, task)}")


def show(texts: Sequence[str], predictions: Sequence[Mapping[str, Any]], as_json: bool) -> None:
    """Print answers for people, or a JSON object a line."""
    if as_json:
        # Escapes are read by every JSON parser; signs that the output lacks would be lost.
        escape = "utf" not in (sys.stdout.encoding or "").lower()
        for text, prediction in zip(texts, predictions, strict=True):
            print(json.dumps({"text": text, **prediction}, ensure_ascii=escape))
        return
    console = Console(highlight=False)
    for text, prediction in zip(texts, predictions, strict=True):
        line = Text(text, style="bold")
        for task, answer in prediction.items():
            line.append(f"\n  {task:<14} ", style="dim")
            if isinstance(answer, list):
                found = [f"{e['word']} ({e['entity_group']} {e['score']:.2f})" for e in answer]
                line.append(", ".join(found) or "none", style="not bold")
            elif "labels" in answer:
                line.append(", ".join(answer["labels"]) or "none", style="not bold")
            else:
                line.append(f"{answer['label']} ({answer['score']:.2f})", style="not bold")
        console.print(line, soft_wrap=True)


class Predict:
    """One process of the actor pool: the model is loaded once."""

    def __init__(
        self,
        artifact: str,
        tasks: Sequence[str] | None,
        threads: int,
        gpu: bool,
        runtime: RuntimeName,
    ) -> None:
        device = "cuda" if gpu else "cpu"
        self.predictor = Predictor.load(fetch(artifact), device, runtime, threads)
        self.tasks = tasks

    def __call__(self, batch: dict[str, np.ndarray[Any, Any]]) -> dict[str, Any]:
        answers = self.predictor.predict([str(text) for text in batch["text"]], self.tasks)
        columns = [json.dumps(flatten(answer)) for answer in answers]
        return {"number": batch["number"], "prediction": np.array(columns, dtype=object)}


def predict_file(
    artifact: str,
    source: Path,
    target: Path,
    column: str,
    tasks: Sequence[str] | None = None,
    workers: int | None = None,
    overwrite: bool = False,
    runtime: RuntimeName = RUNTIMES[0],
) -> tuple[int, int]:
    """Predict for every row of a file.

    Texts stream through a pool of model processes; this process reads the file once more in
    step with the answers, so that columns keep their types and rows their order.

    Returns:
        Number of rows written, and of rows named in the side file.

    Raises:
        ConfigError: a path or column that cannot be used; OUTPUT exists or cannot hold the rows.
    """
    side = target.with_name(target.name + BAD_ROWS)
    check_files(source, target, column, overwrite)
    types = {}
    if target.suffix == ".parquet":
        types = column_types(source)
        manifest = read_manifest(fetch(artifact), check_files=False)
        kinds = {task: manifest.tasks[task]["kind"] for task in tasks or manifest.tasks}
        types |= {f"predicted_{name}": kind for name, kind in flat_types(kinds).items()}
    written = bad = 0
    with (
        forked_workers("train_jobs.preload") as scripts,
        ray_cluster(scripts),
        closing(_answers(artifact, source, column, tasks, workers, runtime)) as answers,
        TableWriter(target, types) as output,
        TableWriter(side) as rejected,
        Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("rows"),
            TimeRemainingColumn(),
        ) as progress,
    ):
        bar = progress.add_task("predicting", total=count_rows(source))
        for row in read_rows(source):
            problem = row_problem(row, column)
            if problem:
                bad += 1
                rejected.write({"line": row.number, "error": problem, "row": row.values})
            else:
                number, prediction = next(answers)
                assert number == row.number
                named = {f"predicted_{name}": value for name, value in prediction.items()}
                output.write({**row.values, **named})
                written += 1
            progress.advance(bar)
        assert next(answers, None) is None
    if not bad:
        side.unlink(missing_ok=True)
    return written, bad


def check_files(source: Path, target: Path, column: str, overwrite: bool) -> None:
    """Refuse what cannot work before a model is loaded."""
    check_suffix("--input", source)
    check_suffix("--output", target)
    if not source.is_file():
        raise ConfigError(f"--input: no file {source}")
    if target.exists() and not overwrite:
        raise ConfigError(f"--output: {target} exists; remove it, or add --overwrite")
    rows = read_rows(source)
    first = next((row for row in rows if row.error is None), None)
    if first is None:
        raise ConfigError(f"--input: {source} has no readable row")
    if column not in first.values:
        raise ConfigError(
            f"--column: {source} has no column {column!r}; it has {', '.join(first.values)}"
        )
    if source.suffix == ".csv":
        deque(rows, maxlen=0)  # a quote that is never closed shows at the end


def row_problem(row: Row, column: str) -> str | None:
    """Why a row cannot be predicted for, or None."""
    if row.error:
        return row.error
    text = row.values.get(column)
    if not isinstance(text, str):
        return f"column {column!r} holds {type(text).__name__}, not text"
    return None if text.strip() else f"column {column!r} is empty or only spaces"


def model_processes(workers: int | None, free: int) -> tuple[int, int, int]:
    """How many there are, the CPUs that each asks for as threads, and the free GPUs to take.

    A CPU is left to what feeds them, and none asks for more than a node has for it. GPUs that are
    too few now are not waited for, since others may keep theirs for days.
    """
    cpus = total("CPU")
    gpus = free if free >= (workers or 1) else 0
    pool = workers or max(1, gpus or cpus - 1)
    threads = 1 if gpus else min(cpu_share(pool, use_gpu=False), max(1, (cpus - 1) // pool))
    return pool, threads, gpus


def untaken_gpus(processes: int, free: int) -> str:
    """What to tell whoever has GPUs of which no model process takes one."""
    advice = f"--workers {free} would use the {free} free" if free else "others use them now"
    return f"{total('GPU')} GPU(s) for {processes} model process(es): predicting on CPUs; {advice}"


def _answers(
    artifact: str,
    source: Path,
    column: str,
    tasks: Sequence[str] | None,
    workers: int | None,
    runtime: RuntimeName,
) -> Generator[tuple[int, dict[str, Any]], None, None]:
    """Row number and prediction of each good row, in order."""
    from ray.data import ActorPoolStrategy, DataContext  # a second that sentences need not wait

    logging.getLogger("ray.data").setLevel(logging.ERROR)  # after its import, which sets it too
    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.execution_options.preserve_order = True
    free = int(ray.available_resources().get("GPU", 0))  # type: ignore[no-untyped-call]
    pool, threads, gpus = model_processes(workers, free)
    if total("GPU") and not gpus:
        print(untaken_gpus(pool, free))
    where = artifact if "://" in artifact else str(fetch(artifact).absolute())
    dataset = _texts(source, column).map_batches(
        Predict,
        fn_constructor_args=(where, tasks, threads, gpus > 0, runtime),
        batch_size=256,
        compute=ActorPoolStrategy(size=pool),
        num_cpus=0 if gpus else threads,
        num_gpus=1 if gpus else 0,
    )
    for batch in dataset.iter_batches(batch_size=ROWS_AT_ONCE):
        for number, prediction in zip(batch["number"], batch["prediction"], strict=True):
            yield int(number), json.loads(prediction)


def _texts(source: Path, column: str) -> Dataset:
    """The good rows' numbers and texts as a stream of blocks."""
    import pyarrow as pa
    from ray.data.block import BlockMetadata
    from ray.data.datasource import Datasource, ReadTask

    path = source.absolute()

    def blocks() -> Iterator[pa.Table]:
        numbers: list[int] = []
        texts: list[str] = []
        for row in read_rows(path):
            if row_problem(row, column) is None:
                numbers.append(row.number)
                texts.append(row.values[column])
            if len(numbers) == ROWS_AT_ONCE:
                yield pa.table({"number": numbers, "text": texts})
                numbers, texts = [], []
        yield pa.table(
            {"number": pa.array(numbers, pa.int64()), "text": pa.array(texts, pa.string())}
        )

    class Texts(Datasource):
        def estimate_inmemory_data_size(self) -> int:
            return path.stat().st_size

        def get_read_tasks(self, *_: Any, **__: Any) -> list[ReadTask]:
            metadata = BlockMetadata(
                num_rows=None,
                size_bytes=path.stat().st_size,
                input_files=(str(path),),
                exec_stats=None,
            )
            return [ReadTask(blocks, metadata)]

    # The file is on this machine, and a cluster's head may have no CPUs to give.
    here = {"ray.io/node-id": ray.get_runtime_context().get_node_id()}
    dataset: Dataset = ray.data.read_datasource(
        Texts(),  # type: ignore[no-untyped-call]
        num_cpus=0,
        label_selector=here,
    )
    return dataset


if __name__ == "__main__":
    run_command(main)
