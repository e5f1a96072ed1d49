"""A training corpus too large to hold: read, tokenised and shuffled a shard at a time.

Rows are known by blocks, runs of consecutive rows that can be read on their own. Each source's list
of blocks is put into random order and cut into n equal parts, and shard k takes part k of each, so
a shard is a sample of the whole corpus in the sources' own proportions. (Shuffling blocks, then
rows within a buffer, is how MosaicML's StreamingDataset and WebDataset order data that does not
fit.)
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import zip_longest

import numpy as np
from numpy.typing import NDArray

from mtl_core.config import Experiment, Split
from mtl_core.data.blocks import BlockReader, Blocks
from mtl_core.data.cache import load_arrays, load_split, save_arrays, save_split
from mtl_core.data.encoding import EncodedSplit, Labels, check_labels, encode_split
from mtl_core.data.examples import Corpus, Example, label_names
from mtl_core.data.formats import Column, Table
from mtl_core.data.sources import (
    Examples,
    check_columns,
    check_content,
    check_splits,
    labelled,
    read_tables,
    to_examples,
)
from mtl_core.encoder import tokenizer_of
from mtl_core.errors import DataError
from mtl_core.folders import cache_root
from mtl_core.world import World

BLOCKS_PER_SHARD = 200
MAX_BLOCK = 1000
MIN_BLOCKS = 20
"""Of a source that has the rows: validation is made of whole blocks."""
HELD_OUT: tuple[Split, ...] = ("validation", "test")


class ElsewhereError(DataError):
    """Another worker could not read its texts, and says why."""


@dataclass(frozen=True, eq=False)
class Shards:
    """How a training corpus is cut; kept as arrays that the processes of a machine map."""

    blocks: tuple[Blocks, ...]
    """Of each source."""
    drawn: tuple[NDArray[np.int64], ...]
    """Each source's blocks that train, in the order drawn."""
    num_shards: int

    @property
    def num_rows(self) -> int:
        """Training rows, including rows that may turn out to have no label."""
        return sum(self.rows(number) for number in range(self.num_shards))

    def rows(self, number: int) -> int:
        """How many rows a shard has."""
        shares = zip(self.blocks, self.share(number), strict=True)
        return sum(int(blocks.rows[indices].sum()) for blocks, indices in shares)

    def share(self, number: int) -> list[NDArray[np.int64]]:
        """One shard's blocks of each source, in the order that they stand in."""
        shares = []
        for drawn in self.drawn:
            first, end = (len(drawn) * n // self.num_shards for n in (number, number + 1))
            shares.append(np.sort(drawn[first:end]))
        return shares

    def fingerprint(self) -> str:
        """Changes with the rows and with how they are cut."""
        digest = hashlib.sha256(repr((self.num_shards, [b.version for b in self.blocks])).encode())
        for array in self._arrays().values():
            digest.update(array.tobytes())
        return digest.hexdigest()

    def _arrays(self) -> dict[str, NDArray[np.int64]]:
        arrays: dict[str, NDArray[np.int64]] = {}
        for number, (blocks, drawn) in enumerate(zip(self.blocks, self.drawn, strict=True)):
            found = {"rows": blocks.rows, "starts": blocks.starts, "drawn": drawn}
            arrays |= {f"{name}.{number}": array for name, array in found.items()}
        return arrays

    def save(self, key: str) -> None:
        """Keep it for other processes of this machine."""
        info = {
            "versions": [blocks.version for blocks in self.blocks],
            "count": self.num_shards,
        }
        save_arrays(cache_root() / "shards" / key, self._arrays(), info)

    @classmethod
    def load(cls, key: str) -> Shards | None:
        """What `save` wrote on this machine."""
        found = load_arrays(cache_root() / "shards" / key)
        if found is None:
            return None
        arrays, info = found
        versions = enumerate(info["versions"])
        blocks = [Blocks(arrays[f"rows.{n}"], arrays[f"starts.{n}"], v) for n, v in versions]
        drawn = [arrays[f"drawn.{number}"] for number in range(len(blocks))]
        return cls(tuple(blocks), tuple(drawn), info["count"])


class ShardedCorpus:
    """The sources of an experiment with `training.shard_texts`."""

    def __init__(self, experiment: Experiment) -> None:
        self.experiment = experiment
        self.sources = experiment.data
        self.readers = [BlockReader(source) for source in self.sources]
        self.columns: list[set[Column]] = [set() for _ in self.sources]
        self.declared: list[Collection[str]] = []
        """Tasks whose labels each source declares, once it is cut."""
        self.carved: list[Example] = []
        """What the cut took from train for validation."""
        self.skipped: Counter[str] = Counter()
        """Unreadable rows passed over so far, per source."""

    def cut(self) -> tuple[Shards, Corpus]:
        """Find the blocks and draw their order; also the held-out splits with their labels.

        A source without validation gives its first blocks for it.

        Raises:
            DataError: a source cannot be read, or not by parts.
        """
        size = self.experiment.training.shard_texts
        assert size is not None
        block = max(1, min(MAX_BLOCK, size // BLOCKS_PER_SHARD))
        found, drawn = [reader.find(block) for reader in self.readers], []
        notes: list[str] = []
        count = -(-sum(int(blocks.rows.sum()) for blocks in found) // size)
        corpus = Corpus({name: [] for name in HELD_OUT}, {}, {})
        for number, (source, reader) in enumerate(zip(self.sources, self.readers, strict=True)):
            largest = found[number].rows.max(initial=0)
            if largest > size:
                fix = f"write it with row groups of {block}, or raise training.shard_texts"
                raise DataError(f"{source.title}: a row group has {largest:,} rows; {fix}")
            least = max(2 * count, MIN_BLOCKS)  # some for every shard, validation apart
            if len(found[number].rows) < least:
                most = int(found[number].rows.sum()) // least
                found[number] = reader.finer(found[number], max(1, most))
            blocks = found[number]
            order = np.random.default_rng([self.experiment.seed, number])
            indices = order.permutation(len(blocks.rows))
            tables, labels = read_tables(source, self.experiment.tasks, HELD_OUT, "train")
            notes += check_splits(source, tables)
            held_out = self._to_examples(number, tables)
            examples = {split: labelled(rows) for split, rows in held_out.items()}
            if not examples.get("validation"):
                taken = max(1, round(len(indices) * source.validation_fraction))
                carved = list(self._examples(number, blocks, indices[:taken]))
                examples["validation"] = carved
                self.carved += carved
                indices = indices[taken:]
            if not len(indices):
                raise DataError(f"{source.title}: too few rows to cut; leave shard_texts out")
            for name, rows in examples.items():
                corpus.splits[name] += rows
            labels = labels or reader.labels(self.experiment.tasks)
            self.declared.append(labels)
            for task, names in labels.items():
                known = corpus.labels.get(task, ())
                corpus.labels[task] = tuple(dict.fromkeys(known + names))
            drawn.append(indices)
        total = sum(int(b.rows[i].sum()) for b, i in zip(found, drawn, strict=True))
        count = min(-(-total // size), max(map(len, drawn)))
        corpus = replace(
            corpus, skipped=dict(self.skipped), notes=tuple(notes), carved=bool(self.carved)
        )
        return Shards(tuple(found), tuple(drawn), count), corpus

    def _to_examples(self, number: int, tables: Mapping[Split, Table]) -> Examples:
        """Tables' rows, labelled or not; such as cannot be read are counted where that is asked."""
        source = self.sources[number]
        examples, skipped = to_examples(source, self.experiment.tasks, tables)
        if skipped:
            self.skipped[source.title] += skipped
        return examples

    def _examples(self, number: int, blocks: Blocks, indices: Iterable[int]) -> Iterator[Example]:
        """The labelled rows of one source's blocks."""
        source, reader = self.sources[number], self.readers[number]
        for index in indices:
            table = reader.read(blocks, index)
            check_content(source, table)
            self.columns[number].update(table.columns)
            yield from labelled(self._to_examples(number, {"train": table})["train"])

    def read(self, shards: Shards, number: int) -> list[Example]:
        """The labelled rows of a shard."""
        return [
            example
            for place, indices in enumerate(shards.share(number))
            for example in self._examples(place, shards.blocks[place], indices)
        ]

    def one_of_each_label(self, shards: Shards) -> list[Example]:
        """Examples that show every label of train, as it was before validation was carved from it.

        Where all tasks' labels are configured, or declared by every source, as many as show one of
        each task; else the whole corpus is gone through for them, a block at a time.
        """
        tasks = self.experiment.tasks
        read = {
            task
            for source, declared in zip(self.sources, self.declared, strict=True)
            for task in source.task_columns
            if task not in declared and not tasks[task].labels
        }
        seen: dict[str, set[str]] = {task: set() for task in tasks}
        found = list(self.carved)
        in_turn = zip_longest(*shards.drawn)
        for place, index in ((p, i) for turn in in_turn for p, i in enumerate(turn)):
            if index is None:
                continue
            for example in self._examples(place, shards.blocks[place], [index]):
                names = {task: label_names(target) for task, target in example.targets.items()}
                if any(names[task] - seen[task] for task in names):
                    found.append(example)
                for task in names:
                    seen[task] |= names[task]
            if all(seen.values()) and not read:
                return found
        if not all(seen.values()):
            for source, columns in zip(self.sources, self.columns, strict=True):
                check_columns(source, {"train": Table(source.title, tuple(columns), [])})
        return found


class Unsharded:
    """All training texts as the one part of every epoch."""

    def __init__(self, split: EncodedSplit) -> None:
        self.split = split
        self.sizes = [len(split)]

    def order(self, epoch: int) -> list[int]:
        return [0]

    def open(self, number: int, following: int | None) -> EncodedSplit:
        return self.split

    def close(self) -> None:
        pass


class ShardLoader:
    """Gives ranks their shards: the first rank of a node makes them, one ahead of the training."""

    def __init__(
        self, experiment: Experiment, shards: Shards, key: str, labels: Labels, world: World
    ) -> None:
        self.experiment, self.shards, self.key = experiment, shards, key
        self.labels, self.world = labels, world
        self.sizes = [shards.rows(number) for number in range(shards.num_shards)]
        self.corpus = ShardedCorpus(experiment)
        self.pool = ThreadPoolExecutor(1, "shards")
        self.making: dict[int, Future[None]] = {}

    def order(self, epoch: int) -> list[int]:
        """The shards of an epoch; the first goes through them as they were drawn."""
        if epoch == 0:
            return list(range(self.shards.num_shards))
        random = np.random.default_rng([self.experiment.seed, epoch])
        numbers: list[int] = random.permutation(self.shards.num_shards).tolist()
        return numbers

    def open(self, number: int, following: int | None) -> EncodedSplit:
        """A shard, mapped from disk, while the following one is being made; all ranks together.

        Raises:
            DataError: rows that cannot be read, or labels that are not known.
            ConfigError: a variable of a path is not set here.
            EncoderError, ArtifactError: the tokenizer cannot be had.
            OSError: the disk is full.
        """
        failure: Exception | None = None
        split = None
        if self.world.local_rank == 0:
            try:
                self._make(number).result()
            except Exception as error:  # whatever it is, the others must not wait for this rank
                failure = error
        if self.world.any(failure is not None):
            raise failure or ElsewhereError("another worker could not read its texts")
        self.making.pop(number, None)
        if self.world.local_rank == 0 and following is not None:
            self._make(following)
        split = load_split(f"{self.key}-{number}")
        if split is None:
            raise OSError(f"{cache_root()}: shard {number + 1} was deleted while it was in use")
        return split

    def _make(self, number: int) -> Future[None]:
        if number not in self.making:
            self.making[number] = self.pool.submit(self._encode, number)
        return self.making[number]

    def _encode(self, number: int) -> None:
        key = f"{self.key}-{number}"
        if load_split(key) is not None:
            return
        examples = self.corpus.read(self.shards, number)
        if not examples:
            raise DataError(f"shard {number + 1} of {self.shards.num_shards} has no labelled row")
        tasks = self.experiment.tasks
        check_labels(Corpus({"train": examples}, {}, {}), tasks, self.labels)
        tokenizer = tokenizer_of(self.experiment)
        window = self.experiment.encoder.max_length
        save_split(key, encode_split(examples, tasks, self.labels, tokenizer, window))

    def close(self) -> None:
        """Make no more."""
        self.pool.shutdown(wait=False, cancel_futures=True)
