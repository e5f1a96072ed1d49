"""From an experiment to encoded splits: read, check, settle labels, tokenise; each once."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, islice
from pathlib import Path
from typing import Any

from mtl_core.artifact import Manifest, library_versions, load_config, read_manifest
from mtl_core.config import SPLITS, Experiment, SourceConfig, Split, TaskConfig
from mtl_core.data.cache import content_key, encode_cached, load_split
from mtl_core.data.encoding import EncodedSplit, Labels, check_labels, resolve_labels
from mtl_core.data.examples import Corpus
from mtl_core.data.shards import ShardedCorpus, Shards
from mtl_core.data.sources import read_corpus
from mtl_core.data.tags import tag_names
from mtl_core.encoder import tokenizer_of
from mtl_core.errors import DataError, there_is
from mtl_core.folders import cache_root, one_at_a_time
from mtl_core.storage import fetch

TOKENISING = ("tokenizers", "transformers", "multitask-ray", "python")
"""What a split's key may change with; of Python, as strings are written as it knows Unicode."""


@dataclass(frozen=True)
class Data:
    """Encoded splits with the content keys that caches go by."""

    splits: dict[str, EncodedSplit]
    """Without "train" where that is cut into shards."""
    keys: dict[str, str]
    labels: dict[str, tuple[str, ...]]
    skipped: dict[str, int]
    """Unreadable rows left out on request, per source."""
    shards: Shards | None = None
    notes: tuple[str, ...] = ()
    """What else to tell of what was left out or has changed."""
    carved: bool = False
    """Whether rows of train serve as validation."""

    @property
    def remarks(self) -> list[str]:
        """Lines about what was left out, or has changed."""
        counts = self.skipped.items()
        return [f"{source}: {n} unreadable row(s) skipped" for source, n in counts] + [*self.notes]

    def summary(self) -> dict[str, dict[str, Any]]:
        """What a manifest says of each split."""
        return {
            split: {
                "fingerprint": key,
                "texts": self.num_texts(split),
                "carved": self.carved and split != "test",
            }
            for split, key in self.keys.items()
        }

    def num_texts(self, split: str) -> int:
        """How many texts a split has; for shards, how many rows they are made of."""
        if split == "train" and self.shards is not None:
            return self.shards.num_rows
        return len(self.splits[split])


def prepare(experiment: Experiment) -> Data:
    """Read and encode an experiment's data; a second call with the same content only maps files.

    With `training.shard_texts` what is trained on is only found, to be read as training goes.

    Raises:
        DataError: the user's data cannot be used as configured.
        EncoderError: the tokenizer cannot be loaded.
    """
    if experiment.training.shard_texts is not None:
        data = _prepare_shards(experiment)
    else:
        corpus = read_corpus(experiment.data, experiment.tasks, experiment.seed)
        if not corpus.splits["train"]:
            raise DataError("no training rows: check the sources' `splits` and `columns`")
        labels = resolve_labels(corpus, with_known_labels(experiment, corpus))
        data = encode(corpus, experiment, labels)
    _check_class_weights(experiment.tasks, data.labels)
    check_metric("training.metric", experiment.training.metric, data)
    return data


def _prepare_shards(experiment: Experiment, labels: Labels | None = None) -> Data:
    """As `prepare`, with train cut into shards; settled labels spare looking for them."""
    sharded = ShardedCorpus(experiment)
    shards, corpus = sharded.cut()
    if labels is None:
        corpus.splits["train"] = sharded.one_of_each_label(shards)
        labels = resolve_labels(corpus, with_known_labels(experiment, corpus))
        del corpus.splits["train"]
    data = encode(corpus, experiment, labels)
    tokenizer, max_length = tokenizer_of(experiment), experiment.encoder.max_length
    encoding = content_key([], experiment.tasks, labels, tokenizer, max_length)
    reading = {"columns", "encoding", "on_bad_row"}
    rows = [source.model_dump(mode="json", include=reading) for source in experiment.data]
    content = json.dumps([encoding, rows, shards.fingerprint()], sort_keys=True)
    key = hashlib.sha256(content.encode()).hexdigest()[:32]
    shards.save(key)
    return replace(data, keys={"train": key, **data.keys}, shards=shards)


