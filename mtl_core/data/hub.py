"""Datasets from the Hugging Face Hub, or folders in its layouts, as tables with class names."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from mtl_core.config import SourceConfig, Split, TaskConfig, expand_path
from mtl_core.data.files import SPLIT_NAMES
from mtl_core.data.formats import BadRow, Column, Row, Table
from mtl_core.data.tags import split_tag
from mtl_core.errors import DataError, there_is

OFFLINE = (
    "to work offline, run `load_dataset(…).save_to_disk(folder)` on a machine that reaches the Hub "
    "and give the folder as `hub:`, or copy its HF_HOME cache here, or give files as `path:`"
)


def read_hub(
    source: SourceConfig,
    tasks: Mapping[str, TaskConfig],
    splits: Iterable[Split],
    wanted: Sequence[Column],
) -> tuple[dict[Split, Table], dict[str, tuple[str, ...]]]:
    """The splits that are there, and each task's labels where the dataset declares their order.

    `source.hub` is an id on the Hub, a folder that `save_to_disk` wrote, or a folder of Parquet
    files. ClassLabel integers become names; -1, which stands for no label, becomes None.

    Raises:
        DataError: the dataset, its subset or a split is not there, or the Hub is out of reach.
    """
    found = open_hub(source, splits)
    tables = {split: to_table(data, title, wanted) for split, (data, title) in found.items()}
    labels = declared_labels(source, tasks, [data for data, _ in found.values()])
    return tables, labels


def open_hub(source: SourceConfig, splits: Iterable[Split]) -> dict[Split, tuple[Any, str]]:
    """The splits that are there, mapped from disk, each with its name in messages."""
    datasets = _load(source)
    found: dict[Split, tuple[Any, str]] = {}
    for split in splits:
        name = source.splits.get(split)
        if name is None:
            name = next((name for name in SPLIT_NAMES[split] if name in datasets), None)
            if name is None and split != "train":
                continue
        if name not in datasets:
            raise DataError(
                f"{source.title}: no split {name or split!r}; map it in `splits:`; "
                + there_is(datasets, name or split)
            )
        found[split] = datasets[name], f"{source.title} [{name}]"
    return found


def declared_labels(
    source: SourceConfig, tasks: Mapping[str, TaskConfig], datasets: Iterable[Any]
) -> dict[str, tuple[str, ...]]:
    """Each task's labels, from the first of the datasets that declares their order."""
    labels: dict[str, tuple[str, ...]] = {}
    for data in datasets:
        for task, column in source.task_columns.items():
            if column in data.features and task not in labels:
                where = f"{source.title}: columns.{task}"
                labels[task] = _label_order(data.features[column], tasks[task], where)
    return {task: names for task, names in labels.items() if names}


def _load(source: SourceConfig) -> dict[str, Any]:
    import datasets

    location = expand_path(source.hub or "")
    if (os.path.isabs(location) or location.startswith(".")) and not os.path.isdir(location):
        raise DataError(f"{location}: no such folder")
    files = os.listdir(location) if os.path.isdir(location) else []
    try:
        if "dataset_dict.json" in files or "state.json" in files:
            loaded = datasets.load_from_disk(location)
        else:
            loaded = datasets.load_dataset(location, source.subset, revision=source.revision)
    except datasets.exceptions.DatasetNotFoundError as error:
        fix = "Check the id and revision; for a private one log in: `hf auth login`"
        raise DataError(f"{source.title}: {error} {fix}") from error
    except ConnectionError as error:
        # Without a cause nobody tries again: offline mode is no failure that passes.
        cause = None if datasets.config.HF_HUB_OFFLINE else error
        raise DataError(f"{source.title}: {error}; {OFFLINE}") from cause
    except ValueError as error:
        raise DataError(f"{source.title}: {error}; set `subset:` to one that there is") from error
    except Exception as error:  # builders raise what their files made them raise
        raise DataError(f"{source.title}: `datasets` cannot load it ({error})") from error
    return dict(loaded) if isinstance(loaded, dict) else {"train": loaded}


def to_table(data: Any, title: str, wanted: Sequence[Column], first: int = 1) -> Table:
    """The rows of a dataset, class numbers decoded; the first of them is called row `first`."""
    names = [name for name in data.column_names if name in wanted]
    coded = {name: data.features[name] for name in names if _class_names(data.features[name])}
    items = data.with_format(None).select_columns(names).to_list() if names else []
    rows: list[tuple[str, Row | BadRow]] = []
    for number, item in enumerate(items, start=first):
        for name, feature in coded.items():
            item[name] = _decode(feature, item[name])
        rows.append((f"{title}, row {number}", item))
    return Table(title, tuple(data.column_names), rows)


def _decode(feature: Any, value: Any) -> Any:
    if isinstance(value, list):
        return [_decode(feature.feature, item) for item in value]
    if isinstance(value, dict):
        return {key: _decode(feature[key], item) for key, item in value.items()}
    names = getattr(feature, "names", None)
    if names is None or value is None:
        return value
    return names[value] if value >= 0 else None


def _class_names(feature: Any) -> list[str]:
    """The names of the ClassLabel in a feature, in a list, or in a list of entities."""
    if isinstance(feature, dict):
        return _class_names(feature.get("label"))
    if hasattr(feature, "feature"):
        return _class_names(feature.feature)
    return list(getattr(feature, "names", None) or ())


def _label_order(feature: Any, task: TaskConfig, where: str) -> tuple[str, ...]:
    """Declared labels; for token classification the entity types, as they first appear."""
    names = _class_names(feature)
    if task.kind != "token_classification" or isinstance(getattr(feature, "feature", None), dict):
        return tuple(names)
    try:
        types = [split_tag(name)[1] for name in names]
    except DataError as error:
        raise DataError(f"{where}: {error}") from error
    return tuple(dict.fromkeys(name for name in types if name))
