"""What an artifact scores through the server, beside what it scores offline.

    python -m benchmarks.serve.scores --artifact runs/demo/artifact

sends the artifact's test split through /v1/predict, once to a server in fp32 and once to one that
chooses its runtime itself, and counts what comes back over words and labels. Ends with status 1
unless fp32 gives the offline counts exactly and the other runtime each task's metric within 0.2
points, and unless seqeval finds the same F1 in what was served.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.serve import servers
from mtl_core import metrics
from mtl_core.artifact import load_config, load_model, read_manifest
from mtl_core.command import run_command
from mtl_core.data.encoding import EncodedSplit
from mtl_core.data.examples import Example
from mtl_core.data.prepare import prepare_scored
from mtl_core.data.sources import read_corpus
from mtl_core.data.tags import tag_names
from mtl_core.evaluation import Evaluation, evaluate

TOLERANCE = 0.2
"""Points that the fast runtime may differ by."""
TEXTS_A_REQUEST = 32
CONNECTIONS = 4
RUNTIMES = {"ours_fp32": 0.0, "ours": TOLERANCE}


@dataclass(frozen=True)
class Served:
    """What a server's answers come to."""

    runtime: str
    counts: Mapping[str, metrics.Counts]
    seqeval: Mapping[str, float]
    """F1 of token tasks, counted by seqeval."""


@dataclass(frozen=True)
class Scored:
    """A labelled split, as texts for the server and as arrays for counting."""

    examples: Sequence[Example]
    encoded: EncodedSplit
    kinds: Mapping[str, Any]
    labels: Mapping[str, tuple[str, ...]]

    @classmethod
    def load(cls, artifact: Path) -> Scored:
        found = prepare_scored(artifact, "test")
        labels, encoded = found.labels, found.splits["test"]
        experiment, manifest = load_config(artifact), read_manifest(artifact)
        tasks = {
            task: config.model_copy(update={"labels": labels[task]})
            for task, config in experiment.tasks.items()
        }
        corpus = read_corpus(experiment.data, tasks, experiment.seed, ["test"])
        kinds = {task: manifest.tasks[task]["kind"] for task in labels}
        return cls(corpus.splits["test"], encoded, kinds, labels)

    def rows(self, task: str) -> NDArray[np.int64]:
        """Texts that carry this task's label."""
        return np.flatnonzero(self.encoded.present[task])

    def scores(self, counts: Mapping[str, metrics.Counts]) -> dict[str, dict[str, float]]:
        return {t: metrics.scores(self.kinds[t], c) for t, c in counts.items()}

    def count(self, runtime: str, answers: Sequence[Mapping[str, Any]]) -> Served:
        """Count answers, in the order of the split's texts."""
        counts, by_seqeval = {}, {}
        for task, kind in self.kinds.items():
            counts[task] = metrics.empty_counts(kind, len(self.labels[task]))
            given = [answers[row][task] for row in self.rows(task)]
            if kind == "token_classification":
                pairs = self._words(task, given)
                for gold, found in pairs:
                    metrics.count_entities(counts[task], gold, found)
                by_seqeval[task] = seqeval_f1(pairs, self.labels[task])
            else:
                self._labels(task, kind, given, counts[task])
        return Served(runtime, counts, by_seqeval)

    def _labels(self, task: str, kind: str, given: Sequence[Any], counts: metrics.Counts) -> None:
        gold = self.encoded.targets[task][self.rows(task)].astype(np.int64)
        names = self.labels[task]
        if kind == "classification":
            found = np.array([names.index(answer["label"]) for answer in given])
            metrics.count_classes(counts, gold, found)
        else:
            chosen = [[name in answer["labels"] for name in names] for answer in given]
            metrics.count_multilabel(counts, gold, np.array(chosen))

    def _words(self, task: str, given: Sequence[Any]) -> list[tuple[metrics.Counts, Any]]:
        """Gold and served word tags of each text."""
        pairs = []
        for row, entities in zip(self.rows(task), given, strict=True):
            starts = self.encoded.word_starts
            gold = self.encoded.word_tags[task][starts[row] : starts[row + 1]].astype(np.int64)
            found = word_tags(entities, self.examples[row].words, self.labels[task])
            pairs.append((gold, found))
        return pairs