def _check_class_weights(tasks: Mapping[str, TaskConfig], labels: Labels) -> None:
    for task, config in tasks.items():
        known = labels[task]
        if config.kind == "token_classification":
            known += tag_names(known)
        for name in config.class_weights if isinstance(config.class_weights, dict) else ():
            if name not in known:
                raise DataError(
                    f"tasks.{task}.class_weights: no label {name!r}; {there_is(known, name)}"
                )


def check_metric(field: str, metric: str, data: Data) -> None:
    """Refuse to choose by the score of a task that has none in validation.

    Raises:
        DataError: it names the field that asks for this metric.
    """
    task = metric.partition("/")[0]
    if metric != "mean" and not data.splits["validation"].present[task].any():
        raise DataError(
            f"{field}: {metric} cannot tell what is best, since no text in validation has a label "
            f"of task {task!r}; label some, or take `mean` or another task"
        )


def encode(corpus: Corpus, experiment: Experiment, labels: Labels) -> Data:
    """Tokenise every split of a corpus that has rows, with labels already settled."""
    tokenizer = tokenizer_of(experiment)
    keys, splits = {}, {}
    for name, examples in corpus.splits.items():
        if examples:
            keys[name], splits[name] = encode_cached(
                examples, experiment.tasks, labels, tokenizer, experiment.encoder.max_length
            )
    return Data(
        splits, keys, dict(labels), corpus.skipped, notes=corpus.notes, carved=corpus.carved
    )


def reopen(experiment: Experiment, labels: Labels, keys: Mapping[str, str]) -> Data:
    """What `prepare` made, in another process: mapped if it is on this machine, else made again.

    One process of a machine makes it, and the others that want it wait.

    Raises:
        DataError: rows are not those that `prepare` found.
    """
    found = _mapped(experiment, labels, keys)
    if found is None:
        with one_at_a_time(cache_root() / "encoded" / f"{keys['train']}.lock"):
            found = _mapped(experiment, labels, keys) or _made_again(experiment, labels, keys)
    return found


def _mapped(experiment: Experiment, labels: Labels, keys: Mapping[str, str]) -> Data | None:
    """What `prepare` made, if all of it is on this machine."""
    sharded = experiment.training.shard_texts is not None
    shards = Shards.load(keys["train"]) if sharded else None
    whole = [name for name in keys if name != "train" or not sharded]
    found = {name: load_split(keys[name]) for name in whole}
    splits = {name: split for name, split in found.items() if split is not None}
    if len(splits) == len(whole) and (shards is not None) == sharded:
        return Data(splits, dict(keys), dict(labels), {}, shards)
    return None


def _made_again(experiment: Experiment, labels: Labels, keys: Mapping[str, str]) -> Data:
    """The same read and tokenised here, as long as it is the same."""
    if experiment.training.shard_texts is not None:
        data = _prepare_shards(experiment, labels)
    else:
        corpus = read_corpus(experiment.data, experiment.tasks, experiment.seed, SPLITS)
        check_labels(corpus, experiment.tasks, labels)
        data = encode(corpus, experiment, labels)
    other = sorted(name for name, key in keys.items() if data.keys.get(name) != key)
    if other:
        raise DataError(
            f"the texts of {other[0]} on {platform.node()} differ from those that the run's driver "
            "found: bring the copies into line, or give a path that all nodes share"
        )
    asked = {name: split for name, split in data.splits.items() if name in keys}
    return replace(data, splits=asked, keys=dict(keys))


