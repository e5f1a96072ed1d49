"""Whether both sides do the same work, and how much of the machine the encoder uses."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.serve.plan import OFFLINE
from benchmarks.serve.report import Values

LEAST_SHARE = 0.9
"""Of labels and entities. Runtimes of less precision may differ in a few."""
LEAST_COSINE = 0.99


def complete(reply: Any, count: int) -> list[Any]:
    """The predictions or vectors of a reply to so many texts.

    Raises:
        ValueError: it is of another shape, or some of what was asked is missing.
    """
    try:
        if reply.get("errors"):
            raise ValueError(f"tasks without an answer: {', '.join(reply['errors'])}")
        if "data" in reply:
            rows = [row["embedding"] for row in reply["data"]]
            read = [math.hypot(*row) for row in rows]
        else:
            rows = list(reply["results"])
            read = [[_essence(answer) for answer in row.values()] for row in rows]
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"an answer of another shape: {error!r}") from error
    if len(read) != count or not all(read):
        raise ValueError(f"{sum(map(bool, read))} answers to {count} texts")
    return rows


def agreement(answers: Mapping[str, Any]) -> dict[str, Any]:
    """How often a peer's label and entities are ours; the least cosine of vectors.

    Vectors are of "offline" and of "embeddings", which the name of an engine or server follows.
    """
    found: dict[str, Any] = {}
    for name, rows in answers.items():
        kind = name.rpartition(" ")[0]
        mine = f"{kind} ours".strip()
        ours = answers.get(mine)
        if rows is None or ours is None or name == mine:
            continue
        if kind:
            found[name] = {"least_cosine": min(map(_cosine, ours, rows))}
        else:
            pairs = list(zip(ours, rows, strict=True))
            found[name] = {
                task: sum(_essence(a.get(task)) == _essence(b.get(task)) for a, b in pairs)
                / len(pairs)
                for task in sorted({task for pair in pairs for row in pair for task in row})
            }
    return found


def disagreements(found: Mapping[str, Mapping[str, float]]) -> list[str]:
    """Where sides did other work, of what `agreement` found."""
    return [
        f"{name} does other work: {what} {value:.3f}, at least {least}"
        for name, values in found.items()
        for what, value in values.items()
        if value < (least := LEAST_COSINE if what == "least_cosine" else LEAST_SHARE)
    ]


def _cosine(left: Sequence[float], right: Sequence[float]) -> float:
    """0 where there is none to have: other numbers of dimensions, or no direction."""
    norms = math.hypot(*left) * math.hypot(*right)
    if len(left) != len(right) or not 0 < norms < math.inf:
        return 0.0
    return sum(a * b for a, b in zip(left, right, strict=True)) / norms


def _essence(answer: Any) -> Any:
    """An answer without its scores, which differ in the last digits; None if there is none."""
    if answer is None:
        return None
    if isinstance(answer, list):
        return [(entity["entity_group"], entity["start"], entity["end"]) for entity in answer]
    return answer["label"]


def utilisation(
    artifact: Path, lengths: Mapping[str, Sequence[int]], values: Values
) -> dict[str, float]:
    """What the encoder computes beside what matrix products in bf16 and int8 reach here.

    `ceiling` is how many texts a second the matrix units could encode if nothing else took any
    time: no server can answer more, whatever is asked of it. Empty if products were not measured.
    """
    config = json.loads((artifact / "encoder/config.json").read_text(encoding="utf-8"))
    products = values.get(("gemm", OFFLINE))
    if not products:
        return {}
    found = {f"gemm_{name}_gflops": _median(products, name) for name in products[0]}
    best = {k: max(v for n, v in found.items() if k in n) for k in ("bf16", "int8")}
    for name, counts in lengths.items():
        found[f"{name}_tokens"] = sum(counts) / len(counts)
        for kind, rate in best.items():
            found[f"{name}_ceiling_{kind}"] = rate / _gflop(config, counts)
    for engine in ("ours", "torch"):
        if samples := values.get((engine, OFFLINE)):
            rate = _gflop(config, lengths["offline"]) * _median(samples, "rate")
            found[f"{engine}_gflops"] = rate
            for kind in best:
                found[f"{engine}_share_of_{kind}"] = rate / best[kind]
    return found


def _gflop(config: Mapping[str, Any], lengths: Sequence[int]) -> float:
    """Of one text, on average: a token meets every weight, and in attention every token twice."""
    hidden = config["hidden_size"]
    weights = 4 * hidden * hidden + 2 * hidden * config["intermediate_size"]
    products = sum(n * weights + 2 * n * n * hidden for n in lengths) / len(lengths)
    return float(2 * config["num_hidden_layers"] * products / 1e9)


def _median(samples: Sequence[Mapping[str, float]], key: str) -> float:
    return median(sample[key] for sample in samples)
