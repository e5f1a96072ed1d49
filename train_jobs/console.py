"""What a person at the terminal sees: errors without tracebacks, progress, tables."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from rich.console import Console, Group
from rich.live import Live
from rich.padding import Padding
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from mtl_core.metrics import PRIMARY, primary_scores

if TYPE_CHECKING:
    from mtl_core.config import Experiment, TaskKind
    from mtl_core.data.prepare import Data

SCORE_COLUMNS = {
    "accuracy": ("accuracy", "exact_match", "token_accuracy"),
    "precision": ("precision",),
    "recall": ("recall",),
    "F1": ("macro_f1", "f1"),
    "micro F1": ("micro_f1",),
}


class Progress:
    """Live table on a terminal, a line every few seconds elsewhere."""

    def __init__(
        self, epochs: int, kinds: Mapping[str, TaskKind], seconds_between_lines: float = 10.0
    ) -> None:
        self.console = Console(stderr=False, highlight=False)
        self.epochs, self.kinds = epochs, kinds
        self.rows: dict[str, dict[str, str]] = {task: {} for task in kinds}
        self.between = seconds_between_lines
        self.state: dict[str, Any] = {"note": "starting workers"}
        self.started: tuple[float, float] | None = None
        self.last_line = 0.0
        self.live = Live(console=self.console, refresh_per_second=4, get_renderable=self._render)

    def __enter__(self) -> Progress:
        if self.console.is_terminal:
            self.live.__enter__()
        else:
            self.console.print("starting workers …")
        return self

    def __exit__(self, *details: Any) -> None:
        if self.console.is_terminal:
            self.live.__exit__(*details)

    def show(self, event: str, row: Mapping[str, Any]) -> None:
        """Take one progress event."""
        if event == "start":
            self.state.update(note="training", epoch=float(row["epoch"]))
            self.started = (time.monotonic(), float(row["epoch"]))
            self.note(f"{row['workers']} worker(s) on {row['device']}, from step {row['step']}")
        elif event == "features":
            self.note(
                f"{row['split']}: {100 * row['done']:.0f} % of {row['texts']} texts are through "
                f"the {row['layers']} frozen layers"
            )
        elif event == "shard":
            self.note(
                f"shard {row['shard']} of {row['shards']}: {row['texts']:,} labelled texts "
                f"in {row['rows']:,} rows"
            )
        elif event == "step":
            self.state.update(row)
            for task in self.rows:
                if f"loss/{task}" in row:
                    self.rows[task]["loss"] = f"{row[f'loss/{task}']:.4f}"
            if time.monotonic() - self.last_line > self.between:
                self.note(self._step_line())
        elif event == "validation":
            self._validated(row)
        elif event == "stopped":
            self.note(f"stopped early: {row['reason']}")

    def _validated(self, row: Mapping[str, Any]) -> None:
        self.state.update(epoch=row["epoch"])
        for task, value in primary_scores(row, "validation").items():
            self.rows[task]["score"] = f"{PRIMARY[self.kinds[task]]} {100 * value:.2f}"
        parts = [f"{task} {values.get('score', '')}" for task, values in self.rows.items()]
        best = " (best so far)" if row.get("best") else ""
        self.note(f"epoch {row['epoch']:g}/{self.epochs} validation: {', '.join(parts)}{best}")

    def _step_line(self) -> str:
        state = self.state
        losses = " ".join(f"{t} {v['loss']}" for t, v in self.rows.items() if "loss" in v)
        return (
            f"epoch {state['epoch']:.2f}/{self.epochs} step {state['step']} loss {losses} "
            f"{state['tokens_per_second']:,.0f} tokens/s ETA {self._eta()}"
        )

    def _eta(self) -> str:
        if self.started is None:
            return "?"
        since, first = self.started
        done = self.state["epoch"] - first
        if done <= 0:
            return "?"
        left = (time.monotonic() - since) / done * (self.epochs - self.state["epoch"])
        return f"{int(left) // 60}:{int(left) % 60:02d}"

    def note(self, text: str) -> None:
        """Print a line that stays, unless the output is full or closed: training goes on.

        For a closed pipe Rich turns to /dev/null and raises SystemExit.
        """
        self.last_line = time.monotonic()
        with contextlib.suppress(OSError, SystemExit):
            self.console.print(text, soft_wrap=True)

    def _render(self) -> Group:
        epoch = float(self.state.get("epoch", 0.0))
        bar = ProgressBar(total=self.epochs, completed=epoch, width=40)
        words = self.state.get("note", "")
        if "step" in self.state:
            words = (
                f"epoch {epoch:.2f}/{self.epochs}  step {self.state['step']}  "
                f"{self.state['tokens_per_second']:,.0f} tokens/s  ETA {self._eta()}"
            )
        table = Table("task", "training loss", "validation", box=None, header_style="dim")
        for task, values in self.rows.items():
            table.add_row(task, values.get("loss", ""), values.get("score", ""))
        # A bar alone does not end its line, and the table's head would stand behind it.
        return Group(Text(words), Padding(bar, 0), table)


def announce_reading(experiment: Experiment) -> None:
    """Say why it takes long where the labels of a large corpus have to be looked for."""
    files = [source for source in experiment.data if source.hub is None]  # the Hub declares them
    unnamed = [
        task
        for task, config in experiment.tasks.items()
        if config.labels is None and any(task in source.task_columns for source in files)
    ]
    if unnamed and experiment.training.shard_texts is not None:
        print(f"reading all rows for the labels of {', '.join(unnamed)}; name them under", end=" ")
        print(f"tasks.{unnamed[0]}.labels to start at once …", flush=True)


def describe_data(data: Data) -> None:
    """Say what will be learned from what."""
    if data.shards is not None:
        found, count = data.shards.num_rows, data.shards.num_shards
        print(f"train: {found:,} rows in {count} shards, which are read as they are needed")
    for name, split in data.splits.items():
        rows = ", ".join(f"{task} {int(p.sum())}" for task, p in split.present.items())
        cut = f"; {split.num_truncated} cut at the length limit" if split.num_truncated else ""
        print(f"{name}: {len(split)} texts ({rows}), {len(split.input_ids)} tokens{cut}")
    for line in data.remarks:
        print(line)


def score_table(title: str, scores: Mapping[str, Mapping[str, Mapping[str, float]]]) -> Table:
    """Split → task → metric → value, as percentages; a row for each task and split.

    Precision, recall and F1 are macro averages for labels and entity-level for entities, whose
    accuracy is that of tokens.
    """
    table = Table(title=title, title_justify="left")
    table.add_column("task")
    table.add_column("split")
    columns = {
        name: metrics
        for name, metrics in SCORE_COLUMNS.items()
        if any(m in task for split in scores.values() for task in split.values() for m in metrics)
    }
    for name in columns:
        table.add_column(name, justify="right")
    for task in dict.fromkeys(task for split in scores.values() for task in split):
        for split, values in scores.items():
            if task in values:
                cells = (
                    next((f"{100 * values[task][m]:.2f}" for m in ms if m in values[task]), "")
                    for ms in columns.values()
                )
                table.add_row(task, split, *cells)
        table.add_section()
    return table


def label_table(
    title: str, rows: Mapping[str, Mapping[str, Any]], most: int, elsewhere: str
) -> Table:
    """Precision, recall, F1 and support a label or entity type.

    Of more than `most` the worst, those that never occur last, and a note that all are `elsewhere`.
    """
    table = Table(title=title, title_justify="left")
    table.add_column("label")
    for column in ("precision", "recall", "F1", "support"):
        table.add_column(column, justify="right")
    shown = list(rows.items())
    if len(rows) > most:
        shown = sorted(shown, key=lambda item: (item[1]["support"] == 0, item[1]["f1"]))[:most]
        table.caption = f"the {most} lowest of {len(rows)}; all are in {elsewhere}"
    for name, row in shown:
        numbers = (f"{100 * row[key]:.2f}" for key in ("precision", "recall", "f1"))
        table.add_row(Text(name), *numbers, str(row["support"]))
    return table
