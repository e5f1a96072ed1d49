"""Sources to a corpus: rows to examples, what becomes validation, and how many rows are kept."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from mtl_core.config import SPLITS, SourceConfig, Split, TaskConfig, TaskKind
from mtl_core.data.examples import Corpus, Example, labels_in
from mtl_core.data.files import read_files
from mtl_core.data.formats import BadRow, Column, Table
from mtl_core.data.rows import RowReader
from mtl_core.errors import DataError, there_is

Examples = dict[Split, list[Example]]
DEMO_COLUMNS: dict[Column, TaskKind] = {
    "sentiment": "classification",
    "entities": "token_classification",
}
UNLABELLED: dict[Split, str] = {
    "validation": "a part of train takes its place",
    "test": "it is not scored",
}
"""What becomes of a split without any task's column."""


def read_corpus(
    sources: Sequence[SourceConfig],
    tasks: Mapping[str, TaskConfig],
    seed: int,
    splits: Sequence[Split] = SPLITS,
    single: Split = "train",
) -> Corpus:
    """Read every source and join them, in order.

    Args:
        sources: where the labelled texts are.
        tasks: every task that a source's columns name.
        seed: draws carved validation splits and limited training rows.
        splits: which to read; each is a key of the corpus, empty when no source has it.
        single: the split that a file on its own is.

    Raises:
        DataError: something in a source cannot be read; the message names the place and the fix.
        ConfigError: a path holds a ${VARIABLE} that is not set.
    """
    examples: dict[str, list[Example]] = {split: [] for split in splits}
    labels: dict[str, tuple[str, ...]] = {}
    skipped: Counter[str] = Counter()
    notes: list[str] = []
    carved = False
    for source in sources:
        part = read_source(source, tasks, seed, splits, single)
        for split in splits:
            examples[split] += part.splits[split]
        for task, names in part.labels.items():
            labels[task] = tuple(dict.fromkeys(labels.get(task, ()) + names))
        skipped.update(part.skipped)
        notes += part.notes
        carved |= part.carved
    if "train" in splits and not all(examples[split] for split in splits if split != "test"):
        where = ", ".join(source.title for source in sources)
        raise DataError(
            f"{where}: no row drawn for train or for validation has a label; draw more "
            "(limit, validation_fraction), or leave out rows without labels"
        )
    return Corpus(examples, labels, dict(skipped), tuple(notes), carved)


def read_source(
    source: SourceConfig,
    tasks: Mapping[str, TaskConfig],
    seed: int,
    splits: Sequence[Split] = SPLITS,
    single: Split = "train",
) -> Corpus:
    """Read one source; `read_corpus` says how.

    A split of only rows without any label (GLUE's test) counts as missing, and a missing validation
    split is carved out of train. Such rows of other splits are dropped once rows were drawn, so
    that the same ones are drawn whichever of these tasks are learned. Train and validation are
    always read together, so that neither depends on which of them was asked for. A label stays
    known if the draw left no row of it to train on.
    """
    needed = set(splits)
    if needed & {"train", "validation"}:
        needed |= {"train", "validation"}
    ordered = [split for split in SPLITS if split in needed]
    examples, labels, skipped, notes = _read(source, tasks, seed, ordered, single)
    found = {split: rows for split, rows in examples.items() if labelled(rows)}
    carved = "validation" in needed - found.keys()
    if "train" in needed:
        train = found.get("train", [])
        _divide(source, found, seed)
        for task in source.task_columns:
            names = labels_in(task, train)
            if names != labels_in(task, found["train"]):  # the draw took a label's last row
                labels[task] = tuple(dict.fromkeys((*labels.get(task, ()), *sorted(names))))
    kept: dict[str, list[Example]] = {split: labelled(found.get(split, [])) for split in splits}
    return Corpus(kept, labels, {source.title: skipped} if skipped else {}, notes, carved)


def _read(
    source: SourceConfig,
    tasks: Mapping[str, TaskConfig],
    seed: int,
    splits: Sequence[Split],
    single: Split,
) -> tuple[Examples, dict[str, tuple[str, ...]], int, tuple[str, ...]]:
    """What the source itself has: examples by split, declared labels, skipped rows, notes."""
    if source.demo:
        return _read_demo(source, tasks, seed), {}, 0, ()
    tables, labels = read_tables(source, tasks, splits, single)
    if "train" in splits or single != "train":  # else another split may have what this one lacks
        check_columns(source, tables)
    notes = check_splits(source, tables)
    examples, skipped = to_examples(source, tasks, tables)
    return examples, labels, skipped, notes


def read_tables(
    source: SourceConfig, tasks: Mapping[str, TaskConfig], splits: Sequence[Split], single: Split
) -> tuple[dict[Split, Table], dict[str, tuple[str, ...]]]:
    """The splits that a file, folder or Hub dataset has, and the label order that it declares."""
    wanted = list(source_columns(source).values())
    if source.hub is not None:
        from mtl_core.data.hub import read_hub

        return read_hub(source, tasks, splits, wanted)
    return read_files(source, splits, wanted, single), {}


