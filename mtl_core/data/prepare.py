"""From an experiment to encoded splits: read, check, settle labels, tokenise; each once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mtl_core.artifact import load_config, read_manifest
from mtl_core.config import SPLITS, Experiment, SourceConfig, Split, TaskConfig
from mtl_core.data.cache import encode_cached, load_split
from mtl_core.data.encoding import EncodedSplit, Labels, check_labels, resolve_labels
from mtl_core.data.examples import Corpus, DataError
from mtl_core.data.sources import read_corpus
from mtl_core.encoder import load_tokenizer


@dataclass(frozen=True)
class Data:
    """Encoded splits with the content keys that caches go by."""

    splits: dict[str, EncodedSplit]
    keys: dict[str, str]
    labels: dict[str, tuple[str, ...]]
    skipped: dict[str, int]
    """Unreadable rows left out on request, per source."""


def prepare(experiment: Experiment) -> Data:
    """Read and encode an experiment's data; a second call with the same content only maps files.

    Raises:
        DataError: the user's data cannot be used as configured.
        EncoderError: the tokenizer cannot be loaded.
    """
    corpus = read_corpus(experiment.data, experiment.tasks, experiment.seed)
    if not corpus.splits["train"]:
        raise DataError("no training rows: check the sources' `splits` and `columns`")
    labels = resolve_labels(corpus, with_known_labels(experiment, corpus))
    data = encode(corpus, experiment, labels)
    _check_metric(experiment.training.metric, data.splits["validation"])
    return data


def _check_metric(metric: str, validation: EncodedSplit) -> None:
    task = metric.partition("/")[0]
    if metric != "mean" and not validation.present[task].any():
        raise DataError(
            f"training.metric: {metric} cannot pick the best epoch, since no text in validation "
            f"has a label of task {task!r}; label some, or take `mean` or another task"
        )


def encode(corpus: Corpus, experiment: Experiment, labels: Labels) -> Data:
    """Tokenise every split of a corpus that has rows, with labels already settled."""
    revision = experiment.encoder.revision if experiment.init_from is None else None
    tokenizer = load_tokenizer(encoder_source(experiment), revision)
    keys, splits = {}, {}
    for name, examples in corpus.splits.items():
        if examples:
            keys[name], splits[name] = encode_cached(
                examples, experiment.tasks, labels, tokenizer, experiment.encoder.max_length
            )
    return Data(splits, keys, dict(labels), corpus.skipped)


def reopen(experiment: Experiment, labels: Labels, keys: Mapping[str, str]) -> Data:
    """What `prepare` made, in another process: mapped if it is on this machine, else made again."""
    found = {name: load_split(key) for name, key in keys.items()}
    splits = {name: split for name, split in found.items() if split is not None}
    if len(splits) == len(keys):
        return Data(splits, dict(keys), dict(labels), {})
    corpus = read_corpus(experiment.data, experiment.tasks, experiment.seed, SPLITS)
    return encode(corpus, experiment, labels)


def prepare_scored(
    artifact: str | Path,
    split: Split,
    sources: Sequence[SourceConfig] | None = None,
    limit: int | None = None,
) -> tuple[Labels, EncodedSplit]:
    """Labelled texts to score an artifact on, as its encoder sees them, and their tasks' labels.

    Args:
        artifact: the folder.
        split: of the data it was made from, or of the folders that `sources` name.
        sources: other data, of which a file on its own is taken whole.
        limit: texts to take, from the beginning; all when absent.

    Raises:
        ArtifactError: the artifact is damaged.
        DataError: the split has no rows, or a label the artifact does not know.
    """
    manifest = read_manifest(artifact, check_files=False)
    experiment = load_config(artifact)
    given = experiment.data if sources is None else sources
    known = {task: manifest.tasks[task] for source in given for task in source.task_columns}
    labels = {task: tuple(info["labels"]) for task, info in known.items()}
    tasks = {
        task: TaskConfig(kind=info["kind"], labels=labels[task]) for task, info in known.items()
    }
    single: Split = "train" if sources is None else split
    corpus = read_corpus(given, tasks, experiment.seed, [split], single)
    if limit is not None:
        corpus.splits[split] = corpus.splits[split][:limit]
    if not corpus.splits[split]:
        if sources is None:
            raise DataError(f"no labelled rows in {split}: choose another --split, or give --data")
        where = ", ".join(source.title for source in sources)
        raise DataError(f"{where}: no labelled rows; give a file, or a folder with one for {split}")
    check_labels(corpus, tasks, labels)
    start = experiment.model_copy(update={"tasks": tasks, "init_from": str(artifact)})
    return labels, encode(corpus, start, labels).splits[split]


def encoder_source(experiment: Experiment) -> str:
    """The model id or folder that the tokenizer comes from."""
    if experiment.init_from is not None:
        return f"{experiment.init_from}/encoder"
    return experiment.encoder.model


def with_known_labels(experiment: Experiment, corpus: Corpus) -> Mapping[str, TaskConfig]:
    """The tasks, with the label order of an `init_from` head where that head can go on learning."""
    if experiment.init_from is None:
        return experiment.tasks
    known = read_manifest(experiment.init_from).tasks
    fresh = resolve_labels(corpus, experiment.tasks)
    return {
        name: config.model_copy(update={"labels": tuple(known[name]["labels"])})
        if name in known and set(fresh[name]) <= set(known[name]["labels"])
        else config
        for name, config in experiment.tasks.items()
    }
