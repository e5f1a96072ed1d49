"""What is measured, and what was asked of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Kind = Literal["rate", "p50", "cost"]


@dataclass(frozen=True)
class Load:
    """What one measurement sends."""

    route: str
    bodies: Literal["sentence", "list", "embed"]
    connections: int


LOADS = {
    "predict": Load("/v1/predict", "sentence", 32),
    "predict_alone": Load("/v1/predict", "sentence", 1),
    # Enough to keep both sides busy; 32 would be a thousand sentences at once.
    "predict_list": Load("/v1/predict", "list", 4),
    "embed": Load("/v1/embeddings", "embed", 32),
}
OFFLINE = "offline"


@dataclass(frozen=True)
class Row:
    """One line of the table: two sides under one load."""

    title: str
    load: str
    ours: str
    peer: str
    kind: Kind
    asked: float | None
    """rate: times faster, at least. p50: times faster, at least. cost: share lost, at most."""


ROWS = {
    "predict": Row("predict, 32 connections", "predict", "ours", "fastapi", "rate", 10.0),
    "predict-ray": Row("predict, 32 connections", "predict", "ours", "ray_serve", "rate", 10.0),
    "predict-bf16": Row("predict, 32 connections", "predict", "ours", "fastapi_bf16", "rate", None),
    "predict-processes": Row(
        "predict, 32 connections", "predict", "ours", "fastapi_processes", "rate", None
    ),
    "latency": Row("predict, 1 connection", "predict_alone", "ours", "fastapi_latency", "p50", 1.0),
    "latency-bf16": Row(
        "predict, 1 connection", "predict_alone", "ours", "fastapi_latency_bf16", "p50", None
    ),
    "latency-in-process": Row(
        "predict, 1 connection, heads in the encoder's process",
        "predict_alone",
        "ours_in_process",
        "fastapi_latency_bf16",
        "p50",
        None,
    ),
    "lists": Row("predict, 32 sentences a request", "predict_list", "ours", "fastapi", "rate", 3.0),
    "embeddings": Row("embeddings, 32 connections", "embed", "ours", "infinity", "rate", 4.0),
    "heads": Row(
        "separate head deployments, 32 connections",
        "predict",
        "ours",
        "ours_in_process",
        "cost",
        0.25,
    ),
    "offline": Row("offline encode", OFFLINE, "ours", "torch", "rate", 4.0),
    "offline-openvino": Row("offline encode", OFFLINE, "ours", "openvino", "rate", None),
    "offline-onnx": Row("offline encode", OFFLINE, "ours", "onnx", "rate", None),
}


def schedule(rows: Sequence[Row], offline: bool) -> dict[str, list[str]]:
    """Server or engine → the loads it takes in a round, in the order of the rows."""
    wanted: dict[str, list[str]] = {}
    for row in rows:
        if (row.load == OFFLINE) != offline:
            continue
        for side in (row.ours, row.peer):
            loads = wanted.setdefault(side, [])
            if row.load not in loads:
                loads.append(row.load)
    return wanted