def source_columns(source: SourceConfig) -> dict[str, Column]:
    """Where text, words and every task's labels stand."""
    columns: dict[str, Column] = dict(source.columns)
    if source.format == "conll":
        columns.setdefault("words", 0)
    return columns


def _read_demo(source: SourceConfig, tasks: Mapping[str, TaskConfig], seed: int) -> Examples:
    from mtl_core.data.demo import demo_corpus

    for task, name in source.task_columns.items():
        kind = DEMO_COLUMNS.get(name)
        if kind is None:
            problem = there_is(DEMO_COLUMNS, name)
            raise DataError(f"demo: columns.{task}: no column {name!r}; {problem}")
        if tasks[task].kind != kind:
            raise DataError(f"demo: column {name!r} is for `tasks.{task}.kind: {kind}` only")
    corpus = demo_corpus(seed)
    examples: Examples = {}
    for split in SPLITS:
        examples[split] = []
        for row in corpus.get(split, ()):
            named = {task: row.targets.get(str(name)) for task, name in source.task_columns.items()}
            targets = {task: target for task, target in named.items() if target is not None}
            examples[split].append(Example(row.text, targets, row.words))
    return examples


def check_columns(source: SourceConfig, tables: Mapping[Split, Table]) -> None:
    """Every column stands in some split."""
    columns = source_columns(source)
    everything = dict.fromkeys(name for table in tables.values() for name in table.columns)
    for role, column in columns.items():
        if everything and column not in everything:
            raise DataError(
                f"{source.title}: columns.{role}: no column {column!r}; "
                + there_is(everything, column)
            )


def check_splits(source: SourceConfig, tables: Mapping[Split, Table]) -> tuple[str, ...]:
    """Every split has the text or the words; what to tell of one that lacks all labels' columns.

    A column that is there without a value is not told: so comes GLUE's test split.

    Raises:
        DataError: train lacks them.
    """
    notes = []
    labels = list(source.task_columns.values())
    for split, table in tables.items():
        check_content(source, table)
        if table.columns and not set(labels) & set(table.columns):
            problem = f"{table.title}: no column {labels[0]!r}"
            known = there_is(table.columns, labels[0])
            if split == "train":
                raise DataError(f"{problem}; {known}")
            notes.append(f"{problem}, so {UNLABELLED[split]}; {known}")
    return tuple(notes)


def check_content(source: SourceConfig, table: Table) -> None:
    """The table has the text or the words."""
    columns = source_columns(source)
    content = [columns[role] for role in ("text", "words") if role in columns]
    if table.columns and not set(content) & set(table.columns):
        raise DataError(
            f"{table.title}: no column {content[0]!r}; " + there_is(table.columns, content[0])
        )


def to_examples(
    source: SourceConfig, tasks: Mapping[str, TaskConfig], tables: Mapping[Split, Table]
) -> tuple[Examples, int]:
    """The rows of every table, labelled or not, and how many rows were skipped on request.

    Raises:
        DataError: a row that cannot be read; the message names its place.
    """
    columns = source_columns(source)
    kinds = {task: tasks[task].kind for task in source.task_columns}
    for task, kind in kinds.items():
        if isinstance(columns[task], int) and kind != "token_classification":
            problem = f"a numbered column has a value a word, which {kind} cannot take"
            raise DataError(f"{source.title}: columns.{task}: {problem}")
    reader = RowReader(columns, kinds)
    examples: Examples = {}
    skipped = 0
    for split, table in tables.items():
        examples[split] = []
        for place, row in table.rows:
            try:
                if isinstance(row, BadRow):
                    raise row
                example = reader.read(row)
            except BadRow as error:
                if source.on_bad_row == "error":
                    hint = "`on_bad_row: skip` passes such rows over"
                    raise DataError(f"{place}: {error}; {hint}") from error
                skipped += 1
                continue
            except DataError as error:
                raise DataError(f"{place}: {error}") from error
            examples[split].append(example)
    return examples, skipped


def labelled(rows: Iterable[Example]) -> list[Example]:
    """Those that carry a label."""
    return [row for row in rows if row.targets]


def _divide(source: SourceConfig, examples: Examples, seed: int) -> None:
    """Carve validation where there is none, then limit train; both keep the rows' order."""
    train = examples.get("train")
    if not train:
        raise DataError(f"{source.title}: the train split has no readable row with a label")
    if not examples.get("validation"):
        count = max(1, round(len(train) * source.validation_fraction))
        examples["validation"], train = _draw(train, count, f"validation {seed}")
        if not train:
            raise DataError(f"{source.title}: a single training row; add a validation split")
    if source.limit is not None and source.limit < len(train):
        train, _ = _draw(train, source.limit, f"limit {seed}")
    examples["train"] = train


def _draw(rows: list[Example], count: int, seed: str) -> tuple[list[Example], list[Example]]:
    """`count` rows and the others, both in their old order."""
    drawn = set(random.Random(seed).sample(range(len(rows)), count))
    return (
        [row for index, row in enumerate(rows) if index in drawn],
        [row for index, row in enumerate(rows) if index not in drawn],
    )
