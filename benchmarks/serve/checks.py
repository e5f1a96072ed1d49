"""Whether both sides do the same work, and how much of the machine the encoder uses."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.serve.plan import OFFLINE
from benchmarks.serve.report import Values


def agreement(answers: Mapping[str, Any]) -> dict[str, Any]:
    """How often a peer's label and entities are ours; the least cosine of offline vectors."""
    found: dict[str, Any] = {}
    for name, rows in answers.items():
        ours = answers.get("offline ours" if name.startswith(OFFLINE) else "ours")
        if rows is None or ours is None or name in ("ours", "offline ours"):
            continue
        if name.startswith(OFFLINE):
            found[name] = {"least_cosine": min(map(_dot, ours, rows))}
        else:
            pairs = list(zip(ours, rows, strict=True))
            found[name] = {
                task: sum(_essence(a[task]) == _essence(b[task]) for a, b in pairs) / len(pairs)
                for task in ours[0]
            }
    return found


def _dot(left: Sequence[float], right: Sequence[float]) -> float:
    return sum(a * b for a, b in zip(left, right, strict=True))


def _essence(answer: Any) -> Any:
    """An answer without its scores, which differ in the last digits."""
    if isinstance(answer, list):
        return [(entity["entity_group"], entity["start"], entity["end"]) for entity in answer]
    return answer["label"]


def utilisation(artifact: Path, lengths: Sequence[int], values: Values) -> dict[str, float]:
    """What the offline encoder computes beside what a bf16 matrix product reaches here."""
    config = json.loads((artifact / "encoder/config.json").read_text(encoding="utf-8"))
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    # A token meets every weight of a layer once, and every other token twice, in attention.
    weights = 4 * hidden * hidden + 2 * hidden * inner
    per_text = sum(n * weights + 2 * n * n * hidden for n in lengths) / len(lengths)
    flops = 2 * config["num_hidden_layers"] * per_text / 1e9
    products = values[("gemm", OFFLINE)]
    found = {f"gemm_{k}_gflops": _median(products, k) for k in ("square", "minilm")}
    found["offline_mean_tokens"] = sum(lengths) / len(lengths)
    for engine in ("ours", "torch"):
        if samples := values.get((engine, OFFLINE)):
            found[f"{engine}_gflops"] = flops * _median(samples, "rate")
            best = max(found["gemm_square_gflops"], found["gemm_minilm_gflops"])
            found[f"{engine}_share_of_gemm"] = found[f"{engine}_gflops"] / best
    return found


def _median(samples: Sequence[Mapping[str, float]], key: str) -> float:
    return median(sample[key] for sample in samples)