def word_tags(
    entities: Sequence[Mapping[str, Any]], words: Sequence[tuple[int, int]], types: Sequence[str]
) -> NDArray[np.int64]:
    """Served entities seen from words: each takes the entity that its first character is in."""
    tags = np.zeros(len(words), dtype=np.int64)
    previous = None
    for number, (begin, _) in enumerate(words):
        inside = [e for e in entities if e["start"] <= begin < e["end"]]
        entity = inside[0] if inside else None
        if entity is not None:
            continues = entity is previous
            tags[number] = types.index(entity["entity_group"]) + 1 + continues * len(types)
        previous = entity
    return tags


def seqeval_f1(pairs: Sequence[tuple[Any, Any]], types: Sequence[str]) -> float:
    from seqeval.metrics import f1_score
    from seqeval.scheme import IOB2

    names = tag_names(types)
    gold, found = (
        [[names[tag] for tag in side] for side in sides] for sides in zip(*pairs, strict=True)
    )
    return float(f1_score(gold, found, mode="strict", scheme=IOB2, zero_division=0))


def ask(name: str, artifact: Path, scored: Scored, folder: Path) -> Served:
    """Start a server, send it every text, stop it."""
    texts = [example.text for example in scored.examples]
    lists = [texts[n : n + TEXTS_A_REQUEST] for n in range(0, len(texts), TEXTS_A_REQUEST)]
    with servers.running(name, artifact, folder) as server:

        def post(inputs: list[str]) -> list[Any]:
            body = json.dumps({"inputs": inputs, "truncate": True}).encode()
            rows: list[Any] = server.post("/v1/predict", body)["results"]
            return rows

        runtime = server.get("/info")["runtime"]
        with ThreadPoolExecutor(CONNECTIONS) as threads:
            answers = [row for rows in threads.map(post, lists) for row in rows]
    return scored.count(runtime, answers)


def complaints(scored: Scored, offline: Evaluation, served: Served, tolerance: float) -> list[str]:
    """What is not as it should be."""
    found = []
    before, after = offline.scores(), scored.scores(served.counts)
    for task, kind in scored.kinds.items():
        name = metrics.PRIMARY[kind]
        points = 100 * abs(before[task][name] - after[task][name])
        if tolerance == 0 and not np.array_equal(offline.counts[task], served.counts[task]):
            found.append(f"{served.runtime}: {task}: the counts are not the offline ones")
        if points > tolerance:
            found.append(f"{served.runtime}: {task} {name} is {points:.2f} points from offline")
        if task in served.seqeval and abs(served.seqeval[task] - after[task]["f1"]) > 1e-9:
            found.append(f"{served.runtime}: {task}: seqeval has F1 {served.seqeval[task]:.6f}")
    return found


def show(scored: Scored, offline: Evaluation, results: Sequence[Served]) -> None:
    """A row for each metric: offline, then each runtime that served."""
    columns = [offline.scores(), *(scored.scores(served.counts) for served in results)]
    names = " | ".join(f"served, {served.runtime}" for served in results)
    print(f"| task | metric | offline, torch-fp32 | {names} |")
    print("|---|---|---|" + "---|" * len(results))
    for task, values in columns[0].items():
        for metric in values:
            row = " | ".join(f"{100 * column[task][metric]:.2f}" for column in columns)
            print(f"| {task} | {metric} | {row} |")
        if task in results[0].seqeval:
            row = " | ".join(f"{100 * served.seqeval[task]:.2f}" for served in results)
            print(f"| {task} | f1 by seqeval | | {row} |")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--artifact", type=Path, required=True, help="artifact folder")
    artifact = parser.parse_args().artifact.resolve()
    scored = Scored.load(artifact)
    print(f"{len(scored.examples)} texts, {scored.encoded.num_truncated} beyond the model's window")
    offline = evaluate(load_model(artifact), scored.encoded, tasks=list(scored.labels))
    with tempfile.TemporaryDirectory(prefix="serve-scores-") as folder:
        results = [ask(name, artifact, scored, Path(folder)) for name in RUNTIMES]
    show(scored, offline, results)
    wrong = [
        line
        for served, tolerance in zip(results, RUNTIMES.values(), strict=True)
        for line in complaints(scored, offline, served, tolerance)
    ]
    print("\n".join(wrong) or "as it should be")
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    run_command(main)