def prepare_scored(
    artifact: str | Path,
    split: Split,
    sources: Sequence[SourceConfig] | None = None,
    limit: int | None = None,
) -> Data:
    """Labelled texts to score an artifact on, as its encoder sees them, and their tasks' labels.

    Args:
        artifact: the folder.
        split: of the data it was made from, or of the folders that `sources` name.
        sources: other data, of which a file on its own is taken whole.
        limit: texts to take, from the beginning; all when absent.

    Raises:
        ArtifactError: the artifact is damaged.
        DataError: the split has no rows, or a label the artifact does not know; or it is no longer
            what was carved from train, or left of it, when the artifact was made.
    """
    manifest = read_manifest(artifact, check_files=False)
    experiment = load_config(artifact)
    given = experiment.data if sources is None else sources
    known = {task: manifest.tasks[task] for source in given for task in source.task_columns}
    labels = {task: tuple(info["labels"]) for task, info in known.items()}
    tasks = {
        task: TaskConfig(kind=info["kind"], labels=labels[task]) for task, info in known.items()
    }
    if sources is None and experiment.training.shard_texts is not None and split != "test":
        corpus = _cut_corpus(experiment, split, limit)
    else:
        single: Split = "train" if sources is None else split
        corpus = read_corpus(given, tasks, experiment.seed, [split], single)
    if limit is not None:
        corpus.splits[split] = corpus.splits[split][:limit]
    if not corpus.splits[split]:
        if sources is None:
            problem = f"no labelled rows in {split}: choose another --split, or give --data"
            raise DataError("\n".join((problem, *corpus.notes)))
        where = ", ".join(source.title for source in sources)
        raise DataError(f"{where}: no labelled rows; give a file, or a folder with one for {split}")
    check_labels(corpus, tasks, labels)
    start = experiment.model_copy(update={"tasks": tasks, "init_from": str(artifact)})
    data = encode(corpus, start, labels)
    in_shards = split == "train" and experiment.training.shard_texts is not None
    if sources is not None or limit is not None or in_shards:
        return data
    return replace(data, notes=(*data.notes, *_changes(manifest, split, data)))


def _changes(manifest: Manifest, split: Split, data: Data) -> list[str]:
    """What to tell where a split is not the one that an artifact was made with.

    Raises:
        DataError: rows may have moved from train into what is carved from it, or back.
    """
    known = manifest.data.get(split, {})
    if known.get("fingerprint") in (None, data.keys[split]):
        return []
    changed = f"{split} has changed since the artifact was made"
    now = library_versions()
    certain = known["texts"] != len(data.splits[split]) or all(
        manifest.versions.get(name) == now.get(name) for name in TOKENISING
    )
    if certain and (data.carved or known.get("carved")):
        raise DataError(
            f"{changed}, so rows that it was trained on may be in validation now: put its sources "
            "back as they were, or score other files (train_jobs.evaluate --data)"
        )
    return [changed if certain else f"{changed}, or has the way it is tokenised"]


def _cut_corpus(experiment: Experiment, split: Split, limit: int | None) -> Corpus:
    """One split of an experiment with shards, as its training cut it; of train up to `limit`."""
    sharded = ShardedCorpus(experiment)
    shards, corpus = sharded.cut()
    if split == "train":
        numbers = range(shards.num_shards)
        rows = chain.from_iterable(sharded.read(shards, number) for number in numbers)
        corpus.splits["train"] = list(islice(rows, limit))
    skipped = dict(sharded.skipped)
    return replace(corpus, splits={split: corpus.splits[split]}, skipped=skipped)


def with_known_labels(experiment: Experiment, corpus: Corpus) -> Mapping[str, TaskConfig]:
    """The tasks, with the label order of an `init_from` head where that head can go on learning."""
    if experiment.init_from is None:
        return experiment.tasks
    known = read_manifest(fetch(experiment.init_from)).tasks
    fresh = resolve_labels(corpus, experiment.tasks)
    return {
        name: config.model_copy(update={"labels": tuple(known[name]["labels"])})
        if name in known and set(fresh[name]) <= set(known[name]["labels"])
        else config
        for name, config in experiment.tasks.items()
    }
